"""The engine: schedule, run, commit. Synchronous; lives in one thread (worker.py)."""

from __future__ import annotations

from collections.abc import Callable

from predictor.engine.load import Load
from predictor.engine.runner import Forward, Runner
from predictor.engine.scheduler import Scheduler
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
    ) -> None:
        """`context`: the most tokens a sequence may have; for the other limits see scheduler.py.

        `speculation` asks for guesses; they are made where `forward` gives a row the same bits in any company.
        """
        self._speculation = Speculation() if speculation and forward.rows_are_exact else None
        self._runner = Runner(forward)
        self._scheduler = Scheduler(forward.slots, max_running, chunk_tokens, step_tokens)
        self._slots = forward.slots
        self._context = context

    def add(self, request: Request) -> None:
        self._scheduler.add(request)

    def end(self, sequence: Sequence, error: PredictorError | None = None) -> None:
        self._scheduler.end(sequence, error)

    def step(self) -> bool:
        """Run one step; false when there was nothing to do."""
        batch = self._scheduler.schedule()
        if not batch:
            return False
        if self._speculation is not None:
            self._speculation.begin(batch)
        held = self._scheduler.commit(batch, self._runner.run(batch))
        if self._speculation is not None:
            self._speculation.end(batch, held)
        return True

    def end_all(self, new_error: Callable[[], PredictorError]) -> None:
        """End every sequence, each with an error object of its own: tracebacks gather on the object raised."""
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
