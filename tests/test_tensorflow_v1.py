"""TensorFlow Serving's REST protocol as a table: what is asked, and the status and body or text that answer it.

The rows come from its api_rest.md and from the texts of its http_rest_api_util.cc, json_tensor.cc, server_core.cc,
get_model_status_impl.cc and classifier.cc.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from kserve import InferenceRESTClient
from kserve.inference_client import RESTConfig
from openai import AsyncOpenAI, NotFoundError

MODEL = "/v1/models/tiny"
PREDICT = MODEL + ":predict"

# The end of text at once, and the prompt before it: predictions that are known exactly.
ECHO = {"parameters": {"max_new_tokens": 1, "logit_bias": {"0": 100}, "return_full_text": True}}
TWICE = {"parameters": ECHO["parameters"] | {"n": 2}}

AVAILABLE = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
STATUS = {"model_version_status": [AVAILABLE]}
STRINGS = {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}}
SIGNATURE = {
    "inputs": {"prompt": STRINGS | {"name": "prompt:0"}},
    "outputs": {"text": STRINGS | {"name": "text:0"}},
    "method_name": "tensorflow/serving/predict",
}
METADATA = {
    "model_spec": {"name": "tiny", "signature_name": "", "version": "1"},
    "metadata": {"signature_def": {"signature_def": {"serving_default": SIGNATURE}}},
}

ROWS = ECHO | {"instances": ["a", "b"]}
COLUMN = ECHO | {"inputs": ["a", "b"]}
PREDICTIONS = {"predictions": ["a", "b"]}
OUTPUTS = {"outputs": ["a", "b"]}

# method, path, body, status, the whole answer or a text of {"error": ...}
TABLE: list[tuple[str, str, Any, int, Any]] = [
    # The row form.
    ("POST", PREDICT, ROWS, 200, PREDICTIONS),
    ("POST", PREDICT, ECHO | {"instances": ["a"]}, 200, {"predictions": ["a"]}),
    ("POST", PREDICT, ECHO | {"instances": [{"prompt": "a"}, {"prompt": "b"}]}, 200, PREDICTIONS),
    ("POST", PREDICT, ECHO | {"instances": [{"b64": "YQ=="}, {"b64": "Yg"}]}, 200, PREDICTIONS),
    ("POST", PREDICT, ECHO | {"instances": [{"prompt": {"b64": "w6nwn5iA"}}]}, 200, {"predictions": ["é😀"]}),
    ("POST", PREDICT, TWICE | {"instances": ["a", "b"]}, 200, {"predictions": [["a", "a"], ["b", "b"]]}),
    # The column form: an output has its input's shape, and the only one has no name.
    ("POST", PREDICT, COLUMN, 200, OUTPUTS),
    ("POST", PREDICT, ECHO | {"inputs": "a"}, 200, {"outputs": "a"}),
    ("POST", PREDICT, ECHO | {"inputs": ["a"]}, 200, {"outputs": ["a"]}),
    ("POST", PREDICT, ECHO | {"inputs": {"prompt": "a"}}, 200, {"outputs": "a"}),
    ("POST", PREDICT, ECHO | {"inputs": {"prompt": ["a", "b"]}}, 200, OUTPUTS),
    ("POST", PREDICT, ECHO | {"inputs": {"b64": "YQ=="}}, 200, {"outputs": "a"}),
    ("POST", PREDICT, ECHO | {"inputs": {"prompt": {"b64": "YQ=="}}}, 200, {"outputs": "a"}),
    ("POST", PREDICT, ECHO | {"inputs": ["a", {"b64": "Yg=="}]}, 200, OUTPUTS),
    ("POST", PREDICT, TWICE | {"inputs": "a"}, 200, {"outputs": ["a", "a"]}),
    # Signatures.
    ("POST", PREDICT, ROWS | {"signature_name": "serving_default"}, 200, PREDICTIONS),
    ("POST", PREDICT, COLUMN | {"signature_name": "serving_default"}, 200, OUTPUTS),
    ("POST", PREDICT, ROWS | {"signature_name": ""}, 200, PREDICTIONS),
    ("POST", PREDICT, ROWS | {"signature_name": "x"}, 400, 'Serving signature name: "x" not found in signature def'),
    ("POST", PREDICT, {"signature_name": 100}, 400, "'signature_name' key must be a string value."),
    ("POST", PREDICT, ROWS | {"signature_name": None}, 400, "'signature_name' key must be a string value."),
    # Versions and labels.
    ("POST", f"{MODEL}/versions/1:predict", ROWS, 200, PREDICTIONS),
    ("POST", f"{MODEL}/versions/01:predict", ROWS, 200, PREDICTIONS),
    ("POST", f"{MODEL}/versions/1:predict", COLUMN, 200, OUTPUTS),
    ("POST", f"{MODEL}/labels/stable:predict", ROWS, 200, PREDICTIONS),
    ("POST", f"{MODEL}/versions/2:predict", ROWS, 404, {"error": "Servable not found for request: Specific(tiny, 2)"}),
    (
        "POST",
        f"{MODEL}/versions/9223372036854775807:predict",
        ROWS,
        404,
        {"error": "Servable not found for request: Specific(tiny, 9223372036854775807)"},
    ),
    (
        "POST",
        f"{MODEL}/versions/9223372036854775808:predict",
        ROWS,
        400,
        {"error": "Failed to convert version: 9223372036854775808 to numeric."},
    ),
    ("POST", f"{MODEL}/versions/{'9' * 5000}:predict", ROWS, 400, "Failed to convert version: 999"),
    ("POST", f"{MODEL}/versions/x:predict", ROWS, 400, f"Malformed request: POST {MODEL}/versions/x:predict"),
    ("POST", f"{MODEL}/versions/x:predict", ROWS, 400, "Failed to convert version: x"),
    ("POST", f"{MODEL}/versions/-1:predict", ROWS, 400, "Failed to convert version: -1"),
    ("POST", f"{MODEL}/versions/²:predict", ROWS, 400, "Failed to convert version: ²"),
    ("POST", f"{MODEL}/labels/new:predict", ROWS, 400, {"error": "Unrecognized servable version label: new"}),
    ("POST", "/v1/models/foo:predict", ROWS, 404, {"error": "Servable not found for request: Latest(foo)"}),
    (
        "POST",
        "/v1/models/foo/versions/50:predict",
        ROWS,
        404,
        {"error": "Servable not found for request: Specific(foo, 50)"},
    ),
    ("POST", "/v1/models/foo/labels/stable:predict", ROWS, 404, "Servable not found for request: Latest(foo)"),
    # Bodies.
    ("POST", PREDICT, b"", 400, {"error": "JSON Parse error: The document is empty"}),
    ("POST", PREDICT, b"instances = [1, 2]", 400, "JSON Parse error: "),
    ("POST", PREDICT, b'{"instances": ["a"]', 400, "JSON Parse error: "),
    ("POST", PREDICT, [], 400, {"error": "JSON Value: [] Is not object"}),
    ("POST", PREDICT, {}, 400, {"error": "Missing 'inputs' or 'instances' key"}),
    ("POST", PREDICT, {"signature_name": "serving_default"}, 400, "Missing 'inputs' or 'instances' key"),
    ("POST", PREDICT, ROWS | COLUMN, 400, "expecting only one of 'inputs' or 'instances' keys to exist"),
    ("POST", PREDICT, {"instances": "a"}, 400, "Excepting 'instances' to be an list/array"),
    ("POST", PREDICT, {"instances": {"prompt": "a"}}, 400, "Excepting 'instances' to be an list/array"),
    ("POST", PREDICT, {"instances": []}, 400, "JSON Value: {\"instances\": []} No values in 'instances' array"),
    ("POST", PREDICT, {"instances": [1, 2]}, 400, "JSON Value: 1 Type: Number is not of expected type: string"),
    ("POST", PREDICT, {"instances": ["a", None]}, 400, "Failed to process element: 1 of 'instances' list."),
    ("POST", PREDICT, {"instances": [{"prompt": 1}]}, 400, "Failed to process element: 0 key: prompt of 'instances'"),
    ("POST", PREDICT, {"inputs": {"x": ["a"]}}, 400, "Missing named input: prompt in 'inputs' object."),
    ("POST", PREDICT, {"inputs": ["a", ["b"]]}, 400, "Encountered list at unexpected level: 1 expected < 1"),
    ("POST", PREDICT, {"inputs": {"prompt": {}}}, 400, "JSON Value: {} not formatted correctly for base64 data"),
    ("POST", PREDICT, {"inputs": {"b64": "!"}}, 400, "Unable to base64 decode"),
    # Status.
    ("GET", f"{MODEL}/versions/1", None, 200, STATUS),
    ("GET", f"{MODEL}/labels/stable", None, 200, STATUS),
    ("GET", "/v1/models/foo", None, 404, "Could not find any versions of model foo"),
    ("GET", "/v1/models/foo", None, 404, "Servable not found for request: Latest(foo)"),
    ("GET", f"{MODEL}/versions/2", None, 404, "Could not find version 2 of model tiny"),
    ("GET", f"{MODEL}/versions/2", None, 404, "Servable not found for request: Specific(tiny, 2)"),
    ("GET", f"{MODEL}/versions/9223372036854775808", None, 400, "Failed to convert version: 9223372036854775808"),
    ("GET", f"{MODEL}/labels/new", None, 400, "Unrecognized servable version label: new"),
    # Metadata.
    ("GET", f"{MODEL}/metadata", None, 200, METADATA),
    ("GET", f"{MODEL}/versions/1/metadata", None, 200, METADATA),
    ("GET", f"{MODEL}/labels/stable/metadata", None, 200, METADATA),
    ("GET", "/v1/models/foo/metadata", None, 404, {"error": "Servable not found for request: Latest(foo)"}),
    ("GET", f"{MODEL}/versions/2/metadata", None, 404, "Servable not found for request: Specific(tiny, 2)"),
    ("GET", f"{MODEL}/labels/new/metadata", None, 400, "Unrecognized servable version label: new"),
    # Methods that the signature does not have.
    (
        "POST",
        f"{MODEL}:classify",
        {"examples": [{"x": 1}]},
        400,
        {
            "error": "Expected classification signature method_name to be tensorflow/serving/classify. "
            "Was: tensorflow/serving/predict"
        },
    ),
    ("POST", f"{MODEL}:regress", {"examples": [{"x": 1}]}, 400, "Expected regression signature method_name to be "),
    ("POST", f"{MODEL}/versions/1:classify", {}, 400, "tensorflow/serving/classify"),
    ("POST", f"{MODEL}/labels/stable:regress", {}, 400, "tensorflow/serving/regress"),
    ("POST", "/v1/models/foo:classify", {}, 404, "Servable not found for request: Latest(foo)"),
    # Paths that fit no route.
    *(
        (method, path, None, 400, {"error": f"Malformed request: {method} {path}"})
        for method, path in [
            ("GET", PREDICT),
            ("GET", f"{MODEL}/versions/1:predict"),
            ("GET", f"{MODEL}/version/50:predict"),
            ("GET", f"{MODEL}/signature"),
            ("GET", f"{MODEL}/"),
            ("GET", "/v1/models/"),
            ("POST", "/v1/models"),
            ("POST", MODEL),
            ("POST", f"{MODEL}:train"),
            ("POST", f"{MODEL}:PREDICT:predict"),
            ("POST", f"{MODEL}/versions:predict"),
            ("POST", f"{MODEL}/version/50:regress"),
            ("POST", f"{MODEL}/versions/1/labels/stable:predict"),
            ("POST", f"{MODEL}/versions/1:explain"),
            ("POST", f"{MODEL}/metadata"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "answer"), TABLE, ids=[f"{row[0]} {row[1]} {row[2]}"[:70] for row in TABLE]
)
async def test_tensorflow_servings_protocol(
    client: httpx.AsyncClient, method: str, path: str, body: Any, status: int, answer: Any
) -> None:
    sent = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    # As curl -d types it: TensorFlow Serving does not look at the type.
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = await client.request(method, path, content=sent, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    if isinstance(answer, str):
        assert list(response.json()) == ["error"]
        assert answer in response.json()["error"]
    else:
        assert response.json() == answer


# KServe's, TensorFlow Serving's and OpenAI's facts in one object.


async def test_a_model_answers_kserves_tensorflows_and_openais_fields_in_one_object(client: httpx.AsyncClient) -> None:
    told = (await client.get(MODEL)).json()
    created = told.pop("created")
    openai = {"id": "tiny", "object": "model", "owned_by": "predictor", "root": "tiny"}
    assert told == {"name": "tiny", "ready": True} | STATUS | openai
    everything = (await client.get("/v1/models")).json()
    listed = [openai | {"created": created}]
    assert everything == {"models": ["tiny"], "object": "list", "data": listed}
    assert isinstance(created, int)


@pytest.mark.parametrize(("patched", "state"), [("loading", "LOADING"), ("stopping", "UNLOADING"), ("failed", "END")])
async def test_a_model_that_cannot_answer_is_503_and_tells_its_state(
    client: httpx.AsyncClient, predictor: Any, monkeypatch: pytest.MonkeyPatch, patched: str, state: str
) -> None:
    if patched == "loading":
        monkeypatch.setattr(predictor, "state", "LOADING")
    elif patched == "stopping":
        monkeypatch.setattr(predictor._stopping, "is_set", lambda: True)
    else:
        monkeypatch.setattr(predictor.language_model().backend._worker, "_failed", True)
    for path in ("", "/versions/1", "/labels/stable"):
        response = await client.get(MODEL + path)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        told = response.json()
        (version,) = told["model_version_status"]
        assert (version["version"], version["state"]) == ("1", state)
        assert version["status"]["error_code"] != "OK"
        assert told["error"] == version["status"]["error_message"] != ""
        assert told.get("ready", False) is False
    metadata = await client.get(f"{MODEL}/metadata")
    assert (metadata.status_code, list(metadata.json())) == (503, ["error"])
    assert (await client.get("/v1/models")).json()["models"] == ["tiny"]


async def test_an_unloaded_model_is_not_found_and_not_listed(
    client: httpx.AsyncClient, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "state", "END")
    for method, path in (
        ("GET", MODEL),
        ("GET", f"{MODEL}/versions/1"),
        ("GET", f"{MODEL}/metadata"),
        ("POST", PREDICT),
    ):
        response = await client.request(method, path, content=json.dumps(ROWS))
        assert response.status_code == 404
        assert "Servable not found for request: Latest(tiny)" in response.json()["error"]
    assert (await client.get("/v1/models")).json() == {"models": [], "object": "list", "data": []}


# Clients as they are.


async def test_kserves_own_client_asks_v1(client: httpx.AsyncClient) -> None:
    kserve = InferenceRESTClient(RESTConfig(transport=client._transport, protocol="v1"))
    assert await kserve.is_server_live("http://test")
    assert await kserve.is_model_ready("http://test", "tiny")
    assert await kserve.infer("http://test", ROWS, "tiny") == PREDICTIONS
    assert await kserve.infer("http://test", COLUMN, "tiny") == OUTPUTS
    with pytest.raises(httpx.HTTPStatusError, match="No values in 'instances' array, '400"):
        await kserve.infer("http://test", {"instances": []}, "tiny")
    with pytest.raises(httpx.HTTPStatusError, match="tiny has no explainer, '501"):
        await kserve.explain("http://test", "tiny", ROWS)


async def test_openais_own_client_lists_the_models_of_v1(client: httpx.AsyncClient) -> None:
    openai = AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client)
    (listed,) = (await openai.models.list()).data
    for model in (listed, await openai.models.retrieve("tiny")):
        assert (model.id, model.object, model.owned_by) == ("tiny", "model", "predictor")
        assert model.created == listed.created
    with pytest.raises(NotFoundError):
        await openai.models.retrieve("foo")
