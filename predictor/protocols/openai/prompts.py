"""The prompts of a completions request, as texts or as token ids."""

from __future__ import annotations

from typing import Any, NamedTuple

from predictor.errors import InvalidRequest
from predictor.protocols.strict_json import printable

_FORMS = "a string, a list of strings, a list of token ids, or a list of such lists"


class Prompt(NamedTuple):
    """One prompt."""

    name: str  # how the client would point at it
    text: str  # empty where there are ids
    ids: tuple[int, ...] | None


def read_prompts(value: Any, samples: int, counted: str, limit: int) -> list[Prompt]:
    """The prompts; null is the beginning of a document, which is what OpenAI's reference makes of it.

    Of each are `samples` wanted, which the field `counted` says; all together may be `limit`. Raises `InvalidRequest`.
    """
    ids = isinstance(value, list) and bool(value) and _is_integer(value[0])
    one = value is None or isinstance(value, str) or ids
    given = ["" if value is None else value] if one else value
    if not isinstance(given, list) or not given:
        raise InvalidRequest(f"prompt must be {_FORMS}, and not empty, got {printable(value)}", param="prompt")
    if len(given) * samples > limit:
        raise InvalidRequest(
            f"prompt: {len(given)} prompts times {samples} samples of each must be at most {limit}",
            param="prompt" if len(given) > 1 else counted,
        )
    return [_read(each, "prompt" if one else f"prompt[{place}]") for place, each in enumerate(given)]


def _read(value: Any, name: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(name, value, None)
    if not isinstance(value, list):
        raise InvalidRequest(f"{name} must be a string or a list of token ids, got {printable(value)}", param="prompt")
    for place, token_id in enumerate(value):
        if not _is_integer(token_id) or token_id < 0:
            raise InvalidRequest(
                f"{name}[{place}] must be a token id, an integer of at least 0, got {printable(token_id)}",
                param="prompt",
            )
    return Prompt(name, "", tuple(value))


def _is_integer(value: Any) -> bool:
    return type(value) is int  # true is an int to isinstance
