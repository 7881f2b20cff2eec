"""The gauges of a loaded model, which ask for their values when they are scraped."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Gauge

from predictor.backends.base import Backend
from predictor.engine.load import Load
from predictor.observability import (
    GUESSED_TOKENS,
    HELD_TOKENS,
    KV_TOKENS,
    KV_TOKENS_USED,
    MODEL,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
)

_GAUGES: dict[Gauge, Callable[[Load], int]] = {
    REQUESTS_RUNNING: lambda load: load.running_requests,
    REQUESTS_WAITING: lambda load: load.waiting_requests,
    KV_TOKENS: lambda load: load.slots,
    KV_TOKENS_USED: lambda load: load.used_slots,
    GUESSED_TOKENS: lambda load: load.guessed_tokens,
    HELD_TOKENS: lambda load: load.held_tokens,
}


def watch(labels: tuple[str, str], backend: Backend, kind: str) -> None:
    """Begin to tell of a model. `labels` are its name and revision, `kind` the backend's name."""
    for gauge, read in _GAUGES.items():
        gauge.labels(*labels).set_function(_reader(backend, read))
    MODEL.labels(*labels, kind, backend.dtype, backend.device).set(1)


def unwatch(labels: tuple[str, str], backend: Backend, kind: str) -> None:
    """Take the gauges away: they have nothing to say of a model that is not there, and would keep it in memory."""
    for gauge in _GAUGES:
        gauge.remove(*labels)
    MODEL.remove(*labels, kind, backend.dtype, backend.device)


def _reader(backend: Backend, read: Callable[[Load], int]) -> Callable[[], float]:
    return lambda: read(backend.load)
