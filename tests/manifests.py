"""The manifests as a cluster would get them: found, rendered once each, and taken apart. No rules here."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT, left_out

# The stable version's, in the one place that has it.
BASE_TAG = yaml.safe_load((ROOT / "manifests" / "base" / "kustomization.yaml").read_text())["images"][0]["newTag"]

MANIFESTS = ROOT / "manifests"
BASE = MANIFESTS / "base"

Json = dict[str, Any]
Flags = dict[str, str]

# A rule takes all rendered objects and Knative's flags, and yields what is wrong.
Rule = Callable[[list[Json], Flags], Iterator[str]]

OURS = "gpt2-predictor"  # the image


def components(manifests: Path = MANIFESTS) -> list[str]:
    """Every component, by its folder below `components`."""
    folder = manifests / "components"
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("kustomization.yaml"))


def overlays() -> list[str]:
    return sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))


class Refused(Exception):
    """Kustomize did not render it; the message is its own."""


def kustomize(folder: Path) -> list[Json]:
    """What `kubectl apply -k` would send; raises `Refused`."""
    result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise Refused(result.stderr)
    return list(yaml.load_all(result.stdout, Loader=yaml.CSafeLoader))


def with_components(names: tuple[str, ...], manifests: Path = MANIFESTS) -> list[Json]:
    """Base with these components over it, in this order; raises `Refused`."""
    with tempfile.TemporaryDirectory() as folder:

        def near(path: Path) -> str:  # kustomize takes no absolute paths
            return os.path.relpath(path, Path(folder).resolve())

        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [near(manifests / "base")],
            "components": [near(manifests / "components" / name) for name in names],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return kustomize(Path(folder))


@functools.cache
def _rendered(name: str) -> list[Json]:
    if name == "base":
        return kustomize(BASE)
    kind, _, rest = name.partition("/")
    return with_components(tuple(rest.split("+"))) if kind == "components" else kustomize(MANIFESTS / name)


def rendered(name: str) -> list[Json]:
    """A copy of `base`, `components/NAME+NAME` (over base) or `overlays/NAME`. Base alone needs no kubectl."""
    if shutil.which("kubectl") is None:
        if name != "base":
            left_out(f"kubectl is not on the PATH: {name} is not rendered")
        return base_by_hand()
    return copy.deepcopy(_rendered(name))


def base_by_hand() -> list[Json]:
    """The resources and the image of a kustomization that uses nothing else, as base does."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - {"apiVersion", "kind", "resources", "images"}
    assert not unknown, f"without kubectl base cannot be rendered with {sorted(unknown)}"
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in kustomization["images"]}
    objects = [yaml.safe_load((BASE / name).read_text()) for name in kustomization["resources"]]
    for container in predictor_of(objects)["containers"]:
        container["image"] = images[container["image"]]
    return objects


def config_features() -> Flags:
    """The flags of Knative that the administrator switches on."""
    text = (MANIFESTS / "config-features.patch.yaml").read_text()
    return dict(yaml.load(text, Loader=yaml.CSafeLoader)["data"])


def of_kind(objects: list[Json], *kinds: str) -> list[Json]:
    return [item for item in objects if item.get("kind") in kinds]


def one(objects: list[Json], kind: str) -> Json:
    (found,) = of_kind(objects, kind)
    return found


def predictor_of(objects: list[Json]) -> Json:
    predictor: Json = one(objects, "InferenceService")["spec"]["predictor"]
    return predictor


def container_of(objects: list[Json]) -> Json:
    container: Json = predictor_of(objects)["containers"][0]
    return container


def is_standard(service: Json) -> bool:
    annotations = service["metadata"].get("annotations", {})
    return bool(annotations.get("serving.kserve.io/deploymentMode") == "Standard")


def pods(objects: list[Json]) -> Iterator[tuple[str, dict[str, str], Json]]:
    """Every pod that comes of the objects: a name for people, its labels, its spec."""
    for item in objects:
        name = f"{item['kind']} {item['metadata']['name']}"
        if item["kind"] == "InferenceService":
            yield name, {"serving.kserve.io/inferenceservice": item["metadata"]["name"]}, item["spec"]["predictor"]
        elif item["kind"] in {"Deployment", "StatefulSet", "Job", "CronJob"}:
            spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
            template = spec["template"]
            yield name, template.get("metadata", {}).get("labels", {}), template["spec"]


def containers(objects: list[Json]) -> Iterator[tuple[str, Json, Json]]:
    """Every container: a name for people, the pod's spec, its own."""
    for name, _, pod in pods(objects):
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield f"{name}, {container['name']}", pod, container


def flags_of(container: Json) -> dict[str, str]:
    """The `--name=value` arguments; a bare `--name` has the value ''."""
    pairs = (arg.partition("=") for arg in container.get("args", []) if arg.startswith("--"))
    return {name: value for name, _, value in pairs}


def services(objects: list[Json], *, standard: bool | None = None) -> Iterator[tuple[Json, Json, Json]]:
    """Each service of the mode (None: any), its predictor and its container."""
    for service in of_kind(objects, "InferenceService"):
        if standard in (None, is_standard(service)):
            predictor = service["spec"]["predictor"]
            yield service, predictor, predictor["containers"][0]


def storage_uri(container: Json) -> str:
    """Where KServe takes the model from, or ""."""
    values = {variable["name"]: variable.get("value", "") for variable in container.get("env", [])}
    return str(values.get("STORAGE_URI", ""))


def tag_of(image: str) -> str:
    """What follows the repository, a digest left out."""
    return image.partition("@")[0].rpartition(":")[2]
