"""Bounds on a share that hold however often one looks."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Beyond it a double no longer counts by ones.
_COUNTABLE = 2.0**53


@dataclass(frozen=True, slots=True)
class Share:
    """`bad` of `total`. Need not be whole numbers: n answers of mean badness b in [0, 1] are b * n of n."""

    bad: float
    total: float

    @property
    def value(self) -> float:
        return self.bad / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{self.value:.1%} of {self.total:.0f}"


def bounds(share: Share, risk: float) -> tuple[float, float]:
    """An interval that holds the true share at every look at once, but for a chance of `risk`.

    An ordinary confidence interval looked at after each answer is wrong sooner or later with certainty; this one may be
    looked at always. It is every p at which the likelihood ratio of a Beta(1/2, 1/2) mixture against p stays
    under 1/risk (Ville's inequality; Robbins 1970, "Statistical methods related to the law of the iterated logarithm";
    Howard et al. 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences"). It holds for badness
    anywhere in [0, 1], since a Bernoulli variable has the largest exponential moments of a given mean.
    """
    if not 0 < share.total < _COUNTABLE:
        return 0.0, 1.0
    bad = min(max(share.bad, 0.0), share.total)
    good = share.total - bad
    mixture = math.lgamma(bad + 0.5) + math.lgamma(good + 0.5) - math.lgamma(share.total + 1) - math.log(math.pi)

    def outside(p: float) -> bool:
        if not 0 < p < 1:  # impossible: some were bad, and some were good
            return True
        likelihood = (bad * math.log(p) if bad else 0.0) + (good * math.log1p(-p) if good else 0.0)
        return mixture - likelihood >= -math.log(risk)

    def edge(out: float, inside: float) -> float:
        for _ in range(50):
            half = (out + inside) / 2
            out, inside = (half, inside) if outside(half) else (out, half)
        return inside

    middle = bad / share.total
    return (edge(0.0, middle) if bad > 0 else 0.0), (edge(1.0, middle) if good > 0 else 1.0)
