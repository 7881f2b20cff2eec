"""5,000 damaged bodies over every protocol: no 5xx, nothing of ours in an answer, nothing left behind."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT

BODIES = 5_000

SHORT = {"max_new_tokens": 2, "seed": 1}
# Route -> a body that is answered with 200.
VALID: dict[str, Any] = {
    "/v1/models/tiny:predict": {
        "instances": ["hello", {"prompt": "the", "n": 2, "stop": ["x"]}],
        "parameters": SHORT | {"details": True, "logprobs": 1, "logit_bias": {"5": 1.5}, "bad_words": ["zz"]},
        "signature_name": "serving_default",
    },
    "/v1/models/tiny/versions/1:predict": {"inputs": {"prompt": ["hello", {"b64": "dGhl"}]}, "parameters": SHORT},
    "/v1/models/tiny/labels/stable:predict": {"text": "hello", "length": 5, "seed": 1},
    "/v2/models/tiny/infer": {
        "id": "1",
        "inputs": [
            {"name": "text_input", "shape": [2], "datatype": "BYTES", "data": ["hello", "the"], "parameters": SHORT}
        ],
        "outputs": [{"name": "text_output", "parameters": {"binary_data": False}}],
    },
    "/v2/models/tiny/generate": {"text_input": "hello", "parameters": SHORT},
    "/v2/models/tiny/generate_stream": {"text_input": "hello", "parameters": SHORT},
    "/v1/completions": {
        "model": "tiny",
        "prompt": ["hello", "the"],
        "max_tokens": 2,
        "temperature": 0.5,
        "n": 1,
        "logprobs": 1,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "a",
    },
    "/openai/v1/completions": {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 2, "best_of": 2, "echo": True},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "max_completion_tokens": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
    },
    "/": {"length": 3, "prefix": "hello", "temperature": 0.7, "top_k": 5, "include_prefix": "false", "truncate": "x"},
    "/generate": {"text": {"in_64": "aGVsbG8="}, "max_length": 8, "do_sample": True, "num_return_sequences": 2},
    "/predict": {"data": {"names": ["a"], "ndarray": ["hello"]}, "meta": {"tags": {"max_new_tokens": 2}}},
    "/send-feedback": {"request": {"data": {"ndarray": ["a"]}}, "response": {}, "reward": 0.5, "truth": {}},
    "/completions": {"prompt": "hello", "max_tokens": 2, "stop": "x", "logprobs": 1, "logit_bias": "{}", "user": "a"},
    "/v1/jobs": {"model": "tiny", "instances": ["hello"], "parameters": SHORT},
}

STRANGE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**63, 2**64, -(2**63), 10**300, 1e308, -0.0, 0.1),
    *("", "0", "NaN", "true", "\x00", "é\U0001f600", "\ud7ff", "\u202e", "<|endoftext|>", "x" * 2_000),
    *([], {}, [[]], [{}], {"": ""}, [None], ["a", 1], [[1, [2]]], [-1], [10**9], {"prompt": "a"}),
    *({"b64": "!"}, {"b64": "/w=="}, "../../etc/passwd", "FILE:/etc/passwd", "${jndi}", "'; --"),
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything within."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def _replace(draw: random.Random, body: Any) -> None:
    container, key = draw.choice(_places(body))
    container[key] = copy.deepcopy(draw.choice(STRANGE))


def _remove(draw: random.Random, body: Any) -> None:
    container, key = draw.choice(_places(body))
    del container[key]


def _add(draw: random.Random, body: Any) -> None:
    containers = [body] + [container for container, _ in _places(body)]
    container = draw.choice(containers)
    if isinstance(container, dict):
        other = draw.choice(list(VALID.values()))
        key = draw.choice([*other, "stream", "n", "x", "", "timeout_s", "__class__"])
        container[key] = copy.deepcopy(draw.choice(STRANGE))
    else:
        container.append(copy.deepcopy(draw.choice(STRANGE)))


CHANGES: list[Callable[[random.Random, Any], None]] = [_replace, _replace, _remove, _add]


def damaged(draw: random.Random, body: Any) -> bytes:
    """`body` with one to three changes of its JSON, and now and then of its bytes."""
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        if _places(body):
            draw.choice(CHANGES)(draw, body)
    text = json.dumps(body, ensure_ascii=draw.random() < 0.5).encode()
    if draw.random() < 0.15:
        cut = draw.randrange(len(text) + 1)
        filler = draw.choice([b"", b"\xff", b"\x00", b"}", b"[" * 3_000, b'"', b"1e999", b"NaN", b"\\ud800", b","])
        text = text[:cut] + filler + text[cut + draw.randint(0, 3) :]
    if draw.random() < 0.03:
        text = draw.choice([b"", b"null", b"[]", b'"a"', b"1", b"[" * 30_000, b'{"a":' * 20_000, draw.randbytes(200)])
    return text


FORBIDDEN = (
    "Traceback",
    'File "',
    "site-packages",
    str(ROOT),
    "predictor.",
    "pydantic",
    "Error(",
    "0x7f",
    "object at ",
)


@pytest.mark.parametrize("part", range(4))
async def test_no_damaged_body_is_our_fault(client: httpx.AsyncClient, part: int) -> None:
    draw = random.Random(part)
    codes: dict[int, int] = {}

    async def one(path: str, body: bytes) -> None:
        response = await client.post(path, content=body)
        codes[response.status_code] = codes.get(response.status_code, 0) + 1
        said = f"{path} {body[:500]!r}: {response.status_code} {response.text[:500]}"
        # 501 is an answer of the protocols: what is known, and not served.
        assert response.status_code < 500 or response.status_code == 501, said
        if response.status_code != 200:
            assert "error" in response.text or "status" in response.text, said
        for word in FORBIDDEN:
            assert word not in response.text.replace(body.decode(errors="replace"), ""), said

    for _ in range(BODIES // 4 // 25):
        paths = [draw.choice(list(VALID)) for _ in range(25)]
        await asyncio.gather(*(one(path, damaged(draw, VALID[path])) for path in paths))
    assert sum(codes.values()) == BODIES // 4
    assert codes[400] > BODIES // 4 * 0.4, codes
    assert codes[200] > BODIES // 4 * 0.02, "some of the damage does no harm"
    await asyncio.sleep(0.1)
    gauges = (await client.get("/metrics")).text
    for gauge in ("predictor_requests_running", "predictor_requests_waiting", "predictor_kv_tokens_used"):
        assert f'{gauge}{{model_name="tiny",revision=""}} 0.0' in gauges


@pytest.mark.parametrize("path", list(VALID))
async def test_the_bodies_that_are_damaged_are_valid_before(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json=VALID[path])
    expected = {"/v1/jobs": 202}.get(path, 200)
    assert response.status_code == expected, response.text
