"""A window of token ids in, its logits out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import GPT2LMHeadModel

from predictor.checkpoints.load import Progress, check_memory, load_gpt2, load_model, read_config
from predictor.errors import CheckpointError
from predictor.evaluation.options import ReferenceName
from predictor.model.config import Width, parse_config
from predictor.model.cpu.threads import default_threads
from predictor.model.gpt2 import Rows, Span


class WindowModel(Protocol):
    """What a comparison needs of a model."""

    def logits(self, ids: list[int], rows: int) -> Iterator[Tensor]:
        """Yield the fp32 logits [rows, V] behind each token of one window, `rows` tokens at a time, in order."""


def open_candidate(folder: Path, dtype: Width, device: torch.device, progress: Progress) -> WindowModel:
    """The model that serves `dtype` on `device`."""
    config = parse_config(read_config(folder))
    kv_bytes = config.context * config.kv_bytes_per_token(4)
    model = load_model(folder, dtype, device, threads=default_threads(), kv_bytes=kv_bytes, progress=progress)
    return RowsModel(model, config.context)


def open_reference(name: ReferenceName, folder: Path, device: torch.device, progress: Progress) -> WindowModel:
    """The same checkpoint in float32: our own torch path, or transformers' GPT-2 as an outside oracle."""
    if name == "transformers":
        return TransformersModel(folder, device)
    config = parse_config(read_config(folder))
    kv_bytes = config.context * config.kv_bytes_per_token(4)
    model = load_gpt2(folder, torch.float32, device, kv_bytes=kv_bytes, progress=progress)
    return RowsModel(model, config.context)


class Forward(Protocol):
    """A forward pass over rows, as predictor.model.gpt2.GPT2 has it."""

    slot_multiple: int

    def new_kv(self, slots: int) -> Tensor: ...
    def forward(self, rows: Rows, kv: Tensor) -> Tensor: ...


class RowsModel:
    """Our forward pass, as the engine calls it: a window is the prompt of one sequence, prefilled in chunks."""

    def __init__(self, model: Forward, context: int) -> None:
        self._model = model
        self._kv = model.new_kv(context + -context % model.slot_multiple)

    def logits(self, ids: list[int], rows: int) -> Iterator[Tensor]:
        for first in range(0, len(ids), rows):
            token_ids = ids[first : first + rows]
            count = len(token_ids)
            span = Span(first_row=0, rows=count, first_slot=0, context=first + count)
            yield self._model.forward(Rows(token_ids, [span], list(range(count))), self._kv)


class TransformersModel:
    """transformers' GPT2LMHeadModel in float32: the window in one pass, the output matrix `rows` rows at a time."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        check_memory(parse_config(read_config(folder)), torch.float32, device, kv_bytes=0)
        # transformers 4 and 5 spell it differently, and this package runs beside both.
        keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        load: Any = GPT2LMHeadModel.from_pretrained  # its types do not know a keyword whose name varies
        try:
            model, found = load(folder, output_loading_info=True, trust_remote_code=False, **{keyword: torch.float32})
        except Exception as error:  # over a damaged file every library below raises what it likes
            raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
        if found["missing_keys"]:  # it would go on with random numbers in their place
            raise CheckpointError(f"the checkpoint lacks the tensors {', '.join(sorted(found['missing_keys']))}")
        self._model = model.to(device).eval()

    def logits(self, ids: list[int], rows: int) -> Iterator[Tensor]:
        window = torch.tensor([ids], dtype=torch.int64, device=self._model.device)
        hidden: Tensor = self._model.transformer(window, use_cache=False).last_hidden_state[0]
        for block in hidden.split(rows):
            yield self._model.lm_head(block)
