"""Seldon's protocol: its clients' requests, every field with its default, every refusal, and rewards."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI
from google.protobuf import json_format, struct_pb2
from prometheus_client import REGISTRY

from predictor.errors import RateLimited
from predictor.server.seldon import _MAX_REVISIONS
from tests.older_bodies import by_v1
from tests.older_bodies import untouched as untouched  # a fixture
from tests.test_compat import older_server

SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 11, "max_new_tokens": 9, "ignore_eos": True}
PREDICT = ["/predict", "/api/v1.0/predictions"]
FEEDBACK = ["/send-feedback", "/api/v1.0/feedback"]


async def told(client: httpx.AsyncClient, body: Any, path: str = "/predict") -> Any:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response: httpx.Response, status: int = 400) -> str:
    """The text of a refusal in Seldon's form."""
    assert response.status_code == status, response.text
    (failure,) = response.json().values()
    assert list(response.json()) == ["status"]
    assert (failure["code"], failure["status"]) == (status, "FAILURE")
    assert failure["reason"].isupper()
    assert not any(word in failure["info"] for word in ("Traceback", "Error:", "predictor.", "pydantic"))
    return str(failure["info"])


@pytest.mark.parametrize("path", PREDICT)
async def test_the_pipelines_request(client: httpx.AsyncClient, path: str) -> None:
    answer = await told(client, {"data": {"ndarray": ["To be, or not to be"]}}, path)
    assert list(answer) == ["data", "meta"]
    assert answer["data"]["names"] == []
    (text,) = answer["data"]["ndarray"]
    assert isinstance(text, str)
    assert len(answer["meta"]["puid"]) == 32
    assert answer["meta"]["tags"] == {}


async def test_every_item_is_answered_with_v1s_text(client: httpx.AsyncClient) -> None:
    prompts = ["hello world", "the", ""]
    wanted = [await by_v1(client, prompt, **SAMPLED) for prompt in prompts]
    answer = await told(client, {"data": {"ndarray": prompts}, "meta": {"tags": SAMPLED}})
    assert answer["data"]["ndarray"] == wanted


async def test_the_defaults_are_100_tokens_at_07(client: httpx.AsyncClient) -> None:
    asked = {"seed": 3, "ignore_eos": True}
    wanted = await by_v1(client, "the", max_new_tokens=100, temperature=0.7, **asked)
    answer = await told(client, {"data": {"ndarray": ["the"]}, "meta": {"tags": asked}})
    assert answer["data"]["ndarray"] == [wanted]


async def test_only_the_default_of_100_tokens_is_cut_to_the_context(client: httpx.AsyncClient) -> None:
    prompt, asked = "the " * 40, {"seed": 3, "ignore_eos": True}
    room = 128 - (await by_v1(client, prompt, max_new_tokens=1, details=True))["prompt_tokens"]
    assert room < 100
    wanted = await by_v1(client, prompt, max_new_tokens=room, **asked)
    assert (await told(client, {"strData": prompt, "meta": {"tags": asked}}))["strData"] == wanted
    tags = asked | {"max_new_tokens": 100}
    message = error_of(await client.post("/predict", json={"strData": prompt, "meta": {"tags": tags}}))
    assert "max_new_tokens" in message


async def test_an_answer_has_the_shape_and_the_names_of_the_request(client: httpx.AsyncClient) -> None:
    meta = {"puid": "p-1", "tags": {"max_new_tokens": 3, "seed": 1}}
    flat = await told(client, {"data": {"names": ["a"], "ndarray": ["hello", "the"]}, "meta": meta})
    rows = await told(client, {"data": {"names": ["a"], "ndarray": [["hello"], ["the"]]}, "meta": meta})
    mixed = await told(client, {"data": {"names": [], "ndarray": ["hello", ["the"]]}, "meta": meta})
    first, second = flat["data"]["ndarray"]
    assert rows["data"] == {"names": ["a"], "ndarray": [[first], [second]]}
    assert mixed["data"] == {"names": [], "ndarray": [first, [second]]}
    assert flat["meta"] == rows["meta"] == meta
    string = await told(client, {"strData": "hello", "meta": meta})
    assert string == {"strData": first, "meta": meta}


