"""The nanoGPT service's completions: every argument with its default, every refusal, and what was broken there."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import GPT2LMHeadModel

from predictor.protocols.nanogpt import parse
from predictor.protocols.wire import Limits
from tests.conftest import byte_tokenizer
from tests.older_bodies import by_v1
from tests.older_bodies import untouched as untouched  # a fixture

CONTEXT = 128  # of the tiny model
LIMITS = Limits(max_instances=8, max_timeout_s=60)
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 11, "ignore_eos": True}


async def completed(client: httpx.AsyncClient, **arguments: Any) -> Any:
    """The answer to arguments in the query string, which has texts only."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in arguments.items()}
    response = await client.post("/completions", params=texts)
    assert response.status_code == 200, response.text
    return response.json()


async def text_of(client: httpx.AsyncClient, **arguments: Any) -> str:
    (choice,) = (await completed(client, **arguments))["choices"]
    return str(choice["text"])


def error_of(response: httpx.Response, status: int = 400) -> Any:
    """OpenAI's error, which names the field in `param`."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(word in error["message"] for word in ("Traceback", "predictor.", "pydantic"))
    return error


async def test_the_query_says_the_same_as_v1_and_as_a_body(client: httpx.AsyncClient) -> None:
    wanted = await by_v1(client, "hello world", max_new_tokens=12, **SAMPLED)
    fields = {"model": "tiny", "prompt": "hello world", "max_tokens": 12} | SAMPLED
    assert await text_of(client, **fields) == wanted
    response = await client.post("/completions", json=fields)
    assert response.json()["choices"][0]["text"] == wanted


async def test_the_answer_is_openais_object(client: httpx.AsyncClient) -> None:
    answer = await completed(client, prompt="hello", max_tokens=4, seed=1, ignore_eos=True, n=2)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    prompt = (await by_v1(client, "hello", max_new_tokens=1, details=True))["prompt_tokens"]
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}


async def test_openais_client_reads_it(client: httpx.AsyncClient) -> None:
    # Only its address differs from OpenAI's: there is no /v1.
    sdk = openai.AsyncOpenAI(base_url="http://test", api_key="none", http_client=client, max_retries=0)
    answer = await sdk.completions.create(model="tiny", prompt="hello", max_tokens=3, seed=1, logprobs=2)
    assert answer.choices[0].text == await text_of(client, prompt="hello", max_tokens=3, seed=1)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 3
    with pytest.raises(openai.NotFoundError):
        await sdk.completions.create(model="gpt2", prompt="hello")


async def test_the_defaults_are_500_tokens_at_08_with_top_k_200(client: httpx.AsyncClient) -> None:
    details = await by_v1(client, "hello", max_new_tokens=1, details=True)
    room = CONTEXT - details["prompt_tokens"]
    asked = {"seed": 3, "ignore_eos": True}
    wanted = await by_v1(client, "hello", max_new_tokens=room, temperature=0.8, top_k=200, **asked)
    assert await text_of(client, prompt="hello", **asked) == wanted
    slid = await by_v1(
        client, "hello", max_new_tokens=500, temperature=0.8, top_k=200, context_overflow="slide", **asked
    )
    assert await text_of(client, prompt="hello", context_overflow="slide", **asked) == slid
    # The model's random logits are far apart: a higher temperature tells the values of top_k apart.
    hot = {"prompt": "hello", "temperature": 2, "max_tokens": 100} | asked
    by_top_k = [await text_of(client, **hot, **top_k) for top_k in ({}, {"top_k": 200}, {"top_k": 3}, {"top_k": 0})]
    assert by_top_k[0] == by_top_k[1] != by_top_k[2]


def test_the_default_top_k_is_cut_to_a_small_vocabulary(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # nanoGPT's own checkpoints may know 65 characters.
    model = predictor.language_model()
    (request,) = parse({"prompt": "a"}, LIMITS, "tiny").requests
    assert model.preparer.prepare(request).params.top_k == 200
    monkeypatch.setattr(model.backend, "vocabulary", 65)
    assert model.preparer.prepare(request).params.top_k == 65


async def test_only_the_default_of_500_tokens_is_cut_to_the_context(client: httpx.AsyncClient, untouched: None) -> None:
    error = error_of(await client.post("/completions?prompt=hello&max_tokens=500"))
    assert error["param"] == "max_tokens"


async def test_stop_is_a_list_separated_by_commas(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "hello", "seed": 4, "max_tokens": 40, "temperature": 2, "ignore_eos": True}
    whole = await text_of(client, **asked)
    stop = whole[7:10]
    assert "," not in stop
    cut = await completed(client, **asked, stop=f"\x01never,{stop}")
    assert cut["choices"][0]["text"] == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    for stops in (f"\x01never,{stop}", ["\x01never", stop]):
        response = await client.post("/completions", json=asked | {"stop": stops})
        assert response.json()["choices"][0]["text"] == whole[: whole.index(stop)]


async def test_a_stop_string_in_the_prompt_does_not_stop(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "hello", "seed": 4, "max_tokens": 5}
    assert await text_of(client, **asked, stop="hello") == await text_of(client, **asked)


async def test_logprobs_are_those_of_transformers(client: httpx.AsyncClient, oracle: GPT2LMHeadModel) -> None:
    answer = await completed(client, prompt="hello world", max_tokens=3, temperature=0, logprobs=5, ignore_eos=True)
    logprobs = answer["choices"][0]["logprobs"]
    ids = byte_tokenizer()("hello world", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = oracle(ids).logits[0, -1].double().log_softmax(-1).max()
    assert logprobs["token_logprobs"][0] == pytest.approx(float(wanted), abs=1e-3)
    for likeliest in logprobs["top_logprobs"]:
        assert sum(math.exp(value) for value in likeliest.values()) <= 1 + 1e-6
        assert max(likeliest.values()) <= 0


async def test_logit_bias_is_added_before_the_softmax(client: httpx.AsyncClient) -> None:
    # Bias on the token that greedy takes: it must go, and the others keep their order.
    asked = {"prompt": "hello", "max_tokens": 1, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    first = (await completed(client, **asked))["choices"][0]["logprobs"]
    second = sorted(first["top_logprobs"][0], key=lambda token: first["top_logprobs"][0][token])[0]
    greedy = await by_v1(client, "hello", max_new_tokens=1, temperature=0, details=True, logprobs=0, ignore_eos=True)
    (token_id,) = greedy["logprobs"]["token_ids"]
    for bias in ({str(token_id): -100}, json.dumps({str(token_id): -100})):
        assert (await completed(client, **asked, logit_bias=bias))["choices"][0]["logprobs"]["tokens"] == [second]
        response = await client.post("/completions", json=asked | {"logit_bias": bias})
        assert response.json()["choices"][0]["logprobs"]["tokens"] == [second]


async def test_a_file_prompt_is_text(client: httpx.AsyncClient, tmp_path: Any) -> None:
    (tmp_path / "secret").write_text("hello")
    prompt = f"FILE:{tmp_path}/secret"
    answer = await completed(client, prompt=prompt, max_tokens=3, seed=1)
    details = await by_v1(client, prompt, max_new_tokens=3, seed=1, temperature=0.8, top_k=200, details=True)
    assert answer["choices"][0]["text"] == details["text"]
    assert answer["usage"]["prompt_tokens"] == details["prompt_tokens"]


@pytest.mark.parametrize("model", ["gpt2", "../../etc", "out-shakespeare/ckpt.pt", "", "5"])
async def test_an_unknown_model_is_a_404_and_no_path(client: httpx.AsyncClient, untouched: None, model: str) -> None:
    error = error_of(await client.post("/completions", params={"model": model, "prompt": "hello"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_the_user_is_told_to_whoever_admits_requests() -> None:
    assert parse({"prompt": "a", "user": "42"}, LIMITS, "tiny").user == "42"
    assert parse({"prompt": "a"}, LIMITS, "tiny").user is None


async def test_texts_that_look_like_numbers_stay_texts(client: httpx.AsyncClient) -> None:
    for prompt in ("12", "true", "0.5"):
        answer = await completed(client, prompt=prompt, max_tokens=3, user="7", stop="0", model="tiny")
        assert answer["usage"]["prompt_tokens"] == len(byte_tokenizer()(prompt).input_ids)
    answer = await completed(client, prompt="[1, 2]", max_tokens=3, seed=1)
    assert answer["usage"]["prompt_tokens"] == len(byte_tokenizer()("[1, 2]").input_ids)


async def test_it_streams_where_asked(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "hello", "max_tokens": "5", "seed": "1", "stream": "true"}
    response = await client.post("/completions", params=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert last == "[DONE]"
    streamed = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
    assert streamed == await text_of(client, prompt="hello", max_tokens=5, seed=1)


# query, the field it blames
REFUSED: list[tuple[str, str | None]] = [
    ("max_tokens=5", "prompt"),
    ("prompt=a&max_tokens=0", "max_tokens"),
    ("prompt=a&max_tokens=-1", "max_tokens"),
    ("prompt=a&max_tokens=2.5", "max_tokens"),
    ("prompt=a&max_tokens=many", "max_tokens"),
    ("prompt=a&max_tokens=", "max_tokens"),
    ("prompt=a&temperature=-1", "temperature"),
    ("prompt=a&temperature=2.1", "temperature"),
    ("prompt=a&temperature=nan", "temperature"),
    ("prompt=a&temperature=1e999", "temperature"),
    ("prompt=a&n=0", "n"),
    ("prompt=a&n=17", "n"),
    ("prompt=a&n=two", "n"),
    ("prompt=a&stop=", "stop"),
    ("prompt=a&stop=a,,b", "stop"),
    ("prompt=a&stop=" + ",".join("abcdefghijklmnopq"), "stop"),
    ("prompt=a&logprobs=6", "logprobs"),
    ("prompt=a&logprobs=-1", "logprobs"),
    ("prompt=a&logprobs=true", "logprobs"),
    ("prompt=a&logit_bias={", "logit_bias"),
    ("prompt=a&logit_bias=5", "logit_bias"),
    ('prompt=a&logit_bias={"a":1}', "logit_bias"),
    ('prompt=a&logit_bias={"1":101}', "logit_bias"),
    ('prompt=a&logit_bias={"100000":1}', "logit_bias"),
    ("prompt=a&user=" + "x" * 257, "user"),
    ("prompt=a&top_k=-1", "top_k"),
    ("prompt=a&top_k=100000", "top_k"),
    ("prompt=a&top_p=0", "top_p"),
    ("prompt=a&seed=-1", "seed"),
    ("prompt=a&suffix=b", "suffix"),
    ("prompt=a&max_new_tokens=5", "max_new_tokens"),
    ("prompt=a&colour=red", "colour"),
    ("prompt=a&prompt=b", "prompt"),
    ("prompt=%ff", None),
    ("prompt=" + "hello%20" * 200, "prompt"),
]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("query", "param"), REFUSED, ids=lambda value: str(value)[:40])
async def test_a_wrong_argument_is_refused_by_its_name(
    client: httpx.AsyncClient, query: str, param: str | None
) -> None:
    assert error_of(await client.post(f"/completions?{query}"))["param"] == param


@pytest.mark.usefixtures("untouched")
async def test_arguments_stand_in_one_place(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/completions?prompt=a", json={"max_tokens": 3}))
    assert "not in both" in error["message"]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"null", b"{"])
async def test_a_body_that_is_no_object_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    error_of(await client.post("/completions", content=body))
