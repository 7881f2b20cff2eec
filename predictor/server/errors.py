"""The one map from errors to answers: always `{"error": "text"}`, whoever raised it."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from predictor.errors import PredictorError

logger = logging.getLogger(__name__)


def answer(error: Exception) -> JSONResponse:
    """The response an exception becomes. Faults of ours are logged and say nothing about themselves."""
    if isinstance(error, PredictorError):
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return JSONResponse({"error": str(error)}, error.status, headers)
    logger.error("a request failed", exc_info=error)
    return JSONResponse({"error": "internal error; the server's log has more"}, 500)


def add_error_handlers(app: FastAPI) -> None:
    """Handlers for our errors and the router's own; the rest meets `Boundary` in middleware.py."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return answer(error)

    async def router(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        text = {
            404: f"no such route: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        return JSONResponse({"error": text}, error.status_code, error.headers)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{field}: {first['msg']}"}, 400)

    app.add_exception_handler(PredictorError, ours)
    app.add_exception_handler(HTTPException, router)
    app.add_exception_handler(RequestValidationError, validation)
