"""One replica: its queue-proxy and its engine, which all running requests share."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import simpy

from benchmarks.scaling.arrivals import Request
from benchmarks.scaling.service import ServiceCurve

QUEUE_PROXY_DEPTH = 10  # times containerConcurrency wait in the queue-proxy; the next gets 503


@dataclass(frozen=True, slots=True)
class Answer:
    request: Request
    status: int  # 200, 503: a queue was full, 504: it waited longer than `timeout`
    ended_s: float

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.request.at_s


class Replica:
    """Requests that run advance alike, each by one token in `curve.seconds_per_token(running)`.

    `on_answer` is called as each one ends, and `on_room` after it, when another may begin.
    """

    def __init__(
        self,
        env: simpy.Environment,
        curve: ServiceCurve,
        concurrency: int,
        on_answer: Callable[[Answer], None],
        on_room: Callable[[], None],
    ) -> None:
        self._env, self._curve, self._concurrency = env, curve, concurrency
        self._on_answer, self._on_room = on_answer, on_room
        self.waiting: deque[Request] = deque()
        self.leaving = False  # takes nothing new, finishes what it has
        self._running: list[tuple[float, int, Request]] = []  # by the progress at which each ends
        self._progress = 0.0  # tokens that a request which always ran would have by now
        self._progress_s = env.now
        self._changes = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def in_system(self) -> int:
        return len(self._running) + len(self.waiting)

    @property
    def room(self) -> int:
        return 0 if self.leaving else self._concurrency - len(self._running)

    @property
    def full(self) -> bool:
        """Whether the queue-proxy would refuse another."""
        return self.in_system >= (QUEUE_PROXY_DEPTH + 1) * self._concurrency

    def add(self, request: Request) -> None:
        """Run it, or let it wait in the queue-proxy; the caller has looked at `full`."""
        if len(self._running) < self._concurrency:
            self._advance()
            self._start(request)
            self._plan()
        else:
            self.waiting.append(request)

    def _start(self, request: Request) -> None:
        heapq.heappush(self._running, (self._progress + request.tokens, self._changes, request))
        self._changes += 1

    def _advance(self) -> None:
        if self._running:
            passed_s = self._env.now - self._progress_s
            self._progress += passed_s / self._curve.seconds_per_token(len(self._running))
        self._progress_s = self._env.now

    def _plan(self) -> None:
        """Wake when the next one ends, provided that nothing changes before."""
        self._changes += 1
        if self._running:
            left = max(0.0, self._running[0][0] - self._progress)
            wait = self._env.timeout(left * self._curve.seconds_per_token(len(self._running)), value=self._changes)
            assert wait.callbacks is not None
            wait.callbacks.append(self._end)

    def _end(self, event: simpy.Event) -> None:
        if event.value != self._changes:
            return
        self._advance()
        ends_at, _, request = heapq.heappop(self._running)
        self._progress = ends_at  # exactly, so that rounding never adds up
        if self.waiting:
            self._start(self.waiting.popleft())
        self._plan()
        self._on_answer(Answer(request, 200, self._env.now))
        self._on_room()
