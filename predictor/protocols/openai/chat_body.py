"""The body of a chat request: every field of OpenAI's that a text model can meet, and our further parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from predictor.errors import InvalidRequest
from predictor.protocols.openai.answer import Shape
from predictor.protocols.openai.chat import Chat
from predictor.protocols.openai.fields import Fields, StreamOptions, read_fields
from predictor.protocols.parameters import MAX_LOGPROBS, validated
from predictor.protocols.strict_json import printable
from predictor.protocols.wire import Limits
from predictor.text.request import ChatMessage

MAX_MESSAGES = 1_024

# A text goes on to the context's end unless it is told otherwise, as OpenAI's.
_ALL_THERE_IS = 2**31 - 1

_TEXT_ALONE = "the model writes text alone"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["developer", "system", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1)]
    name: str | None = None


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
    not_served: ClassVar = dict.fromkeys(
        ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "audio"), _TEXT_ALONE
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
        messages=_read_messages(body["messages"]),
        max_new_tokens=fields.max_completion_tokens or fields.max_tokens,
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
        message = validated(_Message, value, where)
    except InvalidRequest as error:
        raise InvalidRequest(str(error), param="messages") from error
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    return ChatMessage(message.role, content, message.name)
