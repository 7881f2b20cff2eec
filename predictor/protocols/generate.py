"""Triton's generate extension: `{"text_input": str, "parameters": {...}}` -> `{"text_output": str}`.

Parameters may also stand beside `text_input`. With n > 1 each field of the answer is a list of n. The events of
`generate_stream` carry deltas: the completion is their `text_output`s in a row (of one `sample` where n > 1).
Source: Triton's extension_generate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from predictor.errors import InvalidRequest
from predictor.protocols.details import facts, logprob_columns
from predictor.protocols.parameters import Parameters, validated
from predictor.protocols.strict_json import printable
from predictor.protocols.v2 import INPUT, VERSION, read_parameters
from predictor.protocols.wire import Exchange, Limits, RawAnswer, WireFormat
from predictor.text.pieces import Piece
from predictor.text.request import Completion


class _Request(BaseModel):
    """The body; what else stands in it are parameters."""

    model_config = ConfigDict(strict=True, extra="allow")

    text_input: str
    parameters: dict[str, Any] = {}
    id: str | None = None


class Generate(Exchange):
    """A checked request. `one_event` answers it whole, as the only event of a stream."""

    def __init__(
        self, head: Mapping[str, Any], prompt: str, parameters: Parameters, stream: bool, one_event: bool
    ) -> None:
        """`head` begins the answer, or each event of it."""
        self.requests = [parameters.request(prompt, INPUT)]
        self.stream = stream
        self._head, self._parameters, self._one_event = head, parameters, one_event
        self._prompt = prompt if parameters.return_full_text else ""
        self._begun: set[int] = set()  # samples of which something has been sent

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any] | RawAnswer:
        samples = [self._shown(completion) for completion in results[0]]
        shown = samples[0] if len(samples) == 1 else {name: [each[name] for each in samples] for name in samples[0]}
        answer = dict(self._head) | shown
        return RawAnswer(b"data: " + orjson.dumps(answer) + b"\n\n", "text/event-stream") if self._one_event else answer

    def _shown(self, completion: Completion) -> dict[str, Any]:
        shown: dict[str, Any] = {"text_output": self._prompt + completion.text}
        if self._parameters.details:
            shown["finish_reason"] = completion.finish_reason
            shown |= facts(completion)
            if completion.logprobs is not None:
                shown["logprobs"] = logprob_columns(completion.logprobs, completion.top_logprobs)
        return shown

    def events(self, piece: Piece) -> list[Any]:
        delta, details = piece.delta, self._parameters.details
        event = dict(self._head) | {"text_output": delta.text}
        if piece.sample not in self._begun:
            event["text_output"] = self._prompt + delta.text
        if not event["text_output"] and delta.finish_reason is None and delta.logprob is None:
            return []  # a character that is not whole yet
        self._begun.add(piece.sample)
        if self._parameters.n > 1:
            event["sample"] = piece.sample
        if details and delta.logprob is not None:
            event["logprobs"] = logprob_columns([delta.logprob], [delta.top_logprobs])
        if details and delta.finish_reason is not None:
            event["finish_reason"] = delta.finish_reason
            event |= facts(piece.source)
        return [event]


def parse(body: Any, limits: Limits, model: str, streamed: bool) -> Generate:
    """A body to `model` into a checked request; raises `InvalidRequest` naming the field and the limit.

    `streamed` is for `generate_stream`, where `stream: false` asks for one event; `generate` refuses `stream: true`.
    """
    request = validated(_Request, body, "the body")
    beside = request.model_extra or {}
    for name in beside:
        if name in request.parameters:
            raise InvalidRequest(f"{printable(name)} stands beside parameters and in them; give one", param=name)
    where = "the body" if beside else "parameters"
    parameters = read_parameters(request.parameters | beside, where, limits)
    parameters.check_together(where)
    if parameters.stream and not streamed:
        raise InvalidRequest("generate answers in one piece; send stream: true to generate_stream", param="stream")
    head = {"model_name": model, "model_version": VERSION} | ({} if request.id is None else {"id": request.id})
    whole = streamed and "stream" in parameters.model_fields_set and not parameters.stream
    return Generate(head, request.text_input, parameters, stream=streamed and not whole, one_event=whole)


def generate_format(model: str, streamed: bool) -> WireFormat:
    """The format of requests whose path names `model`."""
    return WireFormat("generate", partial(parse, model=model, streamed=streamed))
