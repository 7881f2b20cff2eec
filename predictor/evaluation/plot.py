"""A comparison as a picture. Must not know how it came about."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from predictor.errors import ConfigurationError
from predictor.evaluation.report import Report

# More points than this by position are averaged: single positions are noise.
_POINTS = 64


def require_matplotlib() -> None:
    """Raise ConfigurationError now rather than after the comparison."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("--plot draws with matplotlib: pip install gpt2-predictor[train]") from error


def write_plot(report: Report, path: Path) -> None:
    """Draw KL and top-1 agreement by position in the window, and the logit differences, as a PNG."""
    from matplotlib.figure import Figure

    curves = report.curves
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    divergence, agreement, differences = figure.subplots(1, 3)
    positions, kl = _averaged(curves.kl)
    divergence.plot(positions, kl)
    divergence.axhline(report.limits.max_kl, color="tab:red", linestyle="--", label="limit of the mean")
    divergence.set(xlabel="position in the window", ylabel="KL to float32, nats", yscale="log")
    positions, share = _averaged(curves.top1_agreement)
    agreement.plot(positions, share)
    agreement.axhline(report.limits.min_top1, color="tab:red", linestyle="--", label="limit of the mean")
    agreement.set(xlabel="position in the window", ylabel="top-1 agreement")
    used = curves.difference_counts.nonzero()[:, 0]
    first, last = int(used.min()), int(used.max()) + 1
    counts, edges = curves.difference_counts[first:last], curves.difference_edges[first : last + 1]
    differences.stairs(counts.tolist(), edges.tolist(), fill=True)
    differences.set(xlabel="|logit difference|", ylabel="logits", xscale="log")
    for axes in (divergence, agreement):
        axes.legend()
    for axes in (divergence, agreement, differences):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report.title}; {report.coverage}", fontsize="medium")
    figure.savefig(path, format="png")


def _averaged(curve: Tensor) -> tuple[list[float], list[float]]:
    """At most _POINTS means over equal stretches of the window, and the positions in their middle."""
    stretches = torch.arange(len(curve), dtype=torch.float64).tensor_split(_POINTS)
    parts = curve.tensor_split(_POINTS)
    return (
        [stretch.mean().item() for stretch in stretches if len(stretch)],
        [part.mean().item() for part in parts if len(part)],
    )
