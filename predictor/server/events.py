"""Server-sent events: an exchange's answer as it comes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import orjson
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from predictor.errors import Cancelled, PredictorError
from predictor.protocols.wire import Exchange
from predictor.server.errors import ours
from predictor.text.pieces import Pieces
from predictor.text.stream import TextStream

logger = logging.getLogger(__name__)

# A client that reads nothing for this long is held to have gone: what it does not read stays in memory.
_STALLED_S = 30.0


class Events(AsyncIterator[Any]):
    """The events of one answer; an error in the middle is the last of them. `aclose` frees every sequence."""

    def __init__(
        self,
        exchange: Exchange,
        pieces: Pieces,
        error: Callable[[PredictorError], Any],
        count: Callable[[Sequence[Sequence[TextStream]]], None],
    ) -> None:
        """`count` is told of the samples when the stream is closed, as far as they have come."""
        self._exchange, self._pieces, self._error, self._count = exchange, pieces, error, count
        self._ready: deque[Any] = deque()
        self._ended = False
        self.status = Cancelled.status  # until the last event is out

    async def __anext__(self) -> Any:
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            try:
                self._ready += self._exchange.events(await self._pieces.__anext__())
            except StopAsyncIteration:
                self._ended, self.status = True, 200
                self._ready += self._exchange.last_events()
            except Exception as error:  # the headers are out: an event has to tell it
                mapped = ours(error)
                self._ended, self.status = True, mapped.status
                self._ready.append(self._error(mapped))
        return self._ready.popleft()

    async def aclose(self) -> None:
        await self._pieces.aclose()
        self._count(self._pieces.rows)


class EventStream(StreamingResponse):
    """Events as `text/event-stream`. However it ends, the events are closed and `on_end` hears the status."""

    def __init__(self, events: Events, on_end: Callable[[int], None]) -> None:
        # Proxies must pass events on at once; nginx buffers unless it is told.
        super().__init__(
            _encoded(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._events, self._on_end = events, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), _STALLED_S)

        try:
            await super().__call__(scope, receive, send_in_time)
        except asyncio.TimeoutError:  # the status is that of a client who left
            logger.info("a client has read nothing of its stream for %g s: it is closed", _STALLED_S)
        finally:
            await self._events.aclose()
            self._on_end(self._events.status)


async def _encoded(events: Events) -> AsyncIterator[bytes]:
    async for event in events:
        yield b"data: " + (event.encode() if isinstance(event, str) else orjson.dumps(event)) + b"\n\n"
