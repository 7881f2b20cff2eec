"""V2 over a real port, as KServe's and Triton's own clients see it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import kserve
import numpy as np
import psutil
import pytest
import tritonclient.http
import tritonclient.http.aio
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.rest.v2_datamodels import ModelMetadataResponse, ServerMetadataResponse
from tritonclient.utils import InferenceServerException

from tests.processes import ServerProcess, serving

PROMPTS = ["hello", "Zoë said \U0001f600"]
ASKED = {"seed": 5, "max_new_tokens": 12, "temperature": 2.0}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("v2") / "log", "--model", f"tiny={checkpoint}") as process:
        process.wait_until_ready("tiny")
        yield process


@pytest.fixture(scope="module")
def wanted(server: ServerProcess) -> list[str]:
    """What `:predict` answers."""
    return list(server.predict("tiny", {"instances": PROMPTS, "parameters": ASKED}).json()["predictions"])


def prompts() -> np.ndarray[Any, Any]:
    return np.array(PROMPTS, dtype=np.object_)


def texts(tensor: np.ndarray[Any, Any]) -> list[str]:
    return [each.decode() if isinstance(each, bytes) else each for each in tensor.reshape(-1)]


@pytest.fixture
async def kserve_client(server: ServerProcess) -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        yield client


@pytest.mark.parametrize("binary_in", [False, True], ids=["JSON in", "raw in"])
@pytest.mark.parametrize("binary_out", [False, True], ids=["JSON out", "raw out"])
async def test_kserves_client_infers(
    server: ServerProcess, kserve_client: InferenceRESTClient, wanted: list[str], binary_in: bool, binary_out: bool
) -> None:
    tensor = InferInput("text_input", [2], "BYTES")
    tensor.set_data_from_numpy(prompts(), binary_data=binary_in)
    outputs = [RequestedOutput("text_output", {"binary_data": binary_out}), RequestedOutput("completion_tokens")]
    request = InferRequest("tiny", [tensor], request_id="a-1", parameters=dict(ASKED), request_outputs=outputs)
    headers: dict[str, str] = {}
    answer = await kserve_client.infer(server.url, request, "tiny", response_headers=headers)
    assert (answer.id, answer.model_name) == ("a-1", "tiny")
    assert texts(answer.get_output_by_name("text_output").as_numpy()) == wanted
    assert answer.get_output_by_name("completion_tokens").as_numpy().tolist() == [12, 12]
    assert ("inference-header-content-length" in headers) == binary_out


async def test_kserves_client_hears_what_is_wrong(server: ServerProcess, kserve_client: InferenceRESTClient) -> None:
    request = InferRequest("tiny", [InferInput("prompt", [1], "BYTES", ["a"])])
    with pytest.raises(httpx.HTTPStatusError, match=r"inputs\[0\].name .*400 Bad Request"):
        await kserve_client.infer(server.url, request, "tiny")


async def test_kserves_client_asks_for_health(server: ServerProcess, kserve_client: InferenceRESTClient) -> None:
    assert await kserve_client.is_server_live(server.url)
    assert await kserve_client.is_server_ready(server.url)
    assert await kserve_client.is_model_ready(server.url, "tiny")
    assert not await kserve_client.is_model_ready(server.url, "other")


def test_metadata_is_what_kserves_classes_describe(server: ServerProcess) -> None:
    ServerMetadataResponse.model_validate_json(server.get("/v2").content, strict=True)
    told = ModelMetadataResponse.model_validate_json(server.get("/v2/models/tiny").content, strict=True)
    assert (told.name, told.versions) == ("tiny", ["1"])


@pytest.fixture
def triton(server: ServerProcess) -> Iterator[tritonclient.http.InferenceServerClient]:
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


def triton_input(module: Any, binary: bool, shape: tuple[int, ...] = (2, 1)) -> list[Any]:
    tensor = module.InferInput("text_input", list(shape), "BYTES")
    tensor.set_data_from_numpy(prompts().reshape(shape), binary_data=binary)
    return [tensor]


@pytest.mark.parametrize("binary_in", [False, True], ids=["JSON in", "raw in"])
@pytest.mark.parametrize("binary_out", [False, True, None], ids=["JSON out", "raw out", "no outputs named"])
@pytest.mark.parametrize("version", ["", "1"])
def test_tritons_client_infers(
    triton: tritonclient.http.InferenceServerClient,
    wanted: list[str],
    binary_in: bool,
    binary_out: bool | None,
    version: str,
) -> None:
    outputs = binary_out if binary_out is None else [tritonclient.http.InferRequestedOutput("text_output", binary_out)]
    inputs = triton_input(tritonclient.http, binary_in)
    answer = triton.infer("tiny", inputs, version, outputs, request_id="a-1", parameters=ASKED)
    assert answer.as_numpy("text_output").shape == (2, 1)
    assert texts(answer.as_numpy("text_output")) == wanted
    told = answer.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("a-1", "tiny", "1")
    assert ("data" in told["outputs"][0]) == (binary_out is False)


def test_tritons_client_reads_every_output(triton: tritonclient.http.InferenceServerClient, wanted: list[str]) -> None:
    asked = ASKED | {"details": True, "logprobs": 1, "n": 2}
    answer = triton.infer("tiny", triton_input(tritonclient.http, True, (2,)), parameters=asked)
    assert answer.as_numpy("seed").tolist() == [[5, 6], [5, 6]]
    assert texts(answer.as_numpy("text_output")[:, 0]) == wanted
    assert texts(answer.as_numpy("finish_reason")) == ["length"] * 4
    assert answer.as_numpy("completion_tokens").tolist() == [[12, 12], [12, 12]]
    for text in texts(answer.as_numpy("logprobs")):
        assert len(json.loads(text)["token_ids"]) == 12


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "raw"])
async def test_tritons_asynchronous_client_infers(server: ServerProcess, wanted: list[str], binary: bool) -> None:
    module = tritonclient.http.aio
    async with module.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        assert await client.is_server_ready()
        outputs = [module.InferRequestedOutput("text_output", binary_data=binary)]
        answer = await client.infer("tiny", triton_input(module, binary), outputs=outputs, parameters=ASKED)
        assert texts(answer.as_numpy("text_output")) == wanted


def test_tritons_client_asks_for_health_and_metadata(triton: tritonclient.http.InferenceServerClient) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert triton.is_model_ready("tiny", "1")
    assert not triton.is_model_ready("tiny", "2")
    assert "binary_tensor_data" in triton.get_server_metadata()["extensions"]
    told = triton.get_model_metadata("tiny", "1")
    assert [each["name"] for each in told["inputs"]] == ["text_input"]
    with pytest.raises(InferenceServerException, match="no version 7"):
        triton.get_model_metadata("tiny", "7")


def test_tritons_client_hears_what_is_wrong(triton: tritonclient.http.InferenceServerClient) -> None:
    inputs = triton_input(tritonclient.http, True)
    for asked, named in (
        ({"sequence_id": 3}, "sequence_id"),
        ({"priority": 1}, "priority"),
        ({"timeout": 10}, "timeout"),
        ({"parameters": {"max_length": 5}}, "max_length"),
        ({"outputs": [tritonclient.http.InferRequestedOutput("text")]}, '"text"'),
        ({"outputs": [tritonclient.http.InferRequestedOutput("text_output", class_count=2)]}, "classification"),
    ):
        with pytest.raises(InferenceServerException, match=named) as raised:
            triton.infer("tiny", inputs, **asked)
        assert raised.value.status() == "400"


def test_raw_bodies_are_limited_like_any_other(server: ServerProcess) -> None:
    head = {"inference-header-content-length": "2", "content-type": "application/octet-stream"}
    response = httpx.post(f"{server.url}/v2/models/tiny/infer", content=b"{}" + bytes(2**20), headers=head)
    assert response.status_code == 413


async def test_grpc_is_off(server: ServerProcess) -> None:
    listening = [
        each.laddr.port
        for each in psutil.Process(server.process.pid).connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert listening == [server.port]
    async with kserve.InferenceGRPCClient(f"127.0.0.1:{server.port}", retries=0, timeout=5) as client:
        with pytest.raises(Exception, match="UNAVAILABLE"):
            await client.is_server_live()
