"""Decode steps as CUDA graphs: launched at once, without waiting for the step before.

A step of B sequences replays the graph of the smallest bucket that holds B rows; the rest is padding, which attends to
itself alone in a scratch slot. What differs from step to step reaches the device in one copy. A row's token may be the
sample that the step before is still to draw, so the host reads the tokens of a step while the next one runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from predictor.model.cuda.attention import DecodeAttention
from predictor.model.cuda.library import Kernels
from predictor.model.cuda.sampling import METHODS, Draw, Method, choose
from predictor.model.gpt2 import GPT2

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One sequence's next token: compute `token_id` at `position`, then draw."""

    token_id: int
    position: int
    first_slot: int
    draw: Draw
    source: int | None = None  # instead of token_id: the token that this row of the last step draws


class Launched:
    """The tokens of a step that runs, or has run."""

    def __init__(self, tokens: Tensor, logits: Tensor, done: torch.cuda.Event | None) -> None:
        """logits [B, V] fp32, on the device and valid until the next launch, for rows that are drawn elsewhere."""
        self.logits = logits
        self._tokens, self._done = tokens, done

    def result(self) -> list[int]:
        """Wait for the step: a token per row, -1 where no logit was finite; of no meaning for rows drawn elsewhere."""
        if self._done is not None:
            self._done.synchronize()
        return self._tokens.tolist()


class _Field(IntEnum):
    """The rows of the table that tells the device of a step."""

    TOKEN_ID = 0
    SOURCE = 1
    POSITION = 2
    FIRST_SLOT = 3
    METHOD = 4
    SEED = 5
    COUNT = 6
    TOP_K = 7
    TEMPERATURE = 8  # the bits of an fp64, as the next
    TOP_P = 9


class _Table:
    """[fields, rows] of 8 bytes each: two on the host, written in turn, and one on the device."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        shape = (len(_Field), rows)
        self._vocabulary, self._turn = vocabulary, 0
        # Pinned memory, because only from there does a copy not wait.
        self._host = [torch.zeros(shape, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(shape, dtype=torch.int64, device=device)

    def send(self, rows: Sequence[DecodeRow]) -> None:
        """Fill the table; as many rows as it has."""
        self._turn = 1 - self._turn
        host = self._host[self._turn]
        integers = host.numpy()
        integers[_Field.TOKEN_ID] = [row.token_id for row in rows]
        integers[_Field.SOURCE] = [-1 if row.source is None else row.source for row in rows]
        integers[_Field.POSITION] = [row.position for row in rows]
        integers[_Field.FIRST_SLOT] = [row.first_slot for row in rows]
        integers[_Field.METHOD] = [row.draw.method(self._vocabulary) for row in rows]
        integers.view(np.uint64)[_Field.SEED] = np.array([row.draw.seed for row in rows], dtype=np.uint64)
        integers[_Field.COUNT] = [row.draw.count for row in rows]
        integers[_Field.TOP_K] = [row.draw.top_k for row in rows]
        integers.view(np.float64)[_Field.TEMPERATURE] = [row.draw.temperature for row in rows]
        integers.view(np.float64)[_Field.TOP_P] = [row.draw.top_p for row in rows]
        self._device.copy_(host, non_blocking=True)

    def __getitem__(self, field: _Field) -> Tensor:
        """The device's row of a field: [rows] int64 or fp64."""
        row = self._device[field]
        return row.view(torch.float64) if field in (_Field.TEMPERATURE, _Field.TOP_P) else row


@dataclass(frozen=True, slots=True)
class _Bucket:
    """The table and the recorded work of steps of up to so many rows."""

    table: _Table
    forward: Callable[[], None]
    samplers: dict[Method, Callable[[], None]]


