"""The async side of one sequence: tokens arrive from another thread, `aclose` sends the sequence away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from predictor.engine.params import Token

# Tokens of a lot: more would save nothing, and keep the event loop from others for longer when they come.
_LOT = 32


class Timing:
    """When a sequence was submitted and its tokens were drawn; written by the engine's thread."""

    __slots__ = ("_first_s", "_last_s", "_submitted_s", "_tokens")

    def __init__(self) -> None:
        self._submitted_s = time.perf_counter()
        self._first_s = self._last_s = 0.0
        self._tokens = 0

    def note_token(self) -> None:
        """One more has been drawn."""
        self._last_s = time.perf_counter()
        if not self._tokens:
            self._first_s = self._last_s
        self._tokens += 1

    @property
    def to_first_token_s(self) -> float | None:
        """Seconds from the submission to the first token, the wait for a seat included."""
        return self._first_s - self._submitted_s if self._tokens else None

    @property
    def between_tokens_s(self) -> float | None:
        """Mean seconds from one token to the next."""
        return (self._last_s - self._first_s) / (self._tokens - 1) if self._tokens > 1 else None


class TokenStream(AsyncIterator[Token]):
    """The tokens of one sequence. `aclose` frees it within one step, finished or not; it may be called twice."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.timing = Timing()
        self._arrived: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._on_close = on_close
        self._ended = False

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, Exception):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    def deliver(self, item: Token | Exception) -> None:
        """Add what arrived; on the stream's own loop."""
        self._arrived.put_nowait(item)

    def abandon(self) -> None:
        """Send the sequence away when the stream's loop is gone; from any thread."""
        self._on_close()

    async def aclose(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_close()


class Outbox:
    """Tokens on their way from an engine's thread to the event loops that wait for them."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Token | Exception]]] = {}

    def sink(self, stream: TokenStream, in_lots: bool = False) -> Callable[[Token | Exception], None]:
        """A function that queues an item for `stream`; for the engine's thread only.

        With `in_lots` tokens wait until there are 32 or the last has come. Meanwhile the event loop's thread is left
        asleep: awake, it would take a core from a step in which every other thread waits for that core.
        """
        held: list[tuple[TokenStream, Token | Exception]] = []
        lot = _LOT if in_lots else 1

        def sink(item: Token | Exception) -> None:
            held.append((stream, item))
            if isinstance(item, Exception):
                ended = True
            else:
                ended = item.finish_reason is not None
                stream.timing.note_token()
            if ended or len(held) == lot:
                self._items.setdefault(stream.loop, []).extend(held)
                held.clear()

        return sink

    def flush(self) -> None:
        """Hand over what gathered, one call per event loop."""
        items, self._items = self._items, {}
        for loop, arrivals in items.items():
            try:
                loop.call_soon_threadsafe(_deliver, arrivals)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for stream, _ in arrivals:
                    stream.abandon()


def _deliver(arrivals: list[tuple[TokenStream, Token | Exception]]) -> None:
    for stream, item in arrivals:
        stream.deliver(item)
