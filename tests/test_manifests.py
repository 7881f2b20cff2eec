"""What `kubectl apply -k manifests/base` sends: valid by every schema at hand, and by KServe's and Knative's rules.

Schemas catch typos. The rules below are those that no schema holds: what KServe or Knative refuses, drops without a
word, or fills in wrongly. Each has a bad manifest that it catches.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes.client
import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity

from predictor.settings import Settings
from tests.conftest import left_out

with pytest.MonkeyPatch.context() as patch:  # kserve parses the command line while it is imported
    patch.setattr(sys, "argv", ["pytest"])
    import kserve
    import kserve.models

ROOT = Path(__file__).parents[1]
BASE = ROOT / "manifests" / "base"
CRDS = ROOT.parent / "shared" / "crds"

Json = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- rendering


def rendered_by_kubectl() -> list[Json]:
    """As a cluster would get it."""
    result = subprocess.run(["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def rendered_by_hand() -> list[Json]:
    """The resources and the image of a kustomization that uses nothing else, as ours does."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - {"apiVersion", "kind", "resources", "images"}
    assert not unknown, f"without kubectl this test cannot render {sorted(unknown)}"
    images = {image["name"]: f"{image['newName']}:{image['newTag']}" for image in kustomization["images"]}
    objects = [yaml.safe_load((BASE / name).read_text()) for name in kustomization["resources"]]
    for container in predictor_of(objects)["containers"]:
        container["image"] = images[container["image"]]
    return objects


def config_features() -> dict[str, str]:
    return dict(yaml.safe_load((ROOT / "manifests" / "config-features.patch.yaml").read_text())["data"])


def one(objects: list[Json], kind: str) -> Json:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def predictor_of(objects: list[Json]) -> Json:
    predictor: Json = one(objects, "InferenceService")["spec"]["predictor"]
    return predictor


@pytest.fixture(scope="module")
def base() -> list[Json]:
    return rendered_by_kubectl() if shutil.which("kubectl") else rendered_by_hand()


def test_the_merge_without_kubectl_is_what_kustomize_renders(base: list[Json]) -> None:
    if shutil.which("kubectl") is None:
        left_out("kubectl is not on the PATH: manifests/base is merged by the test, not by kustomize")

    def in_order(objects: list[Json]) -> list[Json]:
        return sorted(objects, key=lambda item: str(item["kind"]))

    assert in_order(rendered_by_hand()) == in_order(base)


# --------------------------------------------------------------------------------------------------------- schemas


def read(value: Any, type_name: str, where: str) -> Any:
    """Build the object from the Python models of KServe and Kubernetes; ValueError for what they do not know.

    Ours, because neither client can: KServe's models name those of Kubernetes, and each client looks in its own.
    """
    if match := re.fullmatch(r"list\[(.*)\]", type_name):
        return [read(item, match[1], f"{where}[{index}]") for index, item in enumerate(value)]
    if match := re.fullmatch(r"dict\(str, (.*)\)", type_name):
        return {key: read(item, match[1], f"{where}.{key}") for key, item in value.items()}
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
            attributes[key]: read(item, model.openapi_types[attributes[key]], f"{where}.{key}")
            for key, item in value.items()
        }
    )


def check_models(item: Json) -> None:
    """Raise ValueError unless the models know the whole object and give it back as it was."""
    names = {"InferenceService": "V1beta1InferenceService"}
    model = read(item, names.get(item["kind"], f"V1{item['kind']}"), item["kind"])
    # KServe's client: the one of Kubernetes writes KServe's models with Python's names.
    if kserve.ApiClient().sanitize_for_serialization(model) != item:
        raise ValueError(f"{item['kind']}: the models lose something")


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


def check_crds(objects: list[Json]) -> None:
    """Raise jsonschema.ValidationError unless the strict schemas of KServe and of Knative admit the service."""
    service = one(objects, "InferenceService")
    for item, name in (
        (service, "inferenceservice_serving.kserve.io_v1beta1"),
        (as_knative_service(service["spec"]["predictor"]), "service_serving.knative.dev_v1"),
    ):
        schema = json.loads((CRDS / f"{name}.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(item)


def test_the_models_of_kserve_and_kubernetes_know_every_field(base: list[Json]) -> None:
    for item in base:
        check_models(item)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda predictor: predictor.update(containerConcurency=32), "has no .'containerConcurency'"),
        (lambda predictor: predictor.update(timeout="300"), "'300' is not of type int"),
        (lambda predictor: predictor["containers"][0]["livenessProbe"]["httpGet"].update(paht="/"), "has no .'paht'"),
        (lambda predictor: predictor["volumes"][0]["persistentVolumeClaim"].update(readonly=True), "no .'readonly'"),
    ],
)
def test_the_models_catch_a_typo_and_a_wrong_type(
    spoil: Callable[[Json], Any], complaint: str, base: list[Json]
) -> None:
    service = copy.deepcopy(one(base, "InferenceService"))
    spoil(service["spec"]["predictor"])
    with pytest.raises(ValueError, match=complaint):
        check_models(service)


