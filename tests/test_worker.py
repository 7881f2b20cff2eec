"""The engine's thread seen from an event loop: cancelling, failing, filling up, stopping."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from predictor.engine.cache import SlotAllocator
from predictor.engine.engine import Engine
from predictor.engine.params import SamplingParams, Token
from predictor.engine.scheduler import Batch, PromptCopy
from predictor.engine.stream import Outbox, TokenStream
from predictor.engine.worker import EngineWorker
from predictor.errors import EngineFailed, NotReady, QueueFull

V = 16


class Scripted:
    """A forward that computes nothing: the next token is the position modulo the vocabulary."""

    def __init__(self, slots: int = 4000, step_s: float = 0.0) -> None:
        self.slots = SlotAllocator(slots)
        self.choose, self.rows_are_exact = None, False
        self.step_s = step_s
        self.fail_next = False
        self.steps = 0

    def copy_prompts(self, copies: list[PromptCopy]) -> None:
        pass

    def logits(self, batch: Batch) -> Tensor:
        self.steps += 1
        time.sleep(self.step_s)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device caught fire")
        rows = [work.first_position + len(work.token_ids) for work in batch.work if work.samples]
        logits = torch.zeros(len(rows), V)
        for row, position in enumerate(rows):
            logits[row, position % V] = 50
        return logits


@pytest.fixture
def forward() -> Scripted:
    return Scripted()


@pytest.fixture
def worker(forward: Scripted) -> Iterator[EngineWorker]:
    made = EngineWorker(Engine(forward, context=2000, max_running=16, chunk_tokens=8, step_tokens=32), queue_limit=20)
    yield made
    made.stop()
    made.join(10)


def params(new: int = 5, **changes: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, **changes)


async def collect(stream: TokenStream) -> list[Token]:
    return [token async for token in stream]


async def settled(worker: EngineWorker, forward: Scripted) -> None:
    for _ in range(500):
        if forward.slots.used == 0 and worker.load.running_requests == worker.load.waiting_requests == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not settled: {worker.load}")


async def test_tokens_arrive_in_order(worker: EngineWorker) -> None:
    ((stream,),) = worker.submit([([1, 2, 3], params(6))])
    tokens = await collect(stream)
    assert [token.id for token in tokens] == [3, 4, 5, 6, 7, 8]
    assert [token.finish_reason for token in tokens] == [None] * 5 + ["length"]


async def test_a_lot_leaves_when_it_is_full_or_the_last_token_has_come() -> None:
    outbox, delivered = Outbox(), list[int]()
    stream = TokenStream(lambda: None)
    sink = outbox.sink(stream, in_lots=True)
    for place in range(70):
        sink(Token(place, finish_reason="length" if place == 69 else None))
        outbox.flush()
        await asyncio.sleep(0)
        delivered.append(stream._arrived.qsize())
    assert delivered == [0] * 31 + [32] * 32 + [64] * 6 + [70]
    assert [token.id for token in await collect(stream)] == list(range(70))


async def test_a_lot_that_is_not_full_leaves_with_an_error(worker: EngineWorker, forward: Scripted) -> None:
    forward.step_s = 0.01
    ((stream,),) = worker.submit([([1], params(500, in_lots=True))])
    got = [(await stream.__anext__()).id]  # with the first lot
    forward.fail_next = True
    got += [(await stream.__anext__()).id for _ in range(31)]
    with pytest.raises(EngineFailed):
        await collect(stream)
    assert got == [(1 + place) % V for place in range(32)]


async def test_closing_frees_the_sequence_within_one_step(worker: EngineWorker, forward: Scripted) -> None:
    forward.step_s = 0.05
    ((stream,),) = worker.submit([([1], params(2000))])
    await stream.__anext__()
    assert forward.slots.used == 2000
    await stream.aclose()
    steps = forward.steps
    while forward.slots.used:
        await asyncio.sleep(0.001)
        assert forward.steps <= steps + 1, "a step was computed after the one that ran"
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await stream.__anext__()


async def test_a_stream_that_was_never_read_can_be_closed(worker: EngineWorker, forward: Scripted) -> None:
    (streams,) = worker.submit([([1] * 20, params(500, n=4))])
    for stream in streams:
        await stream.aclose()
    await settled(worker, forward)


async def test_a_thousand_random_cancels_leak_nothing(worker: EngineWorker, forward: Scripted) -> None:
    chance = random.Random(0)

    async def submit(prompt: list[int], asked: SamplingParams) -> list[TokenStream]:
        while True:
            try:
                return worker.submit([(prompt, asked)])[0]
            except QueueFull:
                await asyncio.sleep(0.01)

    async def one() -> None:
        asked = params(chance.randint(1, 40), n=chance.choice([1, 1, 3]))
        streams = await submit([1] * chance.randint(1, 30), asked)
        for stream in streams:
            for _ in range(chance.randint(0, 5)):
                try:
                    await stream.__anext__()
                except StopAsyncIteration:
                    break
        await asyncio.sleep(chance.random() * 0.01)
        for stream in streams:
            await stream.aclose()

    for _ in range(50):
        await asyncio.gather(*(one() for _ in range(20)))
    await settled(worker, forward)
    ((stream,),) = worker.submit([([1], params(3))])
    assert len(await collect(stream)) == 3


async def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(worker: EngineWorker, forward: Scripted) -> None:
    forward.fail_next = True
    streams = worker.submit([([1], params()), ([1, 2], params(n=2))])
    for stream in (each for row in streams for each in row):
        with pytest.raises(EngineFailed, match="the engine failed") as caught:
            await collect(stream)
        assert "fire" not in str(caught.value)
    assert worker.healthy
    await settled(worker, forward)
    ((stream,),) = worker.submit([([1], params())])
    assert len(await collect(stream)) == 5


async def test_a_device_that_is_lost_makes_the_worker_unhealthy(worker: EngineWorker, forward: Scripted) -> None:
    forward.logits = _cuda_error
    ((stream,),) = worker.submit([([1], params())])
    with pytest.raises(EngineFailed):
        await collect(stream)
    for _ in range(100):
        if not worker.healthy:
            break
        await asyncio.sleep(0.01)
    assert not worker.healthy
    with pytest.raises(NotReady):
        worker.submit([([1], params())])


def _cuda_error(batch: Batch) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_past_the_queue_limit_nothing_is_admitted(worker: EngineWorker, forward: Scripted) -> None:
    forward.step_s = 0.02
    running = worker.submit([([1], params(2000)) for _ in range(2)])  # 4,000 slots: the memory is full
    for (stream,) in running:
        await stream.__anext__()
    waiting = [worker.submit([([1], params())]) for _ in range(20)]
    with pytest.raises(QueueFull, match="20 prompts wait, 1 more would be past its limit of 20"):
        worker.submit([([1], params())])
    assert worker.load.waiting_requests == 20
    for (stream,) in running:
        await stream.aclose()
    for ((stream,),) in waiting:
        assert len(await collect(stream)) == 5


async def test_a_request_of_many_prompts_is_admitted_whole_or_not(worker: EngineWorker, forward: Scripted) -> None:
    forward.step_s = 0.02
    running = worker.submit([([1], params(2000)) for _ in range(2)])
    for (stream,) in running:
        await stream.__anext__()
    first = worker.submit([([1], params()) for _ in range(15)])
    with pytest.raises(QueueFull):
        worker.submit([([1], params()) for _ in range(6)])
    assert worker.load.waiting_requests == 15
    for (stream,) in [*running, *first]:
        await stream.aclose()
    await settled(worker, forward)


async def test_the_event_loop_never_waits_for_a_step(worker: EngineWorker, forward: Scripted) -> None:
    forward.step_s = 0.3
    ((stream,),) = worker.submit([([1], params(3))])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await collect(stream)
    ticking.cancel()
    assert ticks > 20, "the loop stood still while a step slept"


async def test_stopping_answers_everybody(forward: Scripted) -> None:
    forward.step_s = 0.02
    worker = EngineWorker(Engine(forward, context=2000, max_running=2, chunk_tokens=8, step_tokens=32), queue_limit=20)
    streams = worker.submit([([1], params(1000)) for _ in range(5)])
    await streams[0][0].__anext__()
    worker.stop()
    for (stream,) in streams:
        with pytest.raises(NotReady, match="shutting down"):
            await collect(stream)
    worker.join(10)
    assert forward.slots.used == 0
    with pytest.raises(NotReady):
        worker.submit([([1], params())])


def test_a_loop_that_closed_frees_its_sequences(worker: EngineWorker, forward: Scripted) -> None:
    forward.step_s = 0.01

    async def leave() -> None:
        ((stream,),) = worker.submit([([1], params(1000))])
        await stream.__anext__()

    asyncio.run(leave())
    asyncio.run(settled(worker, forward))
