"""What is known of the two versions at a step: counts, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from predictor.rollout.statistics import Share


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations as Prometheus counts them: how many were at most each bound. The last bound is infinity."""

    at_most: Mapping[float, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.at_most.get(math.inf, 0.0)

    def quantile(self, q: float) -> float:
        """As Prometheus' histogram_quantile: linear inside a bucket; inf past the last finite bound."""
        rank, low, below = q * self.total, 0.0, 0.0
        for bound, count in sorted(self.at_most.items()):
            if count >= rank and count > below:
                if math.isinf(bound):
                    return math.inf
                return low + (bound - low) * (rank - below) / (count - below)
            low, below = bound, count
        return math.inf

    @property
    def bounds(self) -> list[float]:
        """The finite ones, rising."""
        return sorted(bound for bound in self.at_most if math.isfinite(bound))

    def past(self, bound: float) -> Share:
        """The observations past one of the bounds."""
        return Share(max(self.total - self.at_most[bound], 0.0), self.total)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one revision did since the step began."""

    errors: Share = field(default_factory=lambda: Share(0, 0))
    ttft_s: Histogram = field(default_factory=Histogram)
    itl_s: Histogram = field(default_factory=Histogram)
    reward: Share | None = None  # `bad` is what is missing to a reward of 1
    lately: float = 0.0  # answers in the last minute of it


@dataclass(frozen=True, slots=True)
class Shadow:
    """How many of the seeded prompts both versions answered alike."""

    equal: int
    prompts: int
    first_difference: str = ""  # which prompt, by its place; never its text


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a decision rests on."""

    stable: Seen
    canary: Seen
    shadow: Shadow | None = None
