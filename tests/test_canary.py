"""Canaries that decide, for real: `predictor rollout` as processes, two predictors behind Envoy, Prometheus, load.

What is a stub, and how it differs from a cluster, is told in tests/canary. `benchmarks/canary.py` keeps the numbers of
the first three in benchmarks/results.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.canary.child import Child
from tests.canary.cluster import FLAGS, HEALTHY, SERVE, Cluster, faulty
from tests.canary.load import Load, told
from tests.canary.scenario import CANARY, LENGTHS, RATE, STABLE, Run, run, shares, start, watch

# The issue's: bad traffic of a canary that is rolled back.
MOST_BAD_TRAFFIC_S = 10

# For the tests that are not about evidence: two steps, each decided by a few answers.
QUICK: dict[str, Any] = {
    "steps": [10, 50, 100],
    "min_samples": 10,
    "min_step_s": 1,
    "max_error_increase": 0.5,
    "max_slow_increase": 0.8,
    "max_ttft_ratio": 5,
    "max_itl_ratio": 5,
}

pytestmark = pytest.mark.timeout(300)


def ended_in(watcher: Child, exit_code: int, limit_s: float = 120) -> None:
    try:
        watcher.process.wait(limit_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the watcher has not ended:\n{watcher.log.read_text()}")
    assert watcher.exit_code == exit_code, watcher.log.read_text()


def show(name: str, seen: Run) -> None:
    print(f"{name}: {seen.steps}, stable {told(seen.stable)}, canary {told(seen.canary)}")
    print("\n".join(seen.decisions))


def test_a_healthy_canary_reaches_all_of_the_traffic(tmp_path: Path) -> None:
    seen = run(tmp_path, HEALTHY)
    show("healthy", seen)
    assert seen.steps == [10, 25, 50, 100]
    assert seen.exit_code == 0
    assert all(each.good for each in seen.stable + seen.canary)
    assert Counter(seen.reasons)["RolloutPromoted"] == 1


def test_a_canary_with_errors_is_rolled_back(tmp_path: Path) -> None:
    seen = run(tmp_path, faulty("errors"))
    bad = [each for each in seen.canary if not each.good]
    show(f"20% errors: {seen.bad_traffic_s(bad):.1f} s of bad traffic", seen)
    assert seen.steps == [10, 0]
    assert seen.exit_code == 1
    assert {each.status for each in bad} == {500}
    assert all(each.good for each in seen.stable)
    assert seen.bad_traffic_s(bad) < MOST_BAD_TRAFFIC_S
    assert seen.reasons[-1] == "RolloutErrors"


def test_a_canary_three_times_as_slow_is_rolled_back(tmp_path: Path) -> None:
    seen = run(tmp_path, faulty("slow"))
    show(f"3 x slower: {seen.bad_traffic_s(seen.canary):.1f} s of bad traffic", seen)
    assert seen.steps == [10, 0]
    assert seen.exit_code == 1
    assert all(each.good for each in seen.stable + seen.canary)  # slow, and right
    assert seen.bad_traffic_s(seen.canary) < MOST_BAD_TRAFFIC_S
    assert seen.reasons[-1] == "RolloutWorse"


def test_a_canary_that_answers_differently_is_rolled_back_by_the_shadow_check(tmp_path: Path) -> None:
    shadow = {"prompts": ["To be", "My lord"], "max_new_tokens": 8}
    seen = run(tmp_path, faulty("tokens"), shadow=shadow)
    show("other tokens", seen)
    assert seen.steps == [10, 0]
    assert seen.exit_code == 1
    assert all(each.good for each in seen.stable + seen.canary)  # nothing else would have told
    assert seen.reasons[-1] == "RolloutShadowDiffers"


def test_a_watcher_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    with Cluster(tmp_path, {STABLE: HEALTHY, CANARY: HEALTHY}) as cluster:
        cluster.serve(STABLE)
        with Load(cluster.envoy.url, RATE, LENGTHS) as load:
            start(cluster)
            killed = watch(cluster, **QUICK)
            cluster.wait_until(lambda: cluster.share(2) == 50, "the canary has half")
            killed.kill()
            time.sleep(2)
            assert cluster.share(2) == 50
            ended_in(watch(cluster, "second.log", **QUICK), 0)
        assert shares(cluster) == [10, 50, 100]
        assert all(each.good for each in load.outcomes), told(load.outcomes)


def test_two_watchers_agree(tmp_path: Path) -> None:
    with Cluster(tmp_path, {STABLE: HEALTHY, CANARY: HEALTHY}) as cluster:
        cluster.serve(STABLE)
        with Load(cluster.envoy.url, RATE, LENGTHS) as load:
            start(cluster)
            watchers = [watch(cluster, f"watch{number}.log", **QUICK) for number in range(2)]
            for watcher in watchers:
                ended_in(watcher, 0)
        assert shares(cluster) == [10, 50, 100]
        assert all(each.good for each in load.outcomes), told(load.outcomes)
        reasons = Counter(each["reason"] for each in cluster.events)
        assert (reasons["RolloutStepped"], reasons["RolloutPromoted"]) == (1, 1)


def test_without_prometheus_a_watcher_holds_and_lives(tmp_path: Path) -> None:
    with Cluster(tmp_path, {STABLE: HEALTHY, CANARY: HEALTHY}) as cluster:
        cluster.serve(STABLE)
        with Load(cluster.envoy.url, RATE, LENGTHS):
            start(cluster)
            cluster.wait_until(lambda: cluster.share(2) == 10, "the canary has its share")
            cluster.prometheus.stop()
            watcher = watch(cluster, **QUICK)
            cluster.wait_until(lambda: "Prometheus" in watcher.log.read_text(), "the watcher says so")
            time.sleep(5)  # in which these rules would have promoted
            assert watcher.exit_code is None, watcher.log.read_text()
            assert shares(cluster) == [10]
            cluster.prometheus.start()
            ended_in(watcher, 0)
        assert shares(cluster) == [10, 50, 100]


@pytest.mark.parametrize(
    ("command", "ready_timeout_s", "reason"),
    [
        ([*SERVE, "--model", "aitextgen=/nowhere", *FLAGS[2:]], 60, "RolloutRevisionFailed"),
        ([sys.executable, "-c", "import time; time.sleep(300)", "--"], 5, "RolloutNotReady"),
    ],
    ids=["ends", "hangs"],
)
def test_a_canary_that_never_becomes_ready_gets_no_traffic(
    tmp_path: Path, command: list[str], ready_timeout_s: float, reason: str
) -> None:
    with Cluster(tmp_path, {STABLE: HEALTHY, CANARY: command}) as cluster:
        cluster.serve(STABLE)
        with Load(cluster.envoy.url, RATE, LENGTHS) as load:
            start(cluster)
            ended_in(watch(cluster, ready_timeout_s=ready_timeout_s), 1)
        assert shares(cluster) == []
        assert cluster.service["spec"]["predictor"]["canaryTrafficPercent"] == 0
        assert cluster.events[-1]["reason"] == reason
        assert all(each.good for each in load.outcomes), told(load.outcomes)
        assert {each.revision for each in load.outcomes} == {cluster.name(1)}


def test_a_watcher_that_comes_when_the_canary_has_failed_rolls_back_and_ends(tmp_path: Path) -> None:
    with Cluster(tmp_path, {STABLE: HEALTHY, CANARY: [sys.executable, "-c", "raise SystemExit(3)"]}) as cluster:
        cluster.serve(STABLE)
        start(cluster)
        cluster.wait_until(lambda: cluster.failure, "KServe has given the revision up")
        ended_in(watch(cluster), 1, limit_s=30)
        assert cluster.service["spec"]["predictor"]["canaryTrafficPercent"] == 0


def test_a_rolled_back_canary_gets_nothing_while_the_next_one_loads(tmp_path: Path) -> None:
    """It is the latest revision that is ready, and that is whom Knative gives a share of the latest revision."""
    third = "gpt2-predictor:3"
    with Cluster(tmp_path, {STABLE: HEALTHY, CANARY: faulty("errors"), third: HEALTHY}) as cluster:
        cluster.serve(STABLE)
        with Load(cluster.envoy.url, RATE, LENGTHS):
            start(cluster)
            ended_in(watch(cluster), 1)
            start(cluster, third)
            watcher = watch(cluster, "third.log", **QUICK)
            ended_in(watcher, 0)
        assert shares(cluster, 2) == [10, 0]
        assert shares(cluster, 3) == [10, 50, 100]
