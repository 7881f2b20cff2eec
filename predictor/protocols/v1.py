"""TensorFlow Serving's V1 predict, and the `{"text", "length"}` body of the predictor this one succeeds.

The signature has one string input, `prompt`, and one string output, `text`. With one of each TensorFlow Serving lets
the value stand for itself, so neither name is needed:

- rows: `{"instances": [...], "parameters": {...}}` -> `{"predictions": [...]}`;
- columns: `{"inputs": "text" | ["a", "b"] | {"prompt": ...}, "parameters": {...}}` -> `{"outputs": ...}`;
- the older body: `{"text": str, "length": total tokens}` -> `{"prediction": prompt + completion}`.

`parameters` is ours, and so are an instance's fields beside `prompt`. Error texts are TensorFlow Serving's where it has
one (its util/json_tensor.cc), with our name of the place where it gives none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from predictor.errors import InvalidRequest
from predictor.protocols.parameters import Parameters, override, parse_parameters
from predictor.protocols.prediction import Predict, Row
from predictor.protocols.strict_json import printable
from predictor.protocols.string_tensor import is_binary, parse_string
from predictor.protocols.wire import Limits, WireFormat, json_body

SIGNATURE = "serving_default"
INPUT, OUTPUT = "prompt", "text"

_DEFAULT_LENGTH = 64  # the older body's: tokens in all, prompt included


def parse(body: Any, limits: Limits) -> Predict:
    """A parsed JSON body into rows; raises `InvalidRequest` naming the field and the limit."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"JSON Value: {printable(body)} Is not object")
    if "text" in body and "instances" in body:
        raise InvalidRequest("text and instances are two ways to ask; give one", param="text")
    return _parse_text(body, limits) if "text" in body else _parse_tensors(body, limits)


def _parse_tensors(body: Mapping[str, Any], limits: Limits) -> Predict:
    _check_signature(body)
    if "instances" not in body and "inputs" not in body:
        raise InvalidRequest("Missing 'inputs' or 'instances' key", param="instances")
    if "instances" in body and "inputs" in body:
        raise InvalidRequest(
            f"JSON Value: {printable(body)} Not formatted correctly expecting only one of 'inputs' or 'instances' "
            "keys to exist",
            param="inputs",
        )
    for key in body:
        if key not in ("instances", "inputs", "parameters", "signature_name"):
            raise InvalidRequest(f"unknown field {printable(key)}", param=key)
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"parameters must be an object, got {printable(parameters)}", param="parameters")
    shared = parse_parameters(parameters, "parameters", limits.max_timeout_s)
    if "inputs" in body:
        return _parse_inputs(body["inputs"], shared, limits)
    instances = body["instances"]
    if not isinstance(instances, list):
        raise InvalidRequest(f"JSON Value: {printable(body)} Excepting 'instances' to be an list/array", "instances")
    if not instances:
        raise InvalidRequest(f"JSON Value: {printable(body)} No values in 'instances' array", "instances")
    _check_count(instances, "instances", limits)
    rows = [_parse_instance(each, place, parameters, shared, limits) for place, each in enumerate(instances)]
    return Predict(rows, shared.stream)


def _check_signature(body: Mapping[str, Any]) -> None:
    signature = body.get("signature_name", SIGNATURE)
    if not isinstance(signature, str):
        raise InvalidRequest(
            f"JSON Value: {printable(body)} not formatted correctly. 'signature_name' key must be a string value.",
            param="signature_name",
        )
    if signature not in (SIGNATURE, ""):
        raise InvalidRequest(
            f"Serving signature name: {printable(signature)} not found in signature def; signature_name must be "
            f'"{SIGNATURE}"',
            param="signature_name",
        )


def _check_count(values: list[Any], name: str, limits: Limits) -> None:
    if len(values) > limits.max_instances:
        raise InvalidRequest(f"{name} must hold at most {limits.max_instances} prompts, got {len(values)}", name)


def _parse_instance(
    instance: Any, place: int, parameters: Mapping[str, Any], shared: Parameters, limits: Limits
) -> Row:
    name = f"instances[{place}]"
    if not isinstance(instance, dict) or is_binary(instance):
        return _row(parse_string(instance, _element(place) + name, name), name, shared)
    if INPUT not in instance:
        raise InvalidRequest(f"{_element(place)}{name} lacks {INPUT}", param=INPUT)
    if "stream" in instance:
        raise InvalidRequest(f"{name}: stream is for the whole request; put it into parameters", param="stream")
    prompt = parse_string(instance[INPUT], f"{_element(place, INPUT)}{name}.{INPUT}", INPUT)
    own = {key: value for key, value in instance.items() if key != INPUT}
    return _row(prompt, name, parse_parameters(override(parameters, own), name, limits.max_timeout_s))


def _element(place: int, key: str | None = None) -> str:
    """How TensorFlow Serving begins an error about one of the instances."""
    named = "" if key is None else f" key: {key}"
    return f"Failed to process element: {place}{named} of 'instances' list. "


def _parse_inputs(inputs: Any, shared: Parameters, limits: Limits) -> Predict:
    """The column form: one string or a list of them, by itself or by the input's name."""
    name = "inputs"
    if isinstance(inputs, dict) and not is_binary(inputs):
        if INPUT not in inputs:
            raise InvalidRequest(f"Missing named input: {INPUT} in 'inputs' object.", param=INPUT)
        for key in inputs:
            if key != INPUT:
                raise InvalidRequest(f"inputs: unknown input {printable(key)}; there is {INPUT} alone", param=key)
        name, inputs = f"inputs.{INPUT}", inputs[INPUT]
    if not isinstance(inputs, list):
        return Predict([_row(parse_string(inputs, name, name), name, shared)], shared.stream, "outputs", single=True)
    if not inputs:
        raise InvalidRequest(f"{name} must hold a prompt, got an empty list", param=name)
    _check_count(inputs, name, limits)
    rows = []
    for place, value in enumerate(inputs):
        where = f"{name}[{place}]"
        if isinstance(value, list):
            raise InvalidRequest(f"{where}: Encountered list at unexpected level: 1 expected < 1", param=where)
        rows.append(_row(parse_string(value, where, where), where, shared))
    return Predict(rows, shared.stream, "outputs")


def _parse_text(body: Mapping[str, Any], limits: Limits) -> Predict:
    text, length = body["text"], body.get("length", _DEFAULT_LENGTH)
    if not isinstance(text, str):
        raise InvalidRequest(f"text must be a string, got {printable(text)}", param="text")
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
    return Predict([row], parameters.stream, "prediction", single=True)


def _row(prompt: str, name: str, parameters: Parameters, max_total_tokens: int | None = None) -> Row:
    parameters.check_together(name)
    request = parameters.request(prompt, name, max_total_tokens)
    return Row(request, parameters.details, parameters.return_full_text)


def _decode(body: bytes, headers: Mapping[str, str]) -> Any:
    if not body:
        raise InvalidRequest("JSON Parse error: The document is empty")
    try:
        return json_body(body, headers)
    except InvalidRequest as error:
        raise InvalidRequest(f"JSON Parse error: {error}", error.param) from error


FORMAT = WireFormat("v1", parse, decode=_decode)
