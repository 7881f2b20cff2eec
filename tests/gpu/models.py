"""Models with random weights of any shape, the same numbers on every device and in every width; no files."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from predictor.model.config import GPT2Config, parse_config
from predictor.model.gpt2 import GPT2, Rows, Span

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")


def shape(
    layers: int = 4, width: int = 768, heads: int = 12, context: int = 1024, vocabulary: int = 5003
) -> GPT2Config:
    return parse_config(
        {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context, "vocab_size": vocabulary}
    )


def random_weights(on: torch.device = CPU) -> Callable[[str, tuple[int, ...]], Tensor]:
    """A `Fetch` of weights as GPT-2 begins with, drawn `on` a device (large shapes are slow on the CPU)."""

    def fetch(name: str, size: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(on).manual_seed(zlib.crc32(name.encode()))
        numbers = torch.randn(size, generator=generator, device=on) * 0.02
        return numbers + 1 if "ln_" in name and name.endswith("weight") else numbers

    return fetch


def new_model(config: GPT2Config, dtype: torch.dtype, device: torch.device = DEVICE) -> GPT2:
    return GPT2(config, random_weights(), dtype, device)


def token_ids(length: int, config: GPT2Config, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocabulary, (length,), generator=generator).tolist()


def compute(model: GPT2, kv: Tensor, sequences: list[tuple[list[int], int, int]]) -> Tensor:
    """One eager step of several sequences, each (new tokens, position of the first, first slot).

    The logits of every row, sequence after sequence.
    """
    ids: list[int] = []
    spans: list[Span] = []
    for tokens, position, first_slot in sequences:
        spans.append(Span(len(ids), len(tokens), first_slot, position + len(tokens)))
        ids += tokens
    return model.forward(Rows(ids, spans, list(range(len(ids)))), kv)
