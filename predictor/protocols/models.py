"""What a server says of its models: KServe's, TensorFlow Serving's and OpenAI's facts in one object.

Clients of the three read the same paths, `/v1/models` and `/v1/models/NAME`, and none minds the others' fields.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from predictor.errors import InvalidRequest, NotFound
from predictor.protocols.v1 import INPUT, OUTPUT, SIGNATURE

# A server has one version of each model; a canary is another server.
VERSION = 1
LABEL = "stable"

METHOD = "tensorflow/serving/predict"

# TensorFlow Serving's methods that our signature does not have, and what it calls their signatures.
OTHER_METHODS = {"classify": "classification", "regress": "regression"}

_MAX_INT64 = 2**63 - 1

# TensorFlow Serving's ModelVersionStatus.State, as far as a model of ours has it.
State = Literal["LOADING", "AVAILABLE", "UNLOADING", "END"]


@dataclass(frozen=True, slots=True)
class Status:
    """Where a model stands; `reason` says why it is not available, and is empty where it is."""

    state: State
    reason: str = ""


def check_servable(
    names: Container[str],
    name: str,
    request: str,
    version: str | None = None,
    label: str | None = None,
    of_status: bool = False,
) -> None:
    """Raise what TensorFlow Serving says of a path that names no servable: `InvalidRequest` or `NotFound`.

    `names` are the models there are, `request` is the method and path. The status of a model has a text of its own.
    """
    number = None if version is None else _number(version, request)
    if name not in names or number not in (None, VERSION):
        wanted = f"Latest({name})" if number is None else f"Specific({name}, {number})"
        text = f"Servable not found for request: {wanted}"
        if of_status:
            what = "any versions" if number is None else f"version {number}"
            text = f"Could not find {what} of model {name}: {text}"
        raise NotFound(text)
    if label not in (None, LABEL):
        raise InvalidRequest(f"Unrecognized servable version label: {label}")


def malformed(request: str) -> InvalidRequest:
    """For a method and path that fit no route."""
    return InvalidRequest(f"Malformed request: {request}")


def other_method(verb: str) -> InvalidRequest:
    """For a verb of `OTHER_METHODS`."""
    return InvalidRequest(
        f"Expected {OTHER_METHODS[verb]} signature method_name to be tensorflow/serving/{verb}. Was: {METHOD}"
    )


def _number(version: str, request: str) -> int:
    not_numeric = f"Failed to convert version: {version} to numeric."
    if not (version.isascii() and version.isdigit()):  # to TensorFlow Serving such a path fits no route
        raise InvalidRequest(f"{malformed(request)}: {not_numeric}")
    # Compared by length first: int() refuses over 4,300 digits.
    if len(version.lstrip("0")) > len(str(_MAX_INT64)) or int(version) > _MAX_INT64:
        raise InvalidRequest(not_numeric)
    return int(version)


def version_status(status: Status) -> dict[str, Any]:
    """TensorFlow Serving's GetModelStatusResponse."""
    code = "OK" if not status.reason else "INTERNAL" if status.state == "END" else "UNAVAILABLE"
    told = {"error_code": code, "error_message": status.reason}
    return {"model_version_status": [{"version": str(VERSION), "state": status.state, "status": told}]}


def one_model(name: str, status: Status, created: int) -> dict[str, Any]:
    """The answer of `/v1/models/NAME`; `created` in seconds since 1970."""
    ready = {"name": name, "ready": status.state == "AVAILABLE"}
    return ready | version_status(status) | _openai_model(name, created)


def all_models(names: Sequence[str], created: int) -> dict[str, Any]:
    """The answer of `/v1/models`; `created` in seconds since 1970."""
    return {"models": list(names), "object": "list", "data": [_openai_model(name, created) for name in names]}


def _openai_model(name: str, created: int) -> dict[str, Any]:
    # `vllm bench serve` reads `root`, vLLM's own field, of the model it finds.
    return {"id": name, "object": "model", "created": created, "owned_by": "predictor", "root": name}


def metadata(name: str) -> dict[str, Any]:
    """TensorFlow Serving's GetModelMetadataResponse: the signature, nested twice as there."""
    signature = {
        "inputs": {INPUT: _strings(INPUT)},
        "outputs": {OUTPUT: _strings(OUTPUT)},
        "method_name": METHOD,
    }
    return {
        "model_spec": {"name": name, "signature_name": "", "version": str(VERSION)},
        "metadata": {"signature_def": {"signature_def": {SIGNATURE: signature}}},
    }


def _strings(name: str) -> dict[str, Any]:
    """A list of strings of any length."""
    shape = {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    return {"dtype": "DT_STRING", "tensor_shape": shape, "name": f"{name}:0"}
