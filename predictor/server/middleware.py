"""What surrounds every route, ours and KServe's: a request id, Retry-After, and nothing unexpected in an answer."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from predictor.errors import NotReady, QueueFull
from predictor.server.errors import answer

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_RETRY_AFTER_S = {429: QueueFull.retry_after_s, 503: NotReady.retry_after_s}


class Boundary:
    """Echoes or makes `x-request-id`; an exception nobody mapped becomes a plain 500.

    KServe's own handler for those is registered after ours and would answer with class names.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name == b"x-request-id"}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                retry_after_s = _RETRY_AFTER_S.get(message["status"])
                if retry_after_s is not None:
                    answered.setdefault("retry-after", str(retry_after_s))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # the last line: nothing of ours leaks into an answer
            if started:
                raise
            await answer(error)(scope, receive, send_with_headers)
