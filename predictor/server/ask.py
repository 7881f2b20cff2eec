"""How a request of any wire format is answered: read, parsed, generated, rendered, counted."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request, Response
from kserve import ModelRepository

from predictor.errors import NotFound
from predictor.observability import REQUEST_SECONDS, REQUESTS
from predictor.protocols.wire import Exchange, RawAnswer, WireFormat
from predictor.server.body import aside, check_media_type, read_body, until_disconnect
from predictor.server.errors import answer
from predictor.server.events import Events, EventStream
from predictor.server.predictor import Asked, Predictor
from predictor.settings import Settings
from predictor.text.deadline import Deadline

logger = logging.getLogger(__name__)

# Characters of an unknown name that a message repeats.
_MAX_NAME = 100

# Told of every request before its body is read; raises to refuse it.
Arrive = Callable[[Request], Awaitable[None]]

# Told of every checked request, and of its model, before anything is generated; raises to refuse it.
Admit = Callable[[Request, Exchange, Predictor], Awaitable[None]]


class Asker:
    """The models of this server, and the one way to ask them."""

    def __init__(self, models: ModelRepository, settings: Settings, admit: Admit, arrive: Arrive | None = None) -> None:
        self.models, self.settings = models, settings
        self.admit, self._arrive = admit, arrive

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return self.settings.models[0].name

    def find(self, name: str) -> Predictor:
        """The model of that name, loaded or not; raises `NotFound`."""
        model = self.models.get_model(name)
        if not isinstance(model, Predictor):
            raise NotFound(
                f"Servable not found for request: Latest({name[:_MAX_NAME]}); this server has {self.names()}"
            )
        return model

    def names(self) -> str:
        """All names, for a message."""
        return ", ".join(sorted(self.models.get_models()))

    async def __call__(self, request: Request, form: WireFormat, model: str | None = None) -> Response:
        """Answer one request. `model` is what the path names."""
        began = time.perf_counter()
        predictor: Predictor | None = None

        def count(status: int) -> None:
            if predictor is None:
                return
            seconds = time.perf_counter() - began
            REQUESTS.labels(*predictor.labels, status).inc()
            REQUEST_SECONDS.labels(*predictor.labels).observe(seconds)
            fields = {"model": predictor.name, "protocol": form.name, "code": status, "seconds": round(seconds, 3)}
            logger.info("answered", extra={"fields": fields | {"request_id": request.state.request_id}})

        response: Response
        try:
            # Where the body names the model, what cannot be read is counted as the first one's.
            predictor = self.find(model or self.default_model)
            if model is not None:
                predictor.language_model()  # 503 before the body is read
            body, size_bytes = await self.read(request, form, predictor)
            named = form.model(body)
            if model is None and named is not None:
                predictor = None  # an unknown model's request is nobody's
                predictor = self.find(named)
            predictor.language_model()
            result = await self._ask(request, form, predictor, body, size_bytes)
            if isinstance(result, Events):
                return EventStream(result, count)
            response = _rendered(result)
        except Exception as error:  # answered here, so that it is counted and logged like any other answer
            response = answer(error, form.error)
        count(response.status_code)
        return response

    async def read(self, request: Request, form: WireFormat, predictor: Predictor) -> tuple[Any, int]:
        """The body, its type, size and time checked, and its bytes; a model that stops ends it."""
        if self._arrive is not None:
            await self._arrive(request)
        check_media_type(request, form.media_types)
        reading = read_body(request, self.settings.max_body_bytes)
        sent = await predictor.unless_stopping(
            Deadline(self.settings.timeout_s).hold(reading, "sending the body", "send it faster")
        )
        return await aside(len(sent), form.decode, sent, request.headers), len(sent)

    async def _ask(self, request: Request, form: WireFormat, predictor: Predictor, body: Any, size_bytes: int) -> Any:
        asked = Asked(form, body, size_bytes, lambda exchange: self.admit(request, exchange, predictor))
        # items(): a lookup by name searches all headers, and thousands of names would take seconds.
        answering = predictor(asked, headers=dict(request.headers.items()))
        result, _ = await until_disconnect(request, answering, _close)
        return result


async def _close(answered: tuple[Any, Any]) -> None:
    if isinstance(answered[0], Events):
        await answered[0].aclose()


def _rendered(result: Any) -> Response:
    if isinstance(result, RawAnswer):
        return Response(result.content, media_type=result.media_type, headers=dict(result.headers))
    # orjson, because the standard library's encoder is ten times slower and nothing else runs meanwhile: the largest
    # answer there may be, 15 MB of log-probabilities, takes it 34 ms.
    return Response(orjson.dumps(result), media_type="application/json")
