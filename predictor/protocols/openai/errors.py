"""OpenAI's error body, from which its clients choose the exception that they raise."""

from __future__ import annotations

from typing import Any

from predictor.errors import InvalidRequest, NotFound, PredictorError

# By status; the rest of 4xx is an invalid request, and what is ours a server error.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_exceeded"}

# Our codes that OpenAI's clients know by another name.
_CODES = {"not_found": "model_not_found", "resource_exhausted": "rate_limit_exceeded"}


def error_body(error: PredictorError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; also the last event of a stream that fails."""
    param = error.param if isinstance(error, InvalidRequest) else "model" if isinstance(error, NotFound) else None
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": param, "code": _CODES.get(error.code, error.code)}}