async def test_messages_without_an_id_get_one_of_their_own(client: httpx.AsyncClient) -> None:
    body = {"strData": "hello", "meta": {"puid": "", "tags": {"max_new_tokens": 1}}}
    first, second = (await told(client, body), await told(client, body))
    assert first["meta"]["puid"] != second["meta"]["puid"]


async def test_the_prompt_can_come_along(client: httpx.AsyncClient) -> None:
    tags = {"max_new_tokens": 3, "seed": 1}
    (text,) = (await told(client, {"data": {"ndarray": ["hello"]}, "meta": {"tags": tags}}))["data"]["ndarray"]
    whole = await told(client, {"data": {"ndarray": ["hello"]}, "meta": {"tags": tags | {"return_full_text": True}}})
    assert whole["data"]["ndarray"] == ["hello" + text]


async def test_tags_that_protobuf_has_made_doubles_are_integers_again(client: httpx.AsyncClient) -> None:
    tags = {"max_new_tokens": 3, "seed": 1, "temperature": 1, "do_sample": True, "stop": ["x"]}
    sent = json_format.MessageToDict(json_format.ParseDict(tags, struct_pb2.Struct()))
    assert "3.0" in json.dumps(sent)
    answer = await told(client, {"strData": "hello", "meta": {"tags": sent}})
    assert answer["strData"] == (await told(client, {"strData": "hello", "meta": {"tags": tags}}))["strData"]


async def test_seldons_client_sends_a_form(client: httpx.AsyncClient) -> None:
    message = {"data": {"ndarray": ["hello & the é"]}, "meta": {"tags": {"max_new_tokens": 3, "seed": 1}}}
    response = await client.post("/predict", data={"json": json.dumps(message)})
    assert response.status_code == 200, response.text
    assert response.json()["data"] == (await told(client, message))["data"]


async def test_curls_form_content_type_is_read_as_json(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}
    content = b'{"strData": "json=", "meta": {"tags": {"max_new_tokens": 1}}}'
    assert (await client.post("/predict", content=content, headers=headers)).status_code == 200


TEXT = {"data": {"ndarray": ["hello"]}}
# body, what the refusal names
REFUSED: list[tuple[Any, str]] = [
    ([], "object"),
    (None, "object"),
    ({}, "data"),
    ({"data": None}, "data"),
    ({"data": []}, "data"),
    ({"data": {}}, "data.ndarray"),
    ({"data": {"ndarray": []}}, "data.ndarray"),
    ({"data": {"ndarray": None}}, "data.ndarray"),
    ({"data": {"ndarray": "hello"}}, "data.ndarray"),
    ({"data": {"ndarray": [1]}}, "data.ndarray[0]"),
    ({"data": {"ndarray": ["a", None]}}, "data.ndarray[1]"),
    ({"data": {"ndarray": [["a", "b"]]}}, "data.ndarray[0]"),
    ({"data": {"ndarray": [[]]}}, "data.ndarray[0]"),
    ({"data": {"ndarray": [[["a"]]]}}, "data.ndarray[0]"),
    ({"data": {"ndarray": ["a"] * 9}}, "at most 8"),
    ({"data": {"ndarray": ["a", "hello " * 200]}}, "data.ndarray[1]"),
    ({"data": {"names": "a", "ndarray": ["a"]}}, "data.names"),
    ({"data": {"names": [1], "ndarray": ["a"]}}, "data.names"),
    ({"data": {"names": None, "ndarray": ["a"]}}, "data.names"),
    ({"data": {"tensor": {"shape": [1], "values": [1]}}}, "data.tensor"),
    ({"data": {"tftensor": {}}}, "data.tftensor"),
    ({"data": {"ndarray": ["a"], "colour": 1}}, "colour"),
    ({"strData": 5}, "strData"),
    ({"strData": None}, "strData"),
    ({"strData": "hello " * 200}, "strData"),
    ({"strData": "a"} | TEXT, "either"),
    ({"binData": "YQ=="}, "binData"),
    ({"jsonData": ["a"]}, "jsonData"),
    ({"customData": {}}, "customData"),
    (TEXT | {"status": {}}, "status"),
    (TEXT | {"parameters": {}}, "parameters"),
    (TEXT | {"meta": None}, "meta"),
    (TEXT | {"meta": []}, "meta"),
    (TEXT | {"meta": {"puid": 5}}, "meta.puid"),
    (TEXT | {"meta": {"routing": {}}}, "routing"),
    (TEXT | {"meta": {"metrics": []}}, "metrics"),
    (TEXT | {"meta": {"requestPath": {}}}, "requestPath"),
    (TEXT | {"meta": {"tags": None}}, "meta.tags"),
    (TEXT | {"meta": {"tags": ["seed"]}}, "meta.tags"),
    *[
        (TEXT | {"meta": {"tags": {name: value}}}, name)
        for name, value in [
            ("colour", "red"), ("temperature", -1), ("temperature", "0.7"), ("temperature", None), ("top_k", -1.0),
            ("top_k", 2.5), ("top_k", 100_000), ("top_p", 0), ("top_p", 90), ("seed", -1), ("seed", 1e18),
            ("max_new_tokens", 0), ("max_new_tokens", 128), ("max_tokens", 1.5), ("stop", [""]), ("do_sample", "yes"),
            ("timeout_s", 61), ("n", 2), ("num_return_sequences", 2), ("details", True), ("logprobs", 1),
            ("stream", True),
        ]
    ],
]  # fmt: skip


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("body", "name"), REFUSED, ids=lambda value: str(value)[:60])
async def test_a_wrong_message_is_refused_by_the_fields_name(client: httpx.AsyncClient, body: Any, name: str) -> None:
    message = error_of(await client.post("/predict", content=json.dumps(body)))
    assert name in message
    assert len(message) < 250


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("form", "name"),
    [("json=", "JSON"), ("json=%ff", "UTF-8"), ("json={}&json={}", "twice"), ("json={}&x=1", "x"), ("x=1", "JSON")],
)
async def test_a_wrong_form_is_refused(client: httpx.AsyncClient, form: str, name: str) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
    assert name in error_of(await client.post("/predict", content=form, headers=headers))


