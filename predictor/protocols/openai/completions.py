"""What completions look like: one object, or chunks of it as they come."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from predictor.protocols.wire import Exchange
from predictor.text.pieces import Piece
from predictor.text.request import Completion, LogProb, PromptToken, TextRequest
from predictor.text.stream import TextStream

_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answer is to look."""

    model: str
    n: int  # choices per prompt; more may be generated, of which these are the best
    logprobs: bool
    echo: bool
    usage: bool  # in a stream: a last chunk with the usage
    usage_so_far: bool  # in a stream: the usage in every chunk


class _Place(NamedTuple):
    """A token of a choice, as `logprobs` tells of it."""

    token: str
    logprob: float | None  # None: the prompt's first
    likeliest: Sequence[LogProb]  # in its place, best first
    offset: int  # in the choice's text


class Completions(Exchange):
    """A checked request. Choices are numbered through: choice i is sample i % n of prompt i // n."""

    def __init__(self, requests: list[TextRequest], shape: Shape, stream: bool, user: str | None) -> None:
        self.requests, self.stream, self.user = requests, stream, user
        self._shape = shape
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._begun: dict[tuple[int, int], TextStream] = {}  # the samples of which something has come

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        chosen = [completion for candidates in results for completion in _best(candidates, self._shape.n)]
        choices = [
            self._choice(index, self._echoed(each) + each.text, self._places(each), each.finish_reason)
            for index, each in enumerate(chosen)
        ]
        # Every candidate was computed, also the ones that are not shown.
        return self._answer(choices, chosen[0].dtype) | {"usage": _usage(results)}

    def events(self, piece: Piece) -> list[Any]:
        source, delta, sample = piece.source, piece.delta, (piece.row, piece.sample)
        echoed = self._echoed(source)
        text, places = delta.text, []
        if sample not in self._begun:
            self._begun[sample] = source
            text = echoed + text
            places += _of_prompt(source.prompt_logprobs)
        if delta.logprob is not None:
            places.append(_of_token(delta.logprob, delta.top_logprobs, len(echoed) + delta.offset))
        if delta.end is not None:
            places.append(_of_token(delta.end.logprob, delta.end.top_logprobs, len(echoed) + delta.offset))
        if not text and not places and delta.finish_reason is None:
            return []  # a character that is not whole yet
        index = piece.row * self._shape.n + piece.sample
        chunk = self._answer([self._choice(index, text, places, delta.finish_reason)], source.dtype)
        if self._shape.usage:
            chunk["usage"] = self._usage_so_far() if self._shape.usage_so_far else None
        return [chunk]

    def last_events(self) -> list[Any]:
        if not self._shape.usage:
            return [_DONE]
        dtype = next(iter(self._begun.values())).dtype
        return [self._answer([], dtype) | {"usage": self._usage_so_far()}, _DONE]

    def _answer(self, choices: list[Any], dtype: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._shape.model,
            "system_fingerprint": dtype,  # with another width the same seed may answer differently
            "choices": choices,
        }

    def _choice(self, index: int, text: str, places: list[_Place], finish_reason: str | None) -> dict[str, Any]:
        logprobs = _columns(places) if self._shape.logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _echoed(self, source: Completion | TextStream) -> str:
        return source.prompt_text if self._shape.echo else ""

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

    def _usage_so_far(self) -> dict[str, int]:
        rows: list[list[TextStream]] = [[] for _ in self.requests]
        for (row, _), source in self._begun.items():
            rows[row].append(source)
        return _usage(rows)


def _best(candidates: Sequence[Completion], n: int) -> Sequence[Completion]:
    """All of n, or of more the n likeliest, by the sum of their tokens' log-probabilities, likeliest first."""
    if len(candidates) == n:
        return candidates
    return sorted(candidates, key=_summed_logprob, reverse=True)[:n]


def _summed_logprob(candidate: Completion) -> float:
    of_text = sum(token.logprob for token in candidate.logprobs or ())
    return of_text if candidate.end is None else of_text + candidate.end.logprob.logprob


def _usage(rows: Sequence[Sequence[Completion | TextStream]]) -> dict[str, int]:
    """A prompt counts once, whatever n is."""
    prompt = sum(samples[0].prompt_tokens for samples in rows if samples)
    completion = sum(each.completion_tokens for samples in rows for each in samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _of_prompt(tokens: Sequence[PromptToken] | None) -> list[_Place]:
    return [_Place(each.token, each.logprob, each.top_logprobs, each.offset) for each in tokens or ()]


def _of_token(chosen: LogProb, likeliest: Sequence[LogProb], offset: int) -> _Place:
    return _Place(chosen.token, chosen.logprob, likeliest, offset)


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
        shown.setdefault(each.token, each.logprob)
    shown.setdefault(place.token, place.logprob)
    return shown
