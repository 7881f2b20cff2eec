"""What OpenAI's completions refuse, and the exceptions that its own client makes of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from predictor.errors import (
    DeadlineExceeded,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    NotReady,
    PredictorError,
    QueueFull,
    RateLimited,
    Unauthenticated,
)
from predictor.protocols.openai import COMPLETIONS
from predictor.protocols.wire import Limits
from predictor.text.stream import TextStream

LIMITS = Limits(max_instances=8, max_timeout_s=60)


@pytest.fixture
async def ask(kserve_app: Any) -> AsyncIterator[AsyncOpenAI]:
    """The real client, on the app in process."""
    transport = httpx2.ASGITransport(app=kserve_app, raise_app_exceptions=False)
    async with AsyncOpenAI(
        base_url="http://test/v1", api_key="none", max_retries=0, http_client=httpx2.AsyncClient(transport=transport)
    ) as opened:
        yield opened


def body_of(error: openai.APIError) -> dict[str, Any]:
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}
    return error.body


REFUSED: list[tuple[str, Any, str]] = [  # field, value, what the message says of it
    ("suffix", "!", "suffix is not served"),
    ("suffix", "", "suffix is not served"),
    ("stop", [""], "at least 1 character"),
    ("stop", "", "at least 1 character"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", "a" * 257, "at most 256"),
    ("stop", [3], "stop[0]"),
    ("max_tokens", -1, "greater than or equal to 0"),
    ("max_tokens", 0, "at least 1, or 0 with echo"),
    ("max_tokens", 3.0, "valid integer"),
    ("max_tokens", True, "valid integer"),
    ("max_tokens", "16", "valid integer"),
    ("temperature", 2.1, "less than or equal to 2"),
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", "1", "valid number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.1, "less than or equal to 1"),
    ("top_k", -1, "greater than or equal to 0"),
    ("top_k", 100_000, "vocabulary"),
    ("n", 0, "greater than or equal to 1"),
    ("n", 17, "less than or equal to 16"),
    ("n", 9, "at most 8"),
    ("best_of", 0, "greater than or equal to 1"),
    ("best_of", 17, "less than or equal to 16"),
    ("best_of", 9, "at most 8"),
    ("logprobs", 6, "less than or equal to 5"),
    ("logprobs", -1, "greater than or equal to 0"),
    ("logprobs", True, "valid integer"),
    ("echo", 1, "valid boolean"),
    ("stream", "true", "valid boolean"),
    ("stream_options", {"include_usage": True}, "needs stream: true"),
    ("presence_penalty", 2.1, "less than or equal to 2"),
    ("frequency_penalty", -2.1, "greater than or equal to -2"),
    ("logit_bias", {"x": 1}, "token ids"),
    ("logit_bias", {"5": 101}, "less than or equal to 100"),
    ("logit_bias", {"999999": 1}, "vocabulary"),
    ("logit_bias", [5], "valid dictionary"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**64, "18446744073709551615"),
    ("seed", 10**399, "18446744073709551615"),
    ("user", 5, "valid string"),
    ("user", "u" * 257, "at most 256"),
    ("timeout_s", 61, "at most this server's 60"),
    ("prompt", [], "not empty"),
    ("prompt", 5, "a list of token ids"),
    ("prompt", {"text": "a"}, "a list of token ids"),
    ("prompt", ["a", 5], "prompt[1]"),
    ("prompt", [5, "a"], "prompt[1]"),
    ("prompt", [5, True], "prompt[1]"),
    ("prompt", [5, -1], "prompt[1]"),
    ("prompt", [5, 1.0], "prompt[1]"),
    ("prompt", [[5], [5, None]], "prompt[1][1]"),
    ("prompt", [[5], [[5]]], "prompt[1][0]"),
    ("prompt", [5, 10**300], "vocabulary"),
    ("prompt", ["a"] * 9, "at most 8"),
    ("model", 5, "valid string"),
    ("messages", [], "unknown field"),
    ("min_p", 0.1, "unknown field"),
    ("max_new_tokens", 5, "here it is max_tokens"),
    ("num_return_sequences", 2, "here it is n"),
    ("return_full_text", True, "here it is echo"),
    ("details", True, "here it is logprobs"),
]


@pytest.mark.parametrize(("field", "value", "said"), REFUSED, ids=lambda part: str(part)[:20])
async def test_a_wrong_value_is_a_bad_request_that_names_the_field(
    client: httpx.AsyncClient, field: str, value: Any, said: str
) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "hello"} | {field: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert said in error["message"]


async def test_what_is_missing_is_named(client: httpx.AsyncClient) -> None:
    for field, rest in (
        ("model", {"prompt": "a"}),
        ("prompt", {"model": "tiny"}),
        ("model", {"model": None, "prompt": "a"}),
    ):
        answer = await client.post("/v1/completions", json=rest)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


async def test_fields_that_contradict_each_other_are_refused(ask: AsyncOpenAI) -> None:
    for fields, param in (
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 5, "extra_body": {"min_new_tokens": 6}}, "min_new_tokens"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"echo": True, "logprobs": 1, "extra_body": {"context_overflow": "slide"}}, "context_overflow"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask.completions.create(model="tiny", prompt="hello", **fields)
        assert body_of(caught.value)["param"] == param
    same = await ask.completions.create(model="tiny", prompt="hello", n=2, best_of=2, stream=True)
    assert [chunk async for chunk in same]


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        ("x" * 300, {}, "prompt"),
        ("x" * 5000, {}, "prompt"),
        ([5] * 128, {}, "prompt"),
        ("hello", {"max_tokens": 127}, "max_tokens"),
    ],
)
async def test_past_the_context_has_openais_code(
    ask: AsyncOpenAI, prompt: Any, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask.completions.create(model="tiny", prompt=prompt, **fields)
    body = body_of(caught.value)
    assert (body["code"], body["param"]) == ("context_length_exceeded", param)
    assert "max_new_tokens" not in body["message"]


async def test_the_default_length_is_what_the_context_leaves(ask: AsyncOpenAI) -> None:
    answer = await ask.completions.create(model="tiny", prompt=[5] * 120, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


async def test_a_prompt_that_fills_the_context_can_be_scored(ask: AsyncOpenAI) -> None:
    answer = await ask.completions.create(model="tiny", prompt=[5] * 128, max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 128


async def test_an_unknown_model_is_not_found(ask: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await ask.completions.create(model="gpt-4", prompt="hello")
    body = body_of(caught.value)
    assert (body["code"], body["param"]) == ("model_not_found", "model")
    assert "gpt-4" in body["message"]
    assert "tiny" in body["message"]
    with pytest.raises(openai.NotFoundError) as caught:
        await ask.with_options(base_url="http://test/openai/v1").models.retrieve("gpt-4")
    assert body_of(caught.value)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("raised", "wanted", "kind"),
    [
        (QueueFull("the queue is full"), openai.RateLimitError, "rate_limit_exceeded"),
        (RateLimited("too often", 3), openai.RateLimitError, "rate_limit_exceeded"),
        (Unauthenticated("no key"), openai.AuthenticationError, "authentication_error"),
        (Forbidden("not for you"), openai.PermissionDeniedError, "permission_error"),
        (EngineFailed("the engine failed"), openai.InternalServerError, "server_error"),
        (NotReady("loading"), openai.InternalServerError, "server_error"),
        (DeadlineExceeded("took too long"), openai.InternalServerError, "server_error"),
        (InvalidRequest("no"), openai.BadRequestError, "invalid_request_error"),
        (KeyError("secret"), openai.InternalServerError, "server_error"),
    ],
)
async def test_every_error_is_the_clients_exception_for_it(
    ask: AsyncOpenAI,
    predictor: Any,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    wanted: type[openai.APIStatusError],
    kind: str,
) -> None:
    async def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(predictor.language_model(), "generate", fail)
    with pytest.raises(wanted) as caught:
        await ask.completions.create(model="tiny", prompt="hello")
    body = body_of(caught.value)
    assert body["type"] == kind
    assert body["message"] == (str(raised) if isinstance(raised, PredictorError) else body["message"])
    assert "secret" not in body["message"]
    if caught.value.status_code in (429, 503):
        assert int(caught.value.response.headers["retry-after"]) > 0
    if caught.value.status_code == 429:
        assert body["code"] == "rate_limit_exceeded"


async def test_an_error_in_mid_stream_is_the_clients_exception(
    ask: AsyncOpenAI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TextStream.__anext__

    async def fail_at_the_third(self: TextStream) -> Any:
        if self.completion_tokens == 2:
            raise EngineFailed("the engine failed")
        return await whole(self)

    monkeypatch.setattr(TextStream, "__anext__", fail_at_the_third)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 9, "logprobs": 0}
    stream = await ask.completions.create(stream=True, **asked)
    for _ in range(2):
        await stream.__anext__()
    with pytest.raises(openai.APIError, match="the engine failed") as caught:
        await stream.__anext__()
    assert body_of(caught.value)["type"] == "server_error"
    raw = (await client.post("/v1/completions", json=asked | {"stream": True})).text
    *_, last, rest = raw.split("\n\n")
    assert (json.loads(last.removeprefix("data: ")).keys(), rest) == ({"error": 0}.keys(), "")


async def test_an_error_before_the_first_event_has_its_status(ask: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        await ask.completions.create(model="tiny", prompt=[999_999], stream=True)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b"null", {}, 400),
        (b'"\xff"', {}, 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "tiny", "prompt": "a", "prompt": "b"}', {}, 400),
        (b'{"model": "tiny", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", {}, 400),
        (b'{"model": "tiny", "prompt": [NaN]}', {}, 400),
        (b'{"model": "tiny", "temperature": 1e999}', {}, 400),
        (b" " * 70_000, {}, 413),
        (b"{}", {"content-type": "text/csv"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/openai/v1/completions", "/v1/chat/completions"])
async def test_what_cannot_be_read_has_openais_error_body(
    client: httpx.AsyncClient, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = await client.post(path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/chat/nothing", "/openai/v1/responses", "/v1/embeddings"])
async def test_a_route_that_is_not_there_is_no_model_that_is_not_there(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post(path, json={"model": "tiny"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("unknown_url", "invalid_request_error", None)
    assert error["message"] == f"no such route: POST {path}"


def test_whoever_asks_is_told_to_the_guard() -> None:
    assert COMPLETIONS.parse({"model": "tiny", "prompt": "a", "user": "u1"}, LIMITS).user == "u1"
    assert COMPLETIONS.parse({"model": "tiny", "prompt": "a"}, LIMITS).user is None
