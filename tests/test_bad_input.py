"""Bad input over HTTP: each case is refused with the right status and names what is wrong; none reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

PREDICT = "/v1/models/tiny:predict"


def v1(**parameters: Any) -> bytes:
    return json.dumps({"instances": ["hello"], "parameters": parameters}).encode()


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


# name, body, what the answer must contain; status 400
REFUSED: list[tuple[str, bytes, str]] = [
    # JSON itself
    ("empty body", b"", "JSON"),
    ("not JSON", b"hello", "JSON"),
    ("cut off", b'{"instances": ["a"]', "JSON"),
    ("trailing garbage", b'{"instances": ["a"]} x', "JSON"),
    ("NaN", b'{"instances": ["a"], "parameters": {"temperature": NaN}}', "NaN"),
    ("Infinity", b'{"instances": ["a"], "parameters": {"temperature": Infinity}}', "Infinity"),
    ("1e400", b'{"instances": ["a"], "parameters": {"temperature": 1e400}}', "1e400"),
    ("duplicate key", b'{"instances": ["a"], "instances": ["b"]}', "instances"),
    ("duplicate nested key", b'{"instances": ["a"], "parameters": {"seed": 1, "seed": 2}}', "seed"),
    ("lone surrogate", b'{"instances": ["\\ud800"]}', "surrogate"),
    ("not UTF-8", b'{"instances": ["\xff"]}', "UTF-8"),
    ("a number of 5,000 digits", b'{"instances": ["a"], "parameters": {"seed": ' + b"9" * 5000 + b"}}", "too large"),
    ("nested too deeply", b"[" * 50_000, "JSON"),
    # the body
    ("a list", b'["hello"]', "object"),
    ("a string", b'"hello"', "object"),
    ("null", b"null", "object"),
    ("neither key", body(), "Missing 'inputs' or 'instances' key"),
    ("both forms", body(inputs=["hello"], instances=["hello"]), "only one of 'inputs' or 'instances'"),
    ("inputs null", body(inputs=None), "inputs"),
    ("inputs empty", body(inputs=[]), "inputs"),
    ("inputs too many", body(inputs=["a"] * 9), "at most 8"),
    ("inputs a list in a list", body(inputs=[["a"]]), "inputs[0]"),
    ("inputs without prompt", body(inputs={"text": ["a"]}), "Missing named input: prompt"),
    ("inputs with an unknown name", body(inputs={"prompt": "a", "seed": 1}), "seed"),
    ("base64 that is none", body(inputs=[{"b64": "?"}]), "inputs[0]"),
    ("base64 that is no text", body(instances=["a", {"b64": "/w=="}]), "instances[1]"),
    ("base64 of a number", body(instances=[{"prompt": {"b64": 5}}]), "instances[0].prompt"),
    ("both ways", body(text="hello", instances=["hello"]), "text"),
    ("unknown top-level field", body(instances=["a"], paramters={}), "paramters"),
    ("instances a string", body(instances="hello"), "instances"),
    ("instances empty", body(instances=[]), "instances"),
    ("instances null", body(instances=None), "instances"),
    ("too many instances", body(instances=["a"] * 9), "at most 8"),
    ("an instance a number", body(instances=["a", 5]), "instances[1]"),
    ("an instance null", body(instances=[None]), "instances[0]"),
    ("an instance a list", body(instances=[["a"]]), "instances[0]"),
    ("an instance without prompt", body(instances=[{"seed": 1}]), "prompt"),
    ("a prompt that is a number", body(instances=[{"prompt": 5}]), "prompt"),
    ("an instance's unknown field", body(instances=[{"prompt": "a", "temprature": 1}]), "temprature"),
    ("an instance's bad field", body(instances=["a", {"prompt": "a", "top_p": 2}]), "instances[1].top_p"),
    ("parameters a list", body(instances=["a"], parameters=[]), "parameters"),
    ("parameters null", body(instances=["a"], parameters=None), "parameters"),
    ("signature_name a number", body(instances=["a"], signature_name=5), "signature_name"),
    ("signature_name unknown", body(instances=["a"], signature_name="classify"), "signature_name"),
    # parameters: unknown, null, wrong type, out of range
    ("unknown parameter", v1(max_length=5), "max_length"),
    ("a parameter null", v1(seed=None), "seed"),
    ("max_new_tokens 0", v1(max_new_tokens=0), "max_new_tokens"),
    ("max_new_tokens -1", v1(max_new_tokens=-1), "max_new_tokens"),
    ("max_new_tokens 1.5", v1(max_new_tokens=1.5), "max_new_tokens"),
    ("max_new_tokens 3.0", v1(max_new_tokens=3.0), "max_new_tokens"),
    ("max_new_tokens true", v1(max_new_tokens=True), "max_new_tokens"),
    ("max_new_tokens a string", v1(max_new_tokens="5"), "max_new_tokens"),
    ("max_new_tokens past the context", v1(max_new_tokens=128), "max_new_tokens"),
    ("max_new_tokens past any integer", v1(max_new_tokens=10**30), "max_new_tokens"),
    ("context_overflow unknown", v1(context_overflow="truncate"), "context_overflow"),
    ("context_overflow true", v1(context_overflow=True), "context_overflow"),
    ("context_overflow error, past the context", v1(context_overflow="error", max_new_tokens=128), "max_new_tokens"),
    ("max_new_tokens past 16 contexts", v1(context_overflow="slide", max_new_tokens=16 * 128), "max_new_tokens"),
    ("the alias and the name", v1(max_tokens=5, max_new_tokens=5), "max_tokens"),
    ("min_new_tokens past max", v1(min_new_tokens=6, max_new_tokens=5), "min_new_tokens"),
    ("min_new_tokens past the default max", v1(min_new_tokens=1000), "min_new_tokens"),
    ("do_sample 1", v1(do_sample=1), "do_sample"),
    ("do_sample a string", v1(do_sample="false"), "do_sample"),
    ("temperature -0.1", v1(temperature=-0.1), "temperature"),
    ("temperature 101", v1(temperature=101), "temperature"),
    ("temperature a string", v1(temperature="0.7"), "temperature"),
    ("temperature true", v1(temperature=True), "temperature"),
    ("temperature a huge integer", v1(temperature=10**399), "temperature"),
    ("top_k -1", v1(top_k=-1), "top_k"),
    ("top_k past the vocabulary", v1(top_k=100_000), "top_k"),
    ("top_k a float", v1(top_k=5.5), "top_k"),
    ("top_p 0", v1(top_p=0), "top_p"),
    ("top_p 1.01", v1(top_p=1.01), "top_p"),
    ("repetition_penalty 0", v1(repetition_penalty=0), "repetition_penalty"),
    ("repetition_penalty 11", v1(repetition_penalty=11), "repetition_penalty"),
    ("presence_penalty 2.1", v1(presence_penalty=2.1), "presence_penalty"),
    ("frequency_penalty -2.1", v1(frequency_penalty=-2.1), "frequency_penalty"),
    ("logit_bias a list", v1(logit_bias=[1]), "logit_bias"),
    ("logit_bias key no integer", v1(logit_bias={"hello": 1}), "logit_bias"),
    ("logit_bias key negative", v1(logit_bias={"-1": 1}), "logit_bias"),
    ("logit_bias key past the vocabulary", v1(logit_bias={"100000": 1}), "logit_bias"),
    ("logit_bias value 101", v1(logit_bias={"1": 101}), "logit_bias"),
    ("logit_bias value a string", v1(logit_bias={"1": "5"}), "logit_bias"),
    ("logit_bias too long", v1(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
    ("bad_words a string", v1(bad_words="no"), "bad_words"),
    ("bad_words with an empty one", v1(bad_words=[""]), "bad_words"),
    ("bad_words too many", v1(bad_words=["no"] * 257), "bad_words"),
    ("stop empty", v1(stop=[""]), "stop"),
    ("stop an empty string", v1(stop=""), "stop"),
    ("stop a number", v1(stop=5), "stop"),
    ("stop too many", v1(stop=["a"] * 17), "stop"),
    ("stop too long", v1(stop=["a" * 257]), "stop"),
    ("seed -1", v1(seed=-1), "seed"),
    ("seed 2^64", v1(seed=2**64), "seed"),
    ("seed a float", v1(seed=1.0), "seed"),
    ("seed true", v1(seed=True), "seed"),
    ("n 0", v1(n=0), "n must"),
    ("n 17", v1(n=17), "n must"),
    ("num_return_sequences 17", v1(num_return_sequences=17), "num_return_sequences"),
    ("ignore_eos a number", v1(ignore_eos=0), "ignore_eos"),
    ("logprobs 21", v1(logprobs=21, details=True), "logprobs"),
    ("logprobs true", v1(logprobs=True, details=True), "logprobs"),
    ("logprobs without details", v1(logprobs=2), "details"),
    (
        "an answer of too many logprobs",
        body(instances=["a"] * 8, parameters={"logprobs": 20, "details": True, "n": 16, "max_new_tokens": 100}),
        "logprobs",
    ),
    ("return_full_text a string", v1(return_full_text="yes"), "return_full_text"),
    ("details null", v1(details=None), "details"),
    ("stream", v1(stream=1), "stream"),
    ("timeout_s 0", v1(timeout_s=0), "timeout_s"),
    ("timeout_s past the server's", v1(timeout_s=61), "timeout_s"),
    # the prompt against the context
    ("a prompt as long as the context", body(instances=["hello " * 200]), "context"),
    ("a prompt no context could hold", body(instances=["x" * 60_000]), "context"),
    (
        "a prompt past 16 contexts",
        body(instances=["hello " * 3000], parameters={"context_overflow": "slide"}),
        "16 times the context",
    ),
    ("the second prompt too long", body(instances=["a", "hello " * 200]), "instances[1]"),
    # the older body
    ("text a number", body(text=5), "text"),
    ("text null", body(text=None), "text"),
    ("length 0", body(text="a", length=0), "length"),
    ("length a string", body(text="a", length="64"), "length"),
    ("length true", body(text="a", length=True), "length"),
    ("length 1.5", body(text="a", length=1.5), "length"),
    ("length null", body(text="a", length=None), "length"),
    ("length no longer than the prompt", body(text="hello " * 20, length=10), "length"),
    ("length with max_new_tokens", body(text="a", max_new_tokens=5), "max_new_tokens"),
    ("an unknown field beside text", body(text="a", lenght=5), "lenght"),
]


@pytest.fixture
def untouched(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when anything is submitted to the engine."""

    def refuse(*_: object) -> None:
        raise AssertionError("a bad request reached the engine")

    monkeypatch.setattr(predictor.language_model().backend, "submit", refuse)


