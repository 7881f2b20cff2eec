"""What V1 answers: predictions or outputs, whole or as events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from predictor.protocols.details import facts, logprob_columns
from predictor.protocols.wire import Exchange
from predictor.text.pieces import Piece
from predictor.text.request import Completion, TextRequest


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, and how its prediction is shown."""

    request: TextRequest
    details: bool
    full_text: bool


class Predict(Exchange):
    """A checked request, whose answer stands under `key`: a value per row, or with `single` the one row's own."""

    def __init__(
        self,
        rows: list[Row],
        stream: bool,
        key: Literal["predictions", "outputs", "prediction"] = "predictions",
        single: bool = False,
    ) -> None:
        self.rows, self.stream, self.key, self.single = rows, stream, key, single
        self.requests = [row.request for row in rows]
        self._begun: set[tuple[int, int]] = set()  # samples of which something has been sent

    def render(self, results: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        values = [_value(row, completions) for row, completions in zip(self.rows, results, strict=True)]
        return {self.key: values[0] if self.single else values}

    def events(self, piece: Piece) -> list[Any]:
        row, delta, place = self.rows[piece.row], piece.delta, (piece.row, piece.sample)
        text = delta.text
        if row.full_text and place not in self._begun:
            text = row.request.prompt + text
        self._begun.add(place)
        event: dict[str, Any] = {"index": piece.row, "delta": text}
        if row.request.n > 1:
            event["sample"] = piece.sample
        if row.details and delta.logprob is not None:
            event["logprobs"] = logprob_columns((delta.logprob,), (delta.top_logprobs,))
        if delta.finish_reason is not None:
            source = piece.source
            event["finish_reason"] = delta.finish_reason
            event["usage"] = {"prompt_tokens": source.prompt_tokens, "completion_tokens": source.completion_tokens}
            if row.details:
                event |= {"seed": source.seed, "dtype": source.dtype}
        elif not text and not row.details:
            return []  # a character that is not whole yet
        return [event]


def _value(row: Row, completions: Sequence[Completion]) -> Any:
    shown = [_shown(row, completion) for completion in completions]
    return shown[0] if row.request.n == 1 else shown


def _shown(row: Row, completion: Completion) -> Any:
    text = row.request.prompt + completion.text if row.full_text else completion.text
    if not row.details:
        return text
    logprobs = completion.logprobs
    return {
        "text": text,
        "finish_reason": completion.finish_reason,
        **facts(completion),
        "logprobs": None if logprobs is None else logprob_columns(logprobs, completion.top_logprobs),
    }
