"""Knative's Pod Autoscaler (KPA) as rules: windows of concurrency in, a number of replicas out. No clock of its own.

Written after Knative's documentation ("Additional autoscaling configuration for Knative Pod Autoscaler", "Configuring
scale bounds", "Configuring target burst capacity") and the behaviour of knative.dev/serving's autoscaler. Times are
seconds since any fixed moment and only grow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, floor

TICK_S = 2  # between decisions
BUCKET_S = 1  # between observations


@dataclass(frozen=True, slots=True)
class Settings:
    """Knative's defaults, under the names of `config-autoscaler`."""

    target_utilization: float = 0.7  # container-concurrency-target-percentage
    stable_window_s: int = 60
    panic_window_s: int = 6  # panic-window-percentage: 10
    panic_threshold: float = 2.0  # panic-threshold-percentage: 200
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    scale_down_delay_s: int = 0
    scale_to_zero_grace_s: int = 30
    scale_to_zero_pod_retention_s: int = 0
    target_burst_capacity: float = 200.0  # some releases ship 211; -1: the activator is always in the path

    def target(self, concurrency: int) -> float:
        """Requests at once per replica that it aims at."""
        return max(1.0, self.target_utilization * concurrency)


class Window:
    """The mean of one value a second over the newest seconds."""

    def __init__(self, length_s: int) -> None:
        self._length_s = length_s
        self._values: deque[tuple[int, float]] = deque()
        self._first_s = 0  # since when there is no window without a value

    def record(self, second: int, value: float) -> None:
        if not self._values or second - self._values[-1][0] >= self._length_s:
            self._values.clear()
            self._first_s = second
        self._values.append((second, value))

    def average(self, now: int) -> float | None:
        """Missing seconds count as 0, those before the first value not at all; None: no value in the window."""
        while self._values and self._values[0][0] <= now - self._length_s:
            self._values.popleft()
        if not self._values:
            return None
        newest = self._values[-1][0]
        seconds = min(newest - max(self._first_s, now - self._length_s + 1) + 1, self._length_s)
        return sum(value for _, value in self._values) / seconds


@dataclass(slots=True)
class Autoscaler:
    """Decides every `TICK_S`; remembers whether it panics, and what it wanted lately."""

    settings: Settings
    concurrency: int  # containerConcurrency, or scaleTarget where that is smaller
    min_replicas: int
    max_replicas: int  # 0: no limit
    panicking_since: float | None = None
    _most_in_panic: int = 0
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    def desired(self, now: float, ready: int, stable: float, panic: float) -> int:
        """Replicas wanted.

        ready: replicas that serve; stable, panic: mean requests in the system over either window, waiting included.
        """
        settings = self.settings
        ready_or_one = max(1, ready)
        most = ceil(settings.max_scale_up_rate * ready_or_one)
        least = floor(ready_or_one / settings.max_scale_down_rate)
        target = settings.target(self.concurrency)
        by_panic = ceil(panic / target)
        desired = min(max(ceil(stable / target), least), most)

        if by_panic / ready_or_one >= settings.panic_threshold:
            self.panicking_since = now
        elif self.panicking_since is not None and now - self.panicking_since > settings.stable_window_s:
            self.panicking_since = None
            self._most_in_panic = 0
        if self.panicking_since is not None:  # only upwards
            desired = self._most_in_panic = max(desired, min(max(by_panic, least), most), self._most_in_panic)

        if settings.scale_down_delay_s:
            self._wanted.append((now, desired))
            while self._wanted[0][0] <= now - settings.scale_down_delay_s:
                self._wanted.popleft()
            desired = max(wanted for _, wanted in self._wanted)
        desired = max(desired, self.min_replicas)
        return min(desired, self.max_replicas) if self.max_replicas else desired

    def excess_burst_capacity(self, ready: int, panic: float) -> float:
        """Below 0 the activator is in the request's path and holds the queue; else replicas are asked directly."""
        if self.settings.target_burst_capacity <= 0:
            return self.settings.target_burst_capacity
        return floor(ready * self.concurrency - self.settings.target_burst_capacity - panic)