async def test_other_errors_have_seldons_form_too(client: httpx.AsyncClient) -> None:
    error_of(await client.post("/predict", content=b"x" * 70_000), 413)
    error_of(await client.post("/send-feedback", content=b"x" * 70_000), 413)
    error_of(await client.post("/send-feedback", content=b"x", headers={"content-type": "image/png"}), 415)


# Rewards.

MESSAGE = {"data": {"ndarray": ["To be"]}}


def rewards(revision: str = "") -> tuple[float, float]:
    """The number of rewards and their sum."""
    labels = {"model_name": "tiny", "revision": revision}
    return tuple(
        REGISTRY.get_sample_value(f"predictor_feedback_reward_{each}", labels) or 0 for each in ("count", "sum")
    )


async def send(client: httpx.AsyncClient, body: Any, path: str = "/send-feedback") -> httpx.Response:
    return await client.post(path, json=body)


@pytest.mark.parametrize("path", FEEDBACK)
async def test_a_reward_goes_into_a_metric_whose_mean_can_be_told(client: httpx.AsyncClient, path: str) -> None:
    count, total = rewards()
    for reward in (1, 0.25, 0):
        body = {"request": MESSAGE, "response": MESSAGE, "truth": MESSAGE, "reward": reward}
        response = await send(client, body, path)
        assert (response.status_code, response.json()) == (200, {"data": {"names": [], "ndarray": []}, "meta": {}})
    assert rewards() == (count + 3, total + 1.25)
    lines = (await client.get("/metrics")).text.splitlines()
    assert f'predictor_feedback_reward_count{{model_name="tiny",revision=""}} {count + 3:.1f}' in lines


