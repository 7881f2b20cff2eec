"""One sample as text: tokens in, deltas out, cut at stop strings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from predictor.engine.params import FinishReason, SamplingParams, Token
from predictor.engine.stream import TokenStream
from predictor.text.detokenizer import new_detokenizer
from predictor.text.prompt import Prompt, log_prob, log_probs
from predictor.text.request import Completion, EndToken, LogProb, PromptToken, TextDelta
from predictor.text.stop import StopMatcher
from predictor.text.vocabulary import Vocabulary


class TextStream(AsyncIterator[TextDelta]):
    """One sample as text. Ends after the delta with a finish reason; `aclose` ends it early and frees the sequence."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokens: TokenStream,
        stops: Sequence[str],
        prompt: Prompt,
        params: SamplingParams,
        sample: int,
        dtype: str,
    ) -> None:
        self.prompt_tokens = len(prompt.ids)
        self.dtype = dtype
        self.seed = (params.seed + sample) % 2**64
        self._vocabulary = vocabulary
        self._prompt = prompt
        self._tokens = tokens
        self.timing = tokens.timing
        self._params = params
        self._detokenizer = new_detokenizer(vocabulary, prompt.ids)
        self._stop = StopMatcher(stops)
        self.completion_tokens = 0  # so far
        self._characters = 0  # that are whole so far
        # As a completion's, from the first delta on.
        self.prompt_logprobs: tuple[PromptToken, ...] | None = None
        # Why it ended: the last delta's reason, `cancelled` when it was closed before, `error` when the backend failed.
        self.finish_reason: FinishReason | None = None

    @property
    def prompt_text(self) -> str:
        """The prompt as it was sent, or what the ids that were sent stand for, special tokens by their names."""
        return self._prompt.text

    async def __anext__(self) -> TextDelta:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        try:
            delta = self._delta(await self._tokens.__anext__())
        except Exception:
            self.finish_reason = "error"
            raise
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            await self._tokens.aclose()
        return delta

    async def aclose(self) -> None:
        self.finish_reason = self.finish_reason or "cancelled"
        await self._tokens.aclose()

    def _delta(self, token: Token) -> TextDelta:
        text, reason, offset = "", token.finish_reason, self._characters
        if token.prompt_logprobs is not None:
            self.prompt_logprobs = self._prompt.tokens(token.prompt_logprobs)
        if not token.is_end:
            self.completion_tokens += 1
            text = self._detokenizer.push(token.id)
            self._characters += len(text)
            # "No end before min_new_tokens" holds for stop strings too: what comes earlier is not searched.
            if self.completion_tokens > self._params.min_new_tokens:
                text = self._stop.push(text)
        if self._stop.matched is not None:
            reason = "stop"
        elif reason is not None:
            text += self._stop.flush()
        if token.is_end:
            return TextDelta(text, finish_reason=reason, offset=offset, end=self._end(token))
        return TextDelta(text, token.id, self._logprob(token), self._alternatives(token), reason, offset)

    def _logprob(self, token: Token) -> LogProb | None:
        if token.logprob is None:
            return None
        return log_prob(self._vocabulary, token.id, token.logprob)

    def _end(self, token: Token) -> EndToken | None:
        logprob = self._logprob(token)
        if logprob is None or token.finish_reason != "stop":  # or it was drawn only because a step draws
            return None
        return EndToken(logprob, self._alternatives(token))

    def _alternatives(self, token: Token) -> tuple[LogProb, ...]:
        return log_probs(self._vocabulary, token.top_logprobs)

    async def collect(self, on_token: Callable[[], None] | None = None) -> Completion:
        """The whole completion; `on_token` hears of each token."""
        deltas: list[TextDelta] = []
        async for delta in self:
            deltas.append(delta)
            if on_token is not None and delta.token_id is not None:
                on_token()
        reason = deltas[-1].finish_reason
        assert reason is not None
        tokens = [delta for delta in deltas if delta.token_id is not None]
        return Completion(
            text="".join(delta.text for delta in deltas),
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(tokens),
            seed=self.seed,
            dtype=self.dtype,
            logprobs=None
            if self._params.logprobs is None
            else tuple(delta.logprob for delta in tokens if delta.logprob is not None),
            top_logprobs=tuple(delta.top_logprobs for delta in tokens),
            offsets=tuple(delta.offset for delta in tokens if delta.logprob is not None),
            end=deltas[-1].end,
            prompt_text=self.prompt_text,
            prompt_logprobs=self.prompt_logprobs,
            timing=self.timing,
        )
