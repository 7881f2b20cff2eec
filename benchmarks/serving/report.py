"""The figures as a terminal's tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.figures import SYSTEMS, Figure, Percentiles, SchedulerFigure, System, Verdict

COLOURS = {"server": "tab:red", "streams": "tab:blue", "engine": "black"}


def print_tables(
    console: Console,
    figures: Sequence[Figure],
    scheduler: Sequence[SchedulerFigure],
    facts: Mapping[str, Any],
    told: Sequence[Verdict],
    title: str,
) -> None:
    for kind, heading in (("clients", "clients that wait for their answers"), ("rate", "Poisson arrivals")):
        mine = [figure for figure in figures if figure.load.kind == kind]
        if mine:
            console.print(_figures(mine, f"{title}: {heading}"))
    console.print("\n".join(f"{name}: {meaning}" for name, meaning in SYSTEMS.items()), highlight=False)
    table = Table(title="Scheduler, µs a step", caption="its part of a step; the runner computes nothing")
    for column in ("sequences", "median", "p99"):
        table.add_column(column, justify="right")
    for each in scheduler:
        table.add_row(str(each.sequences), f"{each.median_us:.0f}", f"{each.p99_us:.0f}")
    console.print(table)
    table = Table(title="Around it")
    table.add_column("")
    table.add_column("", justify="right", overflow="fold")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
    console.print(table)
    for verdict in told:
        console.print(f"{'met' if verdict.met else 'MISSED'}: {verdict.sentence}", highlight=False)


def _figures(figures: Sequence[Figure], title: str) -> Table:
    table = Table(
        title=title,
        caption="ms, p50 / p99. TTFT: of requests for one token. ITL: (latency of N tokens - that) / (N - 1). "
        "added: to the engine's time per token, median of the rounds. CPU: of its process, per token",
    )
    for column in ("load", "system"):
        table.add_column(column)
    for column in ("tokens/s", "min-max", "added", "CPU", "TTFT", "ITL", "latency"):
        table.add_column(column, justify="right")
    for figure in figures:
        rate = figure.tokens_per_s
        table.add_row(
            str(figure.load),
            figure.system,
            _number(rate.median),
            f"{_number(rate.min)}-{_number(rate.max)}",
            "" if figure.over_engine is None else f"{figure.over_engine - 1:+.1%}",
            f"{figure.cpu_ms_per_token:.2f}",
            _pair(figure.first_token_ms),
            _pair(figure.inter_token_ms),
            _pair(figure.latency_ms),
            end_section=figure is [each for each in figures if each.load == figure.load][-1],
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f}"


def _pair(percentiles: Percentiles | None) -> str:
    return "" if percentiles is None else f"{_number(percentiles.p50)} / {_number(percentiles.p99)}"


def plot(figures: Sequence[Figure], out: Path, title: str) -> None:
    """Tokens/s and latencies against the number of clients, and against the rate of arrivals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("clients", "rate") if any(figure.load.kind == kind for figure in figures)]
    labels = {"clients": "clients that wait for their answers", "rate": "Poisson arrivals, requests/s"}
    canvas, panels = pyplot.subplots(len(kinds), 3, figsize=(16, 4.6 * len(kinds)), squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        mine = [figure for figure in figures if figure.load.kind == kind]
        ticks = sorted({figure.load.value for figure in mine})
        for system in SYSTEMS:
            own = [figure for figure in mine if figure.system == system]
            _rates(row[0], system, own)
            _percentiles(row[1], system, own, lambda figure: figure.latency_ms)
            _percentiles(row[2], system, own, lambda figure: figure.first_token_ms)
        for panel, measure in zip(row, ("tokens/s", "latency, ms", "time to first token, ms"), strict=True):
            panel.set(xlabel=labels[kind], ylabel=measure, xscale="log", ylim=(0, None))
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    canvas.suptitle(title)
    canvas.tight_layout()
    canvas.savefig(out, dpi=110)
    pyplot.close(canvas)


def _rates(panel: Any, system: System, figures: Sequence[Figure]) -> None:
    points = [(figure.load.value, figure.tokens_per_s) for figure in figures]
    if points:
        x = [value for value, _ in points]
        panel.plot(x, [rate.median for _, rate in points], marker="o", color=COLOURS[system], label=system)
        panel.fill_between(
            x, [rate.min for _, rate in points], [rate.max for _, rate in points], color=COLOURS[system], alpha=0.15
        )


def _percentiles(
    panel: Any, system: System, figures: Sequence[Figure], of: Callable[[Figure], Percentiles | None]
) -> None:
    points = [(figure.load.value, found) for figure in figures if (found := of(figure)) is not None]
    for name, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
        if points:
            y = [getattr(found, name) for _, found in points]
            x = [value for value, _ in points]
            panel.plot(x, y, style, marker=".", color=COLOURS[system], label=f"{system} {name}")
