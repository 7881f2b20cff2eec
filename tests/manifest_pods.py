"""What no schema holds of pods, whichever object they come from: images, resources, security, mounts, nodes.

Rules as in tests/manifest_rules.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from kubernetes.utils.quantity import parse_quantity

from tests.manifests import OURS, Flags, Json, Rule, containers, flags_of, of_kind, pods, storage_uri

GPU = "nvidia.com/gpu"

# Memory that loading needs: the 1.5B in FP16 is 3.1 GB beside 3 GiB of torch and CUDA; the 124M in int8 took 0.65 GB.
NEEDED_MEMORY = {"openai-community/gpt2-xl": "6Gi", "openai-community/gpt2": "1Gi"}

# Labels of nodes: CoreWeave's, GKE's, and those of NVIDIA's GPU operator.
NODE_LABELS = {
    "gpu.nvidia.com/class",
    "cloud.google.com/gke-accelerator",
    "nvidia.com/gpu.compute.major",
    "nvidia.com/gpu.compute.minor",
    "nvidia.com/gpu.memory",
}


def images_have_fixed_tags(objects: list[Json], flags: Flags) -> Iterator[str]:
    for name, _, container in containers(objects):
        image = container["image"]
        tag = re.fullmatch(r"[^:]+(?::\d+/[^:]+)?:([\w.-]+)(?:@sha256:[0-9a-f]{64})?", image)
        if tag is None or tag[1] == "latest":
            yield f"{name}: the image needs a fixed tag, got {image}"


def image_fits_the_device(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, pod, container in containers(objects):
        device = flags_of(container).get("--device")
        if device is None:
            continue
        if container["image"].endswith("-cpu") != (device == "cpu"):
            yield f"--device={device} with the image {container['image']}"
        limits = container.get("resources", {}).get("limits", {})
        if (GPU in limits) != (device == "cuda"):
            yield f"--device={device} with the limits {limits}"
        kept_for_gpus = {"affinity", "tolerations"} & pod.keys()
        if device == "cpu" and kept_for_gpus:
            yield f"{sorted(kept_for_gpus)} would put a CPU pod on a GPU node"


def resources_fit_the_model(objects: list[Json], flags: Flags) -> Iterator[str]:
    for name, _, container in containers(objects):
        resources = container.get("resources", {})
        known = {"cpu", "memory", GPU}
        for kind in ("requests", "limits"):
            given = resources.get(kind, {})
            for resource in known - {GPU} - given.keys():
                yield f"{name}: resources.{kind}.{resource} is missing: KServe would fill in 1 CPU and 2Gi"
            for resource in given.keys() - known:
                yield f"{name}: resources.{kind}.{resource} is none that we use"
        if resources.get("requests", {}).get(GPU) != resources.get("limits", {}).get(GPU):
            yield f"{name}: {GPU} must be requested as it is limited"
        if "--model" not in flags_of(container) or "--device" not in flags_of(container):
            continue  # loads no model
        source = storage_uri(container).removeprefix("hf://")
        needed = NEEDED_MEMORY.get(source, NEEDED_MEMORY["openai-community/gpt2-xl"])
        for kind in ("requests", "limits"):
            if parse_quantity(resources.get(kind, {}).get("memory", 0)) < parse_quantity(needed):
                yield f"{name}: resources.{kind}.memory is under the {needed} that the model needs to load"


def arguments_are_given_once(objects: list[Json], flags: Flags) -> Iterator[str]:
    for name, _, container in containers(objects):
        given = [arg.partition("=")[0] for arg in container.get("args", []) if arg.startswith("--")]
        for twice in sorted({each for each in given if given.count(each) > 1} - {"--include"}):
            yield f"{name}: {twice} is given twice, perhaps by two components"


def security_is_tight(objects: list[Json], flags: Flags) -> Iterator[str]:
    wanted = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        "readOnlyRootFilesystem": True,
    }
    for name, pod, container in containers(objects):
        context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
        for field, value in wanted.items():
            if context.get(field) != value:
                yield f"{name}: securityContext.{field} must be {value}"
        writable = {volume["name"] for volume in pod.get("volumes", []) if "emptyDir" in volume}
        mounted = {mount["mountPath"] for mount in container.get("volumeMounts", []) if mount["name"] in writable}
        if OURS in container["image"] and "/tmp" not in mounted:
            yield f"{name}: /tmp must be an emptyDir: the root is read-only"


def service_links_are_off(objects: list[Json], flags: Flags) -> Iterator[str]:
    for name, _, pod in pods(objects):
        if pod.get("enableServiceLinks") is not False:
            yield f"{name}: enableServiceLinks must be false: a Service `predictor` would set PREDICTOR_PORT"


def mounts_are_of_volumes(objects: list[Json], flags: Flags) -> Iterator[str]:
    claims = {
        template["metadata"].get("name")
        for item in of_kind(objects, "StatefulSet")
        for template in item["spec"].get("volumeClaimTemplates", [])
    }
    for user, pod, container in containers(objects):
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | claims
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{user}: no volume is called {mount['name']}"
        variables = {variable["name"] for variable in container.get("env", [])}
        for name in re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []))):
            if name not in variables:
                yield f"{user}: $({name}) is no variable, and stays as it is written"


def files_of_arguments_are_mounted(objects: list[Json], flags: Flags) -> Iterator[str]:
    files = {item["metadata"]["name"]: item.get("data", {}).keys() for item in of_kind(objects, "ConfigMap")}
    for user, pod, container in containers(objects):
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container.get("volumeMounts", [])}
        for name, path in flags_of(container).items():
            if name not in {"--rules", "--data", "--text", "--init", "--out", "--json"}:
                continue
            volume = next((mounts[mount] for mount in mounts if path == mount or path.startswith(f"{mount}/")), None)
            if volume is None:
                yield f"{user}: nothing is mounted for {name}={path}"
            elif "configMap" in volume and path.rpartition("/")[2] not in files.get(
                volume["configMap"].get("name"), {}
            ):
                yield f"{user}: its ConfigMap has no file for {name}={path}"


def nodes_are_known_by_their_labels(objects: list[Json], flags: Flags) -> Iterator[str]:
    affinities = [pod.get("affinity", {}).get("nodeAffinity", {}) for _, _, pod in pods(objects)]
    required = [each.get("requiredDuringSchedulingIgnoredDuringExecution", {}) for each in affinities]
    required += [
        group["spec"].get("persistentVolumeSpec", {}).get("nodeAffinity", {}).get("required", {})
        for group in of_kind(objects, "LocalModelNodeGroup")
    ]
    for terms in (each.get("nodeSelectorTerms", []) for each in required):
        for expression in (expression for term in terms for expression in term.get("matchExpressions", [])):
            if expression["key"] not in NODE_LABELS:
                yield f"no node has the label {expression['key']}"
            if expression["operator"] in {"Gt", "Lt"} and not re.fullmatch(r"\d+", "".join(expression["values"])):
                yield f"{expression['key']} {expression['operator']} takes one number"


POD_RULES: tuple[Rule, ...] = (
    images_have_fixed_tags,
    image_fits_the_device,
    resources_fit_the_model,
    arguments_are_given_once,
    security_is_tight,
    service_links_are_off,
    mounts_are_of_volumes,
    files_of_arguments_are_mounted,
    nodes_are_known_by_their_labels,
)
