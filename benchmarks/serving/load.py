"""Asking a target by many clients in turn, or at given moments; knows neither HTTP nor the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.serving.workload import Arrival, Ask


@dataclass(frozen=True, slots=True)
class Reply:
    answer: Any  # a text over HTTP, token ids from the engine
    first_token_at: float | None = None  # on the clock of time.perf_counter; None: the target does not stream


class Target(Protocol):
    async def ask(self, ask: Ask) -> Reply: ...


@dataclass(frozen=True, slots=True)
class Served:
    """One request's times, since it was sent, or since it was to be sent."""

    ask: Ask
    latency_s: float
    first_token_s: float | None
    answer: Any


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    served: list[Served]

    @property
    def tokens(self) -> int:
        return sum(each.ask.new_tokens for each in self.served)


async def run_clients(target: Target, clients: Sequence[Sequence[Ask]]) -> Run:
    """A closed loop: all clients begin together, each sends its next request when it has the answer to the last."""

    async def client(asks: Sequence[Ask]) -> list[Served]:
        return [await _serve(target, ask, time.perf_counter()) for ask in asks]

    began = time.perf_counter()
    served = await asyncio.gather(*map(client, clients))
    return Run(time.perf_counter() - began, [each for one in served for each in one])


async def run_arrivals(target: Target, arrivals: Sequence[Arrival]) -> Run:
    """An open loop. Times count from when a request was due, so that a client which is late hides nothing."""
    began = time.perf_counter()

    async def one(arrival: Arrival) -> Served:
        due = began + arrival.at_s
        await asyncio.sleep(due - time.perf_counter())
        return await _serve(target, arrival.ask, due)

    served = await asyncio.gather(*map(one, arrivals))
    return Run(time.perf_counter() - began, list(served))


async def _serve(target: Target, ask: Ask, since: float) -> Served:
    reply = await target.ask(ask)
    first = None if reply.first_token_at is None else reply.first_token_at - since
    return Served(ask, time.perf_counter() - since, first, reply.answer)
