"""A comparison told: a table for people, an object for JSON. Must not know models."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from predictor.evaluation.comparison import Curves, Measures
from predictor.evaluation.options import Limits, ReferenceName
from predictor.evaluation.verdicts import Verdict, judge


@dataclass(frozen=True, slots=True)
class Report:
    """One comparison and how it was made."""

    model: str
    dtype: str
    device: str
    reference: ReferenceName
    context: int  # the model's, in tokens
    windows: int
    window_tokens: int  # the context, or all of a shorter text
    tokens_left_out: int  # at the end of the text
    rows: int  # tokens computed at a time
    duration_s: float
    measures: Measures
    limits: Limits
    curves: Curves

    @property
    def verdicts(self) -> list[Verdict]:
        return judge(self.measures, self.limits)

    @property
    def failures(self) -> list[str]:
        """What is past its limit; empty when the number format is near enough."""
        return [verdict.failure for verdict in self.verdicts if verdict.failure is not None]

    @property
    def title(self) -> str:
        name = "float32" if self.reference == "predictor" else f"{self.reference}' float32"
        return f"{self.model}: {self.dtype} against {name} on {self.device}"

    @property
    def coverage(self) -> str:
        """How much was compared, in words."""
        windows = f"{self.windows:,} window{'s' if self.windows > 1 else ''} of {self.window_tokens:,} tokens"
        if self.window_tokens < self.context:
            windows += f" (the text is shorter than the context of {self.context:,})"
        return f"{windows}, {self.rows:,} at a time; {self.tokens_left_out:,} left out; {self.duration_s:.1f} s"


def told(report: Report) -> Group:
    """What was compared, and every measure with its limit."""
    measures = report.measures
    shown = Table("measure")
    for heading in (report.dtype, "limit", ""):
        shown.add_column(heading, justify="right")
    shown.add_row("perplexity", f"{measures.perplexity:.6g}")
    shown.add_row("perplexity of the reference", f"{measures.reference_perplexity:.6g}")
    for verdict in report.verdicts:
        outcome = Text("ok", "green") if verdict.failure is None else Text("FAILED", "red")
        shown.add_row(verdict.name, verdict.value, verdict.limit, outcome)
    shown.add_row("KL, 99th percentile", f"{measures.kl_p99:.5g}")
    shown.add_row("KL, largest", f"{measures.kl_max:.5g}")
    shown.add_row("logit difference, largest", f"{measures.max_abs_logit_difference:.5g}")
    return Group(Text(report.title), shown, Text(report.coverage))


def as_json(report: Report) -> dict[str, Any]:
    """All of it but the curves; a number that is NaN or infinite is null, for JSON has no such thing."""
    measures = {name: value if math.isfinite(value) else None for name, value in asdict(report.measures).items()}
    apart = ("measures", "limits", "curves")
    how = {each.name: getattr(report, each.name) for each in fields(report) if each.name not in apart}
    return how | measures | {
        "limits": asdict(report.limits), "passed": not report.failures, "failures": report.failures,
    }  # fmt: skip
