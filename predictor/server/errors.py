"""The one map from errors to answers: `{"error": "text"}`, or what the wire format has in its place."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from predictor.errors import EngineFailed, PredictorError, Unauthenticated
from predictor.protocols.openai.errors import error_body
from predictor.protocols.wire import plain_error

# Where an error looks as OpenAI's does.
_OPENAI = re.compile(r"/(openai/)?v1/(completions|chat/.*|models|embeddings)|/openai/.*|/completions")

logger = logging.getLogger(__name__)


def ours(error: Exception) -> PredictorError:
    """`error` if it was raised on purpose; a fault of ours is logged and becomes one that says nothing about itself."""
    if isinstance(error, PredictorError):
        return error
    logger.error("a request failed", exc_info=error)
    return EngineFailed("internal error; the server's log has more")


def answer(error: Exception, body: Callable[[PredictorError], Any] = plain_error) -> JSONResponse:
    """The response an exception becomes."""
    mapped = ours(error)
    headers = {} if mapped.retry_after_s is None else {"Retry-After": str(mapped.retry_after_s)}
    if mapped.status == Unauthenticated.status:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(mapped), mapped.status, headers)


def body_of_path(path: str) -> Callable[[PredictorError], Any]:
    """How an error looks that is raised before a wire format is known."""
    return error_body if _OPENAI.fullmatch(path) else plain_error


def add_error_handlers(app: FastAPI) -> None:
    """Handlers for our errors and the router's own; the rest meets `Boundary` in middleware.py."""

    async def raised(request: Request, error: Exception) -> JSONResponse:
        return answer(error)

    async def router(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        text = {
            404: f"no such route: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        told = PredictorError(text)
        told.status, told.code = error.status_code, "unknown_url" if error.status_code == 404 else "invalid_argument"
        return JSONResponse(body_of_path(request.url.path)(told), error.status_code, error.headers)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{field}: {first['msg']}"}, 400)

    app.add_exception_handler(PredictorError, raised)
    app.add_exception_handler(HTTPException, router)
    app.add_exception_handler(RequestValidationError, validation)
