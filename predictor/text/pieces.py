"""The samples of one request as one stream, in the order in which their text arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

from predictor.text.deadline import Deadline
from predictor.text.request import TextDelta
from predictor.text.stream import TextStream


@dataclass(frozen=True, slots=True)
class Piece:
    """A delta of one of several samples, and where it belongs."""

    row: int  # of the request's prompts
    sample: int  # of the prompt's n
    delta: TextDelta
    source: TextStream  # with its counts so far, its seed and dtype


class Pieces(AsyncIterator[Piece]):
    """All deltas of all samples. Ends when the last sample has; `aclose` ends it early and frees every sequence."""

    def __init__(self, rows: Sequence[Sequence[TextStream]], first: Piece, rest: AsyncGenerator[Piece, None]) -> None:
        self.rows = rows
        self._first: Piece | None = first
        self._rest = rest

    @classmethod
    async def begin(
        cls, rows: Sequence[Sequence[TextStream]], deadlines: Sequence[Deadline], names: Sequence[str]
    ) -> Pieces:
        """Wait for the first piece; raises what it raises. `rows[i]`, called `names[i]`, has until `deadlines[i]`."""
        merged = _merge(rows, deadlines, names)
        return cls(rows, await merged.__anext__(), merged)

    async def __anext__(self) -> Piece:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await self._rest.__anext__()

    async def aclose(self) -> None:
        await self._rest.aclose()


async def _merge(
    rows: Sequence[Sequence[TextStream]], deadlines: Sequence[Deadline], names: Sequence[str]
) -> AsyncGenerator[Piece, None]:
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(row: int, sample: int, stream: TextStream) -> None:
        async for delta in stream:
            arrived.put_nowait(Piece(row, sample, delta, stream))

    pumps = [
        asyncio.ensure_future(deadline.hold(pump(row, sample, stream), name))
        for row, (streams, deadline, name) in enumerate(zip(rows, deadlines, names, strict=True))
        for sample, stream in enumerate(streams)
    ]

    async def finish() -> None:
        try:
            await asyncio.gather(*pumps)
            arrived.put_nowait(None)
        except Exception as error:  # handed to whoever reads the pieces
            arrived.put_nowait(error)

    finishing = asyncio.ensure_future(finish())
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        finishing.cancel()
        for each in pumps:
            each.cancel()
        for streams in rows:
            for stream in streams:
                await stream.aclose()
