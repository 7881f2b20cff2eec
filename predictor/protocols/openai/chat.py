"""What the answer to a chat looks like: one object, or chunks of it as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from predictor.protocols.openai.answer import Answer
from predictor.text.pieces import Piece
from predictor.text.request import Completion, LogProb

_ROLE = {"role": "assistant"}


class Chat(Answer):
    """A request for the next message of a chat."""

    id_prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        (samples,) = results
        choices = [
            {
                "index": index,
                "message": _ROLE | {"content": each.text, "refusal": None},
                "logprobs": self._logprobs(each.logprobs or (), each.top_logprobs),
                "finish_reason": each.finish_reason,
            }
            for index, each in enumerate(samples)
        ]
        return self._object(choices, results)

    def events(self, piece: Piece) -> list[Any]:
        delta, told = piece.delta, []
        if self._begins(piece):
            told.append(self._told(piece, _ROLE | {"content": "", "refusal": None}))
        scored = () if delta.logprob is None else (delta.logprob,)
        if delta.text or scored:
            told.append(self._told(piece, {"content": delta.text}, self._logprobs(scored, (delta.top_logprobs,))))
        if delta.finish_reason is not None:
            told.append(self._told(piece, {}, finish_reason=delta.finish_reason))
        return told

    def _told(self, piece: Piece, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> Any:
        choice = {"index": self._index(piece), "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk(choice, piece.source)

    def _logprobs(self, tokens: Sequence[LogProb], likeliest: Sequence[Sequence[LogProb]]) -> dict[str, Any] | None:
        """Of the message's tokens; the one that ends a text is no part of it."""
        if not self._shape.logprobs:
            return None
        content = [
            _shown(token) | {"top_logprobs": [_shown(each) for each in others]}
            for token, others in zip(tokens, likeliest, strict=False)
        ]
        return {"content": content, "refusal": None}


def _shown(token: LogProb) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": None if token.data is None else list(token.data)}
