"""`predictor worker`: runs the jobs that servers keep in Redis. It answers no requests."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from predictor.cli.flags import make_way, setting, settings_of
from predictor.errors import ConfigurationError, EngineFailed
from predictor.settings import Settings

if TYPE_CHECKING:
    from predictor.server.predictor import Predictor

# How often the engines are looked at. A worker with a broken one takes no jobs, so nothing is lost meanwhile.
_LOOK_S = 1.0


def worker(
    model: Annotated[list[str] | None, setting("model")] = None,
    revision: Annotated[str | None, setting("revision")] = None,
    backend: Annotated[str | None, setting("backend")] = None,
    dtype: Annotated[str | None, setting("dtype")] = None,
    device: Annotated[str | None, setting("device")] = None,
    grace_period_s: Annotated[int | None, setting("grace_period_s")] = None,
    kv_memory_mib: Annotated[int | None, setting("kv_memory_mib")] = None,
    max_running: Annotated[int | None, setting("max_running")] = None,
    queue_limit: Annotated[int | None, setting("queue_limit")] = None,
    prefill_chunk_tokens: Annotated[int | None, setting("prefill_chunk_tokens")] = None,
    step_tokens: Annotated[int | None, setting("step_tokens")] = None,
    speculation: Annotated[bool | None, setting("speculation")] = None,
    draft: Annotated[str | None, setting("draft")] = None,
    chat_template: Annotated[str | None, setting("chat_template")] = None,
    jobs: Annotated[str | None, setting("jobs")] = None,
    job_concurrency: Annotated[int | None, setting("job_concurrency")] = None,
    job_expiry_s: Annotated[int | None, setting("job_expiry_s")] = None,
    timeout_s: Annotated[float | None, setting("timeout_s")] = None,
    threads: Annotated[int | None, setting("threads")] = None,
    log_level: Annotated[str | None, setting("log_level")] = None,
    log_format: Annotated[str | None, setting("log_format")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="HTTP port of Prometheus' /metrics; by default none.", min=1, max=65535)
    ] = None,
) -> None:
    """Run the jobs that servers with the same --jobs redis://... accept, until SIGTERM.

    Then what runs is finished within the grace period, or given back to the others. It answers no requests.
    """
    settings = settings_of({name: value for name, value in locals().items() if name != "metrics_port"})
    if settings.redis is None:
        raise ConfigurationError(
            "a worker takes jobs from Redis: give --jobs redis://HOST:PORT/DB. A SQLite file belongs to one server, "
            "which runs its jobs itself"
        )
    if settings.job_concurrency == 0:
        raise ConfigurationError("--job-concurrency must be at least 1 for a worker, got 0")
    make_way(settings)
    from predictor.server.predictor import Predictor
    from predictor.server.server import leave

    turn = asyncio.Lock()
    predictors = [Predictor(settings, each, turn) for each in settings.models]
    with _metrics(metrics_port):
        asyncio.run(_work(settings, predictors))
    leave(predictors)


@contextlib.contextmanager
def _metrics(port: int | None) -> Iterator[None]:
    if port is None:
        yield
        return
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port)
    except OSError as error:
        raise ConfigurationError(f"--metrics-port {port}: {error.strerror}") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def _work(settings: Settings, predictors: Sequence[Predictor]) -> None:
    from predictor.jobs.store import open_store
    from predictor.server.jobs import new_worker
    from predictor.server.server import time_to_finish_s

    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    store = open_store(settings)
    worker = new_worker(store, lambda: predictors, settings)
    running = asyncio.create_task(worker.run())
    try:
        await _until_stopped(stopped, predictors)
    finally:
        worker.drain()
        for predictor in predictors:
            predictor.drain()
        await asyncio.wait({running}, timeout=time_to_finish_s(settings))
        for predictor in predictors:
            predictor.stop()  # what still runs is given back
        await running
        await store.close()


async def _until_stopped(stopped: asyncio.Event, predictors: Sequence[Predictor]) -> None:
    """Load all models; raises what a load raises, or `EngineFailed` once only a restart can help."""
    waiting = asyncio.create_task(stopped.wait())
    loading: set[asyncio.Task[Any]] = {asyncio.create_task(predictor.start_engine()) for predictor in predictors}
    try:
        while not waiting.done():
            done, _ = await asyncio.wait({waiting, *loading}, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done & loading:
                loading.remove(task)
                task.result()
            if not all(predictor.alive for predictor in predictors):
                raise EngineFailed("the engine has failed; the log has more")
    finally:
        waiting.cancel()
        for predictor in predictors:
            predictor.drain()  # ends a load
        await asyncio.gather(*loading, return_exceptions=True)