def test_the_custom_resource_definitions_admit_the_service(base: list[Json]) -> None:
    if not CRDS.is_dir():
        left_out("../shared/crds is not there: the service is not held against the CRDs of KServe and Knative")
    check_crds(base)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda predictor: predictor.update(containerConcurency=32),
        lambda predictor: predictor["containers"][0].update(lifecycle={"preStop": {"sleep": {"seconds": 5}}}),
        lambda predictor: predictor.update(terminationGracePeriodSeconds=60),
    ],
    ids=["typo", "lifecycle", "grace"],
)
def test_the_custom_resource_definitions_catch_what_knative_forbids(
    spoil: Callable[[Json], Any], base: list[Json]
) -> None:
    if not CRDS.is_dir():
        left_out("../shared/crds is not there: nothing shows that it would catch a bad service")
    objects = copy.deepcopy(base)
    spoil(predictor_of(objects))
    with pytest.raises(jsonschema.ValidationError):
        check_crds(objects)


# ----------------------------------------------------------------------------------------------------------- rules

# A rule takes the rendered objects and Knative's flags, and yields what is wrong.
Rule = Callable[[list[Json], dict[str, str]], Iterator[str]]


def deployment_mode_is_pinned(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    annotations = one(objects, "InferenceService")["metadata"].get("annotations", {})
    if annotations.get("serving.kserve.io/deploymentMode") != "Knative":
        yield "serving.kserve.io/deploymentMode must be Knative: the default varies and cannot be changed later"


def namespace_is_left_to_the_user(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    for item in objects:
        if "namespace" in item["metadata"]:
            yield f"{item['kind']} must not name a namespace"


def knative_admits_the_pod(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    predictor = predictor_of(objects)
    for field in ("terminationGracePeriodSeconds", "automountServiceAccountToken"):
        if field in predictor:
            yield f"Knative forbids {field}"
    if [container["name"] for container in predictor["containers"]] != ["kserve-container"]:
        yield "there must be one container, kserve-container"
    for container in predictor["containers"]:
        if "lifecycle" in container:
            yield "Knative forbids lifecycle"
        if len(container.get("ports", [])) > 1:
            yield "Knative forbids a second port"
    if "batcher" in predictor:
        yield "batcher drops every field but instances and turns errors into 200"


def flags_of_knative_are_on(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    predictor = predictor_of(objects)
    volumes = predictor.get("volumes", [])
    claims = [volume["persistentVolumeClaim"] for volume in volumes if "persistentVolumeClaim" in volume]
    needed = {
        "kubernetes.podspec-affinity": "affinity" in predictor,
        "kubernetes.podspec-nodeselector": "nodeSelector" in predictor,
        "kubernetes.podspec-tolerations": "tolerations" in predictor,
        "kubernetes.podspec-securitycontext": "securityContext" in predictor,
        "kubernetes.podspec-init-containers": "initContainers" in predictor,
        "kubernetes.podspec-volumes-emptydir": any("emptyDir" in volume for volume in volumes),
        "kubernetes.podspec-persistent-volume-claim": bool(claims),
        "kubernetes.podspec-persistent-volume-write": any(not claim.get("readOnly") for claim in claims),
    }
    on = {name for name, value in flags.items() if value == "enabled"}
    for name in sorted({name for name, is_needed in needed.items() if is_needed} ^ on):
        yield f"{name} is {'switched on for nothing' if name in on else 'needed and off'}"


def image_has_a_fixed_tag(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    image = predictor_of(objects)["containers"][0]["image"]
    tag = re.fullmatch(r"[^:]+(?::\d+/[^:]+)?:([\w.-]+)(?:@sha256:[0-9a-f]{64})?", image)
    if tag is None or tag[1] == "latest":
        yield f"the image needs a fixed tag, got {image}"


def resources_fit_the_model(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    resources = predictor_of(objects)["containers"][0].get("resources", {})
    for kind in ("requests", "limits"):
        for name in ("cpu", "memory", "nvidia.com/gpu"):
            if name not in resources.get(kind, {}):
                yield f"resources.{kind}.{name} is missing: KServe would fill in 1 CPU and 2Gi"
        if parse_quantity(resources.get(kind, {}).get("memory", 0)) < parse_quantity("6Gi"):
            yield f"resources.{kind}.memory is under the 6Gi that 1.5B in FP16 needs to load"


def probes_ask_the_server(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    service = one(objects, "InferenceService")
    container = service["spec"]["predictor"]["containers"][0]
    ports = [port["containerPort"] for port in container["ports"]]
    paths = {}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(name, {})
        if "httpGet" not in probe:
            yield f"{name} must be httpGet: a TCP probe is true while the model loads"
            continue
        paths[name] = probe["httpGet"]["path"]
        if [probe["httpGet"].get("port")] != ports:
            yield f"{name} asks another port than the container's"
        if probe.get("timeoutSeconds", 1) > probe.get("periodSeconds", 10):
            yield f"{name} waits longer than its period"
    ready = f"/v1/models/{service['metadata']['name']}"
    for name in ("startupProbe", "readinessProbe"):
        if paths.get(name) != ready:
            yield f"{name} must ask {ready}"
    if paths.get("livenessProbe") in (None, ready):
        yield "livenessProbe must ask another path: a replica that still loads is alive"


def times_agree(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    predictor = predictor_of(objects)
    if not 0 < predictor.get("timeout", 0) <= 600:
        yield "timeout must be given, and is at most 600 s in Knative"
    deadline = predictor.get("annotations", {}).get("serving.knative.dev/progress-deadline", "600s")
    startup = predictor["containers"][0].get("startupProbe", {})
    startup_s = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
    if int(deadline.removesuffix("s")) <= startup_s:
        yield f"progress-deadline {deadline} ends before the startup probe's {startup_s} s"


def scale_makes_sense(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    predictor = predictor_of(objects)
    concurrency = predictor.get("containerConcurrency", 0)
    if concurrency < 2:
        yield "containerConcurrency must be above 1: the engine batches (0 is no limit at all)"
    if predictor.get("scaleTarget", 0) > concurrency:
        yield "scaleTarget above containerConcurrency is never reached"
    if not 1 <= predictor.get("minReplicas", 0) <= predictor.get("maxReplicas", 0):
        yield "minReplicas must be at least 1 and at most maxReplicas"
    if not 0 <= predictor.get("canaryTrafficPercent", 0) <= 100:
        yield "canaryTrafficPercent is a share of 100"


def environment_is_not_overridden(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    predictor = predictor_of(objects)
    refused = {"PYTHONPATH", "PROTOCOL", "STORAGE_URI", "PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"}
    for variable in predictor["containers"][0].get("env", []):
        if variable["name"] in refused:
            yield f"{variable['name']} is KServe's or Knative's: refused or rewritten"
    if predictor.get("enableServiceLinks") is not False:
        yield "enableServiceLinks must be false: a Service `predictor` would set PREDICTOR_PORT"


def security_is_tight(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    predictor = predictor_of(objects)
    container = predictor["containers"][0]
    wanted = {
        "runAsNonRoot": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        "readOnlyRootFilesystem": True,
    }
    for name, value in wanted.items():
        if container.get("securityContext", {}).get(name) != value:
            yield f"securityContext.{name} must be {value}"
    writable = {volume["name"] for volume in predictor.get("volumes", []) if "emptyDir" in volume}
    if "/tmp" not in {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in writable}:
        yield "/tmp must be an emptyDir: the root is read-only"


def model_comes_from_the_volume(objects: list[Json], flags: dict[str, str]) -> Iterator[str]:
    service = one(objects, "InferenceService")
    predictor = service["spec"]["predictor"]
    container = predictor["containers"][0]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in predictor["volumes"]}
    models = [arg.removeprefix("--model=") for arg in container["args"] if arg.startswith("--model=")]
    name, _, folder = (models or [""])[0].partition("=")
    if name != service["metadata"]["name"]:
        yield f"the model is called {name!r}, the service {service['metadata']['name']!r}"
    if folder not in mounts:
        yield f"nothing is mounted at {folder!r}, where the model is read"
        return
    claim = volumes[mounts[folder]["name"]].get("persistentVolumeClaim", {})
    if claim.get("claimName") != one(objects, "PersistentVolumeClaim")["metadata"]["name"]:
        yield "the claim of the weights is not the one in this folder"
    if not (claim.get("readOnly") and mounts[folder].get("readOnly")):
        yield "the weights must be mounted read-only"


RULES: tuple[Rule, ...] = (
    deployment_mode_is_pinned,
    namespace_is_left_to_the_user,
    knative_admits_the_pod,
    flags_of_knative_are_on,
    image_has_a_fixed_tag,
    resources_fit_the_model,
    probes_ask_the_server,
    times_agree,
    scale_makes_sense,
    environment_is_not_overridden,
    security_is_tight,
    model_comes_from_the_volume,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_base_keeps_the_rule(rule: Rule, base: list[Json]) -> None:
    assert list(rule(base, config_features())) == []


def _container(objects: list[Json]) -> Json:
    container: Json = predictor_of(objects)["containers"][0]
    return container


def _annotations(objects: list[Json]) -> Json:
    annotations: Json = one(objects, "InferenceService")["metadata"]["annotations"]
    return annotations


GPU_NODES = {"nvidia.com/gpu.present": "true"}

# (the rule that must object, what is done to the objects and the flags)
BAD: list[tuple[Rule, Callable[[list[Json], dict[str, str]], Any]]] = [
    (deployment_mode_is_pinned, lambda o, f: _annotations(o).clear()),
    (deployment_mode_is_pinned, lambda o, f: _annotations(o).update({"serving.kserve.io/deploymentMode": "Standard"})),
    (namespace_is_left_to_the_user, lambda o, f: one(o, "InferenceService")["metadata"].update(namespace="default")),
    (knative_admits_the_pod, lambda o, f: _container(o).update(lifecycle={"preStop": {"sleep": {"seconds": 5}}})),
    (knative_admits_the_pod, lambda o, f: predictor_of(o).update(terminationGracePeriodSeconds=60)),
    (knative_admits_the_pod, lambda o, f: predictor_of(o).update(automountServiceAccountToken=False)),
    (knative_admits_the_pod, lambda o, f: _container(o)["ports"].append({"containerPort": 8081})),
    (knative_admits_the_pod, lambda o, f: _container(o).update(name="predictor")),
    (knative_admits_the_pod, lambda o, f: predictor_of(o).update(batcher={"maxBatchSize": 32})),
    (flags_of_knative_are_on, lambda o, f: f.pop("kubernetes.podspec-affinity")),
    (flags_of_knative_are_on, lambda o, f: f.update({"kubernetes.podspec-tolerations": "disabled"})),
    (flags_of_knative_are_on, lambda o, f: f.update({"kubernetes.podspec-hostnetwork": "enabled"})),
    (flags_of_knative_are_on, lambda o, f: predictor_of(o).update(nodeSelector=GPU_NODES)),
    (flags_of_knative_are_on, lambda o, f: predictor_of(o).update(securityContext={"runAsNonRoot": True})),
    (flags_of_knative_are_on, lambda o, f: predictor_of(o)["volumes"][0]["persistentVolumeClaim"].pop("readOnly")),
    (image_has_a_fixed_tag, lambda o, f: _container(o).update(image="docker.io/me/gpt2-predictor:latest")),
    (image_has_a_fixed_tag, lambda o, f: _container(o).update(image="localhost:5000/gpt2-predictor")),
    (resources_fit_the_model, lambda o, f: _container(o)["resources"]["requests"].update(memory="4Gi")),
    (resources_fit_the_model, lambda o, f: _container(o)["resources"]["limits"].pop("memory")),
    (resources_fit_the_model, lambda o, f: _container(o)["resources"]["limits"].pop("nvidia.com/gpu")),
    (probes_ask_the_server, lambda o, f: _container(o).pop("readinessProbe")),
    (probes_ask_the_server, lambda o, f: _container(o).update(readinessProbe={"tcpSocket": {"port": 8080}})),
    (probes_ask_the_server, lambda o, f: _container(o)["readinessProbe"]["httpGet"].update(path="/v2/health/ready")),
    (probes_ask_the_server, lambda o, f: _container(o)["livenessProbe"]["httpGet"].update(path="/v1/models/aitextgen")),
    (probes_ask_the_server, lambda o, f: _container(o)["livenessProbe"]["httpGet"].update(port=8081)),
    (probes_ask_the_server, lambda o, f: _container(o)["readinessProbe"].update(timeoutSeconds=30)),
    (times_agree, lambda o, f: predictor_of(o).update(timeout=900)),
    (times_agree, lambda o, f: predictor_of(o).pop("timeout")),
    (times_agree, lambda o, f: predictor_of(o).pop("annotations")),
    (scale_makes_sense, lambda o, f: predictor_of(o).update(containerConcurrency=1)),
    (scale_makes_sense, lambda o, f: predictor_of(o).update(scaleTarget=64)),
    (scale_makes_sense, lambda o, f: predictor_of(o).update(minReplicas=5)),
    (scale_makes_sense, lambda o, f: predictor_of(o).update(canaryTrafficPercent=110)),
    (environment_is_not_overridden, lambda o, f: _container(o).update(env=[{"name": "PROTOCOL", "value": "v3"}])),
    (environment_is_not_overridden, lambda o, f: _container(o).update(env=[{"name": "PYTHONPATH", "value": "/app"}])),
    (environment_is_not_overridden, lambda o, f: predictor_of(o).pop("enableServiceLinks")),
    (security_is_tight, lambda o, f: _container(o)["securityContext"].pop("runAsNonRoot")),
    (security_is_tight, lambda o, f: _container(o)["securityContext"]["capabilities"].update(drop=["NET_RAW"])),
    (security_is_tight, lambda o, f: _container(o)["volumeMounts"].pop()),
    (model_comes_from_the_volume, lambda o, f: _container(o).update(args=["--model=gpt2=/mnt/models"])),
    (model_comes_from_the_volume, lambda o, f: _container(o).update(args=["--model=aitextgen=/models"])),
    (model_comes_from_the_volume, lambda o, f: _container(o)["volumeMounts"][0].pop("readOnly")),
    (model_comes_from_the_volume, lambda o, f: one(o, "PersistentVolumeClaim")["metadata"].update(name="weights")),
]


@pytest.mark.parametrize(("rule", "spoil"), BAD, ids=[f"{rule.__name__}-{i}" for i, (rule, _) in enumerate(BAD)])
def test_the_rule_catches_a_bad_manifest(
    rule: Rule, spoil: Callable[[list[Json], dict[str, str]], Any], base: list[Json]
) -> None:
    objects, flags = copy.deepcopy(base), config_features()
    spoil(objects, flags)
    assert list(rule(objects, flags)) != []


def test_every_rule_has_a_bad_manifest() -> None:
    assert {rule for rule, _ in BAD} == set(RULES)


# ----------------------------------------------------------------------------------------------- the files beside


def test_the_arguments_are_flags_of_serve(base: list[Json]) -> None:
    names = {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in _container(base)["args"]}
    assert names <= Settings.model_fields.keys()


def test_the_server_gives_up_before_knative_does(base: list[Json]) -> None:
    assert Settings.model_fields["timeout_s"].default < predictor_of(base)["timeout"]


def test_the_tag_stands_in_one_place() -> None:
    tag = yaml.safe_load((BASE / "kustomization.yaml").read_text())["images"][0]["newTag"]
    version = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert version is not None
    assert tag == version[1]
    assert [path.name for path in (ROOT / "manifests").rglob("*.yaml") if tag in path.read_text()] == [
        "kustomization.yaml"
    ]


def test_the_service_account_patch_is_a_service_account_and_nothing_else() -> None:
    patch = yaml.safe_load((ROOT / "image-secrets-serviceaccount.patch.yaml").read_text())
    assert patch == {"imagePullSecrets": [{"name": "docker-hub"}]}
    check_models({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}, **patch})


def test_the_features_patch_fits_a_config_map() -> None:
    patch = yaml.safe_load((ROOT / "manifests" / "config-features.patch.yaml").read_text())
    assert patch.keys() == {"data"}
    check_models({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config-features"}, **patch})


def test_the_manifests_in_the_guide_are_valid() -> None:
    guide = (ROOT / "docs" / "deploy.md").read_text()
    manifests = re.findall(r"<<EOF\n(.*?)\nEOF\n", guide, flags=re.DOTALL)
    assert manifests
    for manifest in manifests:
        for item in yaml.safe_load_all(manifest):
            check_models(item)


def test_the_sample_is_a_v1_body() -> None:
    sample = json.loads((ROOT / "sample.json").read_text())
    assert sample.keys() == {"instances", "parameters"}
    assert all(isinstance(instance, str) and instance for instance in sample["instances"])
    assert sample["parameters"].keys() <= {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
