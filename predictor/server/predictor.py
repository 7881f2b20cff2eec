"""The KServe custom predictor: preprocess, predict, postprocess. Loading and ending are `Resident`'s."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from predictor.observability import (
    CODES,
    COMPLETION_TOKENS,
    INTER_TOKEN_SECONDS,
    PROMPT_TOKENS,
    REQUESTS,
    TIME_TO_FIRST_TOKEN_SECONDS,
)
from predictor.protocols.wire import Exchange, Limits, WireFormat
from predictor.server.body import aside
from predictor.server.events import Events
from predictor.server.resident import Resident
from predictor.settings import NamedModel, Settings
from predictor.text.pieces import Pieces
from predictor.text.request import Completion
from predictor.text.stream import TextStream


@dataclass(frozen=True, slots=True)
class Asked:
    """What the routes give KServe to pass through preprocess, predict and postprocess."""

    form: WireFormat
    body: Any
    size_bytes: int  # as it was sent
    admit: Callable[[Exchange], Awaitable[None]]  # raises to refuse


Checked = tuple[WireFormat, Exchange]
Results = tuple[WireFormat, Exchange, Sequence[Sequence[Completion]] | Pieces]


class Predictor(Resident):
    """One model behind KServe's protocol. The port opens before it is loaded; until then it answers 503."""

    def __init__(self, settings: Settings, model: NamedModel, turn: asyncio.Lock | None = None) -> None:
        """`turn` is shared by models that are to load one after the other: two at once would need more memory."""
        super().__init__(settings, model, turn)
        self._limits = Limits(settings.max_instances, settings.timeout_s)
        for code in CODES:
            REQUESTS.labels(*self.labels, code)

    async def preprocess(self, payload: Asked, headers: dict[str, str] | None = None) -> Checked:
        """A parsed body into a checked request."""
        exchange = await aside(payload.size_bytes, payload.form.parse, payload.body, self._limits)
        await payload.admit(exchange)
        return payload.form, exchange

    async def predict(self, payload: Checked, headers: dict[str, str] | None = None) -> Results:
        """Generate every row; leaving early (an error, a disconnect) frees all of them."""
        form, exchange = payload
        model, timeout_s = self.language_model(), self.settings.timeout_s
        if exchange.stream:
            return form, exchange, await model.stream(exchange.requests, timeout_s)
        return form, exchange, await model.generate(exchange.requests, timeout_s)

    async def postprocess(self, result: Results, headers: dict[str, str] | None = None) -> Any:
        """Completions into the answer's JSON, or what comes into `Events`."""
        form, exchange, completions = result
        if isinstance(completions, Pieces):
            return Events(exchange, completions, form.error, self.count)
        self.count(completions)
        return await asyncio.to_thread(exchange.render, completions)  # it may be hundreds of thousands of numbers

    def count(self, rows: Sequence[Sequence[Completion | TextStream]]) -> None:
        """Add what was answered to the metrics; `rows[i]` are the samples of prompt i."""
        PROMPT_TOKENS.labels(*self.labels).inc(sum(row[0].prompt_tokens for row in rows))
        COMPLETION_TOKENS.labels(*self.labels).inc(sum(each.completion_tokens for row in rows for each in row))
        for timing in (each.timing for row in rows for each in row):
            if timing.to_first_token_s is not None:
                TIME_TO_FIRST_TOKEN_SECONDS.labels(*self.labels).observe(timing.to_first_token_s)
            if timing.between_tokens_s is not None:
                INTER_TOKEN_SECONDS.labels(*self.labels).observe(timing.between_tokens_s)
