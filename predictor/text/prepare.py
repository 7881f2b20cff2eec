"""What a prompt and its parameters are to a model: encoded, defaults filled in, checked against its limits."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace

from predictor.backends.base import Backend
from predictor.engine.params import SamplingParams
from predictor.errors import ContextExceeded, InvalidRequest
from predictor.text.banned import BannedStrings
from predictor.text.chat import ChatTemplate
from predictor.text.prompt import Prompt
from predictor.text.request import TextRequest
from predictor.text.vocabulary import Vocabulary

# Log-probabilities in one answer, of prompts and completions, alternatives counted: 250,000 are about 15 MB of JSON.
_MAX_LOGPROBS = 250_000

# Contexts that one sequence may fill with `context_overflow: "slide"`, prompt included.
_MAX_CONTEXTS = 16

# Longer prompts, and any banned strings, are prepared off the event loop: at 4 MB/s this much takes 1 ms.
_INLINE_CHARACTERS = 4_000

# About what a chat's message costs beside its content.
_PER_MESSAGE = 100


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prompt and its parameters as the backend takes them."""

    prompt: Prompt
    params: SamplingParams

    @property
    def logprobs(self) -> int:
        """The most log-probabilities that its answer may hold."""
        params, of_prompt, of_each = self.params, 0, 0
        if params.prompt_logprobs is not None:
            of_prompt = len(self.prompt.ids) * (params.prompt_logprobs + 1)
        if params.logprobs is not None:
            of_each = params.logprobs + 1
        return params.n * (of_prompt + params.max_new_tokens * of_each)


@dataclass(frozen=True, slots=True)
class _Bound:
    """The most tokens a sequence may have, prompt included, and what to call them in a message."""

    tokens: int
    name: str


class Preparer:
    """Prepares requests for a backend."""

    def __init__(self, backend: Backend, vocabulary: Vocabulary, chat: ChatTemplate) -> None:
        self.backend, self.vocabulary, self._chat = backend, vocabulary, chat

    async def prepare_all(self, requests: list[TextRequest]) -> list[Prepared]:
        """Those of one answer; raises `InvalidRequest` naming the field and the limit."""
        filters: dict[tuple[str, ...], BannedStrings] = {}  # prompts of one request mostly share their list

        def work() -> list[Prepared]:
            prepared = [self.prepare(request, filters) for request in requests]
            _check_size(prepared)
            return prepared

        size = sum(_size(request) for request in requests)
        if size <= _INLINE_CHARACTERS and not any(request.bad_words for request in requests):
            return work()
        return await asyncio.to_thread(work)

    def prepare(self, request: TextRequest, filters: dict[tuple[str, ...], BannedStrings] | None = None) -> Prepared:
        """Encode and resolve what depends on the model: defaults, the context, token ids.

        `filters` keeps banned strings from one prompt to the next.
        """
        request = self.as_text(request)
        bound = self._bound(request)
        _check_scoring(request)
        given = self._prompt_ids(request, bound)
        prompt_ids = given or self._empty_prompt()
        if len(prompt_ids) > bound.tokens - (request.max_new_tokens != 0):
            raise _too_long(request, len(prompt_ids), bound)
        end_token = self.vocabulary.end_token
        params = SamplingParams(
            max_new_tokens=_max_new_tokens(request, len(prompt_ids), bound),
            window=self.backend.context if request.context_overflow == "slide" else None,
            min_new_tokens=request.min_new_tokens,
            temperature=request.temperature,
            top_k=min(request.default_top_k, self.backend.vocabulary) if request.top_k is None else request.top_k,
            top_p=request.top_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            token_filter=self._banned(request, {} if filters is None else filters),
            end_tokens=frozenset() if end_token is None else frozenset({end_token}),
            ignore_eos=request.ignore_eos,
            seed=secrets.randbits(64) if request.seed is None else request.seed,
            n=request.n,
            logprobs=request.logprobs,
            prompt_logprobs=request.prompt_logprobs,
        )
        self._check_model_limits(request, params)
        self.backend.check(params)
        return Prepared(Prompt(self.vocabulary, request, prompt_ids, empty=not given), params)

    def as_text(self, request: TextRequest) -> TextRequest:
        """The request with the prompt that its messages become, where it is a chat."""
        if request.messages is None:
            return request
        return replace(request, prompt=self._chat.render(request.messages), messages=None)

    def _prompt_ids(self, request: TextRequest, bound: _Bound) -> list[int]:
        if request.prompt_ids is not None:
            if len(request.prompt_ids) > bound.tokens:  # before a look at each of what may be hundreds of thousands
                raise _too_long(request, len(request.prompt_ids), bound)
            for token_id in request.prompt_ids:
                if token_id >= self.backend.vocabulary:
                    raise InvalidRequest(
                        f"{request.name}: token ids must be below the vocabulary of {self.backend.vocabulary}, "
                        f"got {token_id}",
                        param=request.prompt_name,
                    )
            return list(request.prompt_ids)
        longest = self.vocabulary.longest_token
        if longest and len(request.prompt) > bound.tokens * longest:
            raise ContextExceeded(
                f"{request.name}: the prompt's {len(request.prompt)} characters cannot fit {bound.name} tokens",
                param=request.prompt_name,
            )
        return self.vocabulary.encode(request.prompt)

    def _bound(self, request: TextRequest) -> _Bound:
        context = self.backend.context
        if request.context_overflow == "slide":
            return _Bound(_MAX_CONTEXTS * context, f"{_MAX_CONTEXTS} times the context of {context}")
        return _Bound(context, f"the context of {context}")

    def _empty_prompt(self) -> list[int]:
        """GPT-2 begins a text after its end-of-text token; an empty prompt becomes that."""
        token = self.backend.tokenizer.bos_token_id
        token = self.vocabulary.end_token if token is None else token
        if token is None:
            raise InvalidRequest("prompt must not be empty: this model has no token to begin with", param="prompt")
        return [int(token)]

    def _check_model_limits(self, request: TextRequest, params: SamplingParams) -> None:
        if params.min_new_tokens > params.max_new_tokens:
            raise InvalidRequest(
                f"{request.name}: min_new_tokens must be at most {request.new_name} ({params.max_new_tokens}), "
                f"got {params.min_new_tokens}",
                param="min_new_tokens",
            )
        vocabulary = self.backend.vocabulary
        if params.top_k > vocabulary:
            raise InvalidRequest(
                f"{request.name}: top_k must be at most the vocabulary of {vocabulary}, got {params.top_k}",
                param="top_k",
            )
        for token_id in params.logit_bias:
            if token_id >= vocabulary:
                raise InvalidRequest(
                    f"{request.name}: logit_bias: token ids must be below the vocabulary of {vocabulary}, "
                    f"got {token_id}",
                    param="logit_bias",
                )

    def _banned(self, request: TextRequest, filters: dict[tuple[str, ...], BannedStrings]) -> BannedStrings | None:
        if not request.bad_words:
            return None
        if not self.vocabulary.byte_level:
            raise InvalidRequest("bad_words needs a byte-level tokenizer, and this model's is not", param="bad_words")
        if request.bad_words not in filters:
            filters[request.bad_words] = BannedStrings(request.bad_words, self.vocabulary)
        return filters[request.bad_words]


