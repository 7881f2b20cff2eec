"""The process: KServe's model server with our routes, our host, and a shutdown that loses nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Sequence

import kserve
from fastapi.responses import JSONResponse
from kserve.model_server import app

from predictor.server.errors import add_error_handlers
from predictor.server.predictor import Predictor
from predictor.server.resident import LAST_STEP_S
from predictor.server.routes import add_routes
from predictor.settings import Settings

logger = logging.getLogger(__name__)

# Before the grace period ends, what still runs is answered with 503: the answers need a moment to leave.
_LAST_WORDS_S = 2.0


def time_to_finish_s(settings: Settings) -> float:
    """Seconds that what runs has after a signal, until it is ended: the grace period but for its last moments."""
    return max(settings.grace_period_s - _LAST_WORDS_S, settings.grace_period_s / 2)


class Server(kserve.ModelServer):  # type: ignore[misc]  # kserve ships no types
    """One HTTP port; gRPC stays off (its errors lose their codes)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            http_port=settings.port,
            workers=1,  # more would pickle the model, and load it once each
            enable_grpc=False,
            enable_latency_logging=False,
            grace_period=settings.grace_period_s,
        )
        self._settings = settings
        # KServe's choice, orjson, is deprecated in FastAPI and warns on every answer.
        app.router.default_response_class = JSONResponse
        app.router.redirect_slashes = False  # to an address that the client's Host header makes up
        add_routes(app, self.registered_models, settings)
        add_error_handlers(app)

    def register_signal_handler(self) -> None:
        """KServe's handler needs a running event loop and fails before there is one; ours only sets flags.

        uvicorn puts its own in place while it serves, and hands the signal to this one when it has drained.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stop_everything())

    def _stop_everything(self) -> None:
        self._rest_server._server.should_exit = True
        for model in self._predictors():
            model.stop()

    def _predictors(self) -> list[Predictor]:
        return [model for model in self.registered_models.get_models().values() if isinstance(model, Predictor)]

    async def _serve(self) -> None:
        """KServe's gather, with a host, a drain, and a clean end when the model cannot be loaded."""
        http = self._rest_server._server
        http.config.host = self._settings.host  # KServe has no setting for it
        # Not httptools, uvicorn's first choice: it drops the body of a request that offers HTTP/2 (curl --http2, Java's
        # client), has no limit on headers, and sends chunks to HTTP/1.0.
        http.config.http = "h11"
        drain = asyncio.create_task(self._drain())
        tasks = [asyncio.create_task(work) for work in self.servers]
        try:
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = next((task.exception() for task in done if task.exception() is not None), None)
            if failed is not None:
                http.should_exit = True
                if pending:
                    await asyncio.wait(pending)
                raise failed
        finally:
            drain.cancel()

    async def _drain(self) -> None:
        """Once a signal has arrived: refuse new work at once, end what is left just before the grace runs out."""
        http = self._rest_server._server
        while not http.should_exit:  # noqa: ASYNC110 - uvicorn sets a flag, in a signal handler
            await asyncio.sleep(0.05)
        logger.info("stopping: running requests have %d s", self._settings.grace_period_s)
        for model in self._predictors():
            model.drain()
        await asyncio.sleep(time_to_finish_s(self._settings))
        for model in self._predictors():
            model.stop()


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; raises `PredictorError` when the model cannot be loaded."""
    turn = asyncio.Lock()
    predictors = [Predictor(settings, model, turn) for model in settings.models]
    Server(settings).start(predictors)
    leave(predictors)


def leave(predictors: Sequence[Predictor]) -> None:
    """The end of a process whose models are stopped."""
    if any(predictor.load_abandoned for predictor in predictors):
        # The loading thread is inside a library: Python would wait for its download threads, or pull the interpreter
        # away under it. Nothing is left to save.
        logging.shutdown()
        os._exit(0)
    for predictor in predictors:
        predictor.join(LAST_STEP_S)
