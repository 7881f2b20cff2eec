"""gpt-2-cloud-run: `{"length", "temperature", "top_k", "top_p", "prefix", "truncate", "include_prefix"}` -> `{"text"}`.

Values may be strings ("5", "0.7", "False"): a query string has no others, and that server read those of JSON, too.
Beside its own fields a body may have our parameters that choose tokens, but for `min_new_tokens` and `stop`, since
`length` and `truncate` are what these clients know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn
from urllib.parse import parse_qsl

from predictor.errors import InvalidRequest
from predictor.protocols.older import LENGTHS, OF_OUR_ANSWERS, SAMPLES, positive, sampling, text
from predictor.protocols.parameters import MAX_STOP_CHARACTERS
from predictor.protocols.query_string import arguments, typed
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Exchange, Limits, WireFormat
from predictor.text.request import Completion, TextRequest

_FIELDS = frozenset({"length", "temperature", "top_k", "top_p", "prefix", "truncate", "include_prefix", "seed"})

_DEFAULT_LENGTH = 1_023  # a GPT-2's context but for the token to begin with
_MAX_PREFIX_CHARACTERS = 500
_UNKNOWN = OF_OUR_ANSWERS | LENGTHS | SAMPLES | {"min_new_tokens", "stop"}
_TEXTS = ("prefix", "truncate")
_READ_HERE = ("length", "prefix", "truncate", "include_prefix")


class Text(Exchange):
    """A checked request."""

    def __init__(self, request: TextRequest, include_prefix: bool) -> None:
        self.requests = [request]
        self._include_prefix = include_prefix

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, str]:
        completion = results[0][0].text
        return {"text": self.requests[0].prompt + completion if self._include_prefix else completion}


def parse(body: Any, limits: Limits) -> Text:
    """A JSON body or a query's arguments; raises `InvalidRequest` naming the field and the limit."""
    fields = typed(object_of(body), _TEXTS)
    length = positive(fields, "length", _DEFAULT_LENGTH, "new tokens; cut to what the context leaves")
    prefix = text(fields, "prefix", default="")[:_MAX_PREFIX_CHARACTERS]
    stop = _truncate(fields)
    include_prefix = fields.get("include_prefix", True)
    if not isinstance(include_prefix, bool):
        raise InvalidRequest(
            f"include_prefix must be true or false, got {printable(include_prefix)}", param="include_prefix"
        )
    rest = {"top_k": 0} | {key: value for key, value in fields.items() if key not in _READ_HERE}
    if _is_zero(rest.get("top_p")):
        del rest["top_p"]  # off, which for us is 1
    parameters = sampling(rest, _UNKNOWN, limits)
    request = replace(parameters.request(prefix, "prefix"), default_max_new_tokens=length, stop=stop)
    return Text(request, include_prefix)


def _truncate(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The text before which the completion is cut: what the prefix holds does not count. Null and "" cut nothing."""
    if fields.get("truncate") is None:
        return ()
    truncate = text(fields, "truncate")
    if len(truncate) > MAX_STOP_CHARACTERS:
        raise InvalidRequest(
            f"truncate must have at most {MAX_STOP_CHARACTERS} characters, got {len(truncate)}", param="truncate"
        )
    return (truncate,) if truncate else ()


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


def asks(query: bytes) -> bool:
    """Whether a query string has one of this format's fields."""
    return any(name in _FIELDS for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))


def _decode_query(query: bytes, body: bytes, headers: Mapping[str, str]) -> Any:
    if body:
        raise InvalidRequest("a GET takes its arguments from the query string and has no body")
    return arguments(query)


def _refuse_both(body: bytes, headers: Mapping[str, str]) -> NoReturn:
    raise InvalidRequest("a POST takes its arguments from the body and has none in the query string")


FORMAT = WireFormat("cloud-run", parse)
ASKED_TWICE = replace(FORMAT, decode=_refuse_both)


def of_query(query: bytes) -> WireFormat:
    """The format of a request whose arguments are in its query string."""
    return replace(FORMAT, decode=partial(_decode_query, query))
