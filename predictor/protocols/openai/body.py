"""The body of a completions request: every field of OpenAI's, and our further parameters by our names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from predictor.errors import InvalidRequest
from predictor.protocols.openai.answer import Shape
from predictor.protocols.openai.completions import Completions
from predictor.protocols.openai.fields import Fields, StreamOptions, read_fields
from predictor.protocols.openai.prompts import read_prompts
from predictor.protocols.parameters import MAX_SAMPLES
from predictor.protocols.wire import Limits

# OpenAI's own limit and default.
_MAX_LOGPROBS = 5
_DEFAULT_MAX_TOKENS = 16


class _Fields(Fields):
    subject: ClassVar = "prompt"
    other_names: ClassVar = {
        "max_new_tokens": "max_tokens",
        "num_return_sequences": "n",
        "return_full_text": "echo",
        "details": "logprobs",
    }
    not_served: ClassVar = {"suffix": "the model continues a text and cannot fill one in"}

    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    echo: bool = False


def parse(body: Any, limits: Limits) -> Completions:
    """A parsed JSON body into a checked request; raises `InvalidRequest` naming the field and the limit."""
    fields, parameters = read_fields(_Fields, body, limits)
    candidates = _candidates(fields, parameters.n, parameters.stream)
    counted = "n" if fields.best_of is None else "best_of"
    prompts = read_prompts(body["prompt"], candidates, counted, limits.max_instances)
    requests = [
        replace(
            parameters.request(prompt.text, prompt.name),
            prompt_ids=prompt.ids,
            max_new_tokens=fields.max_tokens,
            new_name="max_tokens",
            default_max_new_tokens=_DEFAULT_MAX_TOKENS,
            n=candidates,
            # Which candidates are best, only their log-probabilities can tell.
            logprobs=0 if fields.logprobs is None and candidates > parameters.n else fields.logprobs,
            prompt_logprobs=_of_prompt(fields),
        )
        for prompt in prompts
    ]
    shape = Shape(
        model=fields.model,
        n=parameters.n,
        logprobs=fields.logprobs is not None,
        options=fields.stream_options or StreamOptions(),
    )
    return Completions(requests, shape, fields.echo, stream=parameters.stream, user=fields.user)


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
