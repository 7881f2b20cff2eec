"""A stream whose client does not read."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from predictor.server import events
from predictor.server.events import Events, EventStream


class Endless(Events):
    """Events without end, in place of a model's."""

    def __init__(self) -> None:
        self.status = 499
        self.closed = False

    async def __anext__(self) -> Any:
        return {"delta": "x"}

    async def aclose(self) -> None:
        self.closed = True


async def test_a_client_that_reads_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_STALLED_S", 0.05)
    endless, ended, sent = Endless(), [], []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:  # the client's buffers are full
            await asyncio.sleep(60)

    async def receive() -> Any:
        await asyncio.sleep(60)

    response = EventStream(endless, ended.append)
    await asyncio.wait_for(response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send), 30)
    assert endless.closed
    assert ended == [499]
