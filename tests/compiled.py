"""What the tests of the CPU kernels share: which instruction sets there are, models over them, and steps of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from predictor.model.config import parse_config
from predictor.model.cpu.gpt2 import CPUGPT2
from predictor.model.cpu.library import TOKENS_PER_BLOCK, instruction_set
from predictor.model.gpt2 import GPT2, Fetch, Rows, Span
from tests.conftest import left_out

CPU = torch.device("cpu")
WIDTHS = ("float32", "bfloat16", "int8")


def _instruction_sets() -> list[str]:
    names = ["generic", "avx2", "avx512", "avx512_bf16"]
    try:
        return [name for name in names if instruction_set(name) is not None]
    except OSError:  # not compiled: `compiled` leaves the tests out
        return names


INSTRUCTION_SETS = _instruction_sets()

each_instruction_set = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
each_width = pytest.mark.parametrize("width", WIDTHS)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """To be imported by each module whose tests need the library."""
    try:
        instruction_set()
    except OSError as error:
        left_out(str(error))


def fetch_of(model: GPT2LMHeadModel, **changes: Tensor) -> Fetch:
    """The tensors of a transformers model by our names; `changes` instead of some, with "." spelled "__"."""
    tensors = model.state_dict() | {name.replace("__", "."): tensor for name, tensor in changes.items()}

    def fetch(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = tensors[name if name in tensors else f"transformer.{name}"]
        assert tuple(tensor.shape) == shape
        return tensor

    return fetch


def compile_model(
    model: GPT2LMHeadModel, width: str = "float32", instruction_set: str = "", threads: int = 1, **changes: Tensor
) -> CPUGPT2:
    return CPUGPT2(parse_config(model.config.to_dict()), fetch_of(model, **changes), width, threads, instruction_set)


class Part(NamedTuple):
    """What one step computes of one sequence: `count` of its ids from `first` on, its slots from `first_slot` on."""

    ids: Tensor
    first: int
    count: int
    first_slot: int


def rows_of(parts: list[Part]) -> Rows:
    """The rows of all parts, all of them wanted."""
    spans: list[Span] = []
    ids: list[int] = []
    for part in parts:
        spans.append(Span(len(ids), part.count, part.first_slot, part.first + part.count))
        ids += part.ids[part.first : part.first + part.count].tolist()
    return Rows(ids, spans, list(range(len(ids))))


def step(model: GPT2 | CPUGPT2, kv: Tensor, parts: list[Part]) -> list[Tensor]:
    """The logits [count, V] of each part."""
    return list(model.forward(rows_of(parts), kv).clone().split([part.count for part in parts]))


def spoilt_kv(model: GPT2 | CPUGPT2, slots: int) -> Tensor:
    """Memory for keys and values that holds NaN wherever nothing was written."""
    return model.new_kv(slots).fill_(torch.nan)


def run(model: GPT2 | CPUGPT2, ids: Tensor, chunks: list[int], first_slot: int = 0, kv: Tensor | None = None) -> Tensor:
    """All logits [T, V] of one sequence, computed alone in chunks of the given sizes."""
    if kv is None:
        kv = spoilt_kv(model, first_slot + in_blocks(len(ids)))
    logits, first = [], 0
    for count in chunks:
        logits += step(model, kv, [Part(ids, first, count, first_slot)])
        first += count
    assert first == len(ids)
    return torch.cat(logits)


def in_blocks(tokens: int) -> int:
    """Slots of the whole blocks that hold so many tokens."""
    return -(-tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def prompt(vocabulary: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, which tell NaN from NaN and 0 from -0."""
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.itemsize])


def same_bits(a: Tensor, b: Any) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))
