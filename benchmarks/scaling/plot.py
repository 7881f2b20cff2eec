"""What a scenario looks like over time: arrivals, requests in the system, replicas, latencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling.scenarios import Scenario
from benchmarks.scaling.simulation import Outcome

TITLES = {
    "burst": "A burst of 2.5 times one replica's capacity",
    "ramp": "A ramp to 3 times one replica's capacity",
    "zero": "From zero, and back",
    "delay": "The ramp without a scale-down delay, and with one",
}


def plot(found: Sequence[tuple[Scenario, Outcome]], out: Path) -> None:
    """Scenarios of one name, one column each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(4, len(found), figsize=(7.5 * len(found), 11), sharex="col", squeeze=False)
    for column, (scenario, outcome) in zip(panels.T, found, strict=True):
        _column(column, scenario, outcome)
        column[0].set_title(scenario.system.name)
        column[-1].set_xlabel("minutes")
    canvas.suptitle(f"{TITLES[found[0][0].name]} (simulated)")
    canvas.tight_layout()
    canvas.savefig(out, dpi=100)
    pyplot.close(canvas)


def _column(panels: Sequence[Any], scenario: Scenario, outcome: Outcome) -> None:
    rate, system, replicas, latency = panels
    moments = outcome.moments
    minutes = [moment.at_s / 60 for moment in moments]
    wanted = [scenario.load.rate(moment.at_s) for moment in moments]
    served = [moment.ready * scenario.system.capacity for moment in moments]
    rate.step(minutes, served, where="post", color="tab:green", label="capacity of the ready replicas")
    rate.plot(minutes, wanted, color="black", label="arrivals")
    rate.set_ylabel("requests/s")
    rate.set_ylim(0, 1.3 * max(*wanted, *served))  # room for the legend

    running, waiting = [moment.running for moment in moments], [moment.waiting for moment in moments]
    system.stackplot(minutes, running, waiting, colors=("tab:blue", "tab:orange"), labels=("running", "waiting"))
    system.set_ylabel("requests in the system")

    replicas.step(minutes, [m.desired for m in moments], where="post", color="tab:red", linestyle="--", label="wanted")
    replicas.step(minutes, [m.ready for m in moments], where="post", color="tab:green", label="ready")
    replicas.set_ylabel("replicas")
    replicas.set_ylim(0, scenario.system.deployment.max_replicas + 1.2)

    answers = outcome.with_status(200)
    came = np.array([answer.request.at_s / 60 for answer in answers])
    took = np.array([answer.latency_s for answer in answers])
    latency.scatter(came, took, s=2, color="tab:blue", alpha=0.3, linewidths=0, label="answered")
    lost = [answer for answer in outcome.answers if answer.status != 200]
    if lost:
        latency.scatter(
            [answer.request.at_s / 60 for answer in lost],
            [answer.latency_s for answer in lost],
            s=4,
            color="tab:red",
            label="503 or 504",
        )
    latency.set_ylabel("latency, s, by arrival")
    latency.set_ylim(0, None)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.legend(loc="upper right", fontsize=8, markerscale=3)
