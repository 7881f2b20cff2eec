"""KServe's V2 (the Open Inference Protocol): `text_input` in, `text_output` out, as JSON or as its binary extension.

`text_input` is BYTES of shape [rows] or [rows, 1]. Every output has the same shape, or [rows, n] where n > 1 samples
are asked for. `parameters`, of the request and over them those of the input, are the generation parameters; a list or
an object may also stand there as a string of JSON, since the protocol's own parameters are scalars.
Source: kserve.github.io, "Open Inference Protocol (V2)"; Triton's extension_binary_data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import orjson
from pydantic import BaseModel, ConfigDict

from predictor.errors import InvalidRequest
from predictor.protocols import models, strict_json
from predictor.protocols.details import logprob_columns
from predictor.protocols.parameters import Parameters, override, parse_parameters, validated
from predictor.protocols.strict_json import printable
from predictor.protocols.tensors import (
    BINARY,
    JSON_LENGTH,
    Datatype,
    Message,
    Tensor,
    decode,
    encode,
    flatten_strings,
    read_strings,
)
from predictor.protocols.wire import Exchange, Limits, RawAnswer, WireFormat
from predictor.text.request import Completion

VERSION = str(models.VERSION)
INPUT = "text_input"


class _Output(NamedTuple):
    datatype: Datatype
    value: Callable[[Completion], Any]


OUTPUTS: dict[str, _Output] = {
    "text_output": _Output("BYTES", lambda completion: completion.text),
    "finish_reason": _Output("BYTES", lambda completion: completion.finish_reason),
    "prompt_tokens": _Output("INT64", lambda completion: completion.prompt_tokens),
    "completion_tokens": _Output("INT64", lambda completion: completion.completion_tokens),
    "seed": _Output("UINT64", lambda completion: completion.seed),
    "dtype": _Output("BYTES", lambda completion: completion.dtype),
    # JSON as text: the columns are as long as the completion, and no tensor is ragged.
    "logprobs": _Output(
        "BYTES",
        lambda completion: orjson.dumps(logprob_columns(completion.logprobs or (), completion.top_logprobs)).decode(),
    ),
}
_FIRST_OUTPUT = "text_output"


class _Request(BaseModel):
    """The envelope. KServe's own classes write null for what is not given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    inputs: list[Any]
    outputs: list[Any] | None = None
    parameters: dict[str, Any] | None = None
    id: str | None = None
    model_name: str | None = None  # KServe's client repeats the path here
    model_version: str | None = None


