"""The V1 contract through KServe's own application, on a tiny model."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from predictor.errors import DeadlineExceeded, EngineFailed, QueueFull
from predictor.observability import CODES

PREDICT = "/v1/models/tiny:predict"


async def predict(client: httpx.AsyncClient, *instances: Any, **parameters: Any) -> list[Any]:
    response = await client.post(PREDICT, json={"instances": list(instances), "parameters": parameters})
    assert response.status_code == 200, response.text
    return response.json()["predictions"]


async def test_a_prediction_is_the_completion(client: httpx.AsyncClient) -> None:
    first, second = await predict(client, "hello", "the word", seed=5, max_new_tokens=6)
    assert isinstance(first, str)
    assert not first.startswith("hello")
    assert await predict(client, "the word", seed=5, max_new_tokens=6) == [second]


async def test_greedy_is_that_of_transformers(
    client: httpx.AsyncClient, checkpoint: Path, oracle: GPT2LMHeadModel
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    wanted = oracle.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    (prediction,) = await predict(client, "hello world", temperature=0, max_new_tokens=30, details=True, logprobs=0)
    if wanted[-1] == 0:  # transformers keeps the end token
        wanted.pop()
    assert prediction["logprobs"]["token_ids"] == wanted


async def test_do_sample_false_is_greedy(client: httpx.AsyncClient) -> None:
    greedy = await predict(client, "hello", temperature=0, max_new_tokens=10)
    assert await predict(client, "hello", do_sample=False, temperature=5, max_new_tokens=10) == greedy


async def test_full_text_begins_with_the_prompt(client: httpx.AsyncClient) -> None:
    (completion,) = await predict(client, "hello", seed=1, max_new_tokens=5)
    assert await predict(client, "hello", seed=1, max_new_tokens=5, return_full_text=True) == ["hello" + completion]


async def test_details_tell_counts_reason_seed_and_logprobs(client: httpx.AsyncClient) -> None:
    (told,) = await predict(client, "hello world", seed=9, max_new_tokens=5, ignore_eos=True, details=True, logprobs=2)
    (plain,) = await predict(client, "hello world", seed=9, max_new_tokens=5, ignore_eos=True)
    assert set(told) == {"text", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "dtype", "logprobs"}
    assert told["text"] == plain
    assert (told["finish_reason"], told["completion_tokens"], told["seed"]) == ("length", 5, 9)
    assert told["dtype"] == "float32"
    logprobs = told["logprobs"]
    assert set(logprobs) == {"token_ids", "tokens", "token_logprobs", "top_logprobs"}
    assert [len(column) for column in logprobs.values()] == [5, 5, 5, 5]
    for token_id, value, top in zip(
        logprobs["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert [set(each) for each in top] == [{"token_id", "token", "logprob"}] * 2
        assert top[0]["logprob"] >= top[1]["logprob"]
        assert value <= top[0]["logprob"]
        assert all(each["logprob"] == value for each in top if each["token_id"] == token_id)


async def test_details_without_logprobs_say_null(client: httpx.AsyncClient) -> None:
    (told,) = await predict(client, "hello", max_new_tokens=2, details=True)
    assert told["logprobs"] is None
    assert 0 <= told["seed"] < 2**64


async def test_several_samples_are_a_list_with_seeds_in_a_row(client: httpx.AsyncClient) -> None:
    (samples,) = await predict(client, "hello", n=3, seed=10, max_new_tokens=8, temperature=3, details=True)
    assert [each["seed"] for each in samples] == [10, 11, 12]
    for each in samples:
        (alone,) = await predict(client, "hello", seed=each["seed"], max_new_tokens=8, temperature=3)
        assert alone == each["text"]


async def test_aliases_mean_the_same(client: httpx.AsyncClient) -> None:
    named = await predict(client, "hello", n=2, max_new_tokens=3, seed=1)
    assert await predict(client, "hello", num_return_sequences=2, max_tokens=3, seed=1) == named


async def test_an_instance_overrides_the_parameters(client: httpx.AsyncClient) -> None:
    own = {"prompt": "hello", "max_tokens": 2, "details": True}
    plain, special = await predict(client, "hello", own, max_new_tokens=7, ignore_eos=True, seed=3)
    assert isinstance(plain, str)
    assert special["completion_tokens"] == 2
    assert plain.startswith(special["text"])


async def test_stop_string_ends_before_it(client: httpx.AsyncClient) -> None:
    (whole,) = await predict(client, "hello", seed=4, max_new_tokens=40, ignore_eos=True, temperature=2)
    stop = whole[7:10]
    (cut,) = await predict(
        client,
        "hello",
        seed=4,
        max_new_tokens=40,
        ignore_eos=True,
        temperature=2,
        stop=["\x01never", stop],
        details=True,
    )
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["completion_tokens"] < 40


async def test_a_stop_string_in_the_prompt_does_not_stop(client: httpx.AsyncClient) -> None:
    plain = await predict(client, "hello", seed=4, max_new_tokens=5, ignore_eos=True)
    assert await predict(client, "hello", seed=4, max_new_tokens=5, ignore_eos=True, stop="hello") == plain


async def test_bad_words_never_come(client: httpx.AsyncClient) -> None:
    asked = {"max_new_tokens": 60, "temperature": 3, "ignore_eos": True}
    with_them = await predict(client, *["hello"] * 8, **asked)
    assert any("e" in text or "an" in text for text in with_them)
    for text in await predict(client, *["hello"] * 8, bad_words=["e", "an"], **asked):
        assert "e" not in text
        assert "an" not in text


async def test_min_new_tokens_holds_off_the_end(client: httpx.AsyncClient) -> None:
    eager = {"logit_bias": {"0": 100}, "details": True, "max_new_tokens": 9}
    (ended,) = await predict(client, "hello", **eager)
    assert (ended["finish_reason"], ended["completion_tokens"], ended["text"]) == ("stop", 0, "")
    (held,) = await predict(client, "hello", min_new_tokens=4, **eager)
    assert (held["finish_reason"], held["completion_tokens"]) == ("stop", 4)


async def test_default_length_is_64_or_what_the_context_leaves(client: httpx.AsyncClient) -> None:
    (short,) = await predict(client, "hello", ignore_eos=True, details=True)
    assert short["completion_tokens"] == 64
    (long,) = await predict(client, "hello " * 80, ignore_eos=True, details=True)
    assert long["prompt_tokens"] + long["completion_tokens"] == 128


async def test_an_empty_prompt_begins_after_the_end_of_text(client: httpx.AsyncClient) -> None:
    empty, explicit = await predict(client, "", "<|endoftext|>", seed=3, max_new_tokens=5)
    assert empty == explicit


async def test_the_older_body_answers_prompt_and_text(client: httpx.AsyncClient) -> None:
    response = await client.post(PREDICT, json={"text": "hello world", "length": 12, "ignore_eos": True, "seed": 1})
    assert list(response.json()) == ["prediction"]
    text = response.json()["prediction"]
    assert text.startswith("hello world")
    told = await client.post(
        PREDICT, json={"text": "hello world", "length": 12, "ignore_eos": True, "seed": 1, "details": True}
    )
    details = told.json()["prediction"]
    assert details["text"] == text
    assert details["prompt_tokens"] + details["completion_tokens"] == 12


async def test_the_older_body_keeps_its_length_cap_and_default(client: httpx.AsyncClient) -> None:
    for body, total in (({"length": 9999}, 128), ({}, 64)):
        asked = {"text": "hello", "ignore_eos": True, "details": True} | body
        details = (await client.post(PREDICT, json=asked)).json()["prediction"]
        assert details["prompt_tokens"] + details["completion_tokens"] == total


async def test_answers_are_utf8_json_and_carry_a_request_id(client: httpx.AsyncClient) -> None:
    asked = {"instances": ["é😀"], "parameters": {"return_full_text": True, "max_new_tokens": 1}}
    response = await client.post(PREDICT, content=json.dumps(asked), headers={"x-request-id": "abc-1"})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == "abc-1"
    assert response.json()["predictions"][0].startswith("é😀")
    assert len((await client.get("/")).headers["x-request-id"]) == 32
    forged = await client.get("/", headers={"x-request-id": "a b"})
    assert forged.headers["x-request-id"] != "a b"


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/", {"status": "alive"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/tiny/ready", {"name": "tiny", "ready": True}),
    ],
)
async def test_probes_of_a_ready_server(client: httpx.AsyncClient, path: str, answer: dict[str, Any]) -> None:
    response = await client.get(path)
    assert (response.status_code, response.json()) == (200, answer)


async def test_a_model_that_has_failed_is_neither_live_nor_ready(
    client: httpx.AsyncClient, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor.language_model().backend._worker, "_failed", True)
    for path in ("/", "/v2/health/live", "/v2/health/ready", "/v1/models/tiny"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"]
    refused = await client.post(PREDICT, json={"instances": ["a"]})
    assert refused.status_code == 503


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (QueueFull("the queue is full"), 429, "queue"),
        (DeadlineExceeded("took too long"), 504, "too long"),
        (EngineFailed("the engine failed"), 500, "engine"),
        (RuntimeError("secret detail"), 500, "internal error"),
        (KeyError("secret detail"), 500, "internal error"),
    ],
)
async def test_the_error_map(
    client: httpx.AsyncClient,
    predictor: Any,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    status: int,
    text: str,
) -> None:
    async def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(predictor.language_model(), "generate", fail)
    response = await client.post(PREDICT, json={"instances": ["a"]})
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert text in response.json()["error"]
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) == (status in (429, 503))


async def test_a_fault_in_a_route_of_kserves_tells_nothing(
    client: httpx.AsyncClient, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(backend: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(predictor.language_model().backend), "load", property(fail))  # asked by the gauges
    response = await client.get("/metrics")
    assert response.status_code == 500
    assert response.json() == {"error": "internal error; the server's log has more"}


async def test_a_deadline_of_the_request_is_504_and_frees(client: httpx.AsyncClient, predictor: Any) -> None:
    asked = {
        "instances": ["a"] * 8,
        "parameters": {"max_new_tokens": 120, "ignore_eos": True, "n": 16, "timeout_s": 0.01},
    }
    response = await client.post(PREDICT, json=asked)
    assert response.status_code == 504
    assert "timeout_s" in response.json()["error"]
    for _ in range(500):
        if predictor.language_model().backend.load.used_slots == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("slots leaked")


async def test_metrics_count_and_hold_no_text(client: httpx.AsyncClient) -> None:
    await predict(client, "xyzzy secret prompt", max_new_tokens=3)
    text = (await client.get("/metrics")).text
    assert 'predictor_requests_running{model_name="tiny",revision=""} 0.0' in text
    assert 'predictor_requests_waiting{model_name="tiny",revision=""} 0.0' in text
    assert 'predictor_requests_total{code="200",model_name="tiny",revision=""}' in text
    assert "xyzzy" not in text


def sample(text: str, series: str) -> float:
    """The value of one series of a page of metrics."""
    (line,) = [line for line in text.splitlines() if line.startswith(series + " ")]
    return float(line.rsplit(" ", 1)[1])


async def test_the_metrics_of_a_rollout_are_there(client: httpx.AsyncClient) -> None:
    first = 'predictor_time_to_first_token_seconds_%s{model_name="tiny",revision=""}'
    between = 'predictor_inter_token_seconds_%s{model_name="tiny",revision=""}'
    before = (await client.get("/metrics")).text
    began = time.perf_counter()
    await predict(client, "a", "b", "c", max_new_tokens=40, ignore_eos=True)
    await predict(client, "a", max_new_tokens=1)  # no second token: nothing between
    took = time.perf_counter() - began
    after = (await client.get("/metrics")).text

    def grew(series: str) -> float:
        return sample(after, series) - sample(before, series)

    assert (grew(first % "count"), grew(between % "count")) == (4, 3)
    assert 0 < grew(between % "sum") < took
    assert 0 < grew(first % "sum") < 4 * took
    for code in CODES:  # a rate needs the zero before the first
        assert f'predictor_requests_total{{code="{code}",model_name="tiny",revision=""}}' in before


async def test_prompts_are_never_logged(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    await predict(client, "xyzzy secret prompt", max_new_tokens=3)
    await client.post(PREDICT, json={"instances": ["xyzzy secret prompt"], "parameters": {"top_p": 7}})
    await client.post(PREDICT, json={"text": "xyzzy secret prompt " * 100})
    assert caplog.records
    assert "xyzzy" not in caplog.text


async def test_a_stream_is_the_answer_in_pieces(client: httpx.AsyncClient) -> None:
    asked = {"seed": 5, "max_new_tokens": 12, "n": 2, "temperature": 2}
    whole = await predict(client, "hello", "the word", **asked)
    body = {"instances": ["hello", "the word"], "parameters": asked | {"stream": True}}
    async with client.stream("POST", PREDICT, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    texts: dict[tuple[int, int], str] = {}
    ended = []
    for event in (json.loads(line.removeprefix("data: ")) for line in lines):
        place = (event["index"], event["sample"])
        texts[place] = texts.get(place, "") + event["delta"]
        if "finish_reason" in event:
            ended.append((place, event["usage"]["completion_tokens"] <= 12))
    assert texts == {(row, sample): whole[row][sample] for row in range(2) for sample in range(2)}
    assert sorted(ended) == [((row, sample), True) for row in range(2) for sample in range(2)]


@pytest.mark.parametrize("path", ["/v2/", "/v1/jobs/", "/generate/", "/v2/models/tiny/"])
async def test_a_slash_too_many_is_no_route_and_leads_nowhere(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path, headers={"host": "elsewhere.example"})
    assert response.status_code == 404
    assert "location" not in response.headers
