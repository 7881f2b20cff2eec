"""OpenAI's error body, from which its clients choose the exception that they raise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from predictor.errors import ContextExceeded, InvalidRequest, NotFound, PredictorError

# By status; the rest of 4xx is an invalid request, and what is ours a server error.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_exceeded"}

# Our codes that OpenAI's clients know by another name.
_CODES = {"not_found": "model_not_found", "resource_exhausted": "rate_limit_exceeded"}

# The language model's names of fields, and OpenAI's.
_OURS = "max_new_tokens"
_OF_COMPLETIONS = {_OURS: "max_tokens"}
_OF_CHATS = {_OURS: "max_completion_tokens", "prompt": "messages"}


def error_body(error: PredictorError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`; also the last event of a stream that fails."""
    return _body(error, _OF_COMPLETIONS)


def chat_error_body(error: PredictorError) -> dict[str, Any]:
    """The same of a chat."""
    return _body(error, _OF_CHATS)


def _body(error: PredictorError, names: Mapping[str, str]) -> dict[str, Any]:
    param = error.param if isinstance(error, InvalidRequest) else "model" if isinstance(error, NotFound) else None
    message = str(error)
    if isinstance(error, ContextExceeded) and param is not None:
        message, param = message.replace(_OURS, names[_OURS]), names.get(param, param)
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": _CODES.get(error.code, error.code)}}
