"""What completions look like: one object, or chunks of it as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from predictor.protocols.openai.answer import Answer, Shape
from predictor.text.pieces import Piece
from predictor.text.request import Completion, LogProb, PromptToken, TextRequest
from predictor.text.stream import TextStream

# What stands for bytes that are no whole character.
_REPLACEMENT = "\ufffd"


class _Place(NamedTuple):
    """A token of a choice, as `logprobs` tells of it."""

    token: str
    logprob: float | None  # None: the prompt's first
    likeliest: Sequence[LogProb]  # in its place, best first
    offset: int  # in the choice's text


class Completions(Answer):
    """A request for completions."""

    id_prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, requests: list[TextRequest], shape: Shape, echo: bool, *, stream: bool, user: str | None
    ) -> None:
        super().__init__(requests, shape, stream, user)
        self._echo = echo

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        chosen = [completion for candidates in results for completion in _best(candidates, self._shape.n)]
        choices = [
            self._choice(index, self._echoed(each) + each.text, self._places(each), each.finish_reason)
            for index, each in enumerate(chosen)
        ]
        return self._object(choices, results)

    def events(self, piece: Piece) -> list[Any]:
        source, delta = piece.source, piece.delta
        echoed = self._echoed(source)
        text, places = delta.text, []
        if self._begins(piece):
            text = echoed + text
            places += _of_prompt(source.prompt_logprobs)
        if delta.logprob is not None:
            places.append(_of_token(delta.logprob, delta.top_logprobs, len(echoed) + delta.offset))
        if delta.end is not None:
            places.append(_of_token(delta.end.logprob, delta.end.top_logprobs, len(echoed) + delta.offset))
        if not text and not places and delta.finish_reason is None:
            return []  # a character that is not whole yet
        return [self._chunk(self._choice(self._index(piece), text, places, delta.finish_reason), source)]

    def _choice(self, index: int, text: str, places: list[_Place], finish_reason: str | None) -> dict[str, Any]:
        logprobs = _columns(places) if self._shape.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _echoed(self, source: Completion | TextStream) -> str:
        return source.prompt_text if self._echo else ""

    def _places(self, completion: Completion) -> list[_Place]:
        if not self._shape.logprobs:
            return []
        begin = len(self._echoed(completion))
        places = _of_prompt(completion.prompt_logprobs)
        places += [
            _of_token(chosen, likeliest, begin + offset)
            for chosen, likeliest, offset in zip(
                completion.logprobs or (), completion.top_logprobs, completion.offsets, strict=False
            )
        ]
        if completion.end is not None:
            places.append(_of_token(completion.end.logprob, completion.end.top_logprobs, begin + len(completion.text)))
        return places


def _best(candidates: Sequence[Completion], n: int) -> Sequence[Completion]:
    """All of n, or of more the n likeliest, by the sum of their tokens' log-probabilities, likeliest first."""
    if len(candidates) == n:
        return candidates
    return sorted(candidates, key=_summed_logprob, reverse=True)[:n]


def _summed_logprob(candidate: Completion) -> float:
    of_text = sum(token.logprob for token in candidate.logprobs or ())
    return of_text if candidate.end is None else of_text + candidate.end.logprob.logprob


def _of_prompt(tokens: Sequence[PromptToken] | None) -> list[_Place]:
    return [_Place(_name(each), each.logprob, each.top_logprobs, each.offset) for each in tokens or ()]


def _of_token(chosen: LogProb, likeliest: Sequence[LogProb], offset: int) -> _Place:
    return _Place(_name(chosen), chosen.logprob, likeliest, offset)


def _name(token: LogProb | PromptToken) -> str:
    """The token's text, or its bytes where they are no whole characters."""
    if token.data is None or _REPLACEMENT not in token.token or _REPLACEMENT.encode() in token.data:
        return token.token
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _columns(places: Sequence[_Place]) -> dict[str, Any]:
    return {
        "tokens": [each.token for each in places],
        "token_logprobs": [each.logprob for each in places],
        "top_logprobs": [_likeliest(each) for each in places],
        "text_offset": [each.offset for each in places],
    }


def _likeliest(place: _Place) -> dict[str, float] | None:
    """Log-probabilities by text: of the likeliest tokens, and of the one that came. None: nothing came before it."""
    if place.logprob is None:
        return None
    shown: dict[str, float] = {}
    for each in place.likeliest:
        shown.setdefault(_name(each), each.logprob)
    shown.setdefault(place.token, place.logprob)
    return shown
