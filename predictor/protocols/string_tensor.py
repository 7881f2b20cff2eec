"""A DT_STRING value in TensorFlow Serving's JSON: a string, or `{"b64": "..."}` with its bytes."""

from __future__ import annotations

import base64
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.strict_json import printable


def is_binary(value: Any) -> bool:
    """Whether `value` is an object of the key `b64` alone; any other object holds named inputs."""
    return isinstance(value, dict) and value.keys() == {"b64"}


def parse_string(value: Any, where: str, param: str) -> str:
    """The text of the value at `where`; `InvalidRequest` in TensorFlow Serving's words for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        shown, kind = printable(value), _json_type(value)
        raise InvalidRequest(f"{where}: JSON Value: {shown} Type: {kind} is not of expected type: string", param)
    if not (is_binary(value) and isinstance(value["b64"], str)):
        raise InvalidRequest(
            f"{where}: JSON Value: {printable(value)} not formatted correctly for base64 data; send a string or "
            '{"b64": "..."}',
            param,
        )
    # As Abseil reads it: white space counts for nothing, and padding may be left out.
    digits = "".join(value["b64"].split())
    if "=" not in digits:
        digits += "=" * (-len(digits) % 4)
    try:
        decoded = base64.b64decode(digits, validate=True)
    except ValueError as error:
        raise InvalidRequest(f"{where}: Unable to base64 decode {printable(value['b64'])}", param) from error
    try:
        return decoded.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{where}: the base64 data is not UTF-8: byte {error.start} cannot be decoded", param
        ) from error


def _json_type(value: Any) -> str:
    """RapidJSON's name of a value's type, for what is neither string nor object."""
    if value is None or isinstance(value, bool):
        return {None: "Null", True: "True", False: "False"}[value]
    return "Array" if isinstance(value, list) else "Number"
