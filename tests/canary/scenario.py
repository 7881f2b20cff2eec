"""One rollout from `start` to its end, by the real controller, under load: what the tests assert and the plot shows."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.canary.child import Child
from tests.canary.cluster import HEALTHY, Cluster
from tests.canary.load import Load, Outcome

STABLE, CANARY = "gpt2-predictor:1", "gpt2-predictor:2"

INTERVAL_S = 1

# A load that two predictors on two cores answer with time to spare: 8 tokens take some 10 ms.
RATE = 50.0
LENGTHS = (4, 8, 12)

# The defaults but for what a test cannot wait for. A margin of 10 points in errors is proved by some 80 answers without
# one, which a canary with 10% of 50 requests per second has had after 16 s; the default of 2 points takes 450 answers.
RULES: dict[str, Any] = {
    "min_step_s": 3,
    "min_samples": 30,
    "max_error_increase": 0.1,
    "max_slow_increase": 0.2,
    "ready_timeout_s": 60,
}


def start(cluster: Cluster, image: str = CANARY) -> None:
    """`predictor rollout start`, to its end."""
    arguments = ["rollout", "start", "--image", image, "--percent", "10", "--prometheus", cluster.prometheus.url]
    child = cluster.command(*arguments, log="start.log")
    assert child.process.wait(60) == 0, child.log.read_text()


def watch(cluster: Cluster, log: str = "watch.log", **rules: Any) -> Child:
    """`predictor rollout watch` as a process; `rules` over those of the tests."""
    path = cluster.folder / "rules.yaml"
    path.write_text(json.dumps(RULES | rules))  # JSON is YAML
    arguments = ["rollout", "watch", "--interval", str(INTERVAL_S), "--rules", str(path)]
    return cluster.command(*arguments, "--prometheus", cluster.prometheus.url, log=log)


def shares(cluster: Cluster, number: int = 2) -> list[int]:
    """The Nth revision's percent of the traffic, each change of it, from its first share on."""
    name = cluster.name(number)
    all_of_them = [weights.get(name, 0) for _, weights in cluster.controller.shifts]
    return [share for share, before in zip(all_of_them, [0, *all_of_them], strict=False) if share != before]


@dataclass(frozen=True, slots=True)
class Run:
    """What happened. Times are seconds since the load began."""

    exit_code: int | None  # the watcher's
    shares: list[tuple[float, int]]  # the canary's percent, from then on
    stable: list[Outcome]
    canary: list[Outcome]
    decisions: list[str]  # the watcher's lines
    reasons: list[str]  # of the Kubernetes Events

    @property
    def steps(self) -> list[int]:
        """The canary's shares, one after the other."""
        return [percent for _, percent in self.shares]

    def bad_traffic_s(self, bad: list[Outcome]) -> float:
        """From the first bad answer of the canary until it has no more traffic: Envoy's weight is 0, and no answer
        comes from it any more.
        """
        back_s = next(at for at, percent in self.shares if percent == 0)
        return max(back_s, *(each.answered_s for each in self.canary)) - min(each.answered_s for each in bad)


def run(folder: Path, command: list[str], limit_s: float = 180, **rules: Any) -> Run:
    """Roll out a version that `command` starts, and watch until that has ended."""
    with Cluster(folder, {STABLE: HEALTHY, CANARY: command}) as cluster:
        cluster.serve(STABLE)
        with Load(cluster.envoy.url, RATE, LENGTHS) as load:
            began = time.monotonic()
            time.sleep(3)  # some history of the stable version alone
            start(cluster)
            watcher = watch(cluster, **rules)
            cluster.wait_until(lambda: watcher.exit_code is not None, "the rollout ends", limit_s)
            time.sleep(2)  # what comes after belongs to the stable version, or to the promoted one, alone
        name = cluster.name(2)
        outcomes = [each.moved(-began) for each in load.outcomes]
        assert len(outcomes) == load.sent
        return Run(
            exit_code=watcher.exit_code,
            shares=[(at - began, weights.get(name, 0)) for at, weights in cluster.controller.shifts if at > began],
            stable=[each for each in outcomes if each.revision != name],
            canary=[each for each in outcomes if each.revision == name],
            decisions=watcher.log.read_text().splitlines(),
            reasons=[each["reason"] for each in cluster.events],
        )
