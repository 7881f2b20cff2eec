"""Measures against their limits. Must not know how they came about."""

from __future__ import annotations

import math
from dataclasses import dataclass

from predictor.evaluation.comparison import Measures
from predictor.evaluation.options import Limits


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judged measure; a NaN is past every limit."""

    name: str
    value: str
    limit: str
    failure: str | None  # what is past its limit, by how much and by which flag


def judge(measures: Measures, limits: Limits) -> list[Verdict]:
    """Everything a run can fail by."""
    return [
        _at_most("perplexity loss", measures.perplexity_loss, limits.max_perplexity_loss, "--max-perplexity-loss"),
        _at_least("top-1 agreement", measures.top1_agreement, limits.min_top1, "--min-top1"),
        _at_most("KL", measures.kl, limits.max_kl, "--max-kl"),
        _none("NaN logits", measures.nan_count),
        _none("infinite logits", measures.infinite_count),
        _none("NaN logits of the reference", measures.reference_nan_count),
    ]


def _at_most(name: str, value: float, limit: float, flag: str) -> Verdict:
    failure = f"{name} is {value:.4g}, {value - limit:.3g} above {flag} {limit:g}"
    return _verdict(name, value, limit, value <= limit, failure)


def _at_least(name: str, value: float, limit: float, flag: str) -> Verdict:
    failure = f"{name} is {value:.4g}, {limit - value:.3g} below {flag} {limit:g}"
    return _verdict(name, value, limit, value >= limit, failure)


def _verdict(name: str, value: float, limit: float, passed: bool, failure: str) -> Verdict:
    if math.isnan(value):
        failure = f"{name} is not a number"
    return Verdict(name, f"{value:.5g}", f"{limit:g}", None if passed else failure)


def _none(name: str, count: int) -> Verdict:
    return Verdict(name, f"{count:,}", "0", f"there are {count:,} {name}, and none may be" if count else None)
