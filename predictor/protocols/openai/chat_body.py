"""The body of a chat request: messages, the fields that completions have too, and our further parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from predictor.errors import InvalidRequest
from predictor.protocols.openai.answer import Shape
from predictor.protocols.openai.chat import Chat
from predictor.protocols.openai.fields import Fields, StreamOptions, read_fields
from predictor.protocols.parameters import MAX_LOGPROBS, validated
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Limits
from predictor.text.request import ChatMessage

MAX_MESSAGES, MAX_PARTS = 1_024, 1_024

_MAX_NAME_CHARACTERS = 64

# A text goes on to the context's end unless it is told otherwise, as OpenAI's.
_ALL_THERE_IS = 2**31 - 1


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["developer", "system", "user", "assistant"]
    content: Any  # read by `_read_content`
    name: str | None = Field(None, max_length=_MAX_NAME_CHARACTERS)


class _TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]


class _Fields(Fields):
    subject: ClassVar = "messages"
    other_names: ClassVar = {
        "max_new_tokens": "max_completion_tokens",
        "num_return_sequences": "n",
        "details": "logprobs",
    }
    not_served: ClassVar = {"return_full_text": "an answer is the assistant's message alone"} | dict.fromkeys(
        ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "audio"),
        "the model writes text alone",
    )

    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)  # its older name
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: _TextFormat | None = None


def parse_chat(body: Any, limits: Limits) -> Chat:
    """A parsed JSON body into a checked request; raises `InvalidRequest` naming the field and the limit."""
    fields, parameters = read_fields(_Fields, body, limits)
    if fields.max_tokens is not None and fields.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens and max_completion_tokens mean the same; give one", param="max_tokens")
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if parameters.n > limits.max_instances:
        raise InvalidRequest(f"n must be at most {limits.max_instances}, got {parameters.n}", param="n")
    request = replace(
        parameters.request("", "messages"),
        prompt_name="messages",
        messages=_read_messages(body["messages"]),
        max_new_tokens=fields.max_completion_tokens or fields.max_tokens,
        new_name="max_completion_tokens" if fields.max_tokens is None else "max_tokens",
        default_max_new_tokens=_ALL_THERE_IS,
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    shape = Shape(fields.model, parameters.n, fields.logprobs, fields.stream_options or StreamOptions())
    return Chat([request], shape, parameters.stream, fields.user)


def _read_messages(value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"messages must be a list of messages, not empty, got {printable(value)}", "messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(f"messages must be at most {MAX_MESSAGES}, got {len(value)}", param="messages")
    return tuple(_read_message(each, f"messages[{place}]") for place, each in enumerate(value))


def _read_message(value: Any, where: str) -> ChatMessage:
    try:
        # Without nulls, which OpenAI's own client sends back with an answer's message.
        said = {key: part for key, part in object_of(value, where).items() if part is not None}
        message = validated(_Message, said, where)
        return ChatMessage(message.role, _read_content(message.content, f"{where}.content"), message.name)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param="messages") from error


def _read_content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{where} must be a string or a list of text parts, not empty, got {printable(value)}")
    if len(value) > MAX_PARTS:
        raise InvalidRequest(f"{where} must have at most {MAX_PARTS} parts, got {len(value)}")
    return "\n".join(validated(_Part, part, f"{where}[{place}]").text for place, part in enumerate(value))
