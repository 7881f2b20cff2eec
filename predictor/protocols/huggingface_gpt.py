"""huggingface-gpt: `{"text": {"plain": str} or {"in_64": base64}, ...}` -> `{"model", "s_elapsed", "sentences"}`.

Its other fields are those of transformers' text-generation pipeline, and mean what they mean there. `top_p` is a share
up to 1, and an integer per cent above it: 0.9 and 90 are the same, and so are 1 and 100, which are off. Beside them a
body may have our parameters that choose tokens.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from predictor.errors import InvalidRequest, Unprocessable
from predictor.protocols.older import LENGTHS, OF_OUR_ANSWERS, positive, sampling
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Exchange, Limits, WireFormat
from predictor.text.request import Completion, TextRequest

_DEFAULT_LENGTH = 20  # transformers' max_length: tokens in all, prompt included
_DEFAULTS = {"do_sample": False, "temperature": 1.0}
_UNKNOWN = OF_OUR_ANSWERS | LENGTHS | {"n"}
_READ_HERE = ("text", "max_length", "top_p")

# Tools that encode break their lines.
_BLANKS = re.compile(r"[ \t\r\n]+")


class Sentences(Exchange):
    """A checked request, which knows since when it is being answered."""

    def __init__(self, request: TextRequest, model: str) -> None:
        self.requests = [request]
        self._model, self._began = model, time.perf_counter()

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        (request,) = self.requests
        return {
            "model": self._model,
            "s_elapsed": f"{time.perf_counter() - self._began:.2f}",
            "sentences": [{"generated_text": request.prompt + completion.text} for completion in results[0]],
        }


def wire_format(model: str) -> WireFormat:
    """The format of a server whose first model is `model`: no body names one."""
    return WireFormat("huggingface-gpt", lambda body, limits: parse(body, limits, model))


def parse(body: Any, limits: Limits, model: str) -> Sentences:
    """A parsed JSON body; raises `InvalidRequest` naming the field and the limit, `Unprocessable` for bad base64."""
    fields = object_of(body)
    prompt = _prompt(fields)
    length = positive(fields, "max_length", _DEFAULT_LENGTH, "tokens in all, prompt included")
    rest = _DEFAULTS | {key: value for key, value in fields.items() if key not in _READ_HERE}
    parameters = sampling(rest | {"top_p": _top_p(fields.get("top_p", 100))}, _UNKNOWN, limits)
    if parameters.n > 1 and not parameters.do_sample:
        raise InvalidRequest(
            f"num_return_sequences must be 1 where do_sample is false, since all would be the same, got {parameters.n}",
            param="num_return_sequences",
        )
    request = replace(parameters.request(prompt, "text", max_total_tokens=length), total_name="max_length")
    return Sentences(request, model)


def _prompt(fields: Mapping[str, Any]) -> str:
    if "text" not in fields:
        raise InvalidRequest("the body lacks text", param="text")
    value = fields["text"]
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"plain", "in_64"}:
        raise InvalidRequest(
            f'text must be {{"plain": string}} or {{"in_64": base64}}, got {printable(value)}', param="text"
        )
    ((form, written),) = value.items()
    if not isinstance(written, str):
        raise InvalidRequest(f"text.{form} must be a string, got {printable(written)}", param="text")
    return written if form == "plain" else _decoded(written)


def _decoded(written: str) -> str:
    try:
        return base64.b64decode(_BLANKS.sub("", written).encode(), validate=True).decode()
    except binascii.Error as error:
        raise Unprocessable(f"text.in_64 is not base64: {str(error).lower()}", param="text") from error
    except UnicodeDecodeError as error:
        raise Unprocessable(f"text.in_64 is not UTF-8: byte {error.start} cannot be decoded", param="text") from error


def _top_p(value: Any) -> Any:
    """As a share. What is neither a share nor per cent is refused; other types are for the parameters' own check."""
    if isinstance(value, bool) or not isinstance(value, int | float) or 0 < value <= 1:
        return value
    if not isinstance(value, int) or not 1 < value <= 100:
        raise InvalidRequest(
            f"top_p must be a share in (0, 1] or an integer per cent up to 100, got {printable(value)}", param="top_p"
        )
    return value / 100
