"""Guessing tokens ahead, so that one step may yield several. Pure Python: no tensors are touched here.

A guess changes nothing but speed: each position is drawn with its own random number, as without guessing, and a guessed
token is kept only where it is what was drawn (scheduler.py `commit`).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from predictor.engine.scheduler import Batch
    from predictor.engine.sequence import Sequence

# Source: Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference".

# Lengths of the run of newest tokens that is looked for, longest first. A single token says too little.
_RUNS = (4, 3, 2)
# A step of a lone sequence with this many guesses fills the kernels' tile of 12 rows, which costs about twice one row.
MOST_GUESSES = 11
# More sequences than this fill the tile by themselves.
MOST_SEQUENCES = 4


class Lookup:
    """Guesses for one sequence: what followed when its newest tokens last stood together."""

    def __init__(self) -> None:
        self._indexed = 0  # tokens that are known as what follows a run
        self._after: dict[tuple[int, ...], int] = {}  # a run -> where what followed it begins
        self._most = 2

    def guess(self, ids: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `ids`: prompt and output so far, to which calls may only append."""
        for end in range(self._indexed, len(ids)):
            for run in _RUNS:
                if end >= run:
                    self._after[tuple(ids[end - run : end])] = end
        self._indexed = len(ids)
        for run in _RUNS:
            begin = self._after.get(tuple(ids[-run:])) if len(ids) >= run else None
            if begin is not None:
                return ids[begin : begin + min(most, self._most)]
        return []

    def learn(self, guessed: int, kept: int) -> None:
        """Guess further where guesses hold, and less far where they do not."""
        self._most = min(2 * guessed, MOST_GUESSES) if kept == guessed else max(kept, 1)


class Pace:
    """Whether guessing pays on this machine and for this text: seconds per token with and without it, as measured.

    Kept per number of sequences in a step, whose cost differs.
    """

    # How fast old measurements fade, and how often the way that seems slower is tried again.
    _FADE, _RETRY_EVERY = 0.1, 32

    def __init__(self) -> None:
        self._seconds_per_token: dict[tuple[int, bool], float] = {}
        self._choices = 0

    def pays(self, sequences: int) -> bool:
        """Whether to guess in the next step, of which there are guesses to be had."""
        self._choices += 1
        guessing, plain = (self._seconds_per_token.get((sequences, way)) for way in (True, False))
        if guessing is None or plain is None:
            return guessing is None
        return (guessing < plain) != (self._choices % self._RETRY_EVERY == 0)

    def measured(self, sequences: int, guessing: bool, seconds: float, tokens: int) -> None:
        """A step of decoding alone took `seconds` and yielded `tokens`."""
        key, new = (sequences, guessing), seconds / tokens
        self._seconds_per_token[key] = new + (1 - self._FADE) * (self._seconds_per_token.get(key, new) - new)


class Speculation:
    """Adds guesses to steps that decode alone, where they pay."""

    def __init__(self) -> None:
        self.guessed = self.held = 0  # tokens since the start
        self._pace = Pace()
        self._sequences = 0  # of the step under way; 0: not one to guess in
        self._started_s = 0.0

    def begin(self, batch: Batch) -> None:
        """Extend a step's works with guesses."""
        alone = not batch.forks and all(work.sequence.uncomputed == 1 for work in batch.work)
        self._sequences = len(batch.work) if alone and len(batch.work) <= MOST_SEQUENCES else 0
        if self._sequences:
            guesses = [_guess(work.sequence) for work in batch.work]
            if any(guesses) and self._pace.pays(self._sequences):
                batch.work = [
                    replace(work, token_ids=work.token_ids + guess, samples=1 + len(guess))
                    for work, guess in zip(batch.work, guesses, strict=True)
                ]
        self._started_s = time.perf_counter()

    def end(self, batch: Batch, held: int) -> None:
        """Learn from that step, of whose guesses `held` were what was drawn."""
        if self._sequences:
            seconds = time.perf_counter() - self._started_s
            guessed = sum(work.samples - 1 for work in batch.work)
            self.guessed += guessed
            self.held += held
            self._pace.measured(self._sequences, guessed > 0, seconds, self._sequences + held)


def _guess(sequence: Sequence) -> list[int]:
    return sequence.lookup.guess(sequence.prompt_ids + sequence.output_ids, sequence.room_for_guesses)
