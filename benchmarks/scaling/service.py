"""How fast a replica serves, as a function of how many requests it runs. Measured, or computed elsewhere; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class ServiceCurve:
    """Seconds in which each of n running requests gets its next token, prompts included.

    Continuous batching shares the engine: every running request advances by a token a step, and a step takes longer
    the more of them there are. A prompt takes its time from everybody; over a mix of requests that is so much per new
    token, which is what a measurement of whole requests gives. Between the points, and past the last, straight lines.
    """

    name: str
    running: tuple[float, ...]  # increasing
    token_s: tuple[float, ...]
    measured_on: str | None  # the machine; None: computed, never measured

    def seconds_per_token(self, running: float) -> float:
        """Of one request among so many; defined for running >= 0."""
        first, last = self.running[0], self.running[-1]
        if running <= last or len(self.running) == 1:
            return float(np.interp(max(running, first), self.running, self.token_s))
        before = self.running[-2]
        slope = (self.token_s[-1] - self.token_s[-2]) / (last - before)
        return self.token_s[-1] + slope * (running - last)

    def tokens_per_s(self, running: float) -> float:
        """Of all of them together."""
        return running / self.seconds_per_token(running)


def from_points(name: str, points: Sequence[tuple[float, float]], measured_on: str | None) -> ServiceCurve:
    """`points`: requests at once, tokens/s of all of them together."""
    ordered = sorted(points)
    return ServiceCurve(
        name, tuple(running for running, _ in ordered), tuple(running / rate for running, rate in ordered), measured_on
    )


def from_json(told: Mapping[str, Any]) -> ServiceCurve:
    """What `dataclasses.asdict` made of one."""
    return ServiceCurve(told["name"], tuple(told["running"]), tuple(told["token_s"]), told["measured_on"])
