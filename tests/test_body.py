"""What surrounds a request's body: large ones leave the event loop, and what ends early lets go of everything."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from predictor.errors import Cancelled
from predictor.protocols import v1
from predictor.protocols.wire import Limits
from predictor.server.body import unless


@pytest.mark.parametrize(("length", "aside"), [(100, False), (20_000, True)])
async def test_a_large_body_is_decoded_and_checked_off_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, length: int, aside: bool
) -> None:
    threads = []

    def parse(body: Any, limits: Limits) -> Any:
        threads.append(threading.current_thread())
        return v1.parse(body, limits)

    def decode(body: bytes, headers: Any) -> Any:
        threads.append(threading.current_thread())
        return plain(body, headers)

    plain = v1.FORMAT.decode
    monkeypatch.setattr(v1, "FORMAT", replace(v1.FORMAT, parse=parse, decode=decode))
    body = {"instances": ["hello"], "parameters": {"max_new_tokens": 1}, "signature_name": ""}
    padded = httpx.Request("POST", "http://test", json=body).content.rjust(length)
    response = await client.post("/v1/models/tiny:predict", content=padded)
    assert response.status_code == 200, response.text
    assert [thread is not threading.main_thread() for thread in threads] == [aside, aside]


async def at_once() -> None:
    pass


async def test_a_result_that_comes_too_late_is_discarded() -> None:
    discarded = []

    async def discard(result: str) -> None:
        discarded.append(result)

    async def stubborn() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "late"  # as `wait_for` does before Python 3.12, when its work has just ended
        return "never"

    with pytest.raises(Cancelled):
        await unless(at_once(), Cancelled("gone"), stubborn(), discard)
    assert discarded == ["late"]


async def test_a_cancel_that_is_swallowed_is_repeated() -> None:
    swallowed = []

    async def deaf_once() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            swallowed.append(1)
        await asyncio.sleep(60)

    with pytest.raises(Cancelled):
        await asyncio.wait_for(unless(at_once(), Cancelled("gone"), deaf_once()), 30)
    assert swallowed == [1]


async def test_what_came_in_time_is_returned_and_not_discarded() -> None:
    async def quick() -> str:
        return "in time"

    async def discard(result: str) -> None:
        raise AssertionError(result)

    assert await unless(asyncio.sleep(60), Cancelled("gone"), quick(), discard) == "in time"
