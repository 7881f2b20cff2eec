"""JSON as RFC 8259 means it: what the standard library lets through by default is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from predictor.errors import InvalidRequest


def loads(body: bytes) -> Any:
    """Parse UTF-8 JSON. Duplicate keys, lone surrogates, NaN, Infinity and overflowing numbers are `InvalidRequest`."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} cannot be decoded") from error
    try:
        parsed = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise InvalidRequest("the body's JSON is nested too deeply") from error
    if "\\u" in text:  # only an escape can bring a lone surrogate into UTF-8 text
        _refuse_surrogates(parsed)
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise InvalidRequest(f"the key {printable(twice)} stands twice in one object", param=twice)
    return result


def _constant(name: str) -> float:
    raise InvalidRequest(f"the body is not valid JSON: {name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequest(f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 400:  # no limit of ours is near 10^400, and int() refuses over 4,300 digits
        raise InvalidRequest(f"the number {text[:40]}... is too large")
    return int(text)


def _refuse_surrogates(value: Any) -> None:
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, str):
            try:
                each.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest("a string holds half of a surrogate pair, which is no character") from error
        elif isinstance(each, dict):
            pending += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            pending += each


def object_of(value: Any, where: str = "the body") -> dict[str, Any]:
    """`value`, which has to be an object; raises `InvalidRequest`, which calls it `where`."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be a JSON object, got {printable(value)}")
    return value


def printable(value: Any, limit: int = 60) -> str:
    """`value` for an error message: as JSON, shortened."""
    try:
        shown = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:  # called deeper in the stack than `loads` was
        shown = "a deeply nested value"
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
