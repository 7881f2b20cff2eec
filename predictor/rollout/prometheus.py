"""What Prometheus has counted of the two revisions. Metric names: predictor/observability.py."""

from __future__ import annotations

import math
from typing import Any

import requests
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from urllib3.util import Retry

from predictor.errors import PredictorError
from predictor.rollout.evidence import Histogram, Seen
from predictor.rollout.rules import Rules
from predictor.rollout.statistics import Share

_TIMEOUT_S = 5

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
        revisions = (stable, canary)
        codes = self._grown(
            "predictor_requests_total", "code", revisions, seconds, f', code=~"{self._rules.error_codes}"'
        )
        totals = self._grown("predictor_requests_total", "code", revisions, seconds)
        ttft = self._grown("predictor_time_to_first_token_seconds_bucket", "le", revisions, seconds)
        itl = self._grown("predictor_inter_token_seconds_bucket", "le", revisions, seconds)
        rewards = self._rewards(revisions, seconds)

        def version(revision: str) -> Seen:
            return Seen(
                errors=Share(_sum(codes, revision), _sum(totals, revision)),
                ttft_s=_histogram(ttft, revision),
                itl_s=_histogram(itl, revision),
                reward=rewards.get(revision),
            )

        return version(stable), version(canary)

    def _rewards(self, revisions: tuple[str, str], seconds: float) -> dict[str, Share]:
        if self._rules.reward is None:
            return {}
        metric = self._rules.reward.metric
        sums = self._grown(f"{metric}_sum", "", revisions, seconds)
        counts = self._grown(f"{metric}_count", "", revisions, seconds)
        return {each: Share(max(_sum(counts, each) - _sum(sums, each), 0), _sum(counts, each)) for each in revisions}

    def _grown(self, metric: str, by: str, revisions: tuple[str, str], seconds: float, also: str = "") -> list[Row]:
        """By how much a counter grew, by revision and the label `by`.

        Not `increase`, which extrapolates to fractions and misses what a series counted before its first scrape: a
        canary's series are new. A pod that has gone still counts; one whose container restarted counts from its
        highest value only.
        """
        series = f'{metric}{{revision=~"{"|".join(revisions)}"{also}{self._selector}}}'
        window = f"{max(math.ceil(seconds), 1)}s"
        now = f"max_over_time({series}[{window}])"
        labels = f"revision, {by}" if by else "revision"
        return self._query(f"sum by ({labels}) ({now} - {series} offset {window} or {now})")

    def _query(self, query: str) -> list[Row]:
        try:
            found: list[dict[str, Any]] = self._prometheus.custom_query(query)
            return [(each["metric"], float(each["value"][1])) for each in found]
        except (requests.RequestException, PrometheusApiClientException, LookupError, TypeError, ValueError) as error:
            raise PrometheusUnavailable(f"Prometheus at {self._url} does not answer: {_short(error)}") from error


def _sum(rows: list[Row], revision: str) -> float:
    return sum(value for labels, value in rows if labels.get("revision") == revision)


def _histogram(rows: list[Row], revision: str) -> Histogram:
    return Histogram({float(labels["le"]): value for labels, value in rows if labels.get("revision") == revision})


def _short(error: Exception) -> str:
    """One line without the addresses of objects."""
    cause = error
    while isinstance(cause.args[:1], tuple) and cause.args and isinstance(cause.args[0], Exception):
        cause = cause.args[0]
    text = " ".join(str(getattr(cause, "reason", cause)).split())
    return text[:200]
