"""The server as a target. What streams will be a class beside `V1` that sets `first_token_at`; nothing else changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from benchmarks.serving.load import Reply
from benchmarks.serving.workload import Ask

MODEL = "aitextgen"


class Refused(Exception):
    """An answer that is none; the message has its status and text."""


class V1:
    """`:predict`, which answers at once with everything."""

    streams = False

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def ask(self, ask: Ask) -> Reply:
        async with self._session.post(f"/v1/models/{MODEL}:predict", data=ask.body) as response:
            answer = await response.read()
        if response.status != 200:
            raise Refused(f"the server answered {response.status}: {answer.decode(errors='replace')[:500]}")
        return Reply(json.loads(answer)["predictions"][0])


async def probe(session: aiohttp.ClientSession, times_s: list[float]) -> None:
    """Ask for readiness every 20 ms until cancelled."""
    while True:
        began = time.perf_counter()
        async with session.get(f"/v1/models/{MODEL}") as response:
            response.raise_for_status()
        times_s.append(time.perf_counter() - began)
        await asyncio.sleep(0.02)


@asynccontextmanager
async def open_session(url: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A connection per request at a time, kept for the next.

    aiohttp takes 0.14 ms of processor time a request here and httpx 2.3 ms, which the server's cores would pay.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)  # the server closes after 65 s
    timeout = aiohttp.ClientTimeout(total=3600)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout, headers=headers) as session:
        yield session