class DecodeSteps:
    """Launches decode steps over one KV memory, one after the other. At most two are under way at a time."""

    def __init__(self, model: GPT2, kernels: Kernels, kv: Tensor, *, most_rows: int, scratch_slot: int) -> None:
        """Record the steps of every bucket. `scratch_slot`: one that no sequence owns, for padding."""
        V, device = model.config.vocabulary, model.device
        self._model, self._kernels, self._kv, self._vocabulary = model, kernels, kv, V
        self._padding = DecodeRow(0, 0, scratch_slot, Draw(elsewhere=True))
        self._on_gpu = device.type == "cuda"
        self._tokens = torch.zeros(most_rows, dtype=torch.int64, device=device)  # what the last step drew
        self._finite = torch.zeros(most_rows, dtype=torch.bool, device=device)
        self._logits = torch.zeros((most_rows, V), dtype=torch.float32, device=device)
        self._answers = [torch.zeros(most_rows, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)]
        self._turn = 0
        self._under_way: list[Launched | None] = [None, None]
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        began = time.perf_counter()
        # The largest first: the smaller ones find room in the memory that it needed for its intermediate results.
        self._buckets = {rows: self._new_bucket(rows) for rows in reversed(bucket_sizes(most_rows))}
        if self._on_gpu:
            graphs = len(self._buckets) * (1 + len(METHODS))
            logger.info("%d CUDA graphs, for up to %d rows, in %.1f s", graphs, most_rows, time.perf_counter() - began)

    def launch(self, rows: Sequence[DecodeRow]) -> Launched:
        """Start a step and return before it has run. Each row's sequence must own its slot `first_slot + position`."""
        size = min(size for size in self._buckets if size >= len(rows))
        bucket = self._buckets[size]
        self._wait_for_the_last_but_one()
        with self._on_device():
            bucket.table.send([*rows, *[self._padding] * (size - len(rows))])
            bucket.forward()
            for method in {row.draw.method(self._vocabulary) for row in rows} - {Method.ELSEWHERE}:
                bucket.samplers[method]()
            return self._answer(len(rows))

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Launched:
        """Start drawing from logits [B, V] that were computed otherwise (a step with prefill)."""
        B = len(draws)
        self._wait_for_the_last_but_one()
        with self._on_device(), torch.inference_mode():
            table = _Table(B, self._vocabulary, self._logits.device)
            table.send([DecodeRow(0, 0, 0, draw) for draw in draws])
            self._take_logits(logits, B)
            for method in {draw.method(self._vocabulary) for draw in draws} - {Method.ELSEWHERE}:
                self._sample(table, method, B)
            return self._answer(B)

    def token_ids(self, token_ids: Tensor, sources: Tensor) -> Tensor:
        """token_ids [R], but where sources [R] is the number of a row of the last step, the token that it draws."""
        drawn = self._tokens[sources.clamp(min=0)].clamp(min=0)  # -1 stands for no token: its sequence is ending
        return torch.where(sources >= 0, drawn, token_ids)

    def _new_bucket(self, rows: int) -> _Bucket:
        config, table = self._model.config, _Table(rows, self._vocabulary, self._logits.device)
        table.send([self._padding] * rows)
        attention = DecodeAttention(
            self._kernels,
            self._kv,
            table[_Field.FIRST_SLOT],
            table[_Field.POSITION],
            self._model.attention_scales,
            config.context,
            self._model.padded(rows),
        )

        def forward() -> None:
            token_ids = self.token_ids(table[_Field.TOKEN_ID], table[_Field.SOURCE])
            self._take_logits(self._model.decode(token_ids, table[_Field.POSITION], attention), rows)

        def sampler(method: Method) -> Callable[[], None]:
            return lambda: self._sample(table, method, rows)

        return _Bucket(table, self._record(forward), {method: self._record(sampler(method)) for method in METHODS})

    def _take_logits(self, logits: Tensor, rows: int) -> None:
        self._logits[:rows] = logits
        self._finite[:rows] = torch.isfinite(logits.amax(dim=-1))

    def _sample(self, table: _Table, method: Method, rows: int) -> None:
        """Draw the rows of one method, and leave the others as they are."""
        u = self._kernels.uniform(table[_Field.SEED], table[_Field.COUNT])
        chosen = choose(
            method, self._logits[:rows], u, table[_Field.TOP_K], table[_Field.TEMPERATURE], table[_Field.TOP_P]
        )
        chosen = torch.where(self._finite[:rows], chosen, -1)
        self._tokens[:rows] = torch.where(table[_Field.METHOD] == method, chosen, self._tokens[:rows])

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A function that does `work` again, on the device as one graph."""
        with self._on_device(), torch.inference_mode():
            if not self._on_gpu:
                return torch.inference_mode()(work)
            work()  # kernels are loaded and libraries take their workspaces, which a capture does not allow
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        return graph.replay

    def _on_device(self) -> AbstractContextManager[object]:
        """Streams and events are those of a thread's current device, which need not be ours."""
        return torch.cuda.device(self._model.device) if self._on_gpu else nullcontext()

    def _wait_for_the_last_but_one(self) -> None:
        """Its host memory is used again: its table has been sent by now, and its answer read."""
        self._turn = 1 - self._turn
        before = self._under_way[self._turn]
        if before is not None:
            before.result()

    def _answer(self, rows: int) -> Launched:
        tokens, done = self._answers[self._turn][:rows], None
        tokens.copy_(self._tokens[:rows], non_blocking=True)
        if self._on_gpu:
            done = torch.cuda.Event()
            done.record()
        launched = self._under_way[self._turn] = Launched(tokens, self._logits[:rows], done)
        return launched


def bucket_sizes(most: int) -> list[int]:
    """Rows that graphs are made for: finer where sampling more rows than there are would cost most."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + sizes[-1] // 2 if sizes[-1] & (sizes[-1] - 1) == 0 else sizes[-1] // 3 * 4)
    return [size for size in sizes if size < most] + [most]
