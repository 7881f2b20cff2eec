"""A discrete-event simulation: arrivals, activator or queue-proxies, autoscaler, replicas that take time to start."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import count

import simpy

from benchmarks.scaling import kpa
from benchmarks.scaling.arrivals import Request
from benchmarks.scaling.fleet import Deployment, Fleet
from benchmarks.scaling.replica import Answer
from benchmarks.scaling.service import ServiceCurve


@dataclass(frozen=True, slots=True)
class Moment:
    """What there was at the end of a second."""

    at_s: float
    waiting: int
    running: int
    ready: int  # without those that leave
    desired: int


@dataclass(frozen=True, slots=True)
class Outcome:
    answers: list[Answer]
    moments: list[Moment]
    ended_s: float  # the last answer
    mean_in_system: float  # until then
    replica_s: float  # what is paid for: all replicas, from the order to the end

    def with_status(self, status: int) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == status]


def simulate(
    curve: ServiceCurve,
    deployment: Deployment,
    requests: Sequence[Request],
    *,
    initial_replicas: int,
    until_s: float = 0.0,
) -> Outcome:
    """Serve `requests`, which are in order of time, until all are answered and `until_s` has passed."""
    return _Service(curve, deployment, initial_replicas).run(requests, until_s)


class _Service:
    def __init__(self, curve: ServiceCurve, deployment: Deployment, initial: int) -> None:
        self._env = simpy.Environment()
        self._deployment = deployment
        self._fleet = Fleet(self._env, curve, deployment, initial, self._answered, self._dispatch)
        settings = deployment.autoscaler
        self._autoscaler = kpa.Autoscaler(
            settings, deployment.concurrency, deployment.min_replicas, deployment.max_replicas
        )
        self._stable = kpa.Window(settings.stable_window_s)
        self._panic = kpa.Window(settings.panic_window_s)
        self._idle_since_s: float | None = None  # nothing is wanted
        self._activator = True  # in the path
        self._waiting: deque[Request] = deque()  # in the activator
        self._turn = count()
        self._in_system, self._counted_s = 0, 0.0
        self._request_s, self._request_s_before_bucket = 0.0, 0.0  # requests in the system times seconds, so far
        self._answers: list[Answer] = []
        self._moments: list[Moment] = []

    def run(self, requests: Sequence[Request], until_s: float) -> Outcome:
        all_came = self._env.process(self._arrive(requests))
        self._env.process(self._observe())
        self._env.run(until=all_came)
        while self._in_system or self._env.now < until_s:
            self._env.step()
        ended_s = max((answer.ended_s for answer in self._answers), default=0.0)
        mean = self._request_s / ended_s if ended_s else 0.0
        return Outcome(self._answers, self._moments, ended_s, mean, self._fleet.replica_s)

    # Requests

    def _arrive(self, requests: Sequence[Request]) -> Generator[simpy.Event, None, None]:
        for request in requests:
            yield self._env.timeout(request.at_s - self._env.now)
            self._count(+1)
            if self._activator or not self._fleet.ready:
                self._waiting.append(request)
                self._dispatch()
                if not self._fleet.ready and not self._fleet.starting:
                    self._fleet.scale(1)  # the activator tells the autoscaler of it at once
            else:
                self._send(request)

    def _send(self, request: Request) -> None:
        """To a replica in turn: the ingress knows no queues."""
        ready = self._fleet.ready
        replica = ready[next(self._turn) % len(ready)]
        if replica.full:
            self._answered(Answer(request, 503, self._env.now))
        else:
            replica.add(request)

    def _dispatch(self) -> None:
        """The activator hands on what a replica has room for, in turns."""
        while self._waiting:
            free = [replica for replica in self._fleet.ready if replica.room > 0]
            if not free:
                return
            free[next(self._turn) % len(free)].add(self._waiting.popleft())

    def _expire(self) -> None:
        """What has waited for `timeout` is answered with 504. Queues are in order of arrival."""
        for queue in (self._waiting, *(replica.waiting for replica in self._fleet.serving)):
            while queue and self._env.now - queue[0].at_s >= self._deployment.timeout_s:
                self._answered(Answer(queue.popleft(), 504, self._env.now))

    def _answered(self, answer: Answer) -> None:
        self._answers.append(answer)
        self._count(-1)

    def _count(self, change: int) -> None:
        self._request_s += self._in_system * (self._env.now - self._counted_s)
        self._counted_s = self._env.now
        self._in_system += change

    # The autoscaler

    def _observe(self) -> Generator[simpy.Event, None, None]:
        for second in count():
            yield self._env.timeout(kpa.BUCKET_S)
            self._count(0)
            self._expire()
            if self._fleet.ready or self._in_system:  # nobody reports while there is no replica and no request
                mean = (self._request_s - self._request_s_before_bucket) / kpa.BUCKET_S
                self._stable.record(second, mean)
                self._panic.record(second, mean)
            self._request_s_before_bucket = self._request_s
            if (second + 1) % kpa.TICK_S == 0:
                self._decide(second)
            running = sum(replica.running for replica in self._fleet.serving)
            ready, desired = len(self._fleet.ready), self._fleet.desired
            self._moments.append(Moment(self._env.now, self._in_system - running, running, ready, desired))

    def _decide(self, second: int) -> None:
        stable, panic, ready = self._stable.average(second), self._panic.average(second) or 0.0, len(self._fleet.ready)
        if stable is None:
            return
        desired = self._autoscaler.desired(self._env.now, ready, stable, panic)
        self._activator = self._autoscaler.excess_burst_capacity(ready, panic) < 0
        if desired:
            self._idle_since_s = None
        self._fleet.scale(desired or self._last_one())

    def _last_one(self) -> int:
        """0 is refused while a replica starts, in its first stable window, in the pod's retention, and before the
        activator has been in the path for the grace; it is there already where `target_burst_capacity` keeps it."""
        if not self._fleet.ready:
            return min(1, self._fleet.starting)
        if self._idle_since_s is None:
            self._idle_since_s = self._env.now
        settings = self._deployment.autoscaler
        stays_s = max(settings.scale_to_zero_pod_retention_s, 0 if self._activator else settings.scale_to_zero_grace_s)
        active = self._env.now - self._fleet.active_since_s >= settings.stable_window_s
        return 0 if active and self._env.now - self._idle_since_s >= stays_s else 1
