"""huggingface-gpt: its two helpers' requests, every field with its default, and every refusal."""

from __future__ import annotations

import base64
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.older_bodies import by_v1, error_of
from tests.older_bodies import untouched as untouched  # a fixture

SAMPLED = {"temperature": 0.9, "top_k": 40, "seed": 11, "ignore_eos": True}


async def sentences(client: httpx.AsyncClient, text: Any = "hello world", **fields: Any) -> list[str]:
    body = {"text": {"plain": text} if isinstance(text, str) else text} | fields
    response = await client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    told = response.json()
    assert list(told) == ["model", "s_elapsed", "sentences"]
    assert all(list(each) == ["generated_text"] for each in told["sentences"])
    return [each["generated_text"] for each in told["sentences"]]


async def tokens_of(client: httpx.AsyncClient, prompt: str) -> int:
    details = await by_v1(client, prompt, max_new_tokens=1, details=True)
    return int(details["prompt_tokens"])


async def test_the_defaults_are_transformers_greedy_text_of_20_tokens_in_all(
    client: httpx.AsyncClient, checkpoint: Path, oracle: GPT2LMHeadModel
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    wanted = oracle.generate(ids, max_length=20, do_sample=False, pad_token_id=0)[0]
    assert len(wanted) == 20
    text = tokenizer.decode(wanted, clean_up_tokenization_spaces=False)
    (sentence,) = await sentences(client)
    # We leave out a character that the end cuts in two.
    assert sentence.rstrip("\ufffd") == text.rstrip("\ufffd")


async def test_the_answer_names_the_model_and_the_seconds(client: httpx.AsyncClient) -> None:
    told = (await client.post("/generate", json={"text": {"plain": "hello"}})).json()
    assert told["model"] == "tiny"
    assert re.fullmatch(r"\d+\.\d\d", told["s_elapsed"])
    assert float(told["s_elapsed"]) < 60


async def test_a_sampled_sentence_is_the_prompt_and_v1s_text(client: httpx.AsyncClient) -> None:
    length = await tokens_of(client, "hello world") + 12
    wanted = await by_v1(client, "hello world", max_new_tokens=12, top_p=0.9, **SAMPLED)
    asked = {"do_sample": True, "max_length": length, "top_p": 90} | SAMPLED
    assert await sentences(client, **asked) == ["hello world" + wanted]


async def test_sampling_defaults_to_temperature_1_and_top_k_50(client: httpx.AsyncClient) -> None:
    length = await tokens_of(client, "the") + 40
    wanted = await by_v1(client, "the", max_new_tokens=40, temperature=1.0, top_k=50, top_p=1.0, seed=3)
    assert await sentences(client, "the", do_sample=True, max_length=length, seed=3) == ["the" + wanted]
    assert wanted != await by_v1(client, "the", max_new_tokens=40, temperature=0.7, top_k=50, seed=3)
    assert wanted != await by_v1(client, "the", max_new_tokens=40, temperature=1.0, top_k=0, seed=3)


@pytest.mark.parametrize(("top_p", "share"), [(0.9, 0.9), (90, 0.9), (100, 1.0), (1, 1.0), (1.0, 1.0), (2, 0.02)])
async def test_top_p_is_a_share_up_to_1_and_per_cent_above(
    client: httpx.AsyncClient, top_p: float, share: float
) -> None:
    asked = {"temperature": 2.0, "seed": 5, "ignore_eos": True}
    wanted = await by_v1(client, "the", max_new_tokens=19, top_p=share, **asked)
    length = await tokens_of(client, "the") + 19
    assert await sentences(client, "the", do_sample=True, max_length=length, top_p=top_p, **asked) == ["the" + wanted]


async def test_several_sequences_are_seeds_in_a_row(client: httpx.AsyncClient) -> None:
    told = await sentences(client, do_sample=True, temperature=2.0, seed=4, max_length=25, num_return_sequences=3)
    alone = [await sentences(client, do_sample=True, temperature=2.0, seed=seed, max_length=25) for seed in (4, 5, 6)]
    assert told == [text for (text,) in alone]
    assert len(set(told)) == 3


async def test_base64_and_plain_text_are_the_same(client: httpx.AsyncClient) -> None:
    text = "for i in {0..9}\ndo\n\té"
    encoded = base64.b64encode(text.encode()).decode()
    wanted = await sentences(client, text, max_length=40)
    assert wanted[0].startswith(text)
    assert await sentences(client, {"in_64": encoded}, max_length=40) == wanted
    assert await sentences(client, {"in_64": encoded[:8] + "\n" + encoded[8:] + "\r\n"}, max_length=40) == wanted


def base64_tool(text: str) -> str:
    return subprocess.run(["base64", "-"], input=text, capture_output=True, text=True, check=True).stdout


async def test_what_the_base64_tool_writes_is_read(client: httpx.AsyncClient) -> None:
    lines = "hello world the banana " * 4  # more than one line of the tool's 76 characters
    encoded = base64_tool(lines)
    assert encoded.count("\n") == 2
    assert (await sentences(client, {"in_64": encoded}, max_length=100))[0].startswith(lines)


async def test_curls_form_content_type_is_read_as_json(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = await client.post("/generate", content=b'{"text": {"plain": "hello"}}', headers=headers)
    assert response.status_code == 200


async def test_a_length_past_the_context_is_cut_to_it(client: httpx.AsyncClient) -> None:
    longest = await sentences(client, "hello", max_length=128, ignore_eos=True)
    assert await sentences(client, "hello", max_length=10**30, ignore_eos=True) == longest


async def test_our_parameters_that_choose_tokens_go_along(client: httpx.AsyncClient) -> None:
    ours = {"repetition_penalty": 1.5, "logit_bias": {"5": 4}, "bad_words": ["e"], "stop": ["b"], "seed": 9}
    wanted = await by_v1(client, "the", max_new_tokens=20, temperature=1, **ours)
    length = await tokens_of(client, "the") + 20
    assert await sentences(client, "the", do_sample=True, max_length=length, **ours) == ["the" + wanted]


PLAIN = {"plain": "hello"}
# fields, what the refusal names
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "lacks text"),
    ({"text": "hello"}, "text"),
    ({"text": None}, "text"),
    ({"text": 5}, "text"),
    ({"text": ["hello"]}, "text"),
    ({"text": {}}, "text"),
    ({"text": {"plain": "a", "in_64": "YQ=="}}, "text"),
    ({"text": {"utf8": "a"}}, "text"),
    ({"text": {"plain": 5}}, "text.plain"),
    ({"text": {"plain": None}}, "text.plain"),
    ({"text": {"in_64": 5}}, "text.in_64"),
    ({"text": {"plain": "hello " * 200}}, "text"),
    ({"text": PLAIN, "do_sample": 1}, "do_sample"),
    ({"text": PLAIN, "do_sample": "true"}, "do_sample"),
    ({"text": PLAIN, "do_sample": None}, "do_sample"),
    ({"text": PLAIN, "top_p": 0}, "top_p"),
    ({"text": PLAIN, "top_p": 0.0}, "top_p"),
    ({"text": PLAIN, "top_p": -1}, "top_p"),
    ({"text": PLAIN, "top_p": 1.5}, "top_p"),
    ({"text": PLAIN, "top_p": 90.0}, "top_p"),
    ({"text": PLAIN, "top_p": 101}, "top_p"),
    ({"text": PLAIN, "top_p": 10**40}, "top_p"),
    ({"text": PLAIN, "top_p": "90"}, "top_p"),
    ({"text": PLAIN, "top_p": True}, "top_p"),
    ({"text": PLAIN, "top_p": None}, "top_p"),
    ({"text": PLAIN, "top_k": -1}, "top_k"),
    ({"text": PLAIN, "top_k": 5.0}, "top_k"),
    ({"text": PLAIN, "top_k": 100_000}, "top_k"),
    ({"text": PLAIN, "temperature": -0.1}, "temperature"),
    ({"text": PLAIN, "temperature": 101}, "temperature"),
    ({"text": PLAIN, "temperature": "1"}, "temperature"),
    ({"text": PLAIN, "max_length": 0}, "max_length"),
    ({"text": PLAIN, "max_length": -1}, "max_length"),
    ({"text": PLAIN, "max_length": 20.0}, "max_length"),
    ({"text": PLAIN, "max_length": "20"}, "max_length"),
    ({"text": PLAIN, "max_length": True}, "max_length"),
    ({"text": PLAIN, "max_length": None}, "max_length"),
    ({"text": {"plain": "hello the word"}, "max_length": 2}, "max_length is the total with the prompt"),
    ({"text": PLAIN, "num_return_sequences": 0}, "num_return_sequences"),
    ({"text": PLAIN, "num_return_sequences": 17, "do_sample": True}, "num_return_sequences"),
    ({"text": PLAIN, "num_return_sequences": "2", "do_sample": True}, "num_return_sequences"),
    # As transformers: greedy sentences would all be the same.
    ({"text": PLAIN, "num_return_sequences": 2}, "num_return_sequences"),
    ({"text": PLAIN, "num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
    ({"text": PLAIN, "seed": -1}, "seed"),
    ({"text": PLAIN, "seed": 2**64}, "seed"),
    # what the body has another name for, or no place
    ({"text": PLAIN, "n": 2}, "n"),
    ({"text": PLAIN, "max_new_tokens": 5}, "max_new_tokens"),
    ({"text": PLAIN, "max_tokens": 5}, "max_tokens"),
    ({"text": PLAIN, "max_len": 5}, "max_len"),
    ({"text": PLAIN, "return_full_text": False}, "return_full_text"),
    ({"text": PLAIN, "details": True}, "details"),
    ({"text": PLAIN, "logprobs": 1}, "logprobs"),
    ({"text": PLAIN, "stream": True}, "stream"),
    ({"text": PLAIN, "model": "gpt2"}, "model"),
]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("body", "name"), REFUSED, ids=lambda value: str(value)[:50])
async def test_a_wrong_body_is_refused_by_the_fields_name(
    client: httpx.AsyncClient, body: dict[str, Any], name: str
) -> None:
    message = error_of(await client.post("/generate", json=body))
    assert name in message
    assert len(message) < 250


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("encoded", ["!", "a", "aGVsbG8", "aGVsbG8=x", "YQ==YQ==", "aGVs-G8=", "é", "/w==", "7aCA"])
async def test_bad_base64_is_a_422(client: httpx.AsyncClient, encoded: str) -> None:
    message = error_of(await client.post("/generate", json={"text": {"in_64": encoded}}), 422)
    assert message.startswith("text.in_64 is not ")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("body", [b"", b"[]", b'"text"', b"null", b"5", b"{"])
async def test_a_body_that_is_no_object_is_refused(client: httpx.AsyncClient, body: bytes) -> None:
    error_of(await client.post("/generate", content=body))
