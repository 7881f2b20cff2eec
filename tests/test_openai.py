"""OpenAI's completions as its own client sees them, against a real process; what is generated is held to V1's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types import Completion
from openai.types.completion_choice import Logprobs
from transformers import GPT2LMHeadModel

from tests.conftest import byte_tokenizer
from tests.processes import ServerProcess, serving

END = "<|endoftext|>"  # id 0
BANANA = byte_tokenizer().convert_tokens_to_ids("Ġbanana")  # " banana"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("openai")
    with serving(folder / "log", "--model", f"tiny={checkpoint}", "--jobs", f"sqlite:///{folder}/jobs") as opened:
        opened.wait_until_ready("tiny")
        yield opened


def client_of(server: ServerProcess, prefix: str = "/v1") -> OpenAI:
    return OpenAI(base_url=server.url + prefix, api_key="none", max_retries=0)


@pytest.fixture
def openai(server: ServerProcess) -> Iterator[OpenAI]:
    with client_of(server) as opened:
        yield opened


def complete(openai: OpenAI, prompt: Any, **fields: Any) -> Completion:
    return openai.completions.create(model="tiny", prompt=prompt, **fields)


def texts(answer: Completion) -> list[str]:
    return [choice.text for choice in answer.choices]


def logprobs(answer: Completion, choice: int = 0) -> Logprobs:
    told = answer.choices[choice].logprobs
    assert told is not None
    return told


def read(token: str) -> str:
    """A token of `logprobs` as a person reads it, parts of characters too."""
    if not token.startswith("bytes:"):
        return token
    return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")).decode(errors="replace")


def predict(server: ServerProcess, prompt: str, **parameters: Any) -> Any:
    """V1's prediction, OpenAI's defaults where `parameters` do not say otherwise."""
    asked = {"max_new_tokens": 16, "temperature": 1, "top_k": 0} | parameters
    answer = server.predict("tiny", {"instances": [prompt], "parameters": asked})
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"][0]


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_a_client_of_either_address_completes_and_lists_models(server: ServerProcess, prefix: str) -> None:
    with client_of(server, prefix) as openai:
        answer = complete(openai, "hello", seed=3)
        assert texts(answer) == [predict(server, "hello", seed=3)]
        listed = openai.models.list()
        assert (listed.object, [model.id for model in listed.data]) == ("list", ["tiny"])
        model = openai.models.retrieve("tiny")
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "predictor")
    assert 1.7e9 < model.created <= answer.created


def test_the_answer_has_every_field(openai: OpenAI) -> None:
    answer = complete(openai, "hello", max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model, answer.system_fingerprint) == ("text_completion", "tiny", "float32")
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
    }
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert complete(openai, "hello", max_tokens=5).id != answer.id


# OpenAI's field, and V1's where it is called otherwise.
@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"max_tokens": 40}, {"max_new_tokens": 40}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 2}, {"temperature": 2}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"presence_penalty": 2, "frequency_penalty": -1.5}, {"presence_penalty": 2, "frequency_penalty": -1.5}),
        ({"logit_bias": {"40": 4, "50": -100}}, {"logit_bias": {"40": 4, "50": -100}}),
        ({"stop": ["\x01", "T"]}, {"stop": ["\x01", "T"]}),
        ({"extra_body": {"top_k": 3}}, {"top_k": 3}),
        ({"extra_body": {"repetition_penalty": 3, "ignore_eos": True}}, {"repetition_penalty": 3, "ignore_eos": True}),
        ({"extra_body": {"min_new_tokens": 9, "bad_words": ["e"]}}, {"min_new_tokens": 9, "bad_words": ["e"]}),
        ({"extra_body": {"do_sample": False}}, {"do_sample": False}),
        (
            {"max_tokens": 140, "extra_body": {"context_overflow": "slide"}},
            {"max_new_tokens": 140, "context_overflow": "slide"},
        ),
    ],
    ids=lambda fields: " ".join(fields),
)
def test_a_field_does_what_it_does_in_v1(
    server: ServerProcess, openai: OpenAI, fields: dict[str, Any], parameters: dict[str, Any]
) -> None:
    assert texts(complete(openai, "hello", seed=11, **fields)) == [predict(server, "hello", seed=11, **parameters)]


def test_null_is_the_default(server: ServerProcess, openai: OpenAI) -> None:
    names = (
        "best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty stop stream stream_options"
    )
    absent = dict.fromkeys((*names.split(), "suffix", "temperature", "top_p", "user"))
    assert texts(complete(openai, "hello", seed=11, **absent)) == [predict(server, "hello", seed=11)]


def test_the_same_seed_gives_the_same_text_and_another_another(openai: OpenAI) -> None:
    first, again, other, none = (
        texts(complete(openai, "hello", seed=seed, max_tokens=30, user="me")) for seed in (5, 5, 6, None)
    )
    assert first == again
    assert len({str(first), str(other), str(none)}) == 3


def test_prompts_are_texts_or_token_ids(openai: OpenAI) -> None:
    prompts = ["hello world", "the word"]
    ids = [byte_tokenizer()(prompt)["input_ids"] for prompt in prompts]
    alone = [texts(complete(openai, prompt, seed=1))[0] for prompt in prompts]
    assert texts(complete(openai, prompts, seed=1)) == alone
    assert texts(complete(openai, ids, seed=1)) == alone
    assert texts(complete(openai, ids[1], seed=1)) == alone[1:]
    assert texts(complete(openai, None, seed=1)) == texts(complete(openai, END, seed=1))  # the beginning of a document


def test_choices_are_numbered_over_prompts_and_samples(server: ServerProcess, openai: OpenAI) -> None:
    answer = complete(openai, ["hello", "the word"], n=3, seed=20)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert texts(answer) == predict(server, "hello", n=3, seed=20) + predict(server, "the word", n=3, seed=20)


def test_best_of_returns_the_likeliest_and_counts_all(openai: OpenAI) -> None:
    asked = {"seed": 2, "max_tokens": 6, "temperature": 2, "extra_body": {"ignore_eos": True}}
    candidates = complete(openai, "hello", n=6, logprobs=0, **asked)
    sums = [sum(logprobs(candidates, i).token_logprobs or []) for i in range(6)]
    by_sum = [texts(candidates)[i] for i in sorted(range(6), key=lambda i: -sums[i])]
    best = complete(openai, "hello", n=2, best_of=6, **asked)
    assert texts(best) == by_sum[:2] != texts(candidates)[:2]
    assert best.choices[0].logprobs is None
    assert best.usage is not None
    assert (best.usage.prompt_tokens, best.usage.completion_tokens) == (2, 36)
    same = complete(openai, "hello", n=2, best_of=2, **asked)
    assert texts(same) == texts(candidates)[:2]


def test_best_of_counts_the_end_as_a_token(openai: OpenAI) -> None:
    """An empty text is no sure thing: where the end is unlikely, so is the text."""
    asked = {"seed": 0, "max_tokens": 1, "temperature": 2, "logit_bias": {"0": 12}}
    candidates = complete(openai, "hello", n=12, logprobs=0, **asked)
    ended = [choice.finish_reason == "stop" for choice in candidates.choices]
    assert True in ended
    assert False in ended
    sums = [sum(logprobs(candidates, i).token_logprobs or []) for i in range(12)]
    (best,) = texts(complete(openai, "hello", best_of=12, **asked))
    assert best == texts(candidates)[max(range(12), key=lambda i: sums[i])]


def test_stop_cuts_before_it_and_says_so(openai: OpenAI) -> None:
    whole = texts(complete(openai, "hello", seed=4, max_tokens=40, extra_body={"ignore_eos": True}))[0]
    stop = whole[7:9]
    for given in (stop, ["\x01never", stop]):
        answer = complete(openai, "hello", seed=4, max_tokens=40, stop=given, extra_body={"ignore_eos": True})
        assert texts(answer) == [whole[: whole.index(stop)]]
        assert answer.choices[0].finish_reason == "stop"


def test_logit_bias_forces_a_token(openai: OpenAI) -> None:
    answer = complete(openai, "hello", max_tokens=3, logit_bias={str(BANANA): 100})
    assert texts(answer) == [" banana" * 3]


def test_logprobs_are_those_of_v1(server: ServerProcess, openai: OpenAI) -> None:
    answer = complete(openai, "hello", seed=9, logprobs=5)
    wanted = predict(server, "hello", seed=9, details=True, logprobs=5)["logprobs"]
    told = logprobs(answer)
    assert any(token.startswith("bytes:\\x") for token in told.tokens or [])
    assert [read(token) for token in told.tokens or []] == wanted["tokens"]
    assert told.token_logprobs == wanted["token_logprobs"]
    assert told.top_logprobs is not None
    for token, value, top, expected in zip(
        told.tokens, wanted["token_logprobs"], told.top_logprobs, wanted["top_logprobs"], strict=True
    ):
        assert top[token] == value
        assert next(iter(top.values())) == expected[0]["logprob"] == max(top.values())
        assert [read(each) for each in top][: len(expected)] == [each["token"] for each in expected]
        assert set(list(top)[len(expected) :]) <= {token}


def test_logprobs_0_tells_the_tokens_that_came(openai: OpenAI) -> None:
    told = logprobs(complete(openai, "hello", seed=9, logprobs=0))
    assert told.top_logprobs == [
        {token: value} for token, value in zip(told.tokens or [], told.token_logprobs or [], strict=True)
    ]


def test_offsets_count_from_the_beginning_of_the_text(openai: OpenAI) -> None:
    """A character of two tokens has one offset, that of both; vLLM counts it twice."""
    two = byte_tokenizer()("é")["input_ids"]
    answer = complete(openai, [*two, BANANA, *two, BANANA], max_tokens=0, echo=True, logprobs=0)
    assert texts(answer) == ["é bananaé banana"]
    assert logprobs(answer).text_offset == [0, 0, 1, 8, 8, 9]
    generated = complete(openai, "é", seed=5, max_tokens=30, logprobs=0, echo=True)
    told = logprobs(generated)
    assert told.tokens is not None
    assert told.text_offset is not None
    assert told.text_offset[:3] == [0, 0, 1]
    whole = [place for place, token in enumerate(told.tokens) if "�" not in read(token) and token != END]
    assert len(whole) > 5
    for place in whole:  # bytes that come to nothing count with the token that shows it
        rest = texts(generated)[0][told.text_offset[place] :]
        assert rest.lstrip("�").startswith(told.tokens[place])


def test_echo_begins_with_the_prompt(openai: OpenAI) -> None:
    plain = texts(complete(openai, "hello", seed=1))[0]
    assert texts(complete(openai, "hello", seed=1, echo=True)) == ["hello" + plain]
    ids = byte_tokenizer()("hello")["input_ids"]
    assert texts(complete(openai, ids, seed=1, echo=True)) == ["hello" + plain]
    assert texts(complete(openai, [*ids, 0], max_tokens=1, echo=True))[0].startswith("hello" + END)


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_echo_with_logprobs_scores_the_prompt(openai: OpenAI, oracle: GPT2LMHeadModel, max_tokens: int) -> None:
    """lm-eval's question: how likely is this text? The answer is transformers'."""
    ids = byte_tokenizer()("hello the banana world")["input_ids"]
    with torch.inference_mode():
        wanted = torch.log_softmax(oracle(torch.tensor([ids])).logits[0, :-1].double(), -1)
    answer = complete(openai, "hello the banana world", max_tokens=max_tokens, echo=True, logprobs=1, seed=1)
    told = logprobs(answer)
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    scores = torch.tensor(told.token_logprobs[1 : len(ids)])
    assert torch.allclose(scores, wanted[range(len(ids) - 1), ids[1:]].float(), atol=1e-4)
    for top, row in zip(told.top_logprobs[1 : len(ids)], wanted, strict=True):
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens
    if max_tokens == 0:
        assert (texts(answer), answer.choices[0].finish_reason) == (["hello the banana world"], "length")
        assert len(told.tokens or []) == len(ids)


def test_scores_end_one_token_before_the_last_also_where_that_ends_the_text(openai: OpenAI) -> None:
    """lm-eval asks for one token, and drops the last log-probability, whatever that token was."""
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    prompts = [byte_tokenizer()(text)["input_ids"] for text in ("hello world", "the banana")]
    usual = complete(openai, prompts, **asked)
    ended = complete(openai, prompts, logit_bias={"0": 100}, **asked)
    for place, ids in enumerate(prompts):
        told = logprobs(ended, place)
        assert len(told.tokens or []) == len(ids) + 1
        assert (told.tokens or [])[-1] == END
        assert (told.text_offset or [])[-1] == len(ended.choices[place].text)
        assert (told.token_logprobs or [])[:-1] == (logprobs(usual, place).token_logprobs or [])[:-1]


STREAMED = {"seed": 8, "max_tokens": 12, "n": 2, "temperature": 2}


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("asked", [None, 2], ids=["no logprobs", "logprobs"])
def test_a_stream_is_the_answer_in_pieces(openai: OpenAI, echo: bool, asked: int | None) -> None:
    fields = STREAMED | {"echo": echo, "logprobs": asked}
    whole = complete(openai, ["hello", "the é"], **fields)
    chunks = list(complete(openai, ["hello", "the é"], stream=True, **fields))  # type: ignore[call-overload]
    assert len({(chunk.id, chunk.created, chunk.object, chunk.model) for chunk in chunks}) == 1
    for index, wanted in enumerate(whole.choices):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == wanted.text
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + [wanted.finish_reason]
        if asked is None:
            assert {choice.logprobs for choice in own} == {None}
            continue
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [getattr(choice.logprobs, column) for choice in own]
            assert list(chain(*parts)) == getattr(wanted.logprobs, column)


def test_a_stream_tells_the_usage_where_asked(openai: OpenAI) -> None:
    whole = complete(openai, ["hello", "the word"], **STREAMED)
    plain = list(complete(openai, ["hello", "the word"], stream=True, **STREAMED))  # type: ignore[call-overload]
    assert not any("usage" in chunk.model_fields_set for chunk in plain)
    options = {"include_usage": True}
    *chunks, last = complete(openai, ["hello", "the word"], stream=True, stream_options=options, **STREAMED)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set and chunk.choices for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)
    *chunks, last = complete(
        openai, "hello", stream=True, stream_options=options | {"continuous_usage_stats": True}, seed=8, max_tokens=12
    )
    so_far = [chunk.usage.completion_tokens for chunk in chunks]
    assert so_far == sorted(so_far)
    assert 0 < so_far[0] < so_far[-1] == last.usage.completion_tokens
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {2}


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
def test_a_chat_with_a_model_that_has_no_template_is_told_what_to_use(server: ServerProcess, prefix: str) -> None:
    with client_of(server, prefix) as openai:
        with pytest.raises(
            BadRequestError, match="no chat template; send the text as prompt to /v1/completions"
        ) as caught:
            openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])
        assert caught.value.param == "messages"
        with pytest.raises(NotFoundError):
            openai.chat.completions.create(model="gpt-4", messages=[])


def test_a_stream_ends_with_done(server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 3, "stream": True}
    answer = httpx.post(server.url + "/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


async def test_the_async_client_does_the_same(server: ServerProcess, openai: OpenAI) -> None:
    whole = complete(openai, "hello", seed=8, max_tokens=30)
    async with AsyncOpenAI(base_url=server.url + "/openai/v1", api_key="none", max_retries=0) as client:
        again = await client.completions.create(model="tiny", prompt="hello", seed=8, max_tokens=30)
        assert texts(again) == texts(whole)
        stream = await client.completions.create(model="tiny", prompt="hello", seed=8, max_tokens=30, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == texts(whole)[0]
        assert [model.id async for model in client.models.list()] == ["tiny"]


async def test_a_client_that_leaves_a_stream_frees_its_sequences(server: ServerProcess) -> None:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(
            model="tiny",
            prompt=["hello"] * 4,
            n=16,
            max_tokens=1900,
            stream=True,
            extra_body={"ignore_eos": True, "context_overflow": "slide"},
        )
        async for _ in stream:
            break
        assert server.metric("predictor_requests_running") > 0
        await stream.close()
        for _ in range(100):
            if server.metric("predictor_requests_running") == 0:
                return
    pytest.fail("the sequences still run")
