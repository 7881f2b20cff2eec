"""What the answers to completions and to chats have in common: their envelope, their usage, and how a stream ends."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from predictor.protocols.openai.fields import StreamOptions
from predictor.protocols.wire import Exchange
from predictor.text.pieces import Piece
from predictor.text.request import Completion, TextRequest
from predictor.text.stream import TextStream

_DONE = "[DONE]"


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answer is to look."""

    model: str
    n: int  # choices per prompt; more may be generated, of which these are the best
    logprobs: bool
    options: StreamOptions


class Answer(Exchange):
    """A checked request, answered with one object or with chunks of it.

    Choices are numbered through: choice i is sample i % n of prompt i // n.
    """

    id_prefix: str
    object_name: str  # what the whole answer calls itself
    chunk_name: str  # what a chunk of it does

    def __init__(self, requests: list[TextRequest], shape: Shape, stream: bool, user: str | None) -> None:
        self.requests, self.stream, self.user = requests, stream, user
        self._shape = shape
        self._id, self._created = f"{self.id_prefix}-{uuid.uuid4().hex}", int(time.time())
        self._begun: dict[tuple[int, int], TextStream] = {}  # the samples of which something has come

    def last_events(self) -> list[Any]:
        if not self._shape.options.include_usage:
            return [_DONE]
        dtype = next(iter(self._begun.values())).dtype
        return [self._envelope(self.chunk_name, [], dtype) | {"usage": self._usage_so_far()}, _DONE]

    def _object(self, choices: list[Any], results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        """The whole answer. Its usage is of all that was computed, whatever is shown."""
        return self._envelope(self.object_name, choices, results[0][0].dtype) | {"usage": _usage(results)}

    def _chunk(self, choice: dict[str, Any], source: TextStream) -> dict[str, Any]:
        chunk = self._envelope(self.chunk_name, [choice], source.dtype)
        if self._shape.options.include_usage:
            chunk["usage"] = self._usage_so_far() if self._shape.options.continuous_usage_stats else None
        return chunk

    def _begins(self, piece: Piece) -> bool:
        """Whether this is the first piece of its sample; from now on it has begun."""
        sample = (piece.row, piece.sample)
        first = sample not in self._begun
        self._begun[sample] = piece.source
        return first

    def _index(self, piece: Piece) -> int:
        return piece.row * self._shape.n + piece.sample

    def _envelope(self, kind: str, choices: list[Any], dtype: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._shape.model,
            "system_fingerprint": dtype,  # with another width the same seed may answer differently
            "choices": choices,
        }

    def _usage_so_far(self) -> dict[str, int]:
        rows: list[list[TextStream]] = [[] for _ in self.requests]
        for (row, _), source in self._begun.items():
            rows[row].append(source)
        return _usage(rows)


def _usage(rows: Sequence[Sequence[Completion | TextStream]]) -> dict[str, int]:
    """A prompt counts once, whatever n is."""
    prompt = sum(samples[0].prompt_tokens for samples in rows if samples)
    completion = sum(each.completion_tokens for samples in rows for each in samples)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