async def test_a_reward_of_0_may_be_left_out_as_protobuf_does(client: httpx.AsyncClient) -> None:
    count, total = rewards()
    assert (await send(client, {"request": MESSAGE, "response": MESSAGE})).status_code == 200
    form = urlencode({"json": json.dumps({"request": MESSAGE})})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert (await client.post("/send-feedback", content=form, headers=headers)).status_code == 200
    assert rewards() == (count + 2, total)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "reward"),
        ([], "object"),
        ({"reward": None}, "reward"),
        ({"reward": "1"}, "reward"),
        ({"reward": True}, "reward"),
        ({"reward": [1]}, "reward"),
        ({"reward": -0.01}, "reward"),
        ({"reward": 1.01}, "reward"),
        ({"reward": 10**300}, "reward"),
        ({"reward": 1, "colour": 1}, "colour"),
        ({"reward": 1, "request": None}, "request"),
        ({"reward": 1, "response": "text"}, "response"),
        ({"reward": 1, "truth": [1]}, "truth"),
        ({"reward": 1, "truth": {"text": 1}}, "text"),
        ({"reward": 1, "response": {"meta": []}}, "response.meta"),
        ({"reward": 1, "response": {"meta": {"requestPath": []}}}, "requestPath"),
        ({"reward": 1, "response": {"meta": {"requestPath": {"tiny": 5}}}}, "requestPath"),
        # Without Knative no answer of this server tells a revision.
        ({"reward": 1, "response": {"meta": {"requestPath": {"tiny": "tiny-00001"}}}}, "tiny-00001"),
    ],
)
async def test_a_wrong_feedback_is_refused_and_counts_nothing(client: httpx.AsyncClient, body: Any, name: str) -> None:
    before = rewards()
    assert name in error_of(await send(client, body))
    assert rewards() == before


@pytest.mark.parametrize("reward", [b"NaN", b"Infinity", b"1e400"])
async def test_a_reward_that_is_not_finite_is_refused(client: httpx.AsyncClient, reward: bytes) -> None:
    error_of(await client.post("/send-feedback", content=b'{"reward": ' + reward + b"}"))


async def test_a_caller_who_is_not_admitted_sends_no_reward(predictor: Any) -> None:
    async def admit(*_: object) -> None:
        raise RateLimited("at most 1 requests a minute", 7)

    before = rewards()
    app = older_server(predictor, admit)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await send(client, {"reward": 1})
    assert "a minute" in error_of(response, 429)
    assert response.headers["retry-after"] == "7"
    assert rewards() == before


@pytest.fixture
def of_a_revision(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """A server that Knative runs as the third revision of a service."""
    monkeypatch.setenv("K_REVISION", "gpt-predictor-00003")
    return older_server(predictor)


def about(revision: str) -> dict[str, Any]:
    return {"reward": 1, "response": MESSAGE | {"meta": {"requestPath": {"tiny": revision}}}}


async def test_a_reward_counts_for_the_revision_that_gave_the_answer(of_a_revision: FastAPI) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(of_a_revision), base_url="http://test") as client:
        answer = await told(client, {"strData": "hello", "meta": {"tags": {"max_new_tokens": 1}}})
        assert answer["meta"]["requestPath"] == {"tiny": "gpt-predictor-00003"}
        # As a client sends it: with the answer, to whichever replica.
        assert (await send(client, {"reward": 0.5, "response": answer})).status_code == 200
        assert (await send(client, {"reward": 0.5})).status_code == 200
        assert (await send(client, about("gpt-predictor-00002"))).status_code == 200
    assert rewards("gpt-predictor-00003") == (2, 1.0)
    assert rewards("gpt-predictor-00002") == (1, 1.0)


@pytest.mark.parametrize(
    "revision", ["", "other-00002", "gpt-predictor-2", "gpt-predictor-x0001", "gpt-predictor-00002\n", "a" * 5_000]
)
async def test_a_revision_of_another_service_makes_no_series(of_a_revision: FastAPI, revision: str) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(of_a_revision), base_url="http://test") as client:
        assert "no revision of this service" in error_of(await send(client, about(revision)))
    assert rewards(revision) == (0, 0) or revision == ""


async def test_callers_cannot_make_series_without_end(of_a_revision: FastAPI) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(of_a_revision), base_url="http://test") as client:
        codes = [
            (await send(client, about(f"gpt-predictor-{number:05}"))).status_code
            for number in range(100, 100 + _MAX_REVISIONS + 2)
        ]
        assert codes == [200] * _MAX_REVISIONS + [400] * 2
        assert (await send(client, about("gpt-predictor-00100"))).status_code == 200
        assert (await send(client, about("gpt-predictor-00003"))).status_code == 200
