"""The async side of one sequence: tokens arrive from another thread, `aclose` sends the sequence away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from predictor.engine.params import Token

# Tokens of a lot: more would save nothing, and keep the event loop from others for longer when they come.
_LOT = 32


class TokenStream(AsyncIterator[Token]):
    """The tokens of one sequence. `aclose` frees it within one step, finished or not; it may be called twice."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
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
            if len(held) == lot or isinstance(item, Exception) or item.finish_reason is not None:
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
