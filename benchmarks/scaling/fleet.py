"""The replicas of a deployment: ordered, starting, ready, leaving; and how long all of them were paid for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import simpy

from benchmarks.scaling import kpa
from benchmarks.scaling.replica import Answer, Replica
from benchmarks.scaling.service import ServiceCurve


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What a replica waits for before it is ready, in seconds."""

    node_s: float  # a machine with a GPU joins the cluster; 0 where one is free
    pull_s: float  # its image; 0 where the node has it
    load_s: float  # weights, warm-up, the readiness probe

    @property
    def total_s(self) -> float:
        return self.node_s + self.pull_s + self.load_s


@dataclass(frozen=True, slots=True)
class Deployment:
    """The numbers of the manifest that decide."""

    concurrency: int
    min_replicas: int
    max_replicas: int
    cold_start: ColdStart = ColdStart(0, 0, 0)
    timeout_s: float = 330.0
    autoscaler: kpa.Settings = field(default_factory=kpa.Settings)


class Fleet:
    """`on_answer` is called as a request ends, `on_room` after it and when a replica is ready."""

    def __init__(
        self,
        env: simpy.Environment,
        curve: ServiceCurve,
        deployment: Deployment,
        initial: int,
        on_answer: Callable[[Answer], None],
        on_room: Callable[[], None],
    ) -> None:
        self._env, self._curve, self._deployment = env, curve, deployment
        self._on_answer, self._on_room = on_answer, on_room
        self.desired = initial
        self.ready: list[Replica] = []
        self.active_since_s = 0.0  # not at zero
        self._leaving: list[Replica] = []
        self._starting: list[simpy.Process] = []
        self._paid_s, self._unpaid_since_s = 0.0, 0.0
        for _ in range(initial):
            self._add()

    @property
    def serving(self) -> list[Replica]:
        """Those that leave, too: they finish what they have."""
        return [*self.ready, *self._leaving]

    @property
    def starting(self) -> int:
        return len(self._starting)

    @property
    def replica_s(self) -> float:
        """Of all replicas until now, from the order to the end."""
        self._pay()
        return self._paid_s

    def scale(self, desired: int) -> None:
        self._pay()
        self.desired = desired
        while len(self.ready) + len(self._starting) < desired:
            self._starting.append(self._env.process(self._start()))
        while len(self.ready) + len(self._starting) > desired:
            if self._starting:  # Kubernetes ends what is not ready first
                self._starting.pop().interrupt()
            else:
                replica = self.ready.pop()
                replica.leaving = True
                self._leaving.append(replica)
        self._forget()

    def _start(self) -> Generator[simpy.Event, None, None]:
        try:
            yield self._env.timeout(self._deployment.cold_start.total_s)
        except simpy.Interrupt:
            return
        assert self._env.active_process is not None
        self._starting.remove(self._env.active_process)
        self._add()
        self._on_room()

    def _add(self) -> None:
        if not self.ready:
            self.active_since_s = self._env.now
        concurrency = self._deployment.concurrency
        self.ready.append(Replica(self._env, self._curve, concurrency, self._on_answer, self._on_end))

    def _on_end(self) -> None:
        self._on_room()
        self._forget()

    def _forget(self) -> None:
        """Let go of those that have finished."""
        if any(not replica.in_system for replica in self._leaving):
            self._pay()
            self._leaving = [replica for replica in self._leaving if replica.in_system]

    def _pay(self) -> None:
        """Account for the replicas until now; called before their number changes."""
        replicas = len(self.serving) + len(self._starting)
        self._paid_s += replicas * (self._env.now - self._unpaid_since_s)
        self._unpaid_since_s = self._env.now
