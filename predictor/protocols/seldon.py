"""Seldon's prediction protocol: `{"data": {"ndarray": [...]}, "meta": {"tags": {...}}}` -> the same with the texts.

A message holds prompts in `data.ndarray`, a list of strings or of rows of one string each, or one in `strData`; the
answer has their completions in the same places. Our parameters are its tags. Payloads of numbers or bytes are refused
by name. Feedback is `{"request", "response", "truth", "reward"}`: three messages, which are not kept, and a number from
0 to 1. An answer's `meta.requestPath` tells the revision that gave it, as Seldon tells an image's version there; a
reward that comes back with it counts for that revision, whichever replica it comes to.

Source: prediction.proto of Seldon Core 1.18 and its Python client, which sends JSON, or JSON as the form field `json`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from predictor.errors import InvalidRequest, PredictorError
from predictor.protocols import strict_json
from predictor.protocols.older import OF_OUR_ANSWERS, SAMPLES, sampling, text
from predictor.protocols.parameters import Parameters
from predictor.protocols.query_string import arguments
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Exchange, Limits, WireFormat, json_body
from predictor.text.request import Completion

_DEFAULT_NEW_TOKENS = 100
_UNKNOWN = (OF_OUR_ANSWERS - {"return_full_text"}) | SAMPLES

# Of prediction.proto's SeldonMessage.
_MESSAGE_FIELDS = ("status", "meta", "data", "binData", "strData", "jsonData", "customData")
_NO_TEXT = {"tensor": "numbers", "tftensor": "a TensorFlow tensor"}


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    name: str
    in_row: bool  # it stood in a row of its own, and so will its completion


class Message(Exchange):
    """A checked message. `names` are those of its columns; None where it holds `strData`."""

    def __init__(
        self, prompts: list[_Prompt], names: list[str] | None, meta: Mapping[str, Any], tags: Parameters
    ) -> None:
        self.requests = [
            replace(tags.request(prompt.text, prompt.name), default_max_new_tokens=_DEFAULT_NEW_TOKENS)
            for prompt in prompts
        ]
        self._prompts, self._names, self._full_text = prompts, names, tags.return_full_text
        self._meta = dict(meta)

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        texts = [
            prompt.text + completion.text if self._full_text else completion.text
            for prompt, (completion,) in zip(self._prompts, results, strict=True)
        ]
        if self._names is None:
            return {"strData": texts[0], "meta": self._meta}
        cells = [[text] if prompt.in_row else text for prompt, text in zip(self._prompts, texts, strict=True)]
        return {"data": {"names": self._names, "ndarray": cells}, "meta": self._meta}


class Feedback(Exchange):
    """A checked feedback. `revision` is the one that it is about; None where it does not tell."""

    def __init__(self, reward: float, revision: str | None) -> None:
        self.requests = []
        self.reward, self.revision = reward, revision

    def render(self, results: Sequence[Sequence[Completion]] = ()) -> dict[str, Any]:
        """What Seldon's wrapper answers: a message without content."""
        return {"data": {"names": [], "ndarray": []}, "meta": {}}


def wire_format(model: str, revision: str) -> WireFormat:
    """The format of this model's answers; a revision that is empty is not told."""
    path = {"requestPath": {model: revision}} if revision else {}
    return WireFormat("seldon", lambda body, limits: parse(body, limits, path), error=error_message, decode=decode)


def parse(body: Any, limits: Limits, path: Mapping[str, Any]) -> Message:
    """A parsed message; raises `InvalidRequest` naming the field and the limit. `path` goes into the answer's meta."""
    message = object_of(body)
    for name in message:
        if name not in ("data", "strData", "meta"):
            raise InvalidRequest(f"{printable(name)} is not served; send data.ndarray or strData", param=name)
    if ("data" in message) == ("strData" in message):
        raise InvalidRequest("a message must have either data or strData", param="data")
    meta = _meta(message.get("meta", {}))
    tags = sampling(_whole(meta["tags"]), _UNKNOWN, limits, "meta.tags")
    meta |= path
    if "strData" in message:
        return Message([_Prompt(text(message, "strData"), "strData", in_row=False)], None, meta, tags)
    data = _inner(message["data"], "data", ("names", "ndarray", *_NO_TEXT))
    for name, holds in _NO_TEXT.items():
        if name in data:
            raise InvalidRequest(f"data.{name} holds {holds}, not text; send data.ndarray", param=name)
    return Message(_prompts(data.get("ndarray"), limits), _names(data.get("names", [])), meta, tags)


