"""TensorFlow Serving's V1 row form, and the `{"text", "length"}` body of the predictor this one succeeds.

`{"instances": [...], "parameters": {...}}` -> `{"predictions": [...]}`, and
`{"text": str, "length": total tokens}` -> `{"prediction": prompt + completion}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.parameters import Parameters, override, parse_parameters
from predictor.protocols.strict_json import printable
from predictor.protocols.wire import Exchange, Limits, WireFormat
from predictor.text.pieces import Piece
from predictor.text.request import Completion, LogProb, TextRequest

SIGNATURE = "serving_default"
_DEFAULT_LENGTH = 64  # the older body's: tokens in all, prompt included


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, and how its prediction is shown."""

    request: TextRequest
    details: bool
    full_text: bool


class Predict(Exchange):
    """A checked request. `single` marks the older body, whose answer is one `prediction`."""

    def __init__(self, rows: list[Row], stream: bool, single: bool = False) -> None:
        self.rows, self.stream, self.single = rows, stream, single
        self.requests = [row.request for row in rows]
        self._begun: set[tuple[int, int]] = set()  # samples of which something has been sent

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        predictions = [_prediction(row, completions) for row, completions in zip(self.rows, results, strict=True)]
        return {"prediction": predictions[0]} if self.single else {"predictions": predictions}

    def events(self, piece: Piece) -> list[Any]:
        row, delta, place = self.rows[piece.row], piece.delta, (piece.row, piece.sample)
        text = delta.text
        if row.full_text and place not in self._begun:
            text = row.request.prompt + text
        self._begun.add(place)
        event: dict[str, Any] = {"index": piece.row, "delta": text}
        if row.request.n > 1:
            event["sample"] = piece.sample
        if row.details and delta.logprob is not None:
            event["logprobs"] = _logprobs((delta.logprob,), (delta.top_logprobs,))
        if delta.finish_reason is not None:
            source = piece.source
            event["finish_reason"] = delta.finish_reason
            event["usage"] = {"prompt_tokens": source.prompt_tokens, "completion_tokens": source.completion_tokens}
            if row.details:
                event |= {"seed": source.seed, "dtype": source.dtype}
        elif not text and not row.details:
            return []  # a character that is not whole yet
        return [event]


def parse(body: Any, limits: Limits) -> Predict:
    """A parsed JSON body into rows; raises `InvalidRequest` naming the field and the limit."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {printable(body)}")
    if "text" in body and "instances" in body:
        raise InvalidRequest("text and instances are two ways to ask; give one", param="text")
    return _parse_text(body, limits) if "text" in body else _parse_instances(body, limits)


def _parse_instances(body: Mapping[str, Any], limits: Limits) -> Predict:
    if "instances" not in body and "inputs" not in body:
        raise InvalidRequest("Missing 'inputs' or 'instances' key", param="instances")
    if "inputs" in body:
        raise InvalidRequest(
            "inputs (the column form) is not served; send instances, a list with one prompt per row", param="inputs"
        )
    for key in body:
        if key not in ("instances", "parameters", "signature_name"):
            raise InvalidRequest(f"unknown field {printable(key)}", param=key)
    signature = body.get("signature_name", SIGNATURE)
    if signature not in (SIGNATURE, ""):
        raise InvalidRequest(
            f'signature_name must be "{SIGNATURE}", got {printable(signature)}', param="signature_name"
        )
    instances, parameters = body["instances"], body.get("parameters", {})
    if not isinstance(instances, list) or not instances:
        raise InvalidRequest(f"instances must be a non-empty list, got {printable(instances)}", param="instances")
    if len(instances) > limits.max_instances:
        raise InvalidRequest(
            f"instances must hold at most {limits.max_instances} prompts, got {len(instances)}", param="instances"
        )
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, got {printable(parameters)}", param="parameters")
    shared = parse_parameters(parameters, "parameters", limits.max_timeout_s)
    return Predict([
        _parse_instance(instance, f"instances[{place}]", parameters, shared, limits)
        for place, instance in enumerate(instances)
    ], stream=shared.stream)  # fmt: skip


def _parse_instance(instance: Any, name: str, parameters: Mapping[str, Any], shared: Parameters, limits: Limits) -> Row:
    if isinstance(instance, str):
        return _row(instance, name, shared)
    if not isinstance(instance, dict):
        raise InvalidRequest(f"{name} must be a string or an object, got {printable(instance)}", param=name)
    prompt = _text(instance, "prompt", name)
    if "stream" in instance:
        raise InvalidRequest(f"{name}: stream is for the whole request; put it into parameters", param="stream")
    own = {key: value for key, value in instance.items() if key != "prompt"}
    return _row(prompt, name, parse_parameters(override(parameters, own), name, limits.max_timeout_s))


def _parse_text(body: Mapping[str, Any], limits: Limits) -> Predict:
    text = _text(body, "text", "the body")
    length = body.get("length", _DEFAULT_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InvalidRequest(
            f"length must be a positive integer (tokens in all, prompt included), got {printable(length)}",
            param="length",
        )
    own = {key: value for key, value in body.items() if key not in ("text", "length")}
    for key in ("max_new_tokens", "max_tokens"):
        if key in own:
            raise InvalidRequest(f"{key} goes with instances; with text, length limits the total", param=key)
    # The predictor this body comes from always answered prompt and completion together.
    parameters = parse_parameters({"return_full_text": True} | own, "the body", limits.max_timeout_s)
    row = _row(text, "text", parameters, max_total_tokens=length)
    return Predict([row], parameters.stream, single=True)


def _row(prompt: str, name: str, parameters: Parameters, max_total_tokens: int | None = None) -> Row:
    parameters.check_together(name)
    request = parameters.request(prompt, name, max_total_tokens)
    return Row(request, parameters.details, parameters.return_full_text)


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    if key not in fields:
        raise InvalidRequest(f"{where} lacks {key}", param=key)
    value = fields[key]
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: {key} must be a string, got {printable(value)}", param=key)
    return value


def _prediction(row: Row, completions: Sequence[Completion]) -> Any:
    shown = [_shown(row, completion) for completion in completions]
    return shown[0] if row.request.n == 1 else shown


def _shown(row: Row, completion: Completion) -> Any:
    text = row.request.prompt + completion.text if row.full_text else completion.text
    if not row.details:
        return text
    return {
        "text": text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "seed": completion.seed,
        "dtype": completion.dtype,
        "logprobs": None if completion.logprobs is None else _logprobs(completion.logprobs, completion.top_logprobs),
    }


def _logprobs(chosen: tuple[LogProb, ...], alternatives: tuple[tuple[LogProb, ...], ...]) -> dict[str, Any]:
    return {
        "token_ids": [each.token_id for each in chosen],
        "tokens": [each.token for each in chosen],
        "token_logprobs": [each.logprob for each in chosen],
        "top_logprobs": [
            [{"token_id": each.token_id, "token": each.token, "logprob": each.logprob} for each in place]
            for place in alternatives
        ],
    }


FORMAT = WireFormat("v1", parse)
