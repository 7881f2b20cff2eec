"""What a comparison may be asked to do, and how far a number format may be off. Must not know torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from predictor.model.config import Width

ReferenceName = Literal["predictor", "transformers"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What passes. NaN and infinite logits never do."""

    max_perplexity_loss: float  # perplexity / reference perplexity - 1
    min_top1: float  # share of positions at which both have the same likeliest token
    max_kl: float  # mean KL(reference || candidate) over the positions, in nats


# Far above what a trained model shows (README.md, "Number formats"), so that a fault is seen and a checkpoint's own
# character is not one.
LIMITS = {
    "float32": Limits(max_perplexity_loss=1e-4, min_top1=0.999, max_kl=1e-6),
    "float16": Limits(max_perplexity_loss=1e-3, min_top1=0.99, max_kl=1e-4),
    "bfloat16": Limits(max_perplexity_loss=0.01, min_top1=0.97, max_kl=1e-3),
    "int8": Limits(max_perplexity_loss=0.01, min_top1=0.95, max_kl=0.01),
}


def limits_of(dtype: str, **given: float | None) -> Limits:
    """The dtype's own limits, with those that were given in their place."""
    return replace(LIMITS[dtype], **{name: value for name, value in given.items() if value is not None})


def defaults(name: str) -> str:
    """One limit of every dtype, as help text."""
    return ", ".join(f"{dtype} {getattr(limits, name):g}" for dtype, limits in LIMITS.items())


@dataclass(frozen=True, slots=True)
class ParityOptions:
    """One comparison of a checkpoint's number format with float32."""

    model: str  # folder or hub id
    dtype: Width
    device: str
    text: Path
    windows: int | None  # at most; None is all of the text
    rows: int  # tokens computed at a time
    reference: ReferenceName
    limits: Limits
    json: Path | None
    plot: Path | None
