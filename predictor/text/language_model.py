"""Text in, text deltas out, over any backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from predictor.backends.base import Backend
from predictor.text.chat import ChatTemplate
from predictor.text.deadline import Deadline
from predictor.text.pieces import Pieces
from predictor.text.prepare import Prepared, Preparer
from predictor.text.request import Completion, TextRequest
from predictor.text.stream import TextStream
from predictor.text.vocabulary import Vocabulary


class LanguageModel:
    """A backend with its tokenizer: what every protocol talks to."""

    def __init__(self, backend: Backend, chat_template: str | None = None) -> None:
        """`chat_template` stands in for the tokenizer's own; raises `PredictorError` for one that is broken."""
        self.backend = backend
        self.vocabulary = Vocabulary(backend.tokenizer)
        self.vocabulary.prepare()
        self.preparer = Preparer(backend, self.vocabulary, ChatTemplate(backend.tokenizer, chat_template))

    async def submit(self, requests: list[TextRequest]) -> list[list[TextStream]]:
        """Check, encode and queue, all or none; a stream per request and sample. The caller closes every stream.

        Raises `InvalidRequest` naming the field, `QueueFull`, or `NotReady`.
        """
        return self._start(requests, await self.preparer.prepare_all(requests))

    async def check(self, requests: list[TextRequest]) -> int:
        """The most tokens that `generate` may make of these; raises the `InvalidRequest` that it would raise."""
        return sum(each.params.n * each.params.max_new_tokens for each in await self.preparer.prepare_all(requests))

    async def stream(self, requests: list[TextRequest], default_timeout_s: float) -> Pieces:
        """The deltas of all samples as they come, once the first is there. Raises as `generate` does, here or later."""
        deadlines, prepared = await self._prepare_in_time(requests, default_timeout_s)
        return await Pieces.begin(self._start(requests, prepared), deadlines, [request.name for request in requests])

    async def generate(
        self, requests: list[TextRequest], default_timeout_s: float, on_token: Callable[[], None] | None = None
    ) -> list[list[Completion]]:
        """Whole completions, a list of n per request; `on_token` hears of each token, in lots.

        Raises `DeadlineExceeded` when one ran out of time.
        """
        deadlines, prepared = await self._prepare_in_time(requests, default_timeout_s)
        # Stop strings end a sequence from here, so its tokens have to be seen as they come.
        rows = self._start(
            requests,
            [
                replace(each, params=replace(each.params, in_lots=not request.stop))
                for request, each in zip(requests, prepared, strict=True)
            ],
        )
        streams = [stream for row in rows for stream in row]
        collected = [
            asyncio.ensure_future(deadline.hold(stream.collect(on_token), request.name))
            for row, deadline, request in zip(rows, deadlines, requests, strict=True)
            for stream in row
        ]
        try:
            completions = iter(await asyncio.gather(*collected))
            return [[next(completions) for _ in row] for row in rows]
        finally:
            for task in collected:
                task.cancel()
            for stream in streams:
                await stream.aclose()

    def _start(self, requests: list[TextRequest], prepared: list[Prepared]) -> list[list[TextStream]]:
        streams = self.backend.submit([(each.prompt.ids, each.params) for each in prepared])
        return [
            [
                TextStream(self.vocabulary, stream, request.stop, each.prompt, each.params, k, self.backend.dtype)
                for k, stream in enumerate(row)
            ]
            for row, request, each in zip(streams, requests, prepared, strict=True)
        ]

    async def _prepare_in_time(
        self, requests: list[TextRequest], default_timeout_s: float
    ) -> tuple[list[Deadline], list[Prepared]]:
        deadlines = [Deadline(request.timeout_s or default_timeout_s) for request in requests]
        soonest = min(deadlines, key=lambda deadline: deadline.timeout_s)
        return deadlines, await soonest.hold(self.preparer.prepare_all(requests), "preparing the prompts")
