"""When requests come: a Poisson process whose rate changes with time. Pure; the same seed, the same requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    tokens: float  # new ones


@dataclass(frozen=True, slots=True)
class Load:
    """Requests/s at moments; straight lines in between, two values at one moment are a jump."""

    name: str
    points: tuple[tuple[float, float], ...]  # seconds, requests/s; in order, the last one ends it

    @property
    def ends_s(self) -> float:
        return self.points[-1][0]

    def rate(self, at_s: float) -> float:
        """0 outside; at a jump the later value."""
        for (begin, low), (end, high) in zip(self.points, self.points[1:], strict=False):
            if begin <= at_s < end:
                return low + (high - low) * (at_s - begin) / (end - begin)
        return 0.0


def steady(rate: float, seconds: float) -> Load:
    return Load("steady", ((0, rate), (seconds, rate)))


def burst(base: float, peak: float, begins_s: float, lasts_s: float, ends_s: float) -> Load:
    over = begins_s + lasts_s
    points = ((0, base), (begins_s, base), (begins_s, peak), (over, peak), (over, base), (ends_s, base))
    return Load("burst", points)


def ramp(base: float, peak: float, begins_s: float, lasts_s: float, holds_s: float, ends_s: float) -> Load:
    """Up in a straight line, hold, and down as fast."""
    top, down = begins_s + lasts_s, begins_s + lasts_s + holds_s
    points = ((0, base), (begins_s, base), (top, peak), (down, peak), (down + lasts_s, base), (ends_s, base))
    return Load("ramp", points)


def draw(load: Load, mean_tokens: float, seed: int, lengths: Sequence[float] = (1.0,)) -> list[Request]:
    """Requests of the load, by thinning; each has the mean length times one of `lengths`, drawn evenly."""
    chance = random.Random(f"{load.name} {seed}")
    most = max(rate for _, rate in load.points)
    found, at_s = list[Request](), 0.0
    while most and (at_s := at_s + chance.expovariate(most)) < load.ends_s:
        if chance.random() * most < load.rate(at_s):
            found.append(Request(at_s, mean_tokens * chance.choice(lengths)))
    return found
