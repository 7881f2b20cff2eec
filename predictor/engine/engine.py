"""The engine: schedule, launch, commit. Lives in one thread (worker.py)."""

from __future__ import annotations

from collections.abc import Callable

from predictor.engine.cuda import CUDAForward, CUDARunner
from predictor.engine.draft import Draft
from predictor.engine.load import Load
from predictor.engine.runner import Forward, Launched, Runner
from predictor.engine.scheduler import Batch, Scheduler
from predictor.engine.sequence import Request, Sequence
from predictor.engine.speculation import Speculation
from predictor.errors import PredictorError


class Engine:
    def __init__(
        self,
        forward: Forward,
        *,
        context: int,
        max_running: int,
        chunk_tokens: int,
        step_tokens: int,
        speculation: bool = False,
        draft: Draft | None = None,
    ) -> None:
        """`context`: the most tokens a sequence may have; for the other limits see scheduler.py.

        `speculation` asks for guesses, by prompt lookup and by the `draft` if there is one; they are made where
        `forward` gives a row the same bits in any company.
        """
        self._speculation = Speculation(draft) if speculation and forward.rows_are_exact else None
        self._runner = CUDARunner(forward) if isinstance(forward, CUDAForward) else Runner(forward)
        self._running: tuple[Batch, Launched] | None = None  # the step that the device is busy with
        self._scheduler = Scheduler(forward.slots, max_running, chunk_tokens, step_tokens)
        self._slots = forward.slots
        self._context = context

    def add(self, request: Request) -> None:
        self._scheduler.add(request)

    def end(self, sequence: Sequence, error: PredictorError | None = None) -> None:
        self._scheduler.end(sequence, error)

    def step(self) -> bool:
        """Launch a step, and deliver the one before it, which ran meanwhile; false when there was nothing to do.

        Where the device has no queue, or a token cannot be drawn before the host has read the last, a step is delivered
        at once. A sequence that turns out to have ended takes part in one step more, whose token for it is dropped.
        """
        batch = self._scheduler.schedule()
        if batch and self._speculation is not None:
            self._speculation.begin(batch)
        launched = self._runner.launch(batch) if batch else None
        landed = self._land()
        if launched is None:
            return landed
        if self._runner.runs_ahead and not any(each.params.needs_the_host for each in batch.sampling):
            self._scheduler.advance(batch)
            self._running = batch, launched
        else:
            sampled = launched.result()
            self._scheduler.advance(batch)
            held = self._scheduler.commit(batch, sampled)
            if self._speculation is not None:
                self._speculation.end(batch, held)
        return True

    def _land(self) -> bool:
        """Wait for the step that runs, if one does, and deliver its tokens."""
        running, self._running = self._running, None
        if running is not None:
            batch, launched = running
            self._scheduler.commit(batch, launched.result())
        return running is not None

    def end_all(self, new_error: Callable[[], PredictorError]) -> None:
        """End every sequence, each with an error object of its own: tracebacks gather on the object raised."""
        self._running = None
        while sequences := self._scheduler.sequences:
            for sequence in sequences:
                self.end(sequence, new_error())

    @property
    def load(self) -> Load:
        scheduler, slots = self._scheduler, self._slots
        return Load(
            running_requests=scheduler.running_requests,
            waiting_requests=scheduler.waiting_requests,
            free_seats=min(scheduler.free_seats, (slots.slots - slots.used) // self._context),
            used_slots=slots.used,
            slots=slots.slots,
            guessed_tokens=self._speculation.guessed if self._speculation else 0,
            held_tokens=self._speculation.held if self._speculation else 0,
        )
