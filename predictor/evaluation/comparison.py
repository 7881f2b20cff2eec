"""Statistics of a candidate's logits against a reference's. Must not know where either comes from.

All of it is computed in fp64 from log-softmax, a few rows at a time: one window of 1,024 x 50,257 logits would take
412 MB in fp64, and several copies of that are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

# 32 x 50,257 x 8 B = 13 MB.
_ROWS = 32

# log10 of the bins of |logit difference|; what is smaller (0 too) or larger is counted in the first and the last.
_LOWEST, _HIGHEST, _BINS = -8, 3, 110


@dataclass(frozen=True, slots=True)
class Measures:
    """What a comparison came to. A NaN among the logits makes NaN of what depends on it."""

    perplexity: float
    reference_perplexity: float
    perplexity_loss: float  # perplexity / reference_perplexity - 1
    top1_agreement: float  # share of the positions; one with a NaN or an infinite logit never agrees
    kl: float  # mean over the positions of KL(reference || candidate), in nats
    kl_p99: float
    kl_max: float
    max_abs_logit_difference: float
    nan_count: int  # of the candidate's logits
    infinite_count: int  # likewise
    reference_nan_count: int


@dataclass(frozen=True, slots=True)
class Curves:
    """What a plot needs: means over the windows by position, and how often a logit differs by how much."""

    kl: Tensor  # [T]
    top1_agreement: Tensor  # [T]
    difference_edges: Tensor  # [bins + 1]
    difference_counts: Tensor  # [bins]


class _Rows(NamedTuple):
    """What is kept of each row of logits, on CPU."""

    kl: Tensor  # [T] fp64, nats
    agreement: Tensor  # [T] bool
    difference: Tensor  # [T] fp32, the largest |logit difference|
    loss: Tensor  # [T - 1] fp64, nats: a window's last row has no target
    reference_loss: Tensor  # [T - 1] fp64, likewise


def _joined(parts: Iterable[_Rows]) -> _Rows:
    return _Rows(*(torch.cat(field) for field in zip(*parts, strict=True)))


class Comparison:
    """Takes windows of one length and adds them up.

    Perplexity is over the predictions inside the windows: of a window of T tokens, T - 1 are predicted, each from
    those before it in the same window. The other measures are over all T positions.
    """

    def __init__(self) -> None:
        self._windows: list[_Rows] = []
        self._histogram = torch.zeros(_BINS, dtype=torch.int64)
        self._nan = self._infinite = self._reference_nan = 0

    def add(self, ids: list[int], candidate: Iterable[Tensor], reference: Iterable[Tensor]) -> None:
        """Add one window: its token ids, and the logits [R, V] of both in equal blocks of rows."""
        parts: list[_Rows] = []
        row = 0
        for ours, theirs in zip(candidate, reference, strict=True):
            for block, truth in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
                parts.append(self._compare(block, truth, ids[row + 1 : row + 1 + len(block)]))
                row += len(block)
        assert row == len(ids), f"{row} rows of logits for {len(ids)} tokens"
        self._windows.append(_joined(parts))

    def _compare(self, logits: Tensor, truth: Tensor, next_ids: list[int]) -> _Rows:
        difference = (logits - truth).abs()
        self._histogram += _histogram(difference).cpu()
        bad, reference_bad = _not_finite(logits), _not_finite(truth)
        self._nan += int(logits[bad].isnan().sum())
        self._infinite += int(logits[bad].isinf().sum())
        self._reference_nan += int(truth[reference_bad].isnan().sum())
        agreement = (logits.argmax(-1) == truth.argmax(-1)) & ~bad & ~reference_bad
        log_p = F.log_softmax(logits, -1, dtype=torch.float64)
        log_p_truth = F.log_softmax(truth, -1, dtype=torch.float64)
        # Rounding may leave -1e-17 of a divergence of 0.
        kl = F.kl_div(log_p, log_p_truth, reduction="none", log_target=True).sum(-1).clamp_(min=0)
        targets = torch.tensor(next_ids, dtype=torch.int64, device=logits.device)[:, None]
        loss, reference_loss = (-each[: len(targets)].gather(1, targets)[:, 0] for each in (log_p, log_p_truth))
        return _Rows(kl.cpu(), agreement.cpu(), difference.amax(-1).cpu(), loss.cpu(), reference_loss.cpu())

    def measures(self) -> Measures:
        """The statistics of everything added."""
        rows = _joined(self._windows)
        loss, reference_loss = rows.loss.mean(), rows.reference_loss.mean()
        return Measures(
            perplexity=loss.exp().item(),
            reference_perplexity=reference_loss.exp().item(),
            perplexity_loss=(loss - reference_loss).expm1().item(),
            top1_agreement=rows.agreement.double().mean().item(),
            kl=rows.kl.mean().item(),
            kl_p99=float(numpy.quantile(rows.kl.numpy(), 0.99, method="inverted_cdf")),
            kl_max=rows.kl.max().item(),
            max_abs_logit_difference=rows.difference.max().item(),
            nan_count=self._nan,
            infinite_count=self._infinite,
            reference_nan_count=self._reference_nan,
        )

    def curves(self) -> Curves:
        """The same by position, and the histogram."""
        return Curves(
            kl=torch.stack([window.kl for window in self._windows]).mean(0),
            top1_agreement=torch.stack([window.agreement for window in self._windows]).double().mean(0),
            difference_edges=torch.logspace(_LOWEST, _HIGHEST, _BINS + 1, dtype=torch.float64),
            difference_counts=self._histogram,
        )


def _not_finite(logits: Tensor) -> Tensor:
    """Which rows [R] hold a NaN or an infinity: either shows in the extremes, in one pass over the logits."""
    lowest, highest = logits.aminmax(dim=-1)
    return ~(lowest.isfinite() & highest.isfinite())


def _histogram(difference: Tensor) -> Tensor:
    """Counts [bins] of the differences by their logarithm; NaN goes with the largest."""
    place = difference.log10().sub_(_LOWEST).mul_(_BINS / (_HIGHEST - _LOWEST))
    return torch.bincount(place.nan_to_num_(nan=_BINS).clamp_(0, _BINS - 1).long().flatten(), minlength=_BINS)
