"""What the bodies of completions and of chats have in common, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from predictor.errors import InvalidRequest
from predictor.protocols.parameters import Parameters, parse_parameters, validated
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Limits

_WHERE = "the body"

# OpenAI's own limit, narrower than that of our other formats.
_MAX_TEMPERATURE = 2

# A user's name is a key of the store of strikes.
_MAX_USER_CHARACTERS = 256


class StreamOptions(BaseModel):
    """What a stream has beside its choices."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in every chunk


class Fields(BaseModel):
    """What a body has beside the parameters of every format, or with another default or range."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    subject: ClassVar[str]  # the field that says what is to be answered; it is read elsewhere
    other_names: ClassVar[Mapping[str, str]]  # of other formats, for what has one here
    not_served: ClassVar[Mapping[str, str]]  # fields of OpenAI's, and why not

    model: str
    temperature: float = Field(1.0, ge=0, le=_MAX_TEMPERATURE)
    top_k: int = Field(0, ge=0)  # not OpenAI's, and off as there
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=_MAX_USER_CHARACTERS)


_Kind = TypeVar("_Kind", bound=Fields)


def read_fields(kind: type[_Kind], body: Any, limits: Limits) -> tuple[_Kind, Parameters]:
    """A parsed JSON body but for its subject; null is as good as absent. Raises `InvalidRequest` naming the field."""
    if kind.subject not in object_of(body):
        raise InvalidRequest(f"{_WHERE} lacks {kind.subject}", param=kind.subject)
    sent = {key: value for key, value in body.items() if value is not None and key != kind.subject}
    for name, ours in kind.other_names.items():
        if name in sent:
            raise InvalidRequest(f"{_WHERE}: unknown field {printable(name)}; here it is {ours}", param=name)
    for name, reason in kind.not_served.items():
        if name in sent:
            raise InvalidRequest(f"{name} is not served: {reason}", param=name)
    own = {key: sent.pop(key) for key in kind.model_fields if key in sent}
    fields = validated(kind, own, _WHERE)
    same = {"temperature": fields.temperature, "top_k": fields.top_k}
    parameters = parse_parameters(sent | same, _WHERE, limits.max_timeout_s)
    _check_stream_options(fields.stream_options, parameters.stream)
    return fields, parameters


def _check_stream_options(options: StreamOptions | None, stream: bool) -> None:
    if options is None:
        return
    if not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest("stream_options.continuous_usage_stats needs include_usage: true", param="stream_options")


def named_model(body: Any) -> str | None:
    """The model that a body asks for."""
    name = body.get("model") if isinstance(body, dict) else None
    return name if isinstance(name, str) else None
