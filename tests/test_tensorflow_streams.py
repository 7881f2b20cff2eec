"""V1's server-sent events: the answer in pieces, errors before and in the middle, clients that leave, metrics."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from predictor.errors import EngineFailed, QueueFull
from predictor.text.request import TextDelta
from predictor.text.stream import TextStream
from tests.processes import serving

PREDICT = "/v1/models/tiny:predict"

# Seconds of work for the tiny model: whatever ends sooner was ended.
ENDLESS = {
    "instances": ["a"] * 8,
    "parameters": {
        "max_new_tokens": 2000,
        "n": 16,
        "ignore_eos": True,
        "context_overflow": "slide",
        "stream": True,
    },
}


async def events(client: httpx.AsyncClient, body: Any) -> list[dict[str, Any]]:
    async with client.stream("POST", PREDICT, json=body) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = (await response.aread()).decode()
    frames = text.split("\n\n")
    assert frames.pop() == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def joined(told: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """What the events of each sample come to, by row and sample; asserts that each ends once, with its last event."""
    samples: dict[tuple[int, int], dict[str, Any]] = {}
    for event in told:
        sample = samples.setdefault((event.pop("index"), event.pop("sample", 0)), {"text": "", "logprobs": []})
        assert "finish_reason" not in sample, "an event after the last one"
        sample["text"] += event.pop("delta")
        if "logprobs" in event:
            sample["logprobs"].append(event.pop("logprobs"))
        if "finish_reason" in event:
            sample |= event.pop("usage")
        else:
            assert event == {}, "only the last event tells the end"
        sample |= event
    assert all("finish_reason" in sample for sample in samples.values())
    return samples


COLUMNS = ("token_ids", "tokens", "token_logprobs", "top_logprobs")

# How each form is asked and where its values stand, as a list with a value per prompt.
FORMS: dict[str, tuple[Callable[[list[str], dict[str, Any]], Any], Callable[[Any], list[Any]]]] = {
    "rows": (lambda prompts, asked: {"instances": prompts, "parameters": asked}, lambda told: told["predictions"]),
    "columns": (lambda prompts, asked: {"inputs": prompts, "parameters": asked}, lambda told: told["outputs"]),
    "one value": (lambda prompts, asked: {"inputs": prompts[0], "parameters": asked}, lambda told: [told["outputs"]]),
    "older": (lambda prompts, asked: {"text": prompts[0], "length": 48} | asked, lambda told: [told["prediction"]]),
}


@given(
    form=st.sampled_from(sorted(FORMS)),
    prompts=st.lists(st.sampled_from(["", "hello", "the word", "é😀", "banana " * 3]), min_size=1, max_size=3),
    stop=st.lists(st.sampled_from(["e", "th", " ", "an", "\ufffd", "zz"]), max_size=3),
    asked=st.fixed_dictionaries(
        {"seed": st.integers(0, 2**64 - 1), "n": st.integers(1, 3), "temperature": st.sampled_from([0, 0.7, 3])},
        optional={"return_full_text": st.booleans(), "min_new_tokens": st.integers(0, 9)},
    ),
    logprobs=st.sampled_from([None, 0, 2]),
)
@settings(  # no shrinking: an example is three requests, and the first that fails says enough
    deadline=None,
    max_examples=25,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
def test_the_events_of_every_form_come_to_its_whole_answer(
    kserve_app: FastAPI, form: str, prompts: list[str], stop: list[str], asked: dict[str, Any], logprobs: int | None
) -> None:
    asked = asked | {"stop": stop, "details": True} | ({} if logprobs is None else {"logprobs": logprobs})
    if form != "older":
        asked["max_new_tokens"] = 24
    make, values = FORMS[form]

    async def both() -> tuple[Any, Any, Any]:
        transport = httpx.ASGITransport(app=kserve_app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            whole = await client.post(PREDICT, json=make(prompts, asked))
            plain = {key: value for key, value in asked.items() if key not in ("details", "logprobs")}
            detailed = await events(client, make(prompts, asked | {"stream": True}))
            return values(whole.json()), detailed, await events(client, make(prompts, plain | {"stream": True}))

    whole, detailed, plain = asyncio.run(both())
    wanted = {
        (row, sample): told
        for row, value in enumerate(whole)
        for sample, told in enumerate(value if asked["n"] > 1 else [value])
    }
    streamed = joined(detailed)
    for told in streamed.values():
        pieces = told["logprobs"]
        columns = {name: [each for piece in pieces for each in piece[name]] for name in COLUMNS}
        told["logprobs"] = None if logprobs is None else columns
    assert streamed == wanted
    told = {place: (each["text"], each["finish_reason"]) for place, each in joined(plain).items()}
    assert told == {place: (each["text"], each["finish_reason"]) for place, each in wanted.items()}


# Errors.


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"instances": ["a"], "parameters": {"stream": True, "top_p": 7}}, 400, "parameters.top_p"),
        ({"instances": ["a"], "parameters": {"stream": True, "max_new_tokens": 128}}, 400, "max_new_tokens"),
        ({"instances": ["hello " * 200], "parameters": {"stream": True}}, 400, "context"),
        ({"instances": ["a"], "parameters": {"stream": 1}}, 400, "parameters.stream"),
        ({"instances": [{"prompt": "a", "stream": True}]}, 400, "instances[0]: stream is for the whole request"),
        ({"inputs": {"prompt": "a", "stream": True}}, 400, "stream"),
        ({"text": "a", "stream": None}, 400, "stream"),
        ({"instances": ["a"], "stream": True}, 400, "stream"),
        ({"instances": ["a"], "parameters": {"stream": True, "timeout_s": 1e-9}}, 504, "timeout_s"),
    ],
)
async def test_an_error_before_the_first_event_is_an_answer_with_its_status(
    client: httpx.AsyncClient, body: Any, status: int, named: str
) -> None:
    response = await client.post(PREDICT, json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    assert named in response.json()["error"]


async def test_a_full_queue_is_429_for_a_stream_too(
    client: httpx.AsyncClient, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise QueueFull("the queue is full")

    monkeypatch.setattr(predictor.language_model().backend, "submit", full)
    response = await client.post(PREDICT, json={"instances": ["a"], "parameters": {"stream": True}})
    assert (response.status_code, response.json()) == (429, {"error": "the queue is full"})
    assert int(response.headers["retry-after"]) > 0


def fail_after(tokens: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stream raise `error` in place of its delta number `tokens`."""
    take = TextStream.__anext__

    async def failing(stream: TextStream) -> TextDelta:
        if stream.completion_tokens == tokens:
            raise error
        return await take(stream)

    monkeypatch.setattr(TextStream, "__anext__", failing)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (EngineFailed("the engine failed"), 500, "the engine failed"),
        (RuntimeError("secret detail"), 500, "internal error; the server's log has more"),
    ],
)
async def test_an_error_in_the_middle_is_the_last_event(
    client: httpx.AsyncClient,
    predictor: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    told: str,
) -> None:
    fail_after(3, error, monkeypatch)
    before = await sample(client, f'predictor_requests_total{{code="{code}",')
    body = {"instances": ["a"], "parameters": {"stream": True, "ignore_eos": True, "details": True}}
    *rest, last = await events(client, body)
    assert last == {"error": told}
    assert len(rest) == 3
    assert await sample(client, f'predictor_requests_total{{code="{code}",') == before + 1
    await all_freed(predictor)