def error_of(response: httpx.Response) -> str:
    """The error's text; asserts that the answer is `{"error": text}` and tells nothing of our insides."""
    answer = response.json()
    assert list(answer) == ["error"]
    assert not any(
        word in answer["error"] for word in ("Traceback", "Error:", "predictor.", "pydantic", "/site-packages")
    )
    return answer["error"]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("sent", "named"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
async def test_bad_body_is_refused_by_name(client: httpx.AsyncClient, sent: bytes, named: str) -> None:
    response = await client.post(PREDICT, content=sent)
    assert response.status_code == 400, response.text
    assert named in error_of(response)


def test_there_are_sixty_cases_and_their_names_differ() -> None:
    names = [case[0] for case in REFUSED]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "named"),
    [
        ("POST", "/v1/models/nobody:predict", {}, b"{}", 404, "Latest(nobody)"),
        ("GET", "/v1/models/nobody", {}, b"", 404, "nobody"),
        ("GET", "/v2/models/nobody", {}, b"", 404, "nobody"),
        ("GET", "/v2/models/nobody/ready", {}, b"", 404, "nobody"),
        ("POST", "/v2/models/nobody/infer", {}, b"{}", 404, "nobody"),
        ("GET", "/no/such/route", {}, b"", 404, "/no/such/route"),
        ("PUT", "/", {}, b"", 405, "PUT"),
        ("GET", PREDICT, {}, b"", 400, "Malformed request: GET /v1/models/tiny:predict"),
        ("DELETE", "/v1/models/tiny", {}, b"", 405, "DELETE"),
        ("PUT", PREDICT, {}, b"{}", 405, "PUT"),
        ("POST", PREDICT, {}, b'{"instances": ["' + b"a" * 70_000 + b'"]}', 413, "65536"),
        ("POST", PREDICT, {"content-type": "application/octet-stream"}, v1(), 415, "octet-stream"),
        ("POST", PREDICT, {"content-type": "multipart/form-data; boundary=x"}, v1(), 415, "multipart"),
        ("POST", PREDICT, {"content-type": "text/html"}, v1(), 415, "text/html"),
        ("POST", PREDICT, {"content-type": "json"}, v1(), 415, "json"),
        ("POST", PREDICT, {"content-type": "application/json; charset=utf-16"}, v1(), 415, "utf-16"),
        ("POST", PREDICT, {"content-encoding": "gzip"}, v1(), 415, "gzip"),
        ("POST", "/v1/models/tiny:explain", {}, b"{}", 501, "explain"),
        ("POST", "/v2/repository/models/tiny/unload", {}, b"", 403, "off"),
        ("POST", "/v2/repository/models/tiny/load", {}, b"", 403, "off"),
    ],
    ids=str,
)
async def test_bad_request_is_refused_by_status(
    client: httpx.AsyncClient, method: str, path: str, headers: dict[str, str], content: bytes, status: int, named: str
) -> None:
    response = await client.request(method, path, headers=headers, content=content)
    assert response.status_code == status, response.text
    assert named in error_of(response)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        "APPLICATION/JSON",
        "application/vnd.api+json",
        "application/x-www-form-urlencoded",
        "text/plain",
        "text/plain; charset=us-ascii",
    ],
)
async def test_what_clients_send_as_json_is_read_as_json(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await client.post(PREDICT, content=v1(max_new_tokens=1), headers=headers)
    assert response.status_code == 200, response.text


LEGAL: list[dict[str, Any]] = [
    {"temperature": 1e-320},
    {"temperature": 100},
    {"temperature": 0},
    {"top_p": 1e-300},
    {"top_k": 0, "top_p": 1e-300},
    {"repetition_penalty": 1e-320},
    {"repetition_penalty": 10},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"seed": 0},
    {"seed": 2**64 - 1, "n": 16},
    {"min_new_tokens": 4},
    {"logit_bias": {"0": 100}},
    {"logit_bias": {str(token_id): -100 for token_id in range(278)}},
    {"bad_words": ["e", "é", "\u0000", "\U0001f600"]},
    {"stop": "a" * 256},
    {"stop": []},
    {"timeout_s": 60},
    {"context_overflow": "error"},
    {"context_overflow": "slide"},
    {"context_overflow": "slide", "max_new_tokens": 16 * 128 - 2},
    {"logprobs": 20, "details": True},
    {},
]


