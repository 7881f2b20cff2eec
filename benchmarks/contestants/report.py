"""The figures as a terminal's tables and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.contestants.contest import ORACLE_TOKENS, Account
from benchmarks.contestants.figures import Figure
from benchmarks.contestants.workload import Cell

QUIET_SHARE = 0.05  # of the cores; past it figures are of the other processes too
CLASSES = {"32 bits": (32,), "16 bits": (16,), "8 bits, and 4": (8, 4)}


def print_tables(
    console: Console, figures: Sequence[Figure], accounts: Sequence[Account], needed: Mapping[int, float], title: str
) -> None:
    """`needed` has the bytes of weights, and of keys and values in use, per width."""
    cells = sorted({figure.cell for figure in figures})
    for heading, widths in CLASSES.items():
        mine = [figure for figure in figures if figure.bits in widths]
        if mine:
            console.print(_rates(mine, cells, f"{title}, {heading}: tokens/s (ours / it)"))
    console.print(_accounts(accounts, needed, title))
    busiest = max(figures, key=lambda figure: figure.others_share)
    if busiest.others_share > QUIET_SHARE:
        console.print(
            f"Other processes took up to {busiest.others_share:.0%} of the cores ({busiest.contestant}, "
            f"{busiest.cell}): measure again on a machine left alone."
        )


def _rates(figures: Sequence[Figure], cells: Sequence[Cell], title: str) -> Table:
    table = Table(title=title, caption="columns: batch x prompt tokens; medians; prefill counted")
    table.add_column("", no_wrap=True)
    for cell in cells:
        table.add_column(str(cell), justify="right")
    table.add_column("of the bound", justify="right")
    for name in dict.fromkeys(figure.contestant for figure in figures):
        own = {figure.cell: figure for figure in figures if figure.contestant == name}
        shares = [figure.share_of_bound for cell, figure in sorted(own.items()) if figure.share_of_bound is not None]
        table.add_row(name, *(_rate(own.get(cell)) for cell in cells), f"{shares[0]:.0%}" if shares else "")
    return table


def _rate(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    rate = f"{figure.tokens_per_s.median:,.{0 if figure.tokens_per_s.median >= 100 else 1}f}"
    return rate if figure.ours_over_it is None else f"{rate} ({figure.ours_over_it:.2f})"


def _accounts(accounts: Sequence[Account], needed: Mapping[int, float], title: str) -> Table:
    table = Table(title=f"{title}: loading and memory")
    for column in ("", "load, s", "peak, GB", "of weights + KV", "idle CPU", "tokens agree", "notes"):
        table.add_column(column, justify="left" if column in ("", "notes") else "right", overflow="fold")
    for account in accounts:
        ready = account.ready
        agreeing, idle = account.agreeing_tokens, account.idle_share
        table.add_row(
            account.contestant.name,
            f"{ready.load_s:.1f}" if ready else "-",
            f"{account.peak_bytes / 1e9:.2f}" if account.peak_bytes else "-",
            f"{account.peak_bytes / needed[account.contestant.bits]:.2f}" if account.peak_bytes else "-",
            "-" if idle is None else f"{idle:.0%}",
            "-" if agreeing is None else f"{agreeing} of {ORACLE_TOKENS}",
            escape(account.reason or ""),
        )
    return table


class _Row(NamedTuple):
    """A row of panels: what it shows over what."""

    label: str
    scale: Literal["log", "linear"]
    belongs: Callable[[Figure], bool]
    x: Callable[[Figure], float]
    y: Callable[[Figure], float | None]


def plot(figures: Sequence[Figure], out: Path, title: str) -> None:
    """Per width: tokens/s against batch at the shortest prompt, and decode tokens/s against context at batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    shortest = min(figure.cell.prompt_tokens for figure in figures)
    rows = (
        _Row(
            f"batch (prompts of {shortest}, prefill counted)",
            "log",
            belongs=lambda figure: figure.cell.prompt_tokens == shortest,
            x=lambda figure: figure.cell.batch,
            y=lambda figure: figure.tokens_per_s.median,
        ),
        _Row(
            "prompt tokens (batch 1, decode alone)",
            "linear",
            belongs=lambda figure: figure.cell.batch == 1,
            x=lambda figure: figure.cell.prompt_tokens,
            y=lambda figure: figure.decode_tokens_per_s,
        ),
    )
    canvas, panels = pyplot.subplots(len(rows), len(CLASSES), figsize=(15, 9), squeeze=False)
    for row, line in zip(rows, panels, strict=True):
        for panel, (heading, widths) in zip(line, CLASSES.items(), strict=True):
            mine = [figure for figure in figures if figure.bits in widths and row.belongs(figure)]
            for name in dict.fromkeys(figure.contestant for figure in mine):
                own = [figure for figure in mine if figure.contestant == name and row.y(figure) is not None]
                points = sorted((row.x(figure), row.y(figure)) for figure in own)
                ours = name.startswith("ours")
                style = {"color": "black", "linewidth": 2.5} if ours else {"linewidth": 1.2}
                panel.plot(*zip(*points, strict=True), marker="o", label=name, **style)
            panel.set(xlabel=row.label, ylabel="tokens/s", title=heading, xscale=row.scale, yscale="log")
            ticks = sorted({row.x(figure) for figure in mine})
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.xaxis.set_minor_locator(ticker.NullLocator())
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:,g}")
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
            panel.grid(alpha=0.3)
            if mine:
                panel.legend(fontsize=7)
    canvas.suptitle(title)
    canvas.tight_layout()
    canvas.savefig(out, dpi=110)
    pyplot.close(canvas)
