"""What one request asks of the engine, already checked against every limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length", "cancelled", "error"]


class TokenFilter(Protocol):
    """Says which tokens may not come next. The engine knows no text; text/banned.py implements it."""

    def banned_after(self, token_ids: Sequence[int]) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose each next token. Ranges are in settings and protocols; here they hold."""

    max_new_tokens: int  # 0 with `prompt_logprobs` alone: the prompt is scored and nothing follows
    window: int | None = None  # the most tokens the model sees, where they may slide; None: all fit the context
    min_new_tokens: int = 0
    temperature: float = 0.7  # 0 = greedy
    top_k: int = 50  # 0 = off
    top_p: float = 1.0  # 1 = off
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    token_filter: TokenFilter | None = None
    end_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int = 0  # sample k of n is drawn with seed + k
    n: int = 1
    logprobs: int | None = None  # None = not wanted, else how many alternatives per token
    prompt_logprobs: int | None = None  # likewise for the tokens of the prompt; not where the window may slide
    in_lots: bool = False  # nobody looks at a token before the sequence has ended: several may be delivered at once

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def draws(self) -> int:
        """Tokens to draw at most. Where nothing is to follow, one that is dropped: a prompt ends in the same way."""
        return max(self.max_new_tokens, 1)

    @property
    def needs_the_host(self) -> bool:
        """Whether a token can be drawn only when the host has read those before it, or wants more than the token."""
        return self.edits_logits or self.logprobs is not None

    @property
    def edits_logits(self) -> bool:
        """Whether anything besides temperature, top-k and top-p changes the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or bool(self.logit_bias)
            or self.token_filter is not None
            or self.min_new_tokens > 0
        )


class Scored(NamedTuple):
    """One token of a prompt, and how likely it was after those before it. Log-probabilities as a `Token`'s."""

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()


# Two for every token of every sequence: a named tuple is made in a third of a frozen dataclass's time.
class Token(NamedTuple):
    """One token of one sequence, as it leaves the engine."""

    id: int
    logprob: float | None = None  # log_softmax of the raw logits: before bias, penalties and temperature
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest (id, logprob), best first
    finish_reason: FinishReason | None = None  # set on the last token
    is_end: bool = False  # an end-of-text token, or one drawn where nothing was to follow: not part of the text
    prompt_logprobs: tuple[Scored, ...] | None = None  # on the first token, where wanted: of the prompt from its second


class Sampled(NamedTuple):
    """One row's outcome; token_id is None when the logits held no finite number."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