async def test_an_error_at_the_first_event_is_a_status(
    client: httpx.AsyncClient, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(0, EngineFailed("the engine failed"), monkeypatch)
    response = await client.post(PREDICT, json={"instances": ["a", "b"], "parameters": {"stream": True}})
    assert (response.status_code, response.json()) == (500, {"error": "the engine failed"})
    await all_freed(predictor)


# Clients that leave.


async def all_freed(predictor: Any) -> None:
    load = predictor.language_model().backend.load
    for _ in range(500):
        load = predictor.language_model().backend.load
        if load.used_slots == load.running_requests == load.waiting_requests == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still held: {load}")


async def leave(app: FastAPI, body: Any, stalled: bool) -> list[dict[str, Any]]:
    """Ask, and go away at the first event, `stalled` having read no further before; the messages that came."""
    content = json.dumps(body).encode()
    gone, sent = asyncio.Event(), []
    asked = iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in asked:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message.get("body"):
            gone.set()
            if stalled:  # as uvicorn while the client's window is full
                await asyncio.sleep(60)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # uvicorn's
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": PREDICT,
        "raw_path": PREDICT.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    await asyncio.wait_for(app(scope, receive, send), 30)
    return sent


@pytest.mark.parametrize("stalled", [False, True])
async def test_a_client_that_leaves_a_stream_frees_its_sequences(
    kserve_app: FastAPI, client: httpx.AsyncClient, predictor: Any, stalled: bool
) -> None:
    tokens = "predictor_completion_tokens_total{"
    left, spent = await sample(client, 'predictor_requests_total{code="499",'), await sample(client, tokens)
    sent = await leave(kserve_app, ENDLESS, stalled)
    assert sent[0]["status"] == 200
    await all_freed(predictor)
    assert await sample(client, 'predictor_requests_total{code="499",') == left + 1
    made = await sample(client, tokens) - spent
    assert 0 < made < 2000 * 16 * 8 / 10, "it was left at the first event"


def test_a_real_client_that_leaves_a_stream_frees_its_sequences(checkpoint: Path, tmp_path: Path) -> None:
    content = json.dumps(ENDLESS).encode()
    head = b"POST " + PREDICT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content)
    with serving(tmp_path / "log", "--model", f"tiny={checkpoint}") as server:
        server.wait_until_ready("tiny")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + content)
            received = b""
            while b"data: " not in received:
                received += connection.recv(65536)
            assert server.metric("predictor_requests_running") > 0
        began = time.monotonic()
        while server.metric("predictor_requests_running") or server.metric("predictor_requests_waiting"):
            assert time.monotonic() - began < 10, "it goes on"
            time.sleep(0.02)
        assert server.metric("predictor_kv_tokens_used") == 0
        assert server.metric("predictor_requests_total", 'code="499"') == 1
        assert "Traceback" not in server.log.read_text()


# Metrics.


async def sample(client: httpx.AsyncClient, series: str) -> float:
    """The sum of the series that begin so."""
    text = (await client.get("/metrics")).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(series))


async def test_streams_are_counted_as_whole_answers_are(client: httpx.AsyncClient) -> None:
    series = [
        'predictor_requests_total{code="200",',
        "predictor_request_seconds_count{",
        "predictor_prompt_tokens_total{",
        "predictor_completion_tokens_total{",
        "predictor_time_to_first_token_seconds_count{",
        "predictor_inter_token_seconds_count{",
    ]
    body = {"instances": ["hello", "a"], "parameters": {"n": 2, "max_new_tokens": 5, "ignore_eos": True}}

    async def counts() -> list[float]:
        return [await sample(client, each) for each in series]

    start = await counts()
    assert (await client.post(PREDICT, json=body)).status_code == 200
    middle = await counts()
    body["parameters"]["stream"] = True
    await events(client, body)
    end = await counts()
    whole = [after - before for before, after in zip(start, middle, strict=True)]
    streamed = [after - before for before, after in zip(middle, end, strict=True)]
    assert streamed == whole
    assert (whole[0], whole[3], whole[4], whole[5]) == (1, 20, 4, 4)
