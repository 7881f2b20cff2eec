"""Canary rollouts measured: `python -m benchmarks.canary`, some three minutes a round.

A healthy version, one with 20% errors and one three times as slow are rolled out by the real controller behind a real
Envoy (tests/canary says what is a stub). Written are how long bad traffic lasted, what clients of the stable version
noticed, and the plot of the first round: shares, answers and latencies over time.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import machine
from tests.canary.cluster import HEALTHY, faulty
from tests.canary.load import Outcome
from tests.canary.scenario import INTERVAL_S, LENGTHS, RATE, RULES, Run, run

RESULTS = Path(__file__).parent / "results"
VERSIONS = {"healthy": HEALTHY, "20% errors": faulty("errors"), "3 x slower": faulty("slow")}
COLOURS = {"stable": "tab:blue", "canary": "tab:orange"}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rollouts of each version.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for canary.json and canary.png.")] = RESULTS,
) -> None:
    """Roll out each version `rounds` times, print the figures and write them."""
    seen: dict[str, list[Run]] = {name: [] for name in VERSIONS}
    loads = []
    for number in range(rounds):
        for name, command in VERSIONS.items():
            with tempfile.TemporaryDirectory(prefix="canary-") as folder:
                seen[name].append(run(Path(folder), command))
            loads.append(os.getloadavg()[0])
            print(f"round {number + 1}, {name}: {seen[name][-1].steps}")
    report = {
        "machine": machine.describe() | {"load_average_min_max": [round(min(loads), 1), round(max(loads), 1)]},
        "load": {"requests_per_s": RATE, "new_tokens": LENGTHS},
        "interval_s": INTERVAL_S,
        "rules": RULES,
        "versions": {name: [figures(name, each) for each in runs] for name, runs in seen.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "canary.json").write_text(json.dumps(report, indent=1) + "\n")
    plot({name: runs[0] for name, runs in seen.items()}, out / "canary.png")
    Console().print(table(report["versions"]))


def figures(name: str, seen: Run) -> dict[str, Any]:
    """One rollout in numbers; seconds are since its load began."""
    bad = {"20% errors": [each for each in seen.canary if not each.good], "3 x slower": seen.canary}.get(name, [])
    return {
        "shares": [[round(at, 2), percent] for at, percent in seen.shares],
        "exit_code": seen.exit_code,
        "bad_traffic_s": round(seen.bad_traffic_s(bad), 2) if bad else None,
        "bad_answers": len(bad),
        "stable": client_view(seen.stable),
        "canary": client_view(seen.canary),
        "decisions": [line for line in seen.decisions if " hold: " not in line],
    }


def client_view(outcomes: list[Outcome]) -> dict[str, Any]:
    """What the clients of one version saw, at the far side of Envoy."""
    ms = [1000 * each.seconds for each in outcomes if each.good]
    cuts = statistics.quantiles(ms, n=20) if len(ms) > 1 else [0.0] * 19
    failed = sum(not each.good for each in outcomes)
    return {"answers": len(outcomes), "failed": failed, "p50_ms": round(cuts[9], 1), "p95_ms": round(cuts[18], 1)}


def table(versions: dict[str, list[dict[str, Any]]]) -> Table:
    shown = Table(title="Rollouts", caption="bad traffic: from the canary's first bad answer until it gets no more")
    for column in ("version", "shares", "bad traffic", "bad answers", "failed of the stable version's"):
        shown.add_column(column)
    for name, runs in versions.items():
        for each in runs:
            steps = " -> ".join(str(percent) for _, percent in each["shares"])
            lasted = "" if each["bad_traffic_s"] is None else f"{each['bad_traffic_s']:.1f} s"
            lost = f"{each['stable']['failed']} of {each['stable']['answers']}"
            shown.add_row(name, steps, lasted, str(each["bad_answers"]), lost)
    return shown


def plot(seen: dict[str, Run], path: Path) -> None:
    """A column per version: its share, its answers and failures per second, every answer's latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, len(seen), figsize=(5 * len(seen), 8), sharex="col", squeeze=False)
    for column, (name, each) in enumerate(seen.items()):
        share, answers, latency = axes[:, column]
        ends_s = max(outcome.answered_s for outcome in each.stable + each.canary)
        times, percents = zip((0.0, 0), *each.shares, (ends_s, each.steps[-1]), strict=True)
        share.step(times, percents, where="post", color=COLOURS["canary"])
        share.set_title(name)
        share.set_ylim(-5, 105)
        for version, outcomes in (("stable", each.stable), ("canary", each.canary)):
            bins = range(int(ends_s) + 2)
            good = [outcome.answered_s for outcome in outcomes if outcome.good]
            failed = [outcome.answered_s for outcome in outcomes if not outcome.good]
            answers.hist(good, bins, histtype="step", color=COLOURS[version], label=f"{version}, good")
            if failed:
                answers.hist(failed, bins, color="tab:red", label=f"{version}, failed")
            milliseconds = [1000 * outcome.seconds for outcome in outcomes]
            sent = [outcome.sent_s for outcome in outcomes]
            latency.scatter(sent, milliseconds, s=3, color=COLOURS[version], label=version)
        latency.set_yscale("log")
        latency.set_xlabel("seconds")
        answers.legend(fontsize="small")
    for row, label in enumerate(("canary's share, %", "answers per second", "latency, ms")):
        axes[row, 0].set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
