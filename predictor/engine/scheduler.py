"""Who runs in the next step. Pure Python: no tensors are touched here.

Each step takes one row of every decoding sequence, then prefill chunks in order of arrival while rows are left.
Chunks begin at multiples of the chunk size and are never cut shorter, so how a prompt is computed depends on the
prompt alone. First come, first served: nobody overtakes a request that waits for KV memory. A sequence whose window
is full comes again, as if it had just arrived: it is prefilled in its own slots, behind the requests that wait.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from heapq import merge
from itertools import count, islice, takewhile
from typing import NamedTuple

from predictor.engine.cache import SlotAllocator
from predictor.engine.params import FinishReason, Sampled, SamplingParams, Token
from predictor.engine.sequence import PENDING, Request, Sequence
from predictor.errors import EngineFailed, PredictorError


class Work(NamedTuple):
    """Consecutive positions of a sequence's window to compute in this step.

    The last `samples` rows are sampled: none in the midst of a prefill, as a rule one; with guesses (speculation.py)
    the row before them and each of theirs. The first `scores` rows say how likely the prompt's next token is.
    """

    sequence: Sequence
    first_position: int
    token_ids: list[int]
    samples: int
    scores: int = 0

    @property
    def guesses(self) -> list[int]:
        return self.token_ids[len(self.token_ids) + 1 - self.samples :] if self.samples > 1 else []


@dataclass(frozen=True, slots=True)
class Ahead:
    """A sequence as it will be if its guesses hold: what the sampler draws the token after them for."""

    sequence: Sequence
    guesses: list[int]

    @property
    def seed(self) -> int:
        return self.sequence.seed

    @property
    def prompt_ids(self) -> list[int]:
        return self.sequence.prompt_ids

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def output_ids(self) -> list[int]:
        return self.sequence.output_ids + self.guesses


@dataclass(frozen=True, slots=True)
class PromptCopy:
    """Keys and values of a prompt to copy for a sibling, before anything is computed."""

    source: int
    target: int
    tokens: int


@dataclass(slots=True)
class Batch:
    """One step: copies first, then the rows of `work`; `forks` sample from their request's stored logits."""

    copies: list[PromptCopy] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.work or self.forks)

    @property
    def sampling(self) -> list[Sequence | Ahead]:
        """What gets a token, in the order of the runner's answer."""
        rows: list[Sequence | Ahead] = []
        for work in self.work:
            if work.samples:
                rows.append(work.sequence)
                rows += [Ahead(work.sequence, work.guesses[:count]) for count in range(1, work.samples)]
        return rows + self.forks


