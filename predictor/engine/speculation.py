"""Guessing tokens ahead, so that one step may yield several. Pure Python: no tensors are touched here.

A guess changes nothing but speed: each position is drawn with its own random number, as without guessing, and a guessed
token is kept only where it is what was drawn (scheduler.py `commit`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from predictor.engine.draft import Draft
    from predictor.engine.scheduler import Batch

# Source: Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023, "Inference with Reference"; of the draft, Leviathan
# et al. 2023, "Fast Inference from Transformers via Speculative Decoding".

# Where a step's guesses come from.
Way = Literal["plain", "lookup", "draft"]

# Lengths of the run of newest tokens that is looked for, longest first. A single token says too little.
_RUNS = (4, 3, 2)
# A step of a lone sequence with this many guesses fills the kernels' tile of 12 rows, which costs about twice one row.
MOST_GUESSES = 11
# More sequences than this fill the tile by themselves.
MOST_SEQUENCES = 4
# A draft computes this many tokens of a prompt in less time than it saves with one token guessed right.
_BACKLOG_PER_TOKEN = 16


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


class Reach:
    """How far a draft guesses for one sequence: as many tokens as hold on average, and one more.

    Where each guess holds with probability p, those are 1 / (1 - p) tokens, which is within a few percent of the best
    length for a draft that takes a tenth of the model's time.
    """

    # How fast old outcomes fade; 0.1 misses are what is left of one after some 20 steps without.
    _FADE, _FEWEST_MISSES = 0.1, 0.1

    def __init__(self) -> None:
        self._held, self._missed = 2.0, 1.0

    @property
    def most(self) -> int:
        return min(int(1 + self._held / self._missed), MOST_GUESSES)

    def learn(self, guessed: int, kept: int) -> None:
        self._held += kept - self._FADE * self._held
        self._missed = max(self._missed + (kept < guessed) - self._FADE * self._missed, self._FEWEST_MISSES)


@dataclass(slots=True)
class _Measured:
    """What is known of one way: sums in which older steps count less."""

    seconds: float = 0.0
    tokens: float = 0.0
    trial: int = 0  # steps that are still to be measured, whatever the way's pace
    patience: int = 0  # steps of a trial that may go by without a measurement
    last: int = 0  # the choice after which it was measured last

    @property
    def pace(self) -> float:
        """Seconds per token; without end where nothing came of a trial."""
        return self.seconds / self.tokens if self.tokens else math.inf


class Pace:
    """Which way of guessing is the fastest on this machine and for this text: seconds per token, as measured.

    Kept per number of sequences in a step, whose cost differs.
    """

    # How fast old measurements fade; how many choices a slower way is left alone before it is tried again, and for how
    # many steps. One step says little: it may yield one token or twelve.
    _FADE, _RETRY_AFTER, _TRIAL = 0.1, 256, 8
    # Steps of a trial in which a draft may catch up: with chunks of 128 tokens, on four full contexts.
    _PATIENCE = 32

    def __init__(self) -> None:
        self._measured: dict[tuple[int, Way], _Measured] = defaultdict(
            lambda: _Measured(trial=self._TRIAL, patience=self._PATIENCE)
        )
        self._choices = 0

    def choose(self, sequences: int, ways: list[Way]) -> Way:
        """The way of the next step, of those to be had."""
        self._choices += 1
        known = {way: self._measured[sequences, way] for way in ways}
        for way, measured in known.items():
            if not measured.trial and self._choices - measured.last > self._RETRY_AFTER:
                measured.trial, measured.patience = self._TRIAL, self._PATIENCE
            if measured.trial:
                return way
        return min(ways, key=lambda way: known[way].pace)

    def measured(self, sequences: int, way: Way, seconds: float, tokens: int) -> None:
        """A step of decoding alone took `seconds` and yielded `tokens`."""
        measured = self._measured[sequences, way]
        measured.seconds += seconds - self._FADE * measured.seconds
        measured.tokens += tokens - self._FADE * measured.tokens
        measured.trial, measured.last = max(measured.trial - 1, 0), self._choices

    def unmeasured(self, sequences: int, way: Way) -> None:
        """A step in which that way only got ready: no pace, and a trial does not wait for ever."""
        measured = self._measured[sequences, way]
        measured.patience = max(measured.patience - 1, 0)
        if not measured.patience:
            measured.trial, measured.last = 0, self._choices


class Speculation:
    """Adds guesses to steps that decode alone, where they pay."""

    def __init__(self, draft: Draft | None = None) -> None:
        self.guessed = self.held = 0  # tokens since the start
        self._draft = draft
        self._pace = Pace()
        self._way: Way = "plain"
        self._chose = False  # whether the way of the step under way was a choice
        self._measures = False  # and whether the step tells its pace
        self._started_s = 0.0

    def begin(self, batch: Batch) -> None:
        """Extend a step's works with guesses."""
        self._way, self._chose, self._measures = "plain", False, False
        sequences = [work.sequence for work in batch.work]
        if batch.forks or len(sequences) > MOST_SEQUENCES or any(each.uncomputed > 1 for each in sequences):
            return
        guesses = [each.lookup.guess(each.prompt_ids + each.output_ids, each.room_for_guesses) for each in sequences]
        ways: list[Way] = ["plain"]
        if any(guesses):
            ways.append("lookup")
        extensible = [each for each in sequences if each.undrafted <= _BACKLOG_PER_TOKEN * each.room_for_guesses]
        if self._draft is not None and extensible:
            ways.append("draft")
        self._way, self._chose = self._pace.choose(len(sequences), ways), True
        draft = self._draft if self._way == "draft" else None
        # What the draft has missed while another way was taken is no part of its pace, and may take it several steps.
        self._measures = draft is None or draft.catch_up(extensible)
        self._started_s = time.perf_counter()
        if draft is not None:
            most = MOST_GUESSES // len(sequences)  # all of the step's rows in one tile
            reach = {each: min(each.room_for_guesses, each.reach.most, most) for each in extensible}
            guesses = draft.guess(sequences, [reach.get(each, 0) for each in sequences])
        if self._way != "plain":
            batch.work = [
                work._replace(token_ids=work.token_ids + guess, samples=1 + len(guess))
                for work, guess in zip(batch.work, guesses, strict=True)
            ]

    def end(self, batch: Batch, held: list[int]) -> None:
        """Learn from that step: of the guesses of each work, `held` were what was drawn."""
        seconds = time.perf_counter() - self._started_s
        for work, kept in zip(batch.work, held, strict=True):
            if work.guesses:
                learner = work.sequence.lookup if self._way == "lookup" else work.sequence.reach
                learner.learn(len(work.guesses), kept)
                self.guessed += len(work.guesses)
        self.held += sum(held)
        if self._measures:
            self._pace.measured(len(batch.work), self._way, seconds, len(batch.work) + sum(held))
        elif self._chose:
            self._pace.unmeasured(len(batch.work), self._way)
