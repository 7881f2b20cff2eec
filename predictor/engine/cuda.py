"""Steps on CUDA, launched without waiting: the next one is prepared while one runs.

Where a row's token is still being drawn, the device takes it from the step before. Decode steps are graphs; a step with
prefill, or with siblings that share their leader's logits, is launched kernel by kernel. One that scores a prompt's
tokens is waited for at its launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from predictor.engine.params import Sampled
from predictor.engine.runner import GPT2Forward, Launched, keep_prompt_logits, rows_of, with_stored_logits
from predictor.engine.sampler import sample
from predictor.engine.scheduler import Batch
from predictor.engine.sequence import PENDING, Sequence
from predictor.model.cuda import graphs
from predictor.model.cuda.graphs import DecodeRow, DecodeSteps
from predictor.model.cuda.sampling import Draw
from predictor.model.gpt2 import GPT2, on_device


class CUDAForward(GPT2Forward):
    """Our model with its kernels and graphs."""

    _model: GPT2

    def __init__(self, model: GPT2, slots: int, max_running: int) -> None:
        super().__init__(model, slots, spare_slots=1)
        assert model.kernels is not None
        self.steps = DecodeSteps(model, model.kernels, self._kv, most_rows=max_running, scratch_slot=slots)
        self.rows: dict[Sequence, int] = {}  # which row of the last step drew each sequence's token

    def source(self, sequence: Sequence, token_id: int) -> int | None:
        """The row of the last step to take a token from, where the host does not know it yet."""
        return self.rows[sequence] if token_id == PENDING else None

    def logits(self, batch: Batch) -> Tensor:
        rows, device = rows_of(batch), self._model.device
        sources = [self.source(work.sequence, token) for work in batch.work for token in work.token_ids]
        token_ids = self.steps.token_ids(
            on_device(rows.token_ids, device), on_device([-1 if row is None else row for row in sources], device)
        )
        return self._model.forward(rows, self._kv, token_ids)


class CUDARunner:
    """Launches steps, each before the one before it is read."""

    runs_ahead = True

    def __init__(self, forward: CUDAForward) -> None:
        self._forward = forward

    def launch(self, batch: Batch) -> Launched:
        # No guesses are made here: each work that samples does so once.
        sequences = [work.sequence for work in batch.work if work.samples] + batch.forks
        with torch.inference_mode():
            if batch.copies:
                self._forward.copy_prompts(batch.copies)
            if all(work.samples and len(work.token_ids) == 1 for work in batch.work) and not batch.forks:
                launched = self._forward.steps.launch(self._decode_rows(batch))
                keep_prompt_logits(batch, launched.logits)
            else:
                logits = with_stored_logits(batch, self._forward.logits(batch) if batch.work else None)
                launched = self._forward.steps.draw(logits, [_draw(sequence) for sequence in sequences])
        self._forward.rows = {sequence: row for row, sequence in enumerate(sequences)}
        return _Launched(launched, sequences)

    def _decode_rows(self, batch: Batch) -> list[DecodeRow]:
        rows = []
        for work in batch.work:
            sequence, (token_id,) = work.sequence, work.token_ids
            assert sequence.slots is not None
            source = self._forward.source(sequence, token_id)
            rows.append(DecodeRow(token_id, work.first_position, sequence.slots.first, _draw(sequence), source))
        return rows


@dataclass(frozen=True, slots=True)
class _Launched:
    step: graphs.Launched
    sequences: list[Sequence]

    def result(self) -> list[Sampled]:
        sampled = [Sampled(None if token < 0 else token) for token in self.step.result()]
        by_host = [row for row, sequence in enumerate(self.sequences) if sequence.params.needs_the_host]
        if by_host:
            drawn = sample(self.step.logits[by_host], [self.sequences[row] for row in by_host])
            for row, token in zip(by_host, drawn, strict=True):
                sampled[row] = token
        return sampled


def _draw(sequence: Sequence) -> Draw:
    params = sequence.params
    return Draw(
        seed=sequence.seed,
        count=len(sequence.output_ids),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        elsewhere=params.needs_the_host,
    )
