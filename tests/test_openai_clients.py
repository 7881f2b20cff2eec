"""What known clients send to completions, field by field, and what they read of the answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

COMMON: dict[str, Any] = {"model": "tiny", "prompt": "hello world", "max_tokens": 6}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}

# `vllm bench serve --backend openai`: the body of vllm/benchmarks/lib/endpoint_request_func.py, and that of
# benchmarks/backend_request_func.py before it; sampling flags of its command line come as further fields.
VLLM_BENCH = {
    "now": COMMON | STREAMED | {"repetition_penalty": 1.0, "logprobs": None},
    "now, --ignore-eos": COMMON | STREAMED | {"repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True},
    "now, --logprobs and sampling flags": COMMON
    | STREAMED
    | {
        "repetition_penalty": 1.0,
        "logprobs": 3,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 5,
        "frequency_penalty": 0.5,
    },
    "2024": COMMON
    | STREAMED
    | {"temperature": 0.0, "best_of": 1, "logprobs": None, "ignore_eos": True, "repetition_penalty": 1.0},
    "2023": COMMON | {"temperature": 0.0, "best_of": 1, "stream": True},
    "token ids": COMMON | STREAMED | {"prompt": [5, 6, 7], "repetition_penalty": 1.0, "logprobs": None},
}
GUIDELLM = COMMON | {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "stop": None,
    "ignore_eos": True,
}


@pytest.mark.parametrize("body", [*VLLM_BENCH.values(), GUIDELLM], ids=[*VLLM_BENCH, "GuideLLM"])
@pytest.mark.parametrize("path", ["/v1/completions", "/openai/v1/completions"])
async def test_a_benchmarks_body_streams_choices_and_then_the_usage(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    *messages, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(message.removeprefix("data: ")) for message in messages]
    with_choices = [chunk for chunk in chunks if chunk["choices"]]
    assert all(isinstance(chunk["choices"][0]["text"], str) for chunk in with_choices)
    if "stream_options" in body:
        assert chunks[:-1] == with_choices
        usage = chunks[-1]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] == 6 or not body.get("ignore_eos")
    else:
        assert chunks == with_choices


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
async def test_a_benchmark_finds_health_and_the_model(client: httpx.AsyncClient, prefix: str) -> None:
    """GuideLLM asks `/health`, and both for the models; vLLM's reads the first one's `root` as its tokenizer's name."""
    assert (await client.get("/health")).status_code == 200
    first = (await client.get(f"{prefix}/models")).json()["data"][0]
    assert (first["id"], first["root"]) == ("tiny", "tiny")


async def test_lm_eval_finds_what_it_sums(client: httpx.AsyncClient) -> None:
    """local-completions of lm-evaluation-harness: log-probabilities after the context, without the token generated."""
    texts = [[5, 6, 7, 8], [9, 10, 11]]
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    scored = (await client.post("/v1/completions", json={"model": "tiny", "prompt": texts} | body)).json()["choices"]
    for ids, choice in zip(texts, scored, strict=True):
        greedy = []
        for length in range(1, len(ids)):
            told = choice["logprobs"]
            value, top = told["token_logprobs"][length], told["top_logprobs"][length]
            greedy.append(value == max(top.values()))
            asked = {"model": "tiny", "prompt": ids[:length], "temperature": 0, "max_tokens": 1, "logprobs": 0}
            asked["logit_bias"] = {str(ids[length]): 100}
            forced = (await client.post("/v1/completions", json=asked)).json()["choices"][0]["logprobs"]
            assert value == pytest.approx(forced["token_logprobs"][0], abs=1e-5)
        assert len(choice["logprobs"]["token_logprobs"][1:-1]) == len(ids) - 1
        assert greedy.count(True) < len(greedy)  # the model is random: not every token is its likeliest
    generated = {"prompt": texts, "max_tokens": 5, "temperature": 0, "stop": ["\n\n", "<|endoftext|>"], "seed": 1234}
    answer = await client.post("/v1/completions", json={"model": "tiny"} | generated)
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
