"""What Prometheus has counted of the two revisions. Metric names: predictor/observability.py."""

from __future__ import annotations

import math
import re
from typing import Any

import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from urllib3.util import Retry

from predictor.errors import PredictorError
from predictor.rollout.evidence import Histogram, Seen
from predictor.rollout.rules import Rules, one_line
from predictor.rollout.statistics import Share

_TIMEOUT_S = 5

# A canary that has answered nothing for as long goes no further, whatever it did before.
_LATELY_S = 60

Row = tuple[dict[str, str], float]


class PrometheusUnavailable(PredictorError):
    """No evidence: it cannot be reached, or refused the query."""

    code = "prometheus"


class Metrics:
    """Counts since a moment, by revision."""

    def __init__(self, url: str, namespace: str, rules: Rules) -> None:
        # A retry would come when the next look is due anyway.
        self._prometheus = PrometheusConnect(url=url.rstrip("/"), retry=Retry(0), timeout=_TIMEOUT_S)
        self._url, self._rules = url, rules
        # Two namespaces may have revisions of one name. Empty: a Prometheus that was told of no namespaces.
        self._selector = f', namespace=~"{namespace}|"' + (f", {rules.selector}" if rules.selector else "")

    def read(self, stable: str, canary: str, seconds: float) -> tuple[Seen, Seen]:
        """The last `seconds` of both revisions; raises `PrometheusUnavailable`."""
        try:
            return self._read((stable, canary), max(math.ceil(seconds), 1))
        except (requests.RequestException, PrometheusApiClientException, LookupError, TypeError, ValueError) as error:
            raise PrometheusUnavailable(f"Prometheus at {self._url} gives no evidence: {_short(error)}") from error

    def _read(self, revisions: tuple[str, str], seconds: int) -> tuple[Seen, Seen]:
        requests_total = "predictor_requests_total"
        codes = self._rules.error_codes.replace("\\", "\\\\").replace('"', '\\"')
        errors = self._grown(requests_total, "code", revisions, seconds, f', code=~"{codes}"')
        answers = self._grown(requests_total, "code", revisions, seconds)
        lately = self._grown(requests_total, "code", revisions, min(seconds, _LATELY_S))
        ttft = self._grown("predictor_time_to_first_token_seconds_bucket", "le", revisions, seconds)
        itl = self._grown("predictor_inter_token_seconds_bucket", "le", revisions, seconds)
        rewards = self._rewards(revisions, seconds)

        def seen(revision: str) -> Seen:
            return Seen(
                errors=Share(_sum(errors, revision), _sum(answers, revision)),
                ttft_s=_histogram(ttft, revision),
                itl_s=_histogram(itl, revision),
                reward=rewards.get(revision),
                lately=_sum(lately, revision),
            )

        return seen(revisions[0]), seen(revisions[1])

    def _rewards(self, revisions: tuple[str, str], seconds: int) -> dict[str, Share]:
        if self._rules.reward is None:
            return {}
        metric = self._rules.reward.metric
        sums = self._grown(f"{metric}_sum", "", revisions, seconds)
        counts = self._grown(f"{metric}_count", "", revisions, seconds)
        return {each: Share(_sum(counts, each) - _sum(sums, each), _sum(counts, each)) for each in revisions}

    def _grown(self, metric: str, by: str, revisions: tuple[str, str], seconds: int, also: str = "") -> list[Row]:
        """By how much a counter grew, by revision and the label `by`.

        Not `increase`, which extrapolates to fractions and misses what a series counted before its first scrape: a
        canary's series are new. So a series that was not there at the beginning counts as a whole if its process is
        younger than that, and from its first scrape if it is older (Prometheus was away). A pod that has gone still
        counts; one whose container restarted counts from its highest value only.
        """
        names = "|".join(map(re.escape, revisions)).replace("\\", "\\\\")
        series = f'{metric}{{revision=~"{names}"{also}{self._selector}}}'
        window = f"{seconds}s"
        now = f"max_over_time({series}[{window}])"
        older = f"last_over_time(process_start_time_seconds[{window}]) < time() - {seconds}"
        labels = f"revision, {by}" if by else "revision"
        return self._query(
            f"sum by ({labels}) ({now} - {series} offset {window} >= 0"
            f" or ({now} - min_over_time({series}[{window}]) and on (job, instance) {older}) or {now})"
        )

    def _query(self, query: str) -> list[Row]:
        # Thanos would otherwise answer with what some of its stores know.
        found: list[dict[str, Any]] = self._prometheus.custom_query(query, {"partial_response": "false"})
        rows = [(dict(each["metric"]), float(each["value"][1])) for each in found]
        if not all(math.isfinite(value) for _, value in rows):
            raise ValueError(f"a count is no number: {rows}")
        return rows


def _sum(rows: list[Row], revision: str) -> float:
    return sum(value for labels, value in rows if labels.get("revision") == revision)


def _histogram(rows: list[Row], revision: str) -> Histogram:
    return Histogram({float(labels["le"]): value for labels, value in rows if labels.get("revision") == revision})


def _short(error: Exception) -> str:
    """One line without the addresses of objects."""
    cause = error
    while isinstance(cause.args[:1], tuple) and cause.args and isinstance(cause.args[0], Exception):
        cause = cause.args[0]
    return one_line(str(getattr(cause, "reason", cause)), 200)
