"""The body of a completions request: every field of OpenAI's, and our further parameters by our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from predictor.errors import InvalidRequest
from predictor.protocols.openai.completions import Completions, Shape
from predictor.protocols.openai.prompts import read_prompts
from predictor.protocols.parameters import MAX_SAMPLES, parse_parameters, validated
from predictor.protocols.strict_json import object_of, printable
from predictor.protocols.wire import Limits

_WHERE = "the body"

# OpenAI's own limits and default, narrower than those of our other formats.
_MAX_TEMPERATURE, _MAX_LOGPROBS = 2, 5
_DEFAULT_MAX_TOKENS = 16

# Names of other formats for what has one here.
_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
    "return_full_text": "echo",
    "details": "logprobs",
}

# A user's name is a key of the store of strikes.
_MAX_USER_CHARACTERS = 256


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in every chunk


class _Fields(BaseModel):
    """What completions have beside the parameters of every format, or with another default or range."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=_MAX_TEMPERATURE)
    top_k: int = Field(0, ge=0)  # not OpenAI's, and off as there
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    echo: bool = False
    stream_options: _StreamOptions | None = None
    user: str | None = Field(None, max_length=_MAX_USER_CHARACTERS)


def named_model(body: Any) -> str | None:
    """The model that a body asks for."""
    name = body.get("model") if isinstance(body, dict) else None
    return name if isinstance(name, str) else None


def parse(body: Any, limits: Limits) -> Completions:
    """A parsed JSON body into a checked request; raises `InvalidRequest` naming the field and the limit."""
    if "prompt" not in object_of(body):
        raise InvalidRequest(f"{_WHERE} lacks prompt", param="prompt")
    sent = {key: value for key, value in body.items() if value is not None and key != "prompt"}
    _refuse_by_name(sent)
    own = {key: sent.pop(key) for key in _Fields.model_fields if key in sent}
    fields = validated(_Fields, own, _WHERE)
    same = {"temperature": fields.temperature, "top_k": fields.top_k}
    parameters = parse_parameters(sent | same, _WHERE, limits.max_timeout_s)
    candidates = _candidates(fields, parameters.n, parameters.stream)
    counted = "n" if fields.best_of is None else "best_of"
    prompts = read_prompts(body["prompt"], candidates, counted, limits.max_instances)
    requests = [
        replace(
            parameters.request(prompt.text, prompt.name),
            prompt_ids=prompt.ids,
            max_new_tokens=fields.max_tokens,
            default_max_new_tokens=_DEFAULT_MAX_TOKENS,
            n=candidates,
            # Which candidates are best, only their log-probabilities can tell.
            logprobs=0 if fields.logprobs is None and candidates > parameters.n else fields.logprobs,
            prompt_logprobs=_of_prompt(fields),
        )
        for prompt in prompts
    ]
    options = _stream_options(fields, parameters.stream)
    shape = Shape(
        model=fields.model,
        n=parameters.n,
        logprobs=fields.logprobs is not None,
        echo=fields.echo,
        usage=options.include_usage,
        usage_so_far=options.continuous_usage_stats,
    )
    return Completions(requests, shape, stream=parameters.stream, user=fields.user)


def refuse_chat(body: Any, limits: Limits) -> NoReturn:
    """Chat needs a template that turns messages into one text; a GPT-2 checkpoint brings none."""
    raise InvalidRequest(
        "this server's models complete text and have no chat template; send the text as prompt to /v1/completions",
        param="messages",
    )


def _refuse_by_name(sent: Mapping[str, Any]) -> None:
    for name, ours in _OTHER_NAMES.items():
        if name in sent:
            raise InvalidRequest(f"{_WHERE}: unknown field {printable(name)}; here it is {ours}", param=name)
    if "suffix" in sent:
        raise InvalidRequest("suffix is not served: the model continues a text and cannot fill one in", param="suffix")


def _stream_options(fields: _Fields, stream: bool) -> _StreamOptions:
    if fields.stream_options is None:
        return _StreamOptions()
    options = fields.stream_options
    if not stream:
        raise InvalidRequest("stream_options needs stream: true", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        raise InvalidRequest("stream_options.continuous_usage_stats needs include_usage: true", param="stream_options")
    return options


def _of_prompt(fields: _Fields) -> int | None:
    """How many alternatives of the prompt's own tokens to ask for; none of them where they are not shown.

    Nothing is generated only where the prompt is scored, so an echo alone scores it too.
    """
    if fields.echo and fields.max_tokens == 0:
        return fields.logprobs or 0
    return fields.logprobs if fields.echo else None


def _candidates(fields: _Fields, n: int, stream: bool) -> int:
    """How many samples of each prompt to generate."""
    candidates = n if fields.best_of is None else fields.best_of
    if candidates < n:
        raise InvalidRequest(f"best_of must be at least n ({n}), got {candidates}", param="best_of")
    if candidates > n and stream:
        raise InvalidRequest(
            f"best_of cannot be streamed: which are best is known at the end; with stream it must be n ({n}), "
            f"got {candidates}",
            param="best_of",
        )
    if fields.max_tokens == 0 and not fields.echo:
        raise InvalidRequest("max_tokens must be at least 1, or 0 with echo: true, got 0", param="max_tokens")
    return candidates