def parse_feedback(body: Any, model: str) -> Feedback:
    """A feedback about this model; raises `InvalidRequest` naming the field.

    JSON made from a protobuf message leaves zeros out, so a feedback without a reward, but with a message, has 0.
    """
    feedback = _inner(body, "the body", ("request", "response", "truth", "reward"))
    messages = [name for name in feedback if name != "reward"]
    for name in messages:
        _inner(feedback[name], name, _MESSAGE_FIELDS)
    if "reward" not in feedback and not messages:
        raise InvalidRequest("the body lacks reward", param="reward")
    reward = feedback.get("reward", 0)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
        raise InvalidRequest(f"reward must be a number from 0 to 1, got {printable(reward)}", param="reward")
    return Feedback(float(reward), _revision(feedback.get("response", {}), model))


def _revision(response: Mapping[str, Any], model: str) -> str | None:
    meta = _inner(response.get("meta", {}), "response.meta")
    path = _inner(meta.get("requestPath", {}), "response.meta.requestPath")
    revision = path.get(model)
    if revision is not None and not isinstance(revision, str):
        raise InvalidRequest(
            f"response.meta.requestPath must hold strings, got {printable(revision)}", param="requestPath"
        )
    return revision


def _prompts(rows: Any, limits: Limits) -> list[_Prompt]:
    name = "data.ndarray"
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest(f"{name} must be a non-empty list of strings, got {printable(rows)}", param="ndarray")
    if len(rows) > limits.max_instances:
        raise InvalidRequest(
            f"{name} must hold at most {limits.max_instances} prompts, got {len(rows)}", param="ndarray"
        )
    return [_prompt(row, f"{name}[{place}]") for place, row in enumerate(rows)]


def _prompt(row: Any, name: str) -> _Prompt:
    in_row = isinstance(row, list) and len(row) == 1
    cell = row[0] if in_row else row
    if not isinstance(cell, str):
        raise InvalidRequest(f"{name} must be a string, or a list of one, got {printable(row)}", param="ndarray")
    return _Prompt(cell, name, in_row)


def _names(names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"data.names must be a list of strings, got {printable(names)}", param="names")
    return names


def _meta(value: Any) -> dict[str, Any]:
    """The fields that an answer repeats: an id, made where there is none as Seldon's executor does, and the tags."""
    meta = _inner(value, "meta", ("puid", "tags"))
    puid = meta.get("puid", "")
    if not isinstance(puid, str):
        raise InvalidRequest(f"meta.puid must be a string, got {printable(puid)}", param="puid")
    return {"puid": puid or uuid.uuid4().hex, "tags": _inner(meta.get("tags", {}), "meta.tags")}


def _whole(tags: Mapping[str, Any]) -> dict[str, Any]:
    """Tags with 16.0 as 16: Seldon's client sends them through protobuf's Value, where every number is a double."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value
        for name, value in tags.items()
    }


def _inner(value: Any, name: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """An object with no fields but those `known`."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be an object, got {printable(value)}", param=name.split(".")[-1])
    for key in value:
        if known is not None and key not in known:
            raise InvalidRequest(f"{name}: unknown field {printable(key)}", param=key)
    return value


def decode(body: bytes, headers: Mapping[str, str]) -> Any:
    """JSON, or JSON as the form field `json`. curl's `-d` declares plain JSON to be a form."""
    declared = headers.get("content-type", "").lower()
    if not (declared.startswith("application/x-www-form-urlencoded") and body.startswith(b"json=")):
        return json_body(body, headers)
    (name, *others), (message, *_) = zip(*arguments(body, "the form").items(), strict=True)
    if others:
        raise InvalidRequest(f"the form must have the field {name} alone, got {printable(others)}", param=others[0])
    return strict_json.loads(message.encode())


def error_message(error: PredictorError) -> dict[str, Any]:
    """Seldon's, which its clients parse into the same message."""
    told = {"code": error.status, "info": str(error), "reason": error.code.upper(), "status": "FAILURE"}
    return {"status": told}
