"""From samples to figures: rates, percentiles, what the server adds, and the bars. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.contestants.figures import Spread
from benchmarks.serving.load import Run, Served

System = Literal["server", "streams", "engine"]
SYSTEMS: dict[System, str] = {
    "server": "the server over HTTP",
    "streams": "the engine behind its thread and token streams, each token as it comes",
    "engine": "the engine alone, stepped in a loop",
}

# What the project promises.
BAR_CLIENTS = BAR_SEQUENCES = 32
MOST_OVER_ENGINE = 1.10
MOST_SCHEDULER_S = 0.2e-3
# Above this, who should be asleep takes enough to be seen in the figures of whom it is compared with.
MOST_IDLE_SHARE = 0.02


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """So many clients that wait for their answers, or so many requests a second that come by chance."""

    kind: Literal["clients", "rate"]
    value: float

    def __str__(self) -> str:
        return (
            f"{self.value:g} client{'' if self.value == 1 else 's'}" if self.kind == "clients" else f"{self.value:g}/s"
        )


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor seconds while a sample was taken."""

    seconds: float  # it took
    own_s: float  # of the process that answered
    client_s: float  # of the process that asked, which is the server's burden and not the engine's
    idle_s: float  # of the process that was not asked
    others_s: float  # of everybody else, a hypervisor's other guests included


