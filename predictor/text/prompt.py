"""A prompt as the model sees it, and what its samples share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from predictor.engine.params import Scored
from predictor.text.detokenizer import text_offsets
from predictor.text.request import LogProb, PromptToken, TextRequest
from predictor.text.vocabulary import Vocabulary


def log_prob(vocabulary: Vocabulary, token_id: int, logprob: float) -> LogProb:
    """A token with its log-probability, as a person reads it."""
    return LogProb(token_id, vocabulary.show(token_id), logprob, vocabulary.bytes_of(token_id))


def log_probs(vocabulary: Vocabulary, likeliest: Sequence[tuple[int, float]]) -> tuple[LogProb, ...]:
    """The same of (id, log-probability)."""
    return tuple(log_prob(vocabulary, token_id, logprob) for token_id, logprob in likeliest)


class Prompt:
    """Token ids, and what can be told of them."""

    def __init__(self, vocabulary: Vocabulary, request: TextRequest, ids: list[int], empty: bool) -> None:
        """`ids`: what the model sees; of an `empty` prompt a token to begin with."""
        self.ids = ids
        self._vocabulary, self._request, self._empty = vocabulary, request, empty
        self._tokens: tuple[PromptToken, ...] | None = None

    @cached_property
    def text(self) -> str:
        """The prompt as it was sent, or what the ids that were sent stand for, special tokens by their names."""
        request = self._request
        return request.prompt if request.prompt_ids is None else self._vocabulary.decode(request.prompt_ids)

    def tokens(self, scored: tuple[Scored, ...]) -> tuple[PromptToken, ...]:
        """The tokens with their scores, which are the same for every sample; none of an empty prompt."""
        if self._tokens is None:
            self._tokens = () if self._empty else self._of(scored)
        return self._tokens

    def _of(self, scored: tuple[Scored, ...]) -> tuple[PromptToken, ...]:
        show, bytes_of, first = self._vocabulary.show, self._vocabulary.bytes_of, self.ids[0]
        offsets = text_offsets(self._vocabulary, self.ids)[1:]
        rest = (
            PromptToken(
                each.token_id,
                show(each.token_id),
                each.logprob,
                log_probs(self._vocabulary, each.top_logprobs),
                offset,
                bytes_of(each.token_id),
            )
            for each, offset in zip(scored, offsets, strict=True)
        )
        return (PromptToken(first, show(first), None, data=bytes_of(first)), *rest)
