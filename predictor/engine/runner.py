"""Runs a batch: works into rows, the forward pass, the sampler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from predictor.engine.cache import SlotAllocator
from predictor.engine.params import Sampled
from predictor.engine.sampler import Choose, Draws, sample, score
from predictor.engine.scheduler import Batch, PromptCopy
from predictor.model.cpu.gpt2 import CPUGPT2
from predictor.model.cpu.library import Draw
from predictor.model.gpt2 import GPT2, Rows, Span


class Forward(Protocol):
    """The tensors behind an engine: ours below, transformers' in backends/transformers.py."""

    slots: SlotAllocator
    rows_are_exact: bool  # whether a row's bits are the same in any company, its sequence's other rows included
    choose: Choose | None  # how tokens are drawn from logits, where the device has a better way than torch's

    def copy_prompts(self, copies: list[PromptCopy]) -> None:
        """Copy the keys and values of prompts to the ranges of their siblings."""

    def logits(self, batch: Batch) -> Tensor:
        """Compute the batch's work; the logits [W, V] fp32, ours to change: of the rows that sample, then of those that
        score, both in the order of the works."""


class Launched(Protocol):
    """A step that runs, or has run."""

    def result(self) -> list[Sampled]:
        """Wait for it; a sample for each of the batch's `sampling`, in that order."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A step that has run."""

    sampled: list[Sampled]

    def result(self) -> list[Sampled]:
        return self.sampled


class Runner:
    """One step on the device, from start to end."""

    runs_ahead = False  # whether the next step may be launched before this one is read

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def launch(self, batch: Batch) -> Launched:
        with torch.inference_mode():
            if batch.copies:
                self._forward.copy_prompts(batch.copies)
            logits = self._forward.logits(batch) if batch.work else None
            return Finished(sample(with_stored_logits(batch, logits), batch.sampling, self._forward.choose))


def with_stored_logits(batch: Batch, logits: Tensor | None) -> Tensor:
    """The logits of `batch.sampling`: those computed [W, V], then those that siblings share with their leader."""
    stored = [_prompt_logits(sequence.request.prompt_logits) for sequence in batch.forks]
    if logits is not None:
        logits = _keep_prompt_logprobs(batch, logits)
        keep_prompt_logits(batch, logits)
    parts = ([] if logits is None else [logits]) + stored
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def keep_prompt_logits(batch: Batch, logits: Tensor) -> None:
    """The siblings will sample their first token from the same logits as their leader."""
    row = 0
    for work in batch.work:
        request = work.sequence.request
        if work.samples and request.pending and request.prompt_logits is None:
            request.prompt_logits = logits[row].clone()
        row += work.samples


def _keep_prompt_logprobs(batch: Batch, logits: Tensor) -> Tensor:
    """Score the prompts' tokens, for the leader and its siblings; what is left are the logits that are sampled."""
    sampled = row = sum(work.samples for work in batch.work)
    for work in batch.work:
        if work.scores:
            request, first = work.sequence.request, work.first_position
            assert request.params.prompt_logprobs is not None
            following = request.prompt_ids[first + 1 : first + 1 + work.scores]
            scored = score(logits[row : row + work.scores], following, request.params.prompt_logprobs)
            # A leader that has ended leaves what it scored behind, and the next one begins anew.
            request.prompt_logprobs[first:] = scored
            row += work.scores
    return logits[:sampled]


def _prompt_logits(logits: Tensor | None) -> Tensor:
    assert logits is not None, "a sibling was admitted before its prompt was computed"
    return logits[None].clone()


def compiled_choice(model: CPUGPT2) -> Choose:
    """The compiled kernels' way from logits to tokens: all rows at once, over the model's threads."""

    def choose(logits: Tensor, sequences: SequenceOf[Draws]) -> list[int | None]:
        draws = []
        for row, sequence in enumerate(sequences):
            p = sequence.params
            position = len(sequence.output_ids)
            draws.append(Draw(row, p.greedy, p.top_k, 0, p.temperature, p.top_p, sequence.seed, position))
        return [None if token < 0 else token for token in model.sample(logits, draws)]

    return choose


class GPT2Forward:
    """Our model over its preallocated KV memory."""

    def __init__(self, model: GPT2 | CPUGPT2, slots: int, spare_slots: int = 0) -> None:
        """`spare_slots` lie behind the others and are never given to a sequence."""
        self.slots = SlotAllocator(slots, model.slot_multiple)
        self.rows_are_exact = isinstance(model, CPUGPT2)
        self.choose = compiled_choice(model) if isinstance(model, CPUGPT2) else None
        self._model = model
        self._kv = model.new_kv(slots + spare_slots)

    def copy_prompts(self, copies: list[PromptCopy]) -> None:
        for copy in copies:
            self._model.copy_kv(self._kv, copy.source, copy.target, copy.tokens)

    def logits(self, batch: Batch) -> Tensor:
        return self._model.forward(rows_of(batch), self._kv)


def rows_of(batch: Batch) -> Rows:
    """The rows of a batch's works; wanted are those that sample, then those that score."""
    token_ids: list[int] = []
    spans: list[Span] = []
    wanted: list[int] = []
    scoring: list[int] = []
    for work in batch.work:
        assert work.sequence.slots is not None
        count = len(work.token_ids)
        scoring += range(len(token_ids), len(token_ids) + work.scores)
        spans.append(Span(len(token_ids), count, work.sequence.slots.first, work.first_position + count))
        token_ids += work.token_ids
        wanted += range(len(token_ids) - work.samples, len(token_ids))
    return Rows(token_ids, spans, wanted + scoring)
