"""Metrics and logs. Prompts and completions never reach either."""

from __future__ import annotations

import json
import logging
import logging.config
import time
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram, Summary

# The Knative revision (settings.py) tells a canary from the stable version.
_LABELS = ["model_name", "revision"]


def _bounds(first_s: float, count: int) -> list[float]:
    """Bounds of a histogram, a factor of 1.41 apart.

    A rollout counts a version's answers past a bound near the other's 95th percentile: with wider steps "twice as
    slow" would look like "as fast".
    """
    return [float(f"{first_s * 2 ** (k / 2):.3g}") for k in range(count)]


REQUESTS_RUNNING = Gauge("predictor_requests_running", "requests of which a sequence is being generated", _LABELS)
REQUESTS_WAITING = Gauge("predictor_requests_waiting", "requests of which nothing has started", _LABELS)
KV_TOKENS_USED = Gauge("predictor_kv_tokens_used", "tokens of KV memory that sequences own", _LABELS)
KV_TOKENS = Gauge("predictor_kv_tokens", "tokens the KV memory holds", _LABELS)
GUESSED_TOKENS = Gauge("predictor_guessed_tokens", "tokens guessed ahead by speculation since the start", _LABELS)
HELD_TOKENS = Gauge("predictor_held_tokens", "guessed tokens that were what was drawn, since the start", _LABELS)
MODEL = Gauge(
    "predictor_model_info",
    "1 for the model in use, its width and device as labels",
    [*_LABELS, "backend", "dtype", "device"],
)
REQUESTS = Counter("predictor_requests", "answered requests for text, over any protocol", [*_LABELS, "code"])
# Series that exist before the first such answer, so that a rate sees it.
CODES = (200, 400, 429, 499, 500, 503, 504)
PROMPT_TOKENS = Counter("predictor_prompt_tokens", "tokens of prompts answered", _LABELS)
COMPLETION_TOKENS = Counter("predictor_completion_tokens", "tokens generated in answers", _LABELS)
REQUEST_SECONDS = Histogram(
    "predictor_request_seconds",
    "time of a request for text, to the end of its answer",
    _LABELS,
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640),
)
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "predictor_time_to_first_token_seconds",
    "time from a sequence's submission to the engine to its first token",
    _LABELS,
    buckets=_bounds(0.001, 34),  # to 93 s
)
INTER_TOKEN_SECONDS = Histogram(
    "predictor_inter_token_seconds",
    "mean time between a sequence's tokens, of sequences of two tokens or more",
    _LABELS,
    buckets=_bounds(0.0001, 30),  # to 2.3 s
)

FEEDBACK_REWARD = Summary(
    "predictor_feedback_reward", "rewards from 0 to 1 that users sent back: their sum and their number", _LABELS
)

REFUSED = Counter("predictor_refused", "requests refused for who asked, how often or what", ["revision", "reason"])
STRIKES = Counter("predictor_strikes", "prompts that matched a banned pattern", ["revision"])

JOBS_QUEUED = Gauge("predictor_jobs_queued", "jobs of the whole store that wait", ["revision"])
JOBS_RUNNING = Gauge("predictor_jobs_running", "jobs that this process runs", _LABELS)
JOBS = Counter("predictor_jobs", "jobs that this process has ended, by how", [*_LABELS, "status"])


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object a line, with what `extra={"fields": {...}}` brought."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A log record as a line for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = getattr(record, "fields", {})
        return " ".join([line, *(f"{key}={value}" for key, value in fields.items())])


def _not_a_client_error(record: logging.LogRecord) -> bool:
    """KServe 0.21 logs each 404 and 503 of its own routes as "Exception:" with a stack trace."""
    return record.msg != "Exception:"


def configure_logging(level: str, form: Literal["text", "json"]) -> None:
    """One handler on stderr for us, uvicorn and KServe; access logs are ours (server/routes.py)."""
    formatter = JsonFormatter if form == "json" else TextFormatter
    loggers = {
        "predictor": level.upper(),
        "uvicorn": "INFO",
        # A line per request, probes included, and a stack trace per client error: ours say it in one line.
        "uvicorn.access": "CRITICAL",
        "kserve": "WARNING",
        "kserve.trace": "CRITICAL",
    }
    logging.getLogger("kserve").addFilter(_not_a_client_error)
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"ours": {"()": formatter}},
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "ours"}},
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {
                name: {"level": each, "propagate": False, "handlers": ["stderr"]} for name, each in loggers.items()
            },
        }
    )
