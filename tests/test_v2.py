"""KServe's V2 through its own application, on a tiny model: what is answered, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from kserve import ModelRepository

from predictor import __version__
from predictor.server import health, v2
from predictor.server.ask import Asker
from predictor.server.errors import add_error_handlers
from predictor.server.middleware import Boundary
from predictor.server.predictor import Predictor
from predictor.settings import load_settings

INFER = "/v2/models/tiny/infer"
ASKED = {"seed": 5, "max_new_tokens": 6, "temperature": 2}


def text_input(*prompts: str, **changes: Any) -> dict[str, Any]:
    return {"name": "text_input", "datatype": "BYTES", "shape": [len(prompts)], "data": list(prompts)} | changes


async def infer(client: httpx.AsyncClient, *prompts: str, path: str = INFER, **fields: Any) -> dict[str, Any]:
    response = await client.post(path, json={"inputs": [text_input(*prompts)]} | fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return dict(response.json())


async def predictions(client: httpx.AsyncClient, *prompts: str, **parameters: Any) -> list[Any]:
    body = {"instances": list(prompts), "parameters": parameters}
    return list((await client.post("/v1/models/tiny:predict", json=body)).json()["predictions"])


async def test_the_text_is_that_of_predict(client: httpx.AsyncClient) -> None:
    wanted = await predictions(client, "hello", "the word", **ASKED)
    answer = await infer(client, "hello", "the word", parameters=ASKED, id="a-1")
    assert answer == {
        "model_name": "tiny",
        "model_version": "1",
        "id": "a-1",
        "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [2], "data": wanted}],
    }
    assert await infer(client, "hello", "the word", parameters=ASKED, id="a-1", path=versioned("infer")) == answer


def versioned(verb: str) -> str:
    return f"/v2/models/tiny/versions/1/{verb}"


@pytest.mark.parametrize("data", [["hello", "there"], [["hello"], ["there"]]], ids=["flat", "nested"])
async def test_a_matrix_of_one_column_keeps_its_shape(client: httpx.AsyncClient, data: list[Any]) -> None:
    body = {"inputs": [text_input(shape=[2, 1], data=data)], "parameters": ASKED}
    (output,) = (await client.post(INFER, json=body)).json()["outputs"]
    assert output["shape"] == [2, 1]
    assert output["data"] == await predictions(client, "hello", "there", **ASKED)


async def test_samples_are_columns(client: httpx.AsyncClient) -> None:
    wanted = await predictions(client, "hello", "there", n=3, **ASKED)
    (output,) = (await infer(client, "hello", "there", parameters={"n": 3, **ASKED}))["outputs"]
    assert output["shape"] == [2, 3]
    assert output["data"] == wanted[0] + wanted[1]


async def test_an_answer_without_an_id_has_none(client: httpx.AsyncClient) -> None:
    assert "id" not in await infer(client, "hello")
    assert "id" not in await infer(client, "hello", id=None, outputs=None, parameters=None)
    assert (await infer(client, "hello", id=""))["id"] == ""


async def test_parameters_of_the_input_stand_over_those_of_the_request(client: httpx.AsyncClient) -> None:
    body = {
        "inputs": [text_input("hello", parameters={"max_tokens": 6})],
        "parameters": ASKED | {"max_new_tokens": 2},
    }
    (output,) = (await client.post(INFER, json=body)).json()["outputs"]
    assert output["data"] == await predictions(client, "hello", **ASKED)


async def test_full_text_begins_with_each_prompt(client: httpx.AsyncClient) -> None:
    (output,) = (await infer(client, "hello", "there", parameters={"n": 2, "return_full_text": True}))["outputs"]
    assert [text[:5] for text in output["data"]] == ["hello", "hello", "there", "there"]


async def test_details_add_every_output(client: httpx.AsyncClient) -> None:
    asked = ASKED | {"details": True, "logprobs": 2, "n": 2}
    (told,) = await predictions(client, "hello", **asked)
    outputs = {each["name"]: each for each in (await infer(client, "hello", parameters=asked))["outputs"]}
    datatypes = {name: each["datatype"] for name, each in outputs.items()}
    assert datatypes == {
        "text_output": "BYTES",
        "finish_reason": "BYTES",
        "prompt_tokens": "INT64",
        "completion_tokens": "INT64",
        "seed": "UINT64",
        "dtype": "BYTES",
        "logprobs": "BYTES",
    }
    assert all(each["shape"] == [1, 2] for each in outputs.values())
    for name, key in (("text_output", "text"), *((name, name) for name in list(outputs)[1:-1])):
        assert outputs[name]["data"] == [sample[key] for sample in told], name
    assert [json.loads(text) for text in outputs["logprobs"]["data"]] == [sample["logprobs"] for sample in told]


async def test_named_outputs_come_in_the_order_asked(client: httpx.AsyncClient) -> None:
    asked = [{"name": "completion_tokens"}, {"name": "text_output", "parameters": {"binary_data": False}}]
    answer = await infer(client, "hello", parameters=ASKED | {"ignore_eos": True}, outputs=asked)
    assert [each["name"] for each in answer["outputs"]] == ["completion_tokens", "text_output"]
    assert answer["outputs"][0]["data"] == [6]


async def test_the_largest_seed_comes_back_whole(client: httpx.AsyncClient) -> None:
    (output,) = (await infer(client, "hello", parameters={"seed": 2**64 - 1}, outputs=[{"name": "seed"}]))["outputs"]
    assert output["data"] == [2**64 - 1]


async def test_lists_and_objects_may_be_strings_of_json(client: httpx.AsyncClient) -> None:
    asked = {"seed": 4, "max_new_tokens": 40, "temperature": 2, "ignore_eos": True}
    (whole,) = await predictions(client, "hello", **asked)
    real = {"stop": ["\x01never", whole[7:10]], "bad_words": ["\x02no"], "logit_bias": {"5": 1.5}}
    wanted = await predictions(client, "hello", **asked, **real)
    as_text = {name: json.dumps(value) for name, value in real.items()}
    for given in (real, as_text):
        (output,) = (await infer(client, "hello", parameters=asked | given))["outputs"]
        assert output["data"] == wanted


@pytest.mark.parametrize("stop", ["[]", '["', "[1]", '["a"'])
async def test_a_stop_string_that_is_no_list_of_strings_is_itself(client: httpx.AsyncClient, stop: str) -> None:
    asked = {"seed": 4, "max_new_tokens": 8}
    (output,) = (await infer(client, "hello", parameters=asked | {"stop": stop}))["outputs"]
    assert output["data"] == await predictions(client, "hello", **asked, stop=[stop])


def refused(**changes: Any) -> dict[str, Any]:
    return {"inputs": [text_input("hello")]} | changes


def wrong_input(**changes: Any) -> dict[str, Any]:
    return refused(inputs=[text_input("hello", **changes)])


def lacking(name: str) -> dict[str, Any]:
    return refused(inputs=[{key: value for key, value in text_input("hello").items() if key != name}])


# name, body, what the answer must contain; status 400
REFUSED: list[tuple[str, Any, str]] = [
    ("a list", [], "object"),
    ("no inputs", {"parameters": {}}, "lacks inputs"),
    ("inputs empty", refused(inputs=[]), "inputs must hold one"),
    ("two inputs", refused(inputs=[text_input("a"), text_input("b")]), "inputs must hold one"),
    ("an input a string", refused(inputs=["hello"]), "inputs[0]"),
    ("an unknown field", refused(paramters={}), "paramters"),
    ("an input's unknown field", wrong_input(dtype="BYTES"), "dtype"),
    ("another input", wrong_input(name="prompt"), "text_input"),
    ("another datatype", wrong_input(datatype="FP32"), "inputs[0].datatype"),
    *((f"no {name}", lacking(name), f"inputs[0] lacks {name}") for name in ("name", "datatype", "shape", "data")),
    ("a shape of no rows", wrong_input(shape=[0], data=[]), "inputs[0].shape"),
    ("a shape of nothing", wrong_input(shape=[]), "inputs[0].shape"),
    ("a shape of two columns", wrong_input(shape=[1, 2]), "inputs[0].shape"),
    ("a shape of three dimensions", wrong_input(shape=[1, 1, 1]), "inputs[0].shape"),
    ("a shape of too many rows", wrong_input(shape=[9], data=["a"] * 9), "1 to 8 rows"),
    ("a shape of floats", wrong_input(shape=[1.0]), "inputs[0].shape"),
    ("a negative shape", wrong_input(shape=[-1]), "inputs[0].shape"),
    ("a shape past any integer", wrong_input(shape=[10**30]), "inputs[0].shape"),
    ("fewer elements than the shape", wrong_input(shape=[2]), "inputs[0].data must hold 2"),
    ("more elements than the shape", wrong_input(data=["a", "b"]), "inputs[0].data must hold 1"),
    ("an element a number", wrong_input(data=[5]), "inputs[0].data[0]"),
    ("an element null", wrong_input(data=[None]), "inputs[0].data[0]"),
    ("nested where the shape is flat", wrong_input(data=[["hello"]]), "inputs[0].data[0]"),
    ("nested too wide", wrong_input(shape=[1, 1], data=[["a", "b"]]), "inputs[0].data[0] must hold 1"),
    ("nested too short", wrong_input(shape=[2, 1], data=[["a"]]), "inputs[0].data must hold 2"),
    ("half nested", wrong_input(shape=[2, 1], data=[["a"], "b"]), "inputs[0].data[1]"),
    ("nested too deeply", wrong_input(shape=[1, 1], data=[[["a"]]]), "inputs[0].data[0][0]"),
    ("data a string", wrong_input(data="hello"), "inputs[0].data"),
    ("data and raw data", wrong_input(parameters={"binary_data_size": 9}), "binary_data_size"),
    ("an id a number", refused(id=5), "id must"),
    ("another model", refused(model_name="other"), "model_name"),
    ("another version", refused(model_version="2"), "model_version"),
    ("parameters a list", refused(parameters=[]), "parameters must"),
    ("an unknown parameter", refused(parameters={"max_length": 5}), "max_length"),
    ("an input's unknown parameter", wrong_input(parameters={"content_type": "str"}), "content_type"),
    ("an input's wrong parameter", wrong_input(parameters={"top_p": 2}), "inputs[0].parameters.top_p"),
    ("a parameter out of range", refused(parameters={"top_p": 2}), "parameters.top_p"),
    ("logprobs without details", refused(parameters={"logprobs": 1}), "details"),
    ("stream", refused(parameters={"stream": True}), "stream"),
    ("a sequence", refused(parameters={"sequence_id": 1}), "sequence_id"),
    ("a priority", refused(parameters={"priority": 1}), "priority"),
    ("a timeout of Triton's", refused(parameters={"timeout": 1}), "timeout"),
    ("binary_data_output a number", refused(parameters={"binary_data_output": 1}), "binary_data_output"),
    ("logit_bias no JSON", refused(parameters={"logit_bias": "{5: 1}"}), "logit_bias"),
    ("logit_bias JSON of a list", refused(parameters={"logit_bias": "[1]"}), "logit_bias"),
    ("bad_words no JSON", refused(parameters={"bad_words": "no"}), "bad_words"),
    ("stop JSON with an empty string", refused(parameters={"stop": '["a", ""]'}), "stop"),
    ("stop JSON with half a character", refused(parameters={"bad_words": '["\\ud800"]'}), "bad_words"),
    ("an unknown output", refused(outputs=[{"name": "text"}]), 'got "text"'),
    ("an output twice", refused(outputs=[{"name": "seed"}, {"name": "seed"}]), "outputs[1].name"),
    ("an output a string", refused(outputs=["text_output"]), "outputs[0]"),
    ("an output without a name", refused(outputs=[{}]), "outputs[0] lacks name"),
    ("an output's unknown field", refused(outputs=[{"name": "seed", "shape": [1]}]), "shape"),
    ("classification", refused(outputs=[{"name": "seed", "parameters": {"classification": 3}}]), "classification"),
    ("binary_data a number", refused(outputs=[{"name": "seed", "parameters": {"binary_data": 1}}]), "binary_data"),
    ("the output logprobs alone", refused(outputs=[{"name": "logprobs"}]), "parameter logprobs"),
    ("the second prompt too long", refused(inputs=[text_input("a", "hello " * 200)]), "text_input[1]"),
]


@pytest.mark.parametrize(("body", "named"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
async def test_a_wrong_body_is_refused_and_named(client: httpx.AsyncClient, body: Any, named: str) -> None:
    response = await client.post(INFER, json=body)
    assert response.status_code == 400, response.text
    assert set(response.json()) == {"error"}
    assert named in response.json()["error"]


async def test_compressed_bodies_are_refused_by_name(client: httpx.AsyncClient) -> None:
    response = await client.post(INFER, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert "gzip" in response.json()["error"]


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
async def test_a_models_metadata_names_what_infer_answers(client: httpx.AsyncClient, path: str) -> None:
    told = (await client.get(path)).json()
    assert {key: told[key] for key in ("name", "versions", "platform")} == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "predictor_gpt2",
    }
    assert told["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": [-1]}]
    asked = {"details": True, "logprobs": 0}
    outputs = (await infer(client, "hello", parameters=asked))["outputs"]
    assert [(each["name"], each["datatype"]) for each in told["outputs"]] == [
        (each["name"], each["datatype"]) for each in outputs
    ]


async def test_the_server_tells_its_name_its_extensions_and_its_models(client: httpx.AsyncClient) -> None:
    told = (await client.get("/v2")).json()
    assert told == {
        "name": "predictor",
        "version": __version__,
        "extensions": ["binary_tensor_data", "parameters", "generate"],
    }
    assert "tiny" in (await client.get("/v2/models")).json()["models"]


MODEL_ROUTES = [("GET", ""), ("GET", "/ready"), ("POST", "/infer"), ("POST", "/generate"), ("POST", "/generate_stream")]


@pytest.mark.parametrize(("method", "verb"), MODEL_ROUTES)
@pytest.mark.parametrize("version", ["2", "0", "01", "latest", "9" * 5000])
async def test_an_unknown_version_is_not_found(client: httpx.AsyncClient, method: str, verb: str, version: str) -> None:
    response = await client.request(method, f"/v2/models/tiny/versions/{version}{verb}")
    assert response.status_code == 404
    assert f"no version {version[:60]}" in response.json()["error"]


@pytest.mark.parametrize(("method", "verb"), MODEL_ROUTES)
@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/other/versions/1"])
async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient, method: str, verb: str, path: str) -> None:
    response = await client.request(method, path + verb)
    assert response.status_code == 404
    assert "other" in response.json()["error"]


async def test_a_ready_server_says_so(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    for path in ("/v2/models/tiny/ready", versioned("ready")):
        assert (await client.get(path)).json() == {"name": "tiny", "ready": True}


@pytest.fixture
async def loading(checkpoint: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A server, with an admin, whose model is not loaded yet."""
    settings = load_settings({"model": f"tiny={checkpoint}", "admin_key": "a file"})
    models, app = ModelRepository(), FastAPI()
    models.update(Predictor(settings, settings.models[0]))

    async def admit(*request: Any) -> None:
        raise AssertionError("nothing is admitted while the model loads")

    for room in (v2, health):
        app.include_router(room.make_router(Asker(models, settings, admit)))
    add_error_handlers(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(Boundary(app)), base_url="http://test") as opened:
        yield opened


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 503),
        ("GET", "/v2/models", 200),
        *(("GET", f"/v2/models/tiny{version}", 200) for version in ("", "/versions/1")),
        *(("GET", f"/v2/models/tiny{version}/ready", 503) for version in ("", "/versions/1")),
        *(("POST", f"/v2/models/tiny/{verb}", 503) for verb in ("infer", "generate", "generate_stream")),
    ],
)
async def test_a_server_whose_model_loads_lives_and_is_not_ready(
    loading: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await loading.request(method, path)
    assert response.status_code == status
    if status == 503:
        assert "loading" in response.json()["error"]


async def test_a_server_with_an_admin_tells_of_its_repository(loading: httpx.AsyncClient) -> None:
    assert "model_repository_extension" in (await loading.get("/v2")).json()["extensions"]


async def test_an_output_that_is_named_is_all_that_comes(client: httpx.AsyncClient) -> None:
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hello"]}
    asked = {"inputs": [tensor], "parameters": {"logprobs": 1, "max_new_tokens": 2}, "outputs": [{"name": "logprobs"}]}
    answer = (await client.post(INFER, json=asked)).json()
    assert [output["name"] for output in answer["outputs"]] == ["logprobs"]
    refused = await client.post(INFER, json=asked | {"parameters": {"logprobs": 1, "details": True}})
    assert refused.status_code == 400
    assert "details" in refused.json()["error"]
