"""The nanoGPT service's completions: OpenAI's, with defaults of its own, and arguments in the query string or in JSON.

Where they are not given, `max_tokens` is 500 or what the context leaves, `temperature` 0.8, and `top_k` 200 or the
vocabulary. `stop` is a list separated by commas, `logit_bias` a JSON object. All other fields, and the answer, are
those of `protocols/openai`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.openai import COMPLETIONS
from predictor.protocols.openai.body import parse as parse_completions
from predictor.protocols.openai.completions import Completions
from predictor.protocols.query_string import arguments, typed
from predictor.protocols.strict_json import object_of
from predictor.protocols.wire import Limits, WireFormat, json_body

_TEMPERATURE = 0.8
_MAX_TOKENS, _TOP_K = 500, 200
_TEXTS = ("model", "prompt", "stop", "user")


def wire_format(model: str, query: bytes = b"") -> WireFormat:
    """The format of a request with this query string, to a server whose first model is `model`."""

    def decode(body: bytes, headers: Mapping[str, str]) -> Any:
        if not query:
            return json_body(body, headers)
        if body:
            raise InvalidRequest("arguments stand in the query string or in the body, not in both")
        return arguments(query)

    def parse_for_model(body: Any, limits: Limits) -> Completions:
        return parse(body, limits, model)

    return replace(COMPLETIONS, name="nanogpt", parse=parse_for_model, decode=decode)


def parse(body: Any, limits: Limits, model: str) -> Completions:
    """A JSON body or a query's arguments; raises `InvalidRequest` naming the field and the limit."""
    fields = {name: value for name, value in typed(object_of(body), _TEXTS).items() if value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = fields["stop"].split(",")
    completions = parse_completions({"model": model, "temperature": _TEMPERATURE} | fields, limits)
    changes: dict[str, Any] = {}
    if "max_tokens" not in fields:
        changes |= {"max_new_tokens": None, "default_max_new_tokens": _MAX_TOKENS}
    if "top_k" not in fields:
        changes |= {"top_k": None, "default_top_k": _TOP_K}
    completions.requests = [replace(request, **changes) for request in completions.requests]
    return completions
