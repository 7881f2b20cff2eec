"""Schemas for rendered manifests: unknown fields, wrong types and unknown kinds.

Three sources, each for what it knows: the Python models of KServe and Kubernetes, the strict JSON schemas of Kubernetes
(PyPI's kubernetes-validate), and those made from the CRDs in ../shared/crds, where this folder is present.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes.client
import kubernetes_validate.utils
import pytest
from referencing import Registry, Resource

from tests.conftest import SHARED
from tests.manifests import Json, is_standard

with pytest.MonkeyPatch.context() as patch:  # kserve parses the command line while it is imported
    patch.setattr(sys, "argv", ["pytest"])
    import kserve
    import kserve.models

CRDS = SHARED / "crds"


def complaints(item: Json) -> Iterator[str]:
    """What any schema says against one object; a kind that no schema knows is an error too."""
    if missing := {"apiVersion", "kind", "metadata"} - item.keys():
        yield f"no {sorted(missing)}"
        return
    group = item["apiVersion"].rpartition("/")[0]
    what = f"{item['kind']} {item['metadata'].get('name')}"
    if group == "serving.kserve.io":
        yield from (f"{what}: {problem}" for problem in _by_models(item))
    if "." not in group or group.endswith(".k8s.io"):
        yield from (f"{what}: {problem}" for problem in [*_by_models(item), *_by_kubernetes(item)])
    elif CRDS.is_dir():
        yield from (f"{what}: {problem}" for problem in _by_crds(item))


# -------------------------------------------------------------------------------------------------- Python models


def _by_models(item: Json) -> Iterator[str]:
    version = item["apiVersion"].rpartition("/")[2]
    name = version.capitalize() + item["kind"]
    if not (hasattr(kserve.models, name) or hasattr(kubernetes.client, name)):
        yield f"no model is called {name}"
        return
    try:
        model = _read(item, name, item["kind"])
    except (ValueError, TypeError, AttributeError) as error:
        yield str(error)
        return
    # KServe's client: the one of Kubernetes writes KServe's models with Python's names.
    if kserve.ApiClient().sanitize_for_serialization(model) != item:
        yield "the models lose something"


def _read(value: Any, type_name: str, where: str) -> Any:
    """Build the object from the Python models of KServe and Kubernetes; ValueError for what they do not know.

    Ours, because neither client can: KServe's models name those of Kubernetes, and each client looks in its own.
    """
    if match := re.fullmatch(r"list\[(.*)\]", type_name):
        return [_read(item, match[1], f"{where}[{index}]") for index, item in enumerate(value)]
    if match := re.fullmatch(r"dict\(str, (.*)\)", type_name):
        return {key: _read(item, match[1], f"{where}.{key}") for key, item in value.items()}
    if type_name in {"str", "int", "bool"}:
        if type(value).__name__ != type_name:
            raise ValueError(f"{where}: {value!r} is not of type {type_name}")
        return value
    model = getattr(kserve.models, type_name, None) or getattr(kubernetes.client, type_name, None)
    if model is None:  # a quantity, or an integer or string
        return value
    attributes = {key: attribute for attribute, key in model.attribute_map.items()}
    if unknown := value.keys() - attributes.keys():
        raise ValueError(f"{where}: {type_name} has no {sorted(unknown)}")
    return model(
        **{
            attributes[key]: _read(item, model.openapi_types[attributes[key]], f"{where}.{key}")
            for key, item in value.items()
        }
    )


# --------------------------------------------------------------------------------------------------- JSON schemas


def _by_kubernetes(item: Json) -> Iterator[str]:
    validator = _kubernetes_validator(item["apiVersion"], item["kind"])
    if validator is None:
        yield f"Kubernetes has no {item['kind']} in {item['apiVersion']}"
    else:
        yield from (error.message for error in validator.iter_errors(item))


@functools.cache
def _kubernetes_validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    """Its own `validate` reads 2 MB of definitions for every object; this reads them once."""
    version = kubernetes_validate.latest_version()
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)  # rbac.authorization.k8s.io/v1 -> rbac-v1
    try:
        schema = kubernetes_validate.utils.schema_contents(f"{folder}/{kind.lower()}-{name}.json", version)
    except FileNotFoundError:
        return None
    return jsonschema.Draft202012Validator(schema, registry=_kubernetes_definitions(folder, version))


@functools.cache
def _kubernetes_definitions(folder: str, version: str) -> Registry[Any]:
    definitions = kubernetes_validate.utils.schema_contents(f"{folder}/_definitions.json", version)
    return Resource.from_contents(definitions) @ Registry()


def _by_crds(item: Json) -> Iterator[str]:
    group, _, version = item["apiVersion"].rpartition("/")
    validator = _crd_validator(f"{item['kind'].lower()}_{group}_{version}")
    if validator is None:
        yield f"no schema is known for {item['kind']} in {item['apiVersion']}"
        return
    yield from (error.message for error in validator.iter_errors(item))
    if item["kind"] == "InferenceService" and not is_standard(item):
        made = as_knative_service(item.get("spec", {}).get("predictor", {}))
        made_by = _crd_validator("service_serving.knative.dev_v1")
        assert made_by is not None
        yield from (f"as Knative Service: {error.message}" for error in made_by.iter_errors(made))


@functools.cache
def _crd_validator(name: str) -> jsonschema.Draft202012Validator | None:
    path = CRDS / f"{name}.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text())) if path.is_file() else None


def as_knative_service(predictor: Json) -> Json:
    """The Knative Service that KServe makes of the predictor, as far as our fields go."""
    pod = copy.deepcopy(predictor)
    annotations = pod.pop("annotations", {})
    for name in ("minReplicas", "maxReplicas", "canaryTrafficPercent", "scaleMetric", "scaleTarget"):
        pod.pop(name, None)
    if "timeout" in pod:
        pod["timeoutSeconds"] = pod.pop("timeout")
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "aitextgen-predictor"},
        "spec": {"template": {"metadata": {"annotations": annotations}, "spec": pod}},
    }
