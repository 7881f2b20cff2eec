"""Text over a backend: what depends on the model, and how streams end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from predictor.backends.base import Backend
from predictor.engine.params import SamplingParams
from predictor.engine.stream import TokenStream
from predictor.errors import DeadlineExceeded, EngineFailed, InvalidRequest
from predictor.text.language_model import LanguageModel
from predictor.text.request import TextRequest


async def settled(backend: Backend) -> None:
    for _ in range(500):
        if backend.load.used_slots == 0 and backend.load.running_requests == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("sequences leaked")


async def test_deltas_join_to_the_completion(backend: Backend) -> None:
    model = LanguageModel(backend)
    ask = TextRequest(prompt="hello", seed=1, temperature=2.0, max_new_tokens=30, ignore_eos=True)
    ((stream,),) = await model.submit([ask])
    deltas = [delta async for delta in stream]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == "length"
    ((whole,),) = await model.generate([ask], 60)
    assert "".join(delta.text for delta in deltas) == whole.text


async def test_streams_say_why_they_ended(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(backend)
    ask = TextRequest(prompt="hello", max_new_tokens=100, ignore_eos=True)
    ((closed,), (failed,)) = await model.submit([ask, ask])
    assert closed.finish_reason is None
    await closed.aclose()
    assert closed.finish_reason == "cancelled"

    async def fail() -> None:
        raise EngineFailed("the engine failed")

    monkeypatch.setattr(failed._tokens, "__anext__", fail, raising=False)
    with pytest.raises(EngineFailed):
        await failed.collect()
    assert failed.finish_reason == "error"
    await failed.aclose()
    await settled(backend)


async def test_tokens_come_in_lots_where_nobody_looks_at_them_before_the_end(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    submit = backend.submit

    def watched(requests: list[tuple[list[int], SamplingParams]]) -> list[list[TokenStream]]:
        asked.extend(params.in_lots for _, params in requests)
        return submit(requests)

    monkeypatch.setattr(backend, "submit", watched)
    model = LanguageModel(backend)
    plain, stopping = (TextRequest("hello", max_new_tokens=3, stop=stop) for stop in ((), ("zzz",)))
    await model.generate([plain, stopping], 60)
    assert asked == [True, False]
    ((stream,),) = await model.submit([plain])
    await stream.collect()
    assert asked[2:] == [False]


async def test_a_stop_string_frees_the_sequence_at_once(backend: Backend) -> None:
    model = LanguageModel(backend)
    ask: dict[str, Any] = {"prompt": "hello", "seed": 1, "temperature": 2.0, "max_new_tokens": 100, "ignore_eos": True}
    ((whole,),) = await model.generate([TextRequest(**ask)], 60)
    ((stream,),) = await model.submit([TextRequest(**ask, stop=(whole.text[5:8],))])
    deltas = [delta async for delta in stream]
    assert deltas[-1].finish_reason == "stop"
    assert len(deltas) < 100
    await settled(backend)


async def test_one_of_several_samples_may_stop_alone(backend: Backend) -> None:
    model = LanguageModel(backend)
    ask: dict[str, Any] = {
        "prompt": "hello",
        "seed": 1,
        "n": 3,
        "temperature": 2.0,
        "max_new_tokens": 40,
        "ignore_eos": True,
    }
    (plain,) = await model.generate([TextRequest(**ask)], 60)
    stop = plain[0].text[4:8]
    (cut,) = await model.generate([TextRequest(**ask, stop=(stop,))], 60)
    assert cut[0].finish_reason == "stop"
    for before, after in zip(plain, cut, strict=True):
        wanted = before.text.split(stop)[0]
        assert after.text == wanted
    await settled(backend)


async def test_text_before_min_new_tokens_is_not_searched_for_stops(backend: Backend) -> None:
    model = LanguageModel(backend)
    ask: dict[str, Any] = {"prompt": "hello", "seed": 1, "temperature": 2.0, "max_new_tokens": 30, "ignore_eos": True}
    ((whole,),) = await model.generate([TextRequest(**ask)], 60)
    ((held,),) = await model.generate([TextRequest(**ask, min_new_tokens=30, stop=(whole.text[2:4],))], 60)
    assert held.text == whole.text
    assert held.finish_reason == "length"


async def test_leaving_in_the_middle_frees_everything(backend: Backend) -> None:
    model = LanguageModel(backend)
    asks = [TextRequest(prompt="hello", n=4, max_new_tokens=100, ignore_eos=True) for _ in range(8)]
    task = asyncio.create_task(model.generate(asks, 60))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await settled(backend)


async def test_a_deadline_frees_everything(backend: Backend) -> None:
    model = LanguageModel(backend)
    asks = [TextRequest(prompt="hello", n=16, max_new_tokens=120, ignore_eos=True, timeout_s=0.02) for _ in range(8)]
    with pytest.raises(DeadlineExceeded, match=r"0.02 s"):
        await model.generate(asks, 60)
    await settled(backend)


async def test_a_bad_request_among_good_ones_admits_none(backend: Backend) -> None:
    model = LanguageModel(backend)
    with pytest.raises(InvalidRequest):
        await model.generate([TextRequest(prompt="hello"), TextRequest(prompt="hello " * 500)], 60)
    assert backend.load.running_requests == backend.load.waiting_requests == 0


async def test_a_long_prompt_is_prepared_off_the_event_loop(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(backend)
    threads = []

    def encode(text: str) -> list[int]:
        threads.append(threading.current_thread())
        return [1, 2]

    monkeypatch.setattr(model.vocabulary, "encode", encode)
    monkeypatch.setattr(model.vocabulary, "longest_token", 10_000)
    await model.generate([TextRequest(prompt="short", max_new_tokens=1)], 60)
    await model.generate([TextRequest(prompt="the word " * 1000, max_new_tokens=1)], 60)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
