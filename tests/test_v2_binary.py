"""V2's binary extension: framing both ways, and every way in which it can be broken."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from predictor.errors import InvalidRequest
from predictor.protocols import generate, v2
from predictor.protocols.tensors import Tensor, decode, encode, read_strings, write_strings
from predictor.protocols.wire import Limits, RawAnswer
from tests.test_v2 import ASKED, INFER, predictions

LENGTH = "inference-header-content-length"
LIMITS = Limits(max_instances=8, max_timeout_s=60)

FRAME = write_strings(["hello"])
TEXTS = st.lists(st.text(max_size=20), min_size=1, max_size=5)


def message(raw: bytes, *, shape: Any = None, size: Any = None, data: Any = None, **fields: Any) -> tuple[bytes, bytes]:
    """The JSON and what follows it."""
    given: dict[str, Any] = {"name": "text_input", "datatype": "BYTES", "shape": [1] if shape is None else shape}
    given["parameters"] = {"binary_data_size": len(raw) if size is None else size}
    if data is not None:
        given["data"] = data
    return json.dumps({"inputs": [given], "parameters": ASKED} | fields).encode(), raw


async def post(client: httpx.AsyncClient, head: bytes, raw: bytes, length: Any = None) -> httpx.Response:
    headers = {LENGTH: str(len(head) if length is None else length), "content-type": "application/octet-stream"}
    return await client.post(INFER, content=head + raw, headers=headers)


@given(TEXTS)
def test_text_is_framed_as_triton_frames_it(texts: list[str]) -> None:
    raw = write_strings(texts)
    assert raw == serialize_byte_tensor(np.array(texts, dtype=object)).item()
    assert [each.decode() for each in deserialize_bytes_tensor(raw)] == texts
    assert read_strings(raw, len(texts), "text_input") == texts


@given(TEXTS, st.data())
def test_a_frame_cut_short_or_with_more_behind_it_is_refused(texts: list[str], data: st.DataObject) -> None:
    raw = write_strings(texts)
    cut = data.draw(st.integers(0, len(raw) - 1))
    for broken in (raw[:cut], raw + data.draw(st.binary(min_size=1, max_size=9))):
        with pytest.raises(InvalidRequest, match="text_input"):
            read_strings(broken, len(texts), "text_input")


@given(st.binary(max_size=40), st.integers(1, 4))
def test_any_bytes_are_read_as_they_are_framed_or_refused(raw: bytes, count: int) -> None:
    with contextlib.suppress(InvalidRequest):
        assert write_strings(read_strings(raw, count, "text_input")) == raw


@given(TEXTS, st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.lists(st.booleans(), min_size=2))
def test_what_encode_writes_is_read_back_by_the_header(texts: list[str], seeds: list[int], binary: list[bool]) -> None:
    tensors = [Tensor("text", "BYTES", (len(texts),), texts), Tensor("seed", "UINT64", (len(seeds),), seeds)]
    answer = encode({"id": "é"}, list(zip(tensors, binary, strict=False)))
    if not any(binary[:2]):
        assert isinstance(answer, dict)
        assert [each["data"] for each in answer["outputs"]] == [texts, seeds]
        return
    assert isinstance(answer, RawAnswer)
    read = decode(answer.content, {name.lower(): value for name, value in answer.headers.items()})
    rest = read.raw
    for tensor, told, is_binary in zip(tensors, read.json["outputs"], binary, strict=False):
        if not is_binary:
            assert told["data"] == list(tensor.data)
            continue
        size = told["parameters"]["binary_data_size"]
        mine, rest = rest[:size], rest[size:]
        if tensor.name == "text":
            assert read_strings(mine, len(texts), "text") == texts
        else:
            assert np.frombuffer(mine, "<u8").tolist() == seeds
    assert rest == b""


async def test_raw_text_is_the_same_as_text_in_json(client: httpx.AsyncClient) -> None:
    prompts = ["hello", "Zoë\n\x00 \U0001f600"]
    response = await post(client, *message(write_strings(prompts), shape=[2, 1]))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    (output,) = response.json()["outputs"]
    assert output["data"] == await predictions(client, *prompts, **ASKED)


async def test_outputs_are_raw_where_they_are_asked_to_be(client: httpx.AsyncClient) -> None:
    asked = [{"name": "text_output", "parameters": {"binary_data": True}}, {"name": "seed"}]
    response = await post(client, *message(write_strings(["hello"]), outputs=asked))
    assert response.headers["content-type"] == "application/octet-stream"
    size = int(response.headers[LENGTH])
    text, seed = json.loads(response.content[:size])["outputs"]
    assert (seed["data"], "data" in text) == ([5], False)
    assert text["parameters"] == {"binary_data_size": len(response.content) - size}
    assert read_strings(response.content[size:], 1, "text_output") == await predictions(client, "hello", **ASKED)


async def test_binary_data_of_an_output_stands_over_that_of_the_request(client: httpx.AsyncClient) -> None:
    in_json = {"name": "text_output", "parameters": {"binary_data": False}}
    parameters = ASKED | {"binary_data_output": True}
    response = await post(client, *message(FRAME, outputs=[in_json], parameters=parameters))
    assert response.headers["content-type"] == "application/json"
    assert LENGTH not in response.headers
    assert response.json()["outputs"][0]["data"] == await predictions(client, "hello", **ASKED)
    response = await post(client, *message(FRAME, outputs=[{"name": "seed"}, in_json], parameters=parameters))
    seed, text = json.loads(response.content[: int(response.headers[LENGTH])])["outputs"]
    assert (seed["parameters"], "data" in text) == ({"binary_data_size": 8}, True)
    assert response.content[-8:] == (5).to_bytes(8, "little")


async def test_a_header_may_say_that_all_of_the_body_is_json(client: httpx.AsyncClient) -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hello"]}
    response = await post(client, json.dumps({"inputs": [tensor], "parameters": ASKED}).encode(), b"")
    assert response.json()["outputs"][0]["data"] == await predictions(client, "hello", **ASKED)


# name, JSON, what follows it, the header (None: the JSON's length), what the answer must contain; status 400
BROKEN: list[tuple[str, bytes, bytes, Any, str]] = [
    ("a header of letters", *message(FRAME), "abc", "Inference-Header-Content-Length"),
    ("an empty header", *message(FRAME), "", "Inference-Header-Content-Length"),
    ("a negative header", *message(FRAME), -1, "Inference-Header-Content-Length"),
    ("a header with a sign", *message(FRAME), "+5", "Inference-Header-Content-Length"),
    ("a header past the body", *message(FRAME), 10_000, "Inference-Header-Content-Length"),
    ("a header of 5,000 digits", *message(FRAME), "9" * 5000, "Inference-Header-Content-Length"),
    ("a header of 0", *message(FRAME), 0, "JSON"),
    ("a header that cuts the JSON", *message(FRAME), 20, "JSON"),
    ("a header that takes raw data in", *message(FRAME), len(message(FRAME)[0]) + 3, "JSON"),
    ("a size too small", *message(FRAME, size=8), None, "binary_data_size must be 9"),
    ("a size too large", *message(FRAME, size=10), None, "binary_data_size must be 9"),
    ("a size of 2^70", *message(FRAME, size=2**70), None, "binary_data_size must be 9"),
    ("a negative size", *message(FRAME, size=-9), None, "binary_data_size must be 9"),
    ("a size a float", *message(FRAME, size=9.0), None, "binary_data_size must be 9"),
    ("a size a string", *message(FRAME, size="9"), None, "binary_data_size must be 9"),
    ("a size true", *message(b"x", size=True), None, "binary_data_size must be 1"),
    ("data too", *message(FRAME, data=["hello"]), None, "data and binary_data_size"),
    ("an element longer than the data", *message(b"\x06\0\0\0hello"), None, "text_input[0]"),
    ("an element of 4 GiB", *message(b"\xff\xff\xff\xffhello"), None, "text_input[0]"),
    ("an element shorter than the data", *message(b"\x04\0\0\0hello"), None, "1 bytes are left"),
    ("half a length", *message(b"\x05\0"), None, "text_input[0]"),
    ("no element", *message(b""), None, "text_input[0]"),
    ("one element of two", *message(FRAME, shape=[2]), None, "text_input[1]"),
    ("two elements of one", *message(FRAME * 2), None, "9 bytes are left"),
    ("no UTF-8", *message(b"\x01\0\0\0\xff"), None, "not UTF-8"),
    ("a surrogate", *message(b"\x03\0\0\0\xed\xa0\x80"), None, "not UTF-8"),
    (
        "raw data that nothing tells of",
        json.dumps(
            {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hello"]}]}
        ).encode(),
        b"xyz",
        None,
        "3 bytes follow",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("head", "raw", "length", "named"), [each[1:] for each in BROKEN], ids=[each[0] for each in BROKEN]
)
async def test_a_broken_frame_is_refused_and_named(
    client: httpx.AsyncClient, head: bytes, raw: bytes, length: Any, named: str
) -> None:
    response = await post(client, head, raw, length)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]


async def test_a_header_of_digits_that_are_no_ascii_is_refused(client: httpx.AsyncClient) -> None:
    head, raw = message(FRAME)
    headers = [(LENGTH.encode(), b"\xb2")]  # a superscript two: str.isdigit takes it, int() does not
    response = await client.post(INFER, content=head + raw, headers=headers)
    assert response.status_code == 400


async def test_raw_data_without_the_header_is_refused(client: httpx.AsyncClient) -> None:
    head, raw = message(FRAME)
    response = await client.post(INFER, content=head + raw)
    assert response.status_code == 400
    response = await client.post(INFER, content=head)
    assert response.status_code == 400
    assert "Inference-Header-Content-Length" in response.json()["error"]


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(
        ['["a"]', '["\\ud800"]', "[[" * 900, "{", "1", [], [[]], {}, {"a": 1}, ["hello", "hello"], [1, 1]]
    )
)
NAMES = [
    *("inputs", "outputs", "parameters", "id", "model_name", "model_version", "name", "datatype", "shape", "data"),
    *("text_input", "binary_data_size", "binary_data", "binary_data_output", "stop", "logit_bias", "bad_words"),
    *("details", "logprobs", "stream", "n", "max_tokens", "__class__", "model_extra", "model_fields_set", ""),
]
VALID_INFER = {
    "id": "1",
    "model_name": "tiny",
    "inputs": [
        {
            "name": "text_input",
            "datatype": "BYTES",
            "shape": [2, 1],
            "data": [["hello"], ["the"]],
            "parameters": {"seed": 1, "bad_words": ["no"]},
        }
    ],
    "outputs": [{"name": "text_output", "parameters": {"binary_data": True}}],
    "parameters": {"binary_data_output": True, "stop": '["a", "b"]', "logit_bias": '{"5": 1}', "n": 2},
}
VALID_RAW = VALID_INFER | {
    "inputs": [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(FRAME)}}
    ]
}
VALID_GENERATE = {"text_input": "hello", "id": "1", "seed": 5, "parameters": {"stop": "a", "n": 2, "stream": False}}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """The (container, key) of everything within."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def damaged(draw: st.DrawFn, valid: dict[str, Any]) -> Any:
    """`valid` with a value or two replaced, removed or added."""
    body = {"body": copy.deepcopy(valid)}
    for _ in range(draw(st.integers(0, 2))):
        container, key = draw(st.sampled_from(list(places(body))))
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove" and container is not body:
            del container[key]
        elif how == "add" and isinstance(container, dict):
            container[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(VALUES))
        else:
            container[key] = copy.deepcopy(draw(VALUES))
    return body.get("body")


@settings(max_examples=500, deadline=None)
@given(
    damaged(VALID_INFER) | damaged(VALID_RAW),
    st.just(FRAME) | st.binary(max_size=9),
    st.sampled_from([0, 0, 0, 0, 1, -1]),
)
def test_a_damaged_message_is_refused_or_read(body: Any, raw: bytes, off: int) -> None:
    head, form = json.dumps(body).encode(), v2.infer_format("tiny")
    raw = raw if "binary_data_size" in head.decode() else b""
    with contextlib.suppress(InvalidRequest):
        exchange = form.parse(form.decode(head + raw, {LENGTH: str(len(head) + off)}), LIMITS)
        assert 1 <= len(exchange.requests) <= 8
        assert all(isinstance(request.prompt, str) for request in exchange.requests)


@settings(max_examples=300, deadline=None)
@given(damaged(VALID_GENERATE), st.booleans())
def test_a_damaged_body_of_generate_is_refused_or_read(body: Any, streamed: bool) -> None:
    form = generate.generate_format("tiny", streamed)
    with contextlib.suppress(InvalidRequest):
        exchange = form.parse(form.decode(json.dumps(body).encode(), {}), LIMITS)
        assert isinstance(exchange.requests[0].prompt, str)
