"""The evidence of a rollout, read from a real Prometheus that holds a known past."""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY

import predictor.observability
from predictor.rollout.evidence import Seen
from predictor.rollout.prometheus import Metrics, PrometheusUnavailable
from predictor.rollout.rules import Rules
from predictor.rollout.statistics import Share
from tests.canary.prometheus import Prometheus
from tests.conftest import left_out
from tests.processes import free_port

STABLE, CANARY = "aitextgen-predictor-00001", "aitextgen-predictor-00002"
EVERY_S = 15
SINCE_S = 125  # how long ago the step began, between two scrapes


class Past:
    """Scrapes of the last ten minutes, as OpenMetrics for `promtool tsdb create-blocks-from`."""

    def __init__(self) -> None:
        self._now = time.time()
        self._lines: list[str] = []

    def add(
        self, metric: str, pod: str, revision: str, first: int, last: int, values: list[float], **labels: str
    ) -> None:
        """`values` at even steps from `first` to `last` seconds ago; between them it is scraped with the last value."""
        told = {
            "job": "default/aitextgen",
            "instance": pod,
            "namespace": "default",
            "pod": pod,
            "revision": revision,
            "model_name": "aitextgen",
        } | labels
        text = ",".join(f'{key}="{value}"' for key, value in sorted(told.items()) if value)
        scrapes = (first - last) // EVERY_S
        for scrape in range(scrapes + 1):
            value = values[min(scrape * len(values) // (scrapes + 1), len(values) - 1)]
            self._lines.append(f"{metric}{{{text}}} {value} {self._now - first + scrape * EVERY_S:.3f}")

    def text(self) -> str:
        return "\n".join([*sorted(self._lines, key=lambda line: line.split("{")[0]), "# EOF\n"])


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("promtool") is None:
        left_out("promtool is not installed (apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("rollout")
    past = Past()
    total = "predictor_requests_total"
    # A pod that served before the step (200 answers) and goes on: 40 more. Its errors are older than the step.
    past.add(total, "a", STABLE, 605, 5, [100, 150, 200, 200, 200, 240], code="200")
    past.add(total, "a", STABLE, 605, 5, [3], code="500")
    # A pod that was scaled away during the step, after 30 answers of it.
    past.add(total, "b", STABLE, 605, 65, [50, 50, 50, 50, 50, 50, 50, 50, 50, 80], code="200")
    # The canary's pod was first scraped when it had answered 7, one of them wrongly.
    past.add(total, "c", CANARY, 50, 5, [6, 20], code="200")
    past.add(total, "c", CANARY, 50, 5, [1], code="500")
    past.add(total, "c", CANARY, 50, 5, [2], code="429")
    # The same revision's name in another namespace.
    past.add(
        total,
        "d",
        CANARY,
        605,
        5,
        [1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 9000],
        code="500",
        namespace="staging",
    )
    past.add(total, "e", "bare-00002", 50, 5, [5], code="200", namespace="")
    for le, count in [("0.01", 5), ("0.02", 19), ("+Inf", 20)]:
        past.add("predictor_time_to_first_token_seconds_bucket", "c", CANARY, 50, 5, [count], le=le)
        past.add("predictor_inter_token_seconds_bucket", "c", CANARY, 50, 5, [count - 5], le=le)
    past.add("predictor_feedback_reward_sum", "c", CANARY, 50, 5, [7.5])
    past.add("predictor_feedback_reward_count", "c", CANARY, 50, 5, [10])
    # Prometheus was away when the step began: what these counted before is not of the step.
    for code, values in (("200", [2000, 2005]), ("500", [40, 43])):
        past.add(total, "f", "away-00002", 50, 5, values, code=code)
    past.add("process_start_time_seconds", "f", "", 50, 5, [time.time() - 500])
    # A container that restarted as the step began.
    past.add(total, "g", "again-00002", 605, 140, [1000], code="200")
    past.add(total, "g", "again-00002", 110, 5, [20, 33], code="200")
    past.add("process_start_time_seconds", "g", "", 605, 140, [time.time() - 900])
    past.add("process_start_time_seconds", "g", "", 110, 5, [time.time() - 115])
    server = Prometheus(folder / "prometheus")
    server.stop()
    (folder / "past").write_text(past.text())
    made = [
        "promtool",
        "tsdb",
        "create-blocks-from",
        "openmetrics",
        str(folder / "past"),
        str(folder / "prometheus/data"),
    ]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    server.start()
    yield server
    server.close()


def read(prometheus: Prometheus, **rules: object) -> tuple[Seen, Seen]:
    return Metrics(prometheus.url + "/", "default", Rules.model_validate(rules)).read(STABLE, CANARY, SINCE_S)


def test_answers_since_the_step_began_are_counted_exactly(prometheus: Prometheus) -> None:
    """Whole numbers: of pods that stay, that have gone, and whose first answers were before their first scrape."""
    stable, canary = read(prometheus)
    assert stable.errors == Share(0, 40 + 30)
    assert canary.errors == Share(1, 20 + 1 + 2)


def test_a_revision_of_the_same_name_in_another_namespace_is_left_out(prometheus: Prometheus) -> None:
    staging = Metrics(prometheus.url, "staging", Rules.model_validate({})).read(STABLE, CANARY, SINCE_S)[1]
    assert staging.errors == Share(8000, 8000)
    _, canary = read(prometheus)
    assert canary.errors == Share(1, 23)


def test_a_prometheus_without_namespaces_is_asked_too(prometheus: Prometheus) -> None:
    metrics = Metrics(prometheus.url, "default", Rules.model_validate({}))
    assert metrics.read("bare-00001", "bare-00002", SINCE_S)[1].errors == Share(0, 5)


def test_what_was_counted_while_prometheus_was_away_is_not_of_the_step(prometheus: Prometheus) -> None:
    metrics = Metrics(prometheus.url, "default", Rules.model_validate({}))
    assert metrics.read("away-00001", "away-00002", SINCE_S)[1].errors == Share(3, 8)


def test_a_container_that_restarted_as_the_step_began_counts_from_zero(prometheus: Prometheus) -> None:
    metrics = Metrics(prometheus.url, "default", Rules.model_validate({}))
    assert metrics.read("again-00001", "again-00002", SINCE_S)[1].errors == Share(0, 33)


def test_the_last_minute_is_told_apart(prometheus: Prometheus) -> None:
    stable, canary = read(prometheus)
    assert stable.lately < stable.errors.total
    assert canary.lately == canary.errors.total


def test_the_rules_may_narrow_what_is_counted(prometheus: Prometheus) -> None:
    _, canary = read(prometheus, selector='pod!="c"')
    assert canary.errors.total == 0


def test_the_rules_say_which_codes_are_errors(prometheus: Prometheus) -> None:
    _, canary = read(prometheus, error_codes="5..|429")
    assert canary.errors == Share(3, 23)


def test_histograms_come_with_their_bounds(prometheus: Prometheus) -> None:
    stable, canary = read(prometheus)
    assert canary.ttft_s.at_most == {0.01: 5, 0.02: 19, math.inf: 20}
    assert canary.itl_s.at_most == {0.01: 0, 0.02: 14, math.inf: 15}
    assert stable.ttft_s.total == 0


def test_rewards_are_read_where_the_rules_ask_for_them(prometheus: Prometheus) -> None:
    assert read(prometheus)[1].reward is None
    stable, canary = read(prometheus, reward={})
    assert canary.reward == Share(2.5, 10)
    assert stable.reward == Share(0, 0)


def test_a_query_that_is_refused_is_told(prometheus: Prometheus) -> None:
    with pytest.raises(PrometheusUnavailable, match="parse error"):
        read(prometheus, selector="no matcher")


def test_a_prometheus_that_is_away_is_told_in_one_line() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(PrometheusUnavailable, match=f"Prometheus at {url} gives no evidence: ") as caught:
        Metrics(url, "default", Rules.model_validate({})).read(STABLE, CANARY, 60)
    assert "refused" in str(caught.value)
    assert "0x" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metric", ["predictor_requests", "predictor_time_to_first_token_seconds", "predictor_inter_token_seconds"]
)
def test_the_server_has_what_is_asked_for(metric: str) -> None:
    assert predictor.observability.REQUESTS is not None
    (found,) = [each for each in REGISTRY.collect() if each.name == metric]
    assert found.type in ("counter", "histogram")
