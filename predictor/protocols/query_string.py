"""Arguments in a query string: names with texts, of which some mean numbers, booleans or JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import parse_qsl

from predictor.errors import InvalidRequest
from predictor.protocols import strict_json
from predictor.protocols.strict_json import printable

# Python's float() reads these too, which is what the servers whose clients send such strings used. 400: strict_json's.
_NUMBER = re.compile(r"[+-]?(\d{1,400}(\.\d{0,400})?|\.\d{1,400})([eE][+-]?\d{1,4})?", re.ASCII)
_BOOLEANS = {"true": True, "false": False}

_MAX_ARGUMENTS = 100  # no body here has as many fields


def arguments(query: bytes, where: str = "the query string") -> dict[str, str]:
    """The arguments by name, percent-decoded; one that stands twice, or is no UTF-8, is `InvalidRequest`.

    `where` is what to call it in a message: a form is encoded alike.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_ARGUMENTS)
    except UnicodeError as error:
        raise InvalidRequest(f"{where} is not percent-encoded UTF-8") from error
    except ValueError as error:  # parse_qsl's word for too many
        raise InvalidRequest(f"{where} must hold at most {_MAX_ARGUMENTS} arguments") from error
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequest(f"{where} has {printable(name)} twice", param=name)
        found[name] = value
    return found


def typed(fields: Mapping[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """`fields` with strings read as what they say, those of `texts` left as they are.

    "5" is 5, "0.7" is 0.7, "true" and "True" are true, and what begins as a JSON list or object is that. Any other
    string stays one, so that whoever wants a number refuses it by its name.
    """
    return {
        name: _read(name, value) if isinstance(value, str) and name not in texts else value
        for name, value in fields.items()
    }


def _read(name: str, text: str) -> Any:
    if text.startswith(("{", "[")):
        try:
            return strict_json.loads(text.encode())
        except InvalidRequest as error:
            raise InvalidRequest(f"{name} is not valid JSON, got {printable(text)}", param=name) from error
    if _NUMBER.fullmatch(text):
        try:
            return int(text)
        except ValueError:
            number = float(text)
            return number if math.isfinite(number) else text
    return _BOOLEANS.get(text.lower(), text)
