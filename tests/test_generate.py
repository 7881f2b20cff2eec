"""Triton's generate extension: one answer, or server-sent events, for one prompt."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from predictor.errors import DeadlineExceeded
from predictor.server.predictor import Predictor
from predictor.text.pieces import Piece, Pieces
from tests.test_v2 import ASKED, predictions, versioned

GENERATE, STREAM = "/v2/models/tiny/generate", "/v2/models/tiny/generate_stream"


async def generate(client: httpx.AsyncClient, path: str = GENERATE, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json={"text_input": "hello"} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return dict(response.json())


async def stream(client: httpx.AsyncClient, path: str = STREAM, **body: Any) -> list[dict[str, Any]]:
    async with client.stream("POST", path, json={"text_input": "hello"} | body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"  # as Triton gives it
        text = (await response.aread()).decode()
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_the_answer_is_tritons_with_the_text_of_predict(client: httpx.AsyncClient) -> None:
    (wanted,) = await predictions(client, "hello", **ASKED)
    answer = {"model_name": "tiny", "model_version": "1", "text_output": wanted}
    assert await generate(client, parameters=ASKED) == answer
    assert await generate(client, path=versioned("generate"), parameters=ASKED | {"stream": False}) == answer


async def test_parameters_may_stand_beside_the_text(client: httpx.AsyncClient) -> None:
    answer = await generate(client, parameters=ASKED)
    assert await generate(client, **ASKED) == answer
    assert await generate(client, parameters={"seed": 5}, max_tokens=6, temperature=2) == answer


async def test_an_id_is_given_back(client: httpx.AsyncClient) -> None:
    assert (await generate(client, id="a-1"))["id"] == "a-1"
    assert {event["id"] for event in await stream(client, id="a-1", max_tokens=9)} == {"a-1"}


async def test_events_are_deltas_of_the_answer(client: httpx.AsyncClient) -> None:
    asked = ASKED | {"max_new_tokens": 30, "ignore_eos": True}
    (wanted,) = await predictions(client, "hello", **asked)
    for path in (STREAM, versioned("generate_stream")):
        events = await stream(client, path, parameters=asked | {"stream": True})
        assert "".join(event["text_output"] for event in events) == wanted
        assert len(events) > 10
        assert all(set(event) == {"model_name", "model_version", "text_output"} for event in events)


async def test_a_stream_that_is_not_to_stream_is_one_event(client: httpx.AsyncClient) -> None:
    (event,) = await stream(client, parameters=ASKED | {"stream": False, "n": 2})
    assert event == await generate(client, parameters=ASKED | {"n": 2})


async def test_samples_are_a_list_and_their_events_tell_which(client: httpx.AsyncClient) -> None:
    (wanted,) = await predictions(client, "hello", **ASKED, n=3)
    assert (await generate(client, **ASKED, n=3))["text_output"] == wanted
    texts = ["", "", ""]
    for event in await stream(client, **ASKED, n=3):
        texts[event["sample"]] += event["text_output"]
    assert texts == wanted


async def test_full_text_begins_with_the_prompt(client: httpx.AsyncClient) -> None:
    whole = (await generate(client, **ASKED, return_full_text=True))["text_output"]
    assert whole.startswith("hello")
    events = await stream(client, **ASKED, return_full_text=True)
    assert "".join(event["text_output"] for event in events) == whole


async def test_details_are_those_of_predict(client: httpx.AsyncClient) -> None:
    asked = ASKED | {"details": True, "logprobs": 2, "ignore_eos": True}
    (told,) = await predictions(client, "hello", **asked)
    answer = await generate(client, **asked)
    assert {"text": answer["text_output"]} | {key: answer[key] for key in told if key != "text"} == told
    *most, last = await stream(client, **asked)
    assert all("finish_reason" not in event for event in most)
    assert {key: last[key] for key in told if key not in ("text", "logprobs")} == {
        key: value for key, value in told.items() if key not in ("text", "logprobs")
    }
    streamed = [event["logprobs"]["token_ids"] for event in [*most, last] if "logprobs" in event]
    assert [token_id for each in streamed for token_id in each] == told["logprobs"]["token_ids"]
    several = await generate(client, **asked, n=2)
    assert (several["seed"], several["finish_reason"]) == ([5, 6], ["length", "length"])


async def test_an_empty_completion_is_still_an_event(client: httpx.AsyncClient) -> None:
    events = await stream(client, logit_bias={"0": 100})
    assert [event["text_output"] for event in events] == [""]


# name, body, what the answer must contain; status 400
REFUSED: list[tuple[str, Any, str]] = [
    ("a list", [], "object"),
    ("no text", {"parameters": {}}, "lacks text_input"),
    ("text a list", {"text_input": ["hello"]}, "text_input"),
    ("text null", {"text_input": None}, "text_input"),
    ("parameters a list", {"text_input": "a", "parameters": []}, "parameters must"),
    ("parameters null", {"text_input": "a", "parameters": None}, "parameters must"),
    ("an unknown parameter", {"text_input": "a", "parameters": {"max_length": 5}}, "max_length"),
    ("an unknown field", {"text_input": "a", "stop_words": ""}, "stop_words"),
    ("an id a number", {"text_input": "a", "id": 5}, "id must"),
    ("a parameter twice", {"text_input": "a", "seed": 1, "parameters": {"seed": 1}}, "seed"),
    ("a parameter and its alias", {"text_input": "a", "n": 1, "parameters": {"num_return_sequences": 1}}, "mean"),
    ("out of range", {"text_input": "a", "top_p": 2}, "top_p"),
    ("logprobs without details", {"text_input": "a", "logprobs": 2}, "details"),
    ("a prompt past the context", {"text_input": "hello " * 200}, "text_input: the prompt"),
]  # fmt: skip


@pytest.mark.parametrize("path", [GENERATE, STREAM])
@pytest.mark.parametrize(("body", "named"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
async def test_a_wrong_body_is_refused_and_named(client: httpx.AsyncClient, path: str, body: Any, named: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    assert named in response.json()["error"]


async def test_generate_does_not_stream(client: httpx.AsyncClient) -> None:
    response = await client.post(GENERATE, json={"text_input": "hello", "parameters": {"stream": True}})
    assert response.status_code == 400
    assert "generate_stream" in response.json()["error"]


async def test_an_error_in_the_middle_is_an_event(
    client: httpx.AsyncClient, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = predictor.language_model()
    begin = model.stream

    async def begin_what_fails(*arguments: Any) -> Pieces:
        pieces = await begin(*arguments)
        pieces._rest = one_and_an_error(pieces._rest)
        return pieces

    async def one_and_an_error(rest: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        async with aclosing(rest):
            yield await rest.__anext__()
            raise DeadlineExceeded("out of time")

    monkeypatch.setattr(model, "stream", begin_what_fails)
    *deltas, last = await stream(client, max_tokens=50, ignore_eos=True)
    assert last == {"error": "out of time"}
    assert deltas
    assert all("error" not in event for event in deltas)