def _size(request: TextRequest) -> int:
    """About how much there is to prepare."""
    said = sum(len(message.content) + _PER_MESSAGE for message in request.messages or ())
    return len(request.prompt) + len(request.prompt_ids or ()) + said


def _check_scoring(request: TextRequest) -> None:
    if request.max_new_tokens == 0 and request.prompt_logprobs is None:
        raise InvalidRequest(
            f"{request.name}: {request.new_name} must be at least 1, or 0 with the prompt's log-probabilities",
            param=request.new_name,
        )
    if request.prompt_logprobs is not None and request.context_overflow == "slide":
        raise InvalidRequest(
            f"{request.name}: the prompt's log-probabilities cannot be had with context_overflow: slide, where the "
            "model does not see all of the prompt at once",
            param="context_overflow",
        )


def _too_long(request: TextRequest, tokens: int, bound: _Bound) -> ContextExceeded:
    wanted = "leave room for one more in" if request.max_new_tokens != 0 else "fit"
    return ContextExceeded(
        f"{request.name}: the prompt has {tokens} tokens and must {wanted} {bound.name}", request.prompt_name
    )


def _max_new_tokens(request: TextRequest, prompt_tokens: int, bound: _Bound) -> int:
    if request.max_total_tokens is not None:
        new = min(request.max_total_tokens, bound.tokens) - prompt_tokens
        if new < 1:
            raise InvalidRequest(
                f"{request.total_name} is the total with the prompt and must be above the prompt's {prompt_tokens} "
                f"tokens, got {request.max_total_tokens}",
                param=request.total_name,
            )
        return new
    room = bound.tokens - prompt_tokens
    if request.max_new_tokens is None:
        return max(min(request.default_max_new_tokens, room), min(request.min_new_tokens, room))
    if request.max_new_tokens > room:
        raise ContextExceeded(
            f"{request.name}: {request.new_name} must be at most {room}, what the prompt's {prompt_tokens} tokens "
            f"leave of {bound.name}, got {request.max_new_tokens}",
            param=request.new_name,
        )
    return request.max_new_tokens


def _check_size(prepared: list[Prepared]) -> None:
    """Refuse an answer that would hold more log-probabilities than one message should."""
    asked = sum(each.logprobs for each in prepared)
    if asked > _MAX_LOGPROBS:
        raise InvalidRequest(
            f"logprobs: the answer could hold {asked} of them and must not hold more than {_MAX_LOGPROBS}; "
            "ask for fewer alternatives, tokens, samples or prompts",
            param="logprobs",
        )