class Scheduler:
    """Waiting and running sequences, and the slots they own."""

    def __init__(self, slots: SlotAllocator, max_running: int, chunk_tokens: int, step_tokens: int) -> None:
        """`chunk_tokens`: prompt tokens computed at a time; `step_tokens`: rows of a step, if one chunk allows."""
        self._slots = slots
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._step_tokens = step_tokens
        self._waiting: deque[Sequence] = deque()  # siblings whose prompt is computed, then leaders by arrival
        self._running: list[Sequence] = []
        self._turns = count()

    @property
    def sequences(self) -> list[Sequence]:
        """Everything alive, running first."""
        return [*self._running, *self._waiting]

    @property
    def waiting_requests(self) -> int:
        """Requests of which nothing has started."""
        return sum(sequence.leads for sequence in self._waiting)

    @property
    def running_requests(self) -> int:
        return len({id(sequence.request) for sequence in self._running})

    @property
    def free_seats(self) -> int:
        return self._max_running - len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request: its first sequence now, the siblings once the prompt is computed."""
        request.leader.turn = next(self._turns)
        self._waiting.append(request.leader)

    def schedule(self) -> Batch:
        """Choose the next step's rows; empty when there is nothing to do."""
        batch = Batch()
        self._fork(batch)  # first: sliding may overwrite the prompt that is copied here
        self._slide()
        begun = []
        for sequence in self._running:
            uncomputed = sequence.uncomputed  # 0 of a sibling that starts in this step
            if uncomputed > 1:
                begun.append(sequence)
            elif uncomputed == 1 and not sequence.drawn_out:
                batch.work.append(self._next_work(sequence))
        self._prefill(batch, begun)
        return batch

    def _fork(self, batch: Batch) -> None:
        """Start siblings: they stand at the head of the queue and cost no rows."""
        while self._waiting and not self._waiting[0].leads and len(self._running) < self._max_running:
            if not self._admit_sibling(self._waiting[0], batch):
                return
            batch.forks.append(self._waiting[0])
            self._running.append(self._waiting.popleft())

    def _slide(self) -> None:
        """Let the full windows of running sequences move on."""
        for sequence in self._running:
            if sequence.window_full and not sequence.drawn_out:
                request = sequence.request
                if request.pending and sequence.slots == request.prompt_slots:
                    self._lead_anew(request)  # the siblings that found no room above lose their prompt
                sequence.slide()
                sequence.turn = next(self._turns)

    def _prefill(self, batch: Batch, begun: list[Sequence]) -> None:
        """Add chunks while they fit, the first in any case: of windows `begun` and of new requests, by turn."""
        rows = len(batch.work)
        limit = max(self._step_tokens, rows + self._chunk_tokens)
        begun.sort(key=_turn)
        new = list(islice(takewhile(lambda s: s.leads, self._waiting), self.free_seats))
        blocked = False
        for sequence in merge(begun, new, key=_turn):
            starts = sequence.slots is None
            if starts and blocked:
                continue
            chunk = self._next_work(sequence)
            if rows + len(chunk.token_ids) > limit:
                return
            if starts and not self._admit_leader(sequence):
                blocked = True  # nobody overtakes it; windows begun have their memory and go on
                continue
            batch.work.append(chunk)
            rows += len(chunk.token_ids)

    def _admit_leader(self, sequence: Sequence) -> bool:
        sequence.slots = self._slots.allocate(sequence.request.slots_needed)
        if sequence.slots is None:
            return False
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _admit_sibling(self, sequence: Sequence, batch: Batch) -> bool:
        request = sequence.request
        assert request.prompt_slots is not None
        if request.prompt_slots_orphaned:
            sequence.slots, request.prompt_slots_orphaned = request.prompt_slots, False
        else:
            sequence.slots = self._slots.allocate(request.slots_needed)
            if sequence.slots is None:
                return False
            batch.copies.append(PromptCopy(request.prompt_slots.first, sequence.slots.first, sequence.uncomputed))
        sequence.computed = sequence.uncomputed
        request.pending.remove(sequence)
        return True

    def _next_work(self, sequence: Sequence) -> Work:
        tokens = sequence.tokens_from(sequence.computed, self._chunk_tokens)
        samples = int(len(tokens) == sequence.uncomputed)
        scores = 0 if sequence.params.prompt_logprobs is None else sequence.scoring(len(tokens))
        return Work(sequence, sequence.computed, tokens, samples, scores)

    def advance(self, batch: Batch) -> None:
        """Account for a step that was launched: what it computes is computed, what it draws is pending."""
        for work in batch.work:
            sequence = work.sequence
            sequence.computed += len(work.token_ids) - len(work.guesses)
            if work.samples and sequence.leads and not sequence.output_ids:
                # The prompt is computed: the siblings go first, before requests that came later.
                sequence.request.prompt_slots = sequence.slots
                for sibling in sequence.request.pending:
                    self._waiting.insert(self._siblings_waiting(), sibling)
        for sequence in [work.sequence for work in batch.work if work.samples] + batch.forks:
            if not sequence.done:
                sequence.output_ids.append(PENDING)

    def commit(self, batch: Batch, sampled: list[Sampled]) -> list[int]:
        """Deliver the tokens of the step that advanced last, let go of what ended.

        Returns how many guesses of each work held.
        """
        outcomes, delivered = iter(sampled), list[tuple[Sequence, Sampled]]()
        held_of_each = []
        for work in batch.work:
            sequence, samples = work.sequence, list(islice(outcomes, work.samples))
            held = _held(work.guesses, samples) if work.samples > 1 else 0
            held_of_each.append(held)
            # What was computed for guesses that did not hold is written over later.
            sequence.computed += held
            sequence.drafted = min(sequence.drafted, sequence.computed)
            for sample in samples[: held + 1]:
                delivered.append((sequence, sample))
        for sequence, sample in [*delivered, *zip(batch.forks, outcomes, strict=True)]:
            if not sequence.done:  # it may have ended while the step ran, or in this loop: a guess, or a sink's doing
                self._deliver(sequence, sample)
        return held_of_each

    def _deliver(self, sequence: Sequence, sample: Sampled) -> None:
        if sample.token_id is None:
            self._fail(sequence)
            return
        params, output = sequence.params, sequence.output_ids
        if output[-1] == PENDING:
            output[-1] = sample.token_id
        else:
            output.append(sample.token_id)
        scored = None
        if params.prompt_logprobs is not None and len(output) == 1:
            scored = tuple(sequence.request.prompt_logprobs)
            if not all(math.isfinite(each.logprob) for each in scored):
                self._fail(sequence)
                return
        is_end = sample.token_id in params.end_tokens and not params.ignore_eos
        reason: FinishReason | None = None
        if not params.max_new_tokens:
            is_end, reason = True, "length"
        elif is_end:
            reason = "stop"
        elif sequence.drawn_out:
            reason = "length"
        token = Token(sample.token_id, sample.logprob, sample.top_logprobs, reason, is_end, scored)
        if reason is not None:
            self.end(sequence)
        sequence.sink(token)

    def _fail(self, sequence: Sequence) -> None:
        self.end(sequence, EngineFailed("the model produced no finite logits; the checkpoint may be damaged"))

    def end(self, sequence: Sequence, error: PredictorError | None = None) -> None:
        """Free a sequence, whatever its state; `error` is delivered to its sink. Ending twice does nothing."""
        if sequence.done:
            return
        sequence.done = True
        request = sequence.request
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        if sequence in request.pending:
            request.pending.remove(sequence)
        elif request.pending and sequence.leads and request.prompt_slots is None:
            self._free(sequence)
            self._lead_anew(request)
        elif request.pending and sequence.slots == request.prompt_slots:
            request.prompt_slots_orphaned, sequence.slots = True, None
        else:
            self._free(sequence)
        if request.prompt_slots_orphaned and not request.pending:
            assert request.prompt_slots is not None
            self._slots.free(request.prompt_slots)
            request.prompt_slots_orphaned = False
        if error is not None:
            sequence.sink(error)

    def _lead_anew(self, request: Request) -> None:
        """Let the next sibling compute the prompt, and the others wait for it."""
        for sibling in request.pending:
            if sibling in self._waiting:
                self._waiting.remove(sibling)
        request.prompt_slots = None
        request.pending[0].turn = request.leader.turn
        request.leader = request.pending.pop(0)
        self._waiting.insert(self._siblings_waiting(), request.leader)

    def _siblings_waiting(self) -> int:
        """How many siblings stand at the head of the queue.

        Leaders stay behind all of them: a sibling may hold, through its prompt, the memory that a leader waits for.
        """
        return sum(not sequence.leads for sequence in self._waiting)

    def _free(self, sequence: Sequence) -> None:
        if sequence.slots is not None:
            self._slots.free(sequence.slots)
            sequence.slots = None


def _turn(sequence: Sequence) -> int:
    return sequence.turn


def _held(guesses: list[int], samples: list[Sampled]) -> int:
    """How many guesses, from the first on, are what was drawn."""
    held = 0
    while held < len(guesses) and samples[held].token_id == guesses[held]:
        held += 1
    return held
