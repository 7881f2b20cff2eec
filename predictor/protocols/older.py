"""What the bodies of older servers have in common: fields of their own, and beside them our parameters by our names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.parameters import Parameters, parse_parameters
from predictor.protocols.strict_json import printable
from predictor.protocols.wire import Limits

WHERE = "the body"

# Parameters of our own answers' form, for which these answers have no place.
OF_OUR_ANSWERS = frozenset({"details", "logprobs", "return_full_text", "stream"})

LENGTHS = frozenset({"max_new_tokens", "max_tokens"})
SAMPLES = frozenset({"n", "num_return_sequences"})


def sampling(fields: Mapping[str, Any], unknown: Collection[str], limits: Limits, where: str = WHERE) -> Parameters:
    """`fields`, which have our names, checked; those in `unknown` are not fields of this body."""
    for name in fields:
        if name in unknown:
            raise InvalidRequest(f"{where}: unknown field {printable(name)}", param=name)
    return parse_parameters(fields, where, limits.max_timeout_s)


def positive(fields: Mapping[str, Any], name: str, default: int, meaning: str) -> int:
    """An integer of at least 1."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{name} must be a positive integer ({meaning}), got {printable(value)}", param=name)
    return value


def text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A string; without a default the body must have it."""
    if name not in fields and default is None:
        raise InvalidRequest(f"{WHERE} lacks {name}", param=name)
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, got {printable(value)}", param=name)
    return value
