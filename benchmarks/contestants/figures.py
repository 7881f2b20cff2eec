"""From samples to figures: medians, ratios to ours, shares of the memory bound, and the bars. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.contestants.workload import Cell

OURS = {32: "ours float32", 16: "ours bfloat16", 8: "ours int8", 4: "ours int8"}

# What the project promises, each as a ratio within one interleaved run.
LEAST_RATIO = {32: 1.1, 16: 1.3, 8: 1.3}
LEAST_SHARE_OF_BOUND = 0.85
LEAST_INT8_OVER_REFERENCE = 12.0  # of the 124M at batch 1
LEAST_AGREEMENT = 0.9  # of a 32-bit peer's tokens with the reference's; below it, it runs another model


@dataclass(frozen=True, slots=True)
class Sample:
    """One contestant, one cell, one round."""

    group: int  # who was interleaved with whom
    round: int
    contestant: str
    cell: Cell
    new_tokens: int  # per sequence
    seconds: float  # prefill and all new tokens
    first_token_s: float  # the same prompts asked for one token
    others_share: float  # of the cores, taken by other processes meanwhile

    @property
    def tokens_per_s(self) -> float:
        return self.cell.batch * self.new_tokens / self.seconds

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.cell.batch * self.cell.prompt_tokens / self.first_token_s


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True, slots=True)
class Figure:
    """One contestant in one cell, over all rounds."""

    contestant: str
    bits: int
    cell: Cell
    rounds: int
    tokens_per_s: Spread
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    ours_over_it: float | None  # median over rounds of ours of the same width over it, interleaved with it
    share_of_bound: float | None  # at batch 1
    others_share: float

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"cell": str(self.cell), "batch": self.cell.batch, "context": self.cell.prompt_tokens}


def ratio(samples: Sequence[Sample], above: str, below: str, cell: Cell) -> float | None:
    """Median over rounds of the tokens/s of `above` over those of `below`, in the groups that have both."""
    rates = {(s.group, s.round, s.contestant): s.tokens_per_s for s in samples if s.cell == cell}
    quotients = [
        rate / rates[group, number, below]
        for (group, number, contestant), rate in rates.items()
        if contestant == above and (group, number, below) in rates
    ]
    return statistics.median(quotients) if quotients else None


def summarise(samples: Sequence[Sample], bits: dict[str, int], bounds: dict[int, float]) -> list[Figure]:
    """A figure per contestant and cell, in the order of `bits`; `bounds` has tokens/s at batch 1 per width."""
    figures = []
    for contestant in bits:
        for cell in sorted({s.cell for s in samples}):
            mine = [s for s in samples if s.contestant == contestant and s.cell == cell]
            if mine:
                figures.append(_figure(samples, mine, bits[contestant], bounds))
    return figures


def _figure(samples: Sequence[Sample], mine: Sequence[Sample], bits: int, bounds: dict[int, float]) -> Figure:
    contestant, cell = mine[0].contestant, mine[0].cell
    rate = Spread.of(s.tokens_per_s for s in mine)
    ours = OURS[bits]
    return Figure(
        contestant=contestant,
        bits=bits,
        cell=cell,
        rounds=len(mine),
        tokens_per_s=rate,
        prefill_tokens_per_s=statistics.median(s.prefill_tokens_per_s for s in mine),
        decode_tokens_per_s=_decode_tokens_per_s(mine),
        ours_over_it=ratio(samples, ours, contestant, cell) if contestant != ours else None,
        share_of_bound=rate.median / bounds[bits] if cell.batch == 1 and bits in bounds else None,
        others_share=statistics.median(s.others_share for s in mine),
    )


def _decode_tokens_per_s(mine: Sequence[Sample]) -> float | None:
    """Of the tokens after the first; None where noise left no time for them.

    The difference of medians, because after a long prompt it is small beside either time.
    """
    decode_s = statistics.median(s.seconds for s in mine) - statistics.median(s.first_token_s for s in mine)
    return mine[0].cell.batch * (mine[0].new_tokens - 1) / decode_s if decode_s > 0 else None


def best_peer(figures: Sequence[Figure], bits: int, cell: Cell) -> Figure | None:
    """The peer of this width that ours beats by least."""
    peers = [f for f in figures if f.bits == bits and f.cell == cell and f.ours_over_it is not None]
    return min(peers, key=lambda f: f.ours_over_it or 0.0, default=None)


def missed_bars(figures: Sequence[Figure], int8_over_reference: float | None, agreement: dict[str, float]) -> list[str]:
    """What is promised and was not measured or not reached, a sentence each; `agreement` has the 32-bit shares."""
    missed = []
    for bits, least in LEAST_RATIO.items():
        ours = [f for f in figures if f.contestant == OURS[bits]]
        if not ours:
            missed.append(f"{bits} bits: {OURS[bits]} was not measured")
        for figure in ours:
            peer = best_peer(figures, bits, figure.cell)
            if peer is None:
                missed.append(f"{bits} bits, {figure.cell}: no peer was measured")
            elif (peer.ours_over_it or 0.0) < least:
                missed.append(
                    f"{bits} bits, {figure.cell}: {peer.ours_over_it:.2f} x {peer.contestant}, wanted {least} x"
                )
        # The bound counts weights alone, so it is held against where keys and values hardly count.
        short = min((f for f in ours if f.share_of_bound is not None), key=lambda f: f.cell, default=None)
        if short is not None and (short.share_of_bound or 0.0) < LEAST_SHARE_OF_BOUND:
            missed.append(
                f"{bits} bits, {short.cell}: {short.share_of_bound:.0%} of the memory bound, "
                f"wanted {LEAST_SHARE_OF_BOUND:.0%}"
            )
    if int8_over_reference is not None and int8_over_reference < LEAST_INT8_OVER_REFERENCE:
        missed.append(
            f"int8 at batch 1: {int8_over_reference:.1f} x transformers float32, wanted {LEAST_INT8_OVER_REFERENCE} x"
        )
    for contestant, share in agreement.items():
        if share < LEAST_AGREEMENT:
            missed.append(f"{contestant}: {share:.0%} of its tokens are the reference's; does it run the same model?")
    return missed
