"""gpt-2-cloud-run: its clients' requests, every field with its default, and every refusal."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.older_bodies import by_v1, error_of
from tests.older_bodies import untouched as untouched  # a fixture

CONTEXT = 128  # of the tiny model
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 11, "ignore_eos": True}


async def told(client: httpx.AsyncClient, **body: Any) -> str:
    response = await client.post("/", json=body)
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["text"]
    return str(response.json()["text"])


async def test_the_readmes_get(client: httpx.AsyncClient) -> None:
    response = await client.get("/?length=10&temperature=1.0")
    assert response.status_code == 200
    assert list(response.json()) == ["text"]


async def test_the_readmes_post(client: httpx.AsyncClient) -> None:
    response = await client.post("/", json={"length": 10, "temperature": 1.0})
    assert response.status_code == 200
    assert list(response.json()) == ["text"]


async def test_a_query_and_a_body_say_the_same_as_v1(client: httpx.AsyncClient) -> None:
    fields = SAMPLED | {"prefix": "hello world", "length": 12}
    wanted = "hello world" + await by_v1(client, "hello world", max_new_tokens=12, **SAMPLED)
    assert await told(client, **fields) == wanted
    assert (await client.get("/", params={key: str(value) for key, value in fields.items()})).json()["text"] == wanted


async def test_a_body_may_hold_strings_as_its_page_sent_them(client: httpx.AsyncClient) -> None:
    fields = SAMPLED | {"prefix": "hello", "length": 7, "include_prefix": False}
    assert await told(client, **{key: str(value) for key, value in fields.items()}) == await told(client, **fields)


async def test_defaults_are_sampling_at_07_with_top_k_and_top_p_off(client: httpx.AsyncClient) -> None:
    wanted = await by_v1(client, "the", temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=30, seed=3)
    assert await told(client, prefix="the", length=30, seed=3) == "the" + wanted
    assert await told(client, prefix="the", length=30, seed=3, top_p=0, top_k=0) == "the" + wanted
    assert await told(client, prefix="the", length="30", seed=3, top_p="0.0", top_k="0") == "the" + wanted
    # 0.7 and top_k 50 are V1's: the comparison would see another top_k.
    narrow = await by_v1(client, "the", temperature=0.7, top_k=1, max_new_tokens=30, seed=3)
    assert narrow != wanted


async def test_the_length_is_cut_to_what_the_context_leaves(client: httpx.AsyncClient) -> None:
    details = await by_v1(client, "hello", max_new_tokens=1, details=True)
    room = CONTEXT - details["prompt_tokens"]
    wanted = "hello" + await by_v1(client, "hello", max_new_tokens=room, top_k=0, seed=1, ignore_eos=True)
    for length in ({}, {"length": 1_023}, {"length": room + 1}, {"length": 10**30}):
        assert await told(client, prefix="hello", seed=1, ignore_eos=True, **length) == wanted
    shorter = await told(client, prefix="hello", seed=1, ignore_eos=True, length=room - 1)
    assert wanted.startswith(shorter)
    assert len(shorter) < len(wanted)


async def test_a_text_may_slide_past_the_context(client: httpx.AsyncClient) -> None:
    asked = {"seed": 1, "ignore_eos": True, "context_overflow": "slide"}
    wanted = await by_v1(client, "hello", max_new_tokens=150, top_k=0, **asked)
    assert await told(client, prefix="hello", length=150, **asked) == "hello" + wanted


async def test_without_a_prefix_a_text_begins_after_the_end_token(client: httpx.AsyncClient) -> None:
    wanted = await by_v1(client, "", max_new_tokens=9, top_k=0, seed=5)
    assert await told(client, length=9, seed=5) == wanted
    assert await told(client, prefix="", length=9, seed=5) == wanted


async def test_a_prefix_is_cut_at_500_characters(client: httpx.AsyncClient) -> None:
    # 500 characters are no more tokens than the window of a slide holds.
    asked = {"length": 3, "seed": 1, "context_overflow": "slide"}
    prefix = "the " * 125
    assert len(prefix) == 500
    text = await told(client, prefix=prefix + "and what comes after", **asked)
    assert text == await told(client, prefix=prefix, **asked)
    assert text.startswith(prefix)
    assert not text.startswith(prefix + "and")


@pytest.mark.parametrize("off", ["false", "False", "FALSE", False])
async def test_the_prefix_can_be_left_out(client: httpx.AsyncClient, off: Any) -> None:
    whole = await told(client, prefix="hello", length=5, seed=2)
    assert whole.startswith("hello")
    assert "hello" + await told(client, prefix="hello", length=5, seed=2, include_prefix=off) == whole
    for on in ("true", "True", True):
        assert await told(client, prefix="hello", length=5, seed=2, include_prefix=on) == whole


async def test_the_text_is_cut_at_truncate(client: httpx.AsyncClient) -> None:
    asked = {"prefix": "hello", "length": 40, "seed": 4, "temperature": 2, "ignore_eos": True}
    whole = (await told(client, **asked)).removeprefix("hello")
    truncate = whole[7:10]
    cut = whole[: whole.index(truncate)]
    assert await told(client, **asked, truncate=truncate) == "hello" + cut
    assert await told(client, **asked, truncate=truncate, include_prefix=False) == cut
    assert await told(client, **asked, truncate="\x01never") == "hello" + whole


async def test_truncate_is_not_looked_for_in_the_prefix(client: httpx.AsyncClient) -> None:
    asked = {"prefix": "hello", "length": 5, "seed": 4}
    assert await told(client, **asked, truncate="hell") == await told(client, **asked)


@pytest.mark.parametrize("nothing", ["", None])
async def test_an_empty_truncate_cuts_nothing(client: httpx.AsyncClient, nothing: str | None) -> None:
    asked = {"prefix": "hello", "length": 5, "seed": 4}
    assert await told(client, **asked, truncate=nothing) == await told(client, **asked)


async def test_texts_that_look_like_numbers_stay_texts(client: httpx.AsyncClient) -> None:
    assert (await told(client, prefix="12", length=3, seed=1)).startswith("12")
    assert (await told(client, prefix="true", length=3, seed=1, truncate="7")).startswith("true")
    assert (await client.get("/", params={"prefix": "[1]", "length": 3})).json()["text"].startswith("[1]")


async def test_our_parameters_that_choose_tokens_go_along(client: httpx.AsyncClient) -> None:
    ours = {"repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": -1, "seed": 9, "do_sample": True}
    wanted = await by_v1(client, "the", max_new_tokens=20, top_k=0, logit_bias={"5": 4}, bad_words=["e"], **ours)
    assert await told(client, prefix="the", length=20, logit_bias={"5": 4}, bad_words=["e"], **ours) == "the" + wanted
    query = {key: str(value) for key, value in ours.items()} | {"logit_bias": '{"5": 4}', "bad_words": '["e"]'}
    response = await client.get("/", params=query | {"prefix": "the", "length": "20"})
    assert response.json()["text"] == "the" + wanted


async def test_head_answers_at_once(client: httpx.AsyncClient, untouched: None) -> None:
    response = await client.head("/")
    assert response.status_code == 200
    assert response.headers["content-length"] == str(len('{"text":""}'))
    assert response.headers["content-type"] == "application/json"


async def test_pages_of_other_origins_may_read_texts_and_no_errors(client: httpx.AsyncClient) -> None:
    header = "access-control-allow-origin"
    for answer in (await client.get("/?length=3"), await client.post("/", json={"length": 3}), await client.head("/")):
        assert answer.status_code == 200
        assert answer.headers[header] == "*"
    for answer in (await client.get("/?length=0"), await client.post("/", json={"length": 0}), await client.get("/")):
        assert header not in answer.headers


@pytest.mark.parametrize("query", ["", "?", "?utm_source=x", "?unknown=length", "?lenght=5"])
async def test_a_get_without_its_fields_is_kserves_liveness(
    client: httpx.AsyncClient, untouched: None, query: str
) -> None:
    response = await client.get("/" + query)
    assert (response.status_code, response.json()) == (200, {"status": "alive"})


@pytest.mark.parametrize("query", ["length=3", "temperature=1", "top_k=0", "top_p=0", "prefix=", "truncate=", "seed=1"])
async def test_a_get_with_any_of_its_fields_is_its_own(client: httpx.AsyncClient, untouched: None, query: str) -> None:
    assert "unknown field" in error_of(await client.get(f"/?{query}&other=1"))


# fields, what the refusal names
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"length": 0}, "length"),
    ({"length": -1}, "length"),
    ({"length": 2.5}, "length"),
    ({"length": "2.5"}, "length"),
    ({"length": "ten"}, "length"),
    ({"length": ""}, "length"),
    ({"length": True}, "length"),
    ({"length": None}, "length"),
    ({"length": "1e400"}, "length"),
    ({"length": [5]}, "length"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "101"}, "temperature"),
    ({"temperature": "nan"}, "temperature"),
    ({"temperature": "inf"}, "temperature"),
    ({"temperature": "1_0"}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": None}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": "x"}, "top_k"),
    ({"top_k": 100_000}, "top_k"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": "90%"}, "top_p"),
    ({"top_p": False}, "top_p"),
    ({"top_p": None}, "top_p"),
    ({"prefix": 5}, "prefix"),
    ({"prefix": None}, "prefix"),
    ({"prefix": ["a"]}, "prefix"),
    ({"prefix": "x y z " * 80}, "prefix"),
    ({"truncate": 5}, "truncate"),
    ({"truncate": ["a"]}, "truncate"),
    ({"truncate": "x" * 257}, "truncate"),
    ({"include_prefix": "yes"}, "include_prefix"),
    ({"include_prefix": 1}, "include_prefix"),
    ({"include_prefix": None}, "include_prefix"),
    ({"seed": -1}, "seed"),
    ({"seed": "1.0"}, "seed"),
    ({"logit_bias": "{"}, "logit_bias"),
    ({"logit_bias": "[" * 50_000}, "logit_bias"),
    ({"bad_words": "word"}, "bad_words"),
    ({"timeout_s": 61}, "timeout_s"),
    # what the body has another name for, or no place
    ({"max_new_tokens": 5}, "max_new_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"min_new_tokens": 5}, "min_new_tokens"),
    ({"stop": "x"}, "stop"),
    ({"n": 2}, "n"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
    ({"return_full_text": True}, "return_full_text"),
    ({"details": True}, "details"),
    ({"logprobs": 1}, "logprobs"),
    ({"stream": True}, "stream"),
    ({"lenght": 5}, "lenght"),
    ({"model": "tiny"}, "model"),
]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("fields", "name"), REFUSED, ids=lambda value: str(value)[:40])
async def test_a_wrong_body_is_refused_by_the_fields_name(
    client: httpx.AsyncClient, fields: dict[str, Any], name: str
) -> None:
    message = error_of(await client.post("/", json=fields))
    assert name in message
    assert len(message) < 250


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("query", "name"),
    [(f"length=3&{name}={value}", name) for fields, name in REFUSED for value in fields.values() if type(value) is str
     and name not in ("length", "prefix") and len(value) < 1_000]
    + [
        ("length=0", "length"),
        ("length=", "length"),
        ("length=3&length=4", "twice"),
        ("prefix=%ff", "UTF-8"),
        ("prefix=%C3%28", "UTF-8"),
        ("length=3&" + "&".join(f"a{i}=1" for i in range(200)), "100"),
        ("length=3&lenght=3", "lenght"),
        ("length=3&" + "x" * 300, "unknown field"),
    ],
)  # fmt: skip
async def test_a_wrong_query_is_refused_by_the_fields_name(client: httpx.AsyncClient, query: str, name: str) -> None:
    assert name in error_of(await client.get(f"/?{query}"))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"null", b"5", b"{", b'{"length": 5, "length": 6}'])
async def test_a_body_that_is_no_object_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    error_of(await client.post("/", content=body))


async def test_a_get_has_no_body(client: httpx.AsyncClient, untouched: None) -> None:
    assert "no body" in error_of(await client.request("GET", "/?length=3", content=b'{"length": 4}'))


async def test_arguments_in_the_body_and_in_the_query_are_refused(client: httpx.AsyncClient) -> None:
    response = await client.post("/?length=9", json={"prefix": "a", "length": 2})
    assert response.status_code == 400
    assert "query string" in response.json()["error"]