class _RequestInput(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    datatype: str
    shape: list[Any]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class _RequestOutput(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    parameters: dict[str, Any] | None = None


class Infer(Exchange):
    """A checked request. `outputs` are the names to answer with, and whether as raw data."""

    def __init__(
        self,
        head: Mapping[str, Any],
        prompts: list[str],
        matrix: bool,
        parameters: Parameters,
        outputs: dict[str, bool],
    ) -> None:
        """`head` begins the answer; `matrix` keeps the shape [rows, 1]."""
        self.requests = [parameters.request(prompt, f"{INPUT}[{row}]") for row, prompt in enumerate(prompts)]
        self._head, self._outputs, self._full_text = head, outputs, parameters.return_full_text
        self._shape = (len(prompts), parameters.n) if matrix or parameters.n > 1 else (len(prompts),)

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any] | RawAnswer:
        tensors = [(self._tensor(name, results), binary) for name, binary in self._outputs.items()]
        return encode(self._head, tensors)

    def _tensor(self, name: str, results: Sequence[Sequence[Completion]]) -> Tensor:
        datatype, value = OUTPUTS[name]
        data = [value(completion) for completions in results for completion in completions]
        if name == _FIRST_OUTPUT and self._full_text:
            prompts = (request.prompt for request in self.requests for _ in range(request.n))
            data = [prompt + text for prompt, text in zip(prompts, data, strict=True)]
        return Tensor(name, datatype, self._shape, data)


def parse(message: Message, limits: Limits, model: str) -> Infer:
    """A message to `model` into a checked request; raises `InvalidRequest` naming the field and the limit."""
    request = validated(_Request, message.json, "the body")
    for field, wanted, got in (("name", model, request.model_name), ("version", VERSION, request.model_version)):
        if got not in (None, wanted):
            raise InvalidRequest(
                f"model_{field} must be that of the path, {printable(wanted)}, got {printable(got)}",
                param=f"model_{field}",
            )
    if len(request.inputs) != 1:
        raise InvalidRequest(f"inputs must hold one tensor, {INPUT}, got {len(request.inputs)}", param="inputs")
    given = validated(_RequestInput, request.inputs[0], "inputs[0]")
    if given.name != INPUT:
        raise InvalidRequest(f'inputs[0].name must be "{INPUT}", got {printable(given.name)}', param="inputs")
    if given.datatype != "BYTES":
        raise InvalidRequest(f'inputs[0].datatype must be "BYTES", got {printable(given.datatype)}', param="inputs")

    shared = dict(request.parameters or {})
    own = dict(given.parameters or {})
    binary = _boolean(shared.pop("binary_data_output", False), "parameters.binary_data_output")
    prompts = _prompts(given, own.pop("binary_data_size", None), message.raw, limits)
    parameters = read_parameters(shared, "parameters", limits)
    if own:
        parameters = read_parameters(override(shared, own), "inputs[0].parameters", limits)
    outputs = _outputs(request.outputs or [], binary, parameters)
    parameters.check_together("parameters", logprobs_shown="logprobs" in outputs)
    if parameters.stream:
        raise InvalidRequest("infer answers in one piece; stream is for generate_stream", param="stream")
    head = {"model_name": model, "model_version": VERSION} | ({} if request.id is None else {"id": request.id})
    return Infer(head, prompts, len(given.shape) == 2, parameters, outputs)


def read_parameters(fields: Mapping[str, Any], where: str, limits: Limits) -> Parameters:
    """Generation parameters of which a list or an object may be a string of JSON.

    `stop` is a list where the string is a JSON list that begins with a string; else it is the stop string itself.
    """
    decoded = dict(fields)
    for name in ("logit_bias", "bad_words", "stop"):
        value = decoded.get(name)
        if isinstance(value, str) and (name != "stop" or value.startswith('["')):
            try:
                decoded[name] = strict_json.loads(value.encode())
            except InvalidRequest as error:
                if name != "stop":
                    raise InvalidRequest(
                        f"{where}.{name} is a string and must then hold JSON, got {printable(value)}", param=name
                    ) from error
    return parse_parameters(decoded, where, limits.max_timeout_s)


def _prompts(given: _RequestInput, raw_size: Any, raw: bytes, limits: Limits) -> list[str]:
    """The elements of the input, from its JSON or from what follows the JSON."""
    shape, most = given.shape, limits.max_instances
    if len(shape) not in (1, 2) or any(type(size) is not int for size in shape) or shape[1:] not in ([], [1]):
        rows = 0
    else:
        rows = shape[0]
    if not 1 <= rows <= most:
        raise InvalidRequest(
            f"inputs[0].shape must be [rows] or [rows, 1] with 1 to {most} rows, got {printable(shape)}", param="inputs"
        )
    if raw_size is None:
        if raw:
            raise InvalidRequest(f"{len(raw)} bytes follow the JSON, and no binary_data_size tells of them")
        if given.data is None:
            raise InvalidRequest("inputs[0] lacks data", param="inputs")
        return flatten_strings(given.data, shape, "inputs[0].data")
    if given.data is not None:
        raise InvalidRequest("inputs[0] has data and binary_data_size; give one", param="inputs")
    if type(raw_size) is not int or raw_size != len(raw):  # no 5.0, no true
        raise InvalidRequest(
            f"inputs[0].parameters.binary_data_size must be {len(raw)}, the bytes that follow the JSON by the header "
            f"{JSON_LENGTH}, got {printable(raw_size)}",
            param="binary_data_size",
        )
    return read_strings(raw, rows, INPUT)


def _outputs(asked: list[Any], binary: bool, parameters: Parameters) -> dict[str, bool]:
    """What the request names, or the text; `details` adds the rest. `binary` holds where an output does not say."""
    outputs: dict[str, bool] = {}
    for place, each in enumerate(asked):
        where = f"outputs[{place}]"
        output = validated(_RequestOutput, each, where)
        if output.name not in OUTPUTS or output.name in outputs:
            raise InvalidRequest(
                f"{where}.name must be one of {', '.join(OUTPUTS)}, each once, got {printable(output.name)}",
                param="outputs",
            )
        own = dict(output.parameters or {})
        outputs[output.name] = _boolean(own.pop("binary_data", binary), f"{where}.parameters.binary_data")
        for name in own:
            raise InvalidRequest(f"{where}.parameters: unknown field {printable(name)}", param=name)
    if "logprobs" in outputs and parameters.logprobs is None:
        raise InvalidRequest("the output logprobs needs the parameter logprobs", param="outputs")
    if parameters.details and asked:
        raise InvalidRequest("details adds every output, and outputs names some; give one of them", param="details")
    if parameters.details:
        for name in OUTPUTS:
            if name != "logprobs" or parameters.logprobs is not None:
                outputs.setdefault(name, binary)
    return outputs or {_FIRST_OUTPUT: binary}


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a boolean, got {printable(value)}", param=name.rsplit(".", 1)[1])
    return value


def infer_format(model: str) -> WireFormat:
    """The format of requests whose path names `model`."""
    return WireFormat("v2", partial(parse, model=model), decode=decode, media_types=(BINARY,))