@pytest.mark.parametrize("parameters", LEGAL, ids=str)
async def test_extreme_but_legal_parameters_are_answered(client: httpx.AsyncClient, parameters: dict[str, Any]) -> None:
    response = await client.post(PREDICT, content=v1(**({"max_new_tokens": 4} | parameters)))
    assert response.status_code == 200, response.text
    again = await client.post(PREDICT, content=v1(max_new_tokens=1))
    assert again.status_code == 200, "the engine did not survive"


@pytest.mark.parametrize(
    "sent",
    [
        body(instances=["a"], parameters={}, signature_name="serving_default"),
        body(instances=["a"] * 8),
        body(instances=[""]),
        body(instances=["\u0000"]),
        body(instances=["\u0000 \U0001f600 \ufffd"]),
        body(instances=["<|endoftext|>hello<|endoftext|>"]),
        b'{"instances": ["\\ud83d\\ude00"]}',
        body(text=""),
        body(text="hello", length=100_000),
        body(text="hello", length=1000, context_overflow="slide"),
        body(instances=["hello " * 400], parameters={"context_overflow": "slide"}),
        body(text="hello", temperature=0, seed=5),
    ],
    ids=repr,
)
async def test_extreme_but_legal_bodies_are_answered(client: httpx.AsyncClient, sent: bytes) -> None:
    response = await client.post(PREDICT, content=sent)
    assert response.status_code == 200, response.text