@dataclass(frozen=True, slots=True)
class Sample:
    """One system under one load in one round."""

    round: int
    system: System
    load: Load
    run: Run
    firsts: Sequence[Served]  # the requests for one token
    usage: Usage

    @property
    def tokens_per_s(self) -> float:
        return self.run.tokens / self.run.seconds

    @property
    def all_tokens(self) -> int:
        """With those of requests for one token."""
        return self.run.tokens + sum(each not in self.run.served for each in self.firsts)

    @property
    def whole(self) -> list[Served]:
        """The requests for more than one token."""
        return [each for each in self.run.served if each.ask.new_tokens > 1]

    def inter_token_s(self) -> list[float]:
        """(latency of N tokens - latency of one) / (N - 1): the one of the same prompt in the same company where that
        was asked, else the median one."""
        if not self.firsts:
            return []
        by_seed = {each.ask.seed: each.latency_s for each in self.firsts}
        paired = [each for each in self.whole if each.ask.seed in by_seed]
        usual_s = statistics.median(by_seed.values())
        return [
            (each.latency_s - by_seed.get(each.ask.seed, usual_s)) / (each.ask.new_tokens - 1)
            for each in paired or self.whole
        ]

    def streamed_inter_token_s(self) -> list[float]:
        return [
            (each.latency_s - each.first_token_s) / (each.ask.new_tokens - 1)
            for each in self.whole
            if each.first_token_s is not None
        ]


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def ms(cls, seconds: Iterable[float]) -> Percentiles | None:
        values = list(seconds)
        if not values:
            return None
        p50, p90, p99 = (float(each) * 1e3 for each in np.percentile(values, (50, 90, 99)))
        return cls(p50, p90, p99, len(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """One system under one load, over all rounds; percentiles are over all requests of all rounds."""

    system: System
    load: Load
    rounds: int
    tokens_per_s: Spread
    requests_per_s: float
    latency_ms: Percentiles | None
    first_token_ms: Percentiles | None  # of requests for one token
    inter_token_ms: Percentiles | None  # from the difference to those
    streamed_first_token_ms: Percentiles | None  # as tokens came, where they come one by one
    streamed_inter_token_ms: Percentiles | None
    over_engine: float | None  # its time per token / the engine's: the median over rounds
    over_streams: float | None
    cpu_ms_per_token: float  # processor time of its process, prompts and requests for one token included
    client_share: float  # processor seconds per second, as `Usage` has them
    idle_share: float
    others_share: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"load": str(self.load), self.load.kind: self.load.value}


def summarise(samples: Sequence[Sample]) -> list[Figure]:
    """A figure per load and system, in the order of `Load` and `SYSTEMS`."""
    figures = []
    for load in sorted({sample.load for sample in samples}):
        for system in SYSTEMS:
            mine = [sample for sample in samples if sample.load == load and sample.system == system]
            if mine:
                figures.append(_figure(samples, mine))
    return figures


def _figure(samples: Sequence[Sample], mine: Sequence[Sample]) -> Figure:
    system, load = mine[0].system, mine[0].load
    usages = [sample.usage for sample in mine]
    seconds = sum(each.seconds for each in usages)
    streamed = [each.first_token_s for sample in mine for each in sample.run.served if each.first_token_s is not None]
    return Figure(
        system=system,
        load=load,
        rounds=len(mine),
        tokens_per_s=Spread.of(sample.tokens_per_s for sample in mine),
        requests_per_s=statistics.median(len(sample.run.served) / sample.run.seconds for sample in mine),
        latency_ms=Percentiles.ms(each.latency_s for sample in mine for each in sample.whole),
        first_token_ms=Percentiles.ms(each.latency_s for sample in mine for each in sample.firsts),
        inter_token_ms=Percentiles.ms(each for sample in mine for each in sample.inter_token_s()),
        streamed_first_token_ms=Percentiles.ms(streamed),
        streamed_inter_token_ms=Percentiles.ms(each for sample in mine for each in sample.streamed_inter_token_s()),
        over_engine=ratio(samples, load, system, "engine"),
        over_streams=ratio(samples, load, system, "streams"),
        cpu_ms_per_token=1e3 * sum(each.own_s for each in usages) / sum(sample.all_tokens for sample in mine),
        client_share=sum(each.client_s for each in usages) / seconds,
        idle_share=sum(each.idle_s for each in usages) / seconds,
        others_share=sum(each.others_s for each in usages) / seconds,
    )


def ratio(samples: Sequence[Sample], load: Load, system: System, below: System) -> float | None:
    """Median over rounds of the time per token of `system` over that of `below`; None where that was not measured.

    Under chance arrivals the time is mostly waiting for requests, so there is none.
    """
    rates = {(s.round, s.system): s.tokens_per_s for s in samples if s.load == load}
    quotients = [
        rates[number, below] / rate
        for (number, each), rate in rates.items()
        if each == system and (number, below) in rates
    ]
    return statistics.median(quotients) if quotients and system != below and load.kind == "clients" else None


@dataclass(frozen=True, slots=True)
class SchedulerFigure:
    sequences: int
    steps: int
    median_us: float
    p99_us: float

    @classmethod
    def of(cls, sequences: int, times_s: Sequence[float]) -> SchedulerFigure:
        median, p99 = (float(each) * 1e6 for each in np.percentile(times_s, (50, 99)))
        return cls(sequences, len(times_s), median, p99)


@dataclass(frozen=True, slots=True)
class Verdict:
    sentence: str
    met: bool


def verdicts(figures: Sequence[Figure], scheduler: Sequence[SchedulerFigure]) -> list[Verdict]:
    """What is promised, and whether it was measured and holds."""
    told = []
    for figure in figures:
        if figure.load == Load("clients", BAR_CLIENTS) and figure.system == "server" and figure.over_engine is not None:
            added = figure.over_engine - 1
            told.append(
                Verdict(
                    f"at {figure.load} the server adds {added:+.1%} to the engine's time per token "
                    f"(bar: {MOST_OVER_ENGINE - 1:+.0%})",
                    figure.over_engine <= MOST_OVER_ENGINE,
                )
            )
    if not told:
        told.append(Verdict(f"what the server adds at {BAR_CLIENTS} clients was not measured", False))
    for each in scheduler:
        if each.sequences == BAR_SEQUENCES:
            told.append(
                Verdict(
                    f"with {each.sequences} sequences the scheduler takes {each.median_us / 1e3:.3f} ms a step "
                    f"(p99 {each.p99_us / 1e3:.3f} ms; bar: {MOST_SCHEDULER_S * 1e3:g} ms)",
                    each.median_us * 1e-6 < MOST_SCHEDULER_S,
                )
            )
    idle = max((figure.idle_share for figure in figures), default=0.0)
    told.append(
        Verdict(
            f"whoever was not measured took at most {idle:.1%} of a core (bar: {MOST_IDLE_SHARE:.0%})",
            idle <= MOST_IDLE_SHARE,
        )
    )
    return told
