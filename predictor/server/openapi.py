"""What `/docs` shows of a route, and what a test sends to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def documented(
    summary: str,
    *,
    tag: str,
    examples: Mapping[str, Any] | None = None,
    schema: Mapping[str, Any] | None = None,
    query: Mapping[str, Any] | None = None,
    answers: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a route's decorator.

    `examples` are bodies by name, of which each is answered with the first status of `answers` (200 by default);
    `schema` is the body's JSON Schema, `query` the example of a query string. The route's docstring is the description.
    """
    extra: dict[str, Any] = {}
    if examples is not None:
        content: dict[str, Any] = {"examples": {name: {"value": body} for name, body in examples.items()}}
        if schema is not None:
            content["schema"] = dict(schema)
        extra["requestBody"] = {"required": True, "content": {"application/json": content}}
    if query is not None:
        extra["parameters"] = [
            {"name": name, "in": "query", "required": False, "schema": {}, "example": value}
            for name, value in query.items()
        ]
    told = answers or {200: "the answer"}
    return {
        "status_code": next(iter(told)),  # or FastAPI would list 200 beside it
        "summary": summary,
        "tags": [tag],
        "openapi_extra": extra,
        "responses": {status: {"description": text} for status, text in told.items()},
    }
