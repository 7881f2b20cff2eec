"""What goes into the language model and what comes out, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from predictor.engine.params import FinishReason
from predictor.engine.stream import Timing

# What happens past the model's context: a refusal, or the model sees a window of the text that moves on.
ContextOverflow = Literal["error", "slide"]


@dataclass(frozen=True, slots=True)
class LogProb:
    """A token, as an id and as a person reads it, with its log-probability."""

    token_id: int
    token: str
    logprob: float
    data: bytes | None = None  # what it is of the text; None where the tokenizer cannot tell


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of the prompt, and how likely the model finds it after the tokens before it."""

    token_id: int
    token: str  # as a person reads it by itself
    logprob: float | None  # None of the prompt's first token, before which there is nothing
    top_logprobs: tuple[LogProb, ...] = ()  # the likeliest tokens in its place, best first; none for the first token
    offset: int = 0  # of the token in the prompt: characters that are whole before it
    data: bytes | None = None  # as a `LogProb`'s


@dataclass(frozen=True, slots=True)
class EndToken:
    """The token that ended a text, with its log-probability: no part of the text, and not counted."""

    logprob: LogProb
    top_logprobs: tuple[LogProb, ...]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """What somebody said in a chat."""

    role: str
    content: str
    name: str | None = None  # for templates that tell speakers of a role apart


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt, checked as far as it can be without the model. Ranges: protocols/parameters.py."""

    prompt: str  # as text; of no effect where `prompt_ids` or `messages` are given
    prompt_ids: tuple[int, ...] | None = None  # the prompt as token ids, for clients that encode it themselves
    messages: tuple[ChatMessage, ...] | None = None  # a chat, of which the model's template makes the prompt
    prompt_name: str = "prompt"  # the client's field that it comes from
    max_new_tokens: int | None = None  # None: the default; 0, with `prompt_logprobs`: score alone
    default_max_new_tokens: int = 64  # where `max_new_tokens` is None; cut to what the context leaves
    new_name: str = "max_new_tokens"  # what the client calls that
    max_total_tokens: int | None = None  # prompt included; capped at what may be asked for
    total_name: str = "length"  # what the client calls that
    context_overflow: ContextOverflow = "error"
    min_new_tokens: int = 0
    temperature: float = 0.7  # 0 = greedy
    top_k: int | None = None  # None: the default; 0 = off
    default_top_k: int = 50  # where `top_k` is None; cut to the vocabulary
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None  # None: drawn at random, told in the completion
    n: int = 1
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # score the prompt's own tokens, each with so many alternatives
    timeout_s: float | None = None
    name: str = "prompt"  # how the client would point at it: "instances[3]"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of one completion. Concatenated texts are the completion; the last has a finish reason."""

    text: str
    token_id: int | None = None  # None where held-back text comes without a token of its own, and at an end token
    logprob: LogProb | None = None
    top_logprobs: tuple[LogProb, ...] = ()
    finish_reason: FinishReason | None = None
    offset: int = 0  # of the token in the completion: characters that were whole before it, sent or held back
    end: EndToken | None = None  # where one was drawn and log-probabilities are asked for


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seed: int
    dtype: str  # the width of the weights it was computed with
    logprobs: tuple[LogProb, ...] | None
    top_logprobs: tuple[tuple[LogProb, ...], ...]
    offsets: tuple[int, ...] = ()  # of the tokens in the text, where log-probabilities are asked for
    end: EndToken | None = None  # as the last delta's
    prompt_text: str = ""  # as it was sent, or what the ids that were sent stand for, special tokens by their names
    # Of each token of the prompt, the same for all n samples; none for an empty prompt, which becomes a begin token.
    prompt_logprobs: tuple[PromptToken, ...] | None = None  # None: not asked for
    timing: Timing = field(default_factory=Timing, compare=False, repr=False)
