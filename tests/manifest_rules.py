"""What no schema holds of a service: what KServe or Knative refuses, drops without a word, or fills in wrongly.

A rule takes all rendered objects and Knative's flags, and yields what is wrong. `services` tells the modes apart, whose
rules differ. `RULES` is all there are, with those of pods (tests/manifest_pods.py) and those about what objects say of
each other (tests/manifest_wiring.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from predictor.settings import Settings
from tests.manifest_pods import POD_RULES
from tests.manifest_wiring import WIRING_RULES
from tests.manifests import BASE_TAG, Flags, Json, Rule, flags_of, is_standard, of_kind, services, storage_uri, tag_of

# Annotations that mean something to KServe or Knative, and their values; any other key of theirs is a typo.
ANNOTATIONS = {
    "serving.kserve.io/deploymentMode": r"Knative|Standard",
    "serving.kserve.io/autoscalerClass": r"external|none",
    "serving.kserve.io/enable-tag-routing": r"true",
    "serving.knative.dev/progress-deadline": r"\d+s",
    "autoscaling.knative.dev/scale-down-delay": r"\d+[ms]",
    "autoscaling.knative.dev/scale-to-zero-pod-retention-period": r"\d+[ms]",
}


def deployment_mode_is_pinned(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, _, _ in services(objects):
        if "serving.kserve.io/deploymentMode" not in service["metadata"].get("annotations", {}):
            yield "serving.kserve.io/deploymentMode is missing: the default varies and cannot be changed later"


def annotations_are_known(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, predictor, _ in services(objects):
        for key, value in [
            *service["metadata"].get("annotations", {}).items(),
            *predictor.get("annotations", {}).items(),
        ]:
            if key not in ANNOTATIONS:
                yield f"nobody reads the annotation {key}"
            elif not re.fullmatch(ANNOTATIONS[key], value):
                yield f"{key} must be {ANNOTATIONS[key]}, got {value!r}"


def namespace_is_left_to_the_user(objects: list[Json], flags: Flags) -> Iterator[str]:
    for item in objects:
        if "namespace" in item["metadata"]:
            yield f"{item['kind']} must not name a namespace"


def predictor_is_one_container(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, _ in services(objects):
        if [container["name"] for container in predictor["containers"]] != ["kserve-container"]:
            yield "there must be one container, kserve-container"
        if "batcher" in predictor:
            yield "batcher drops every field but instances and turns errors into 200"


def knative_admits_the_pod(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, container in services(objects, standard=False):
        for field in ("terminationGracePeriodSeconds", "automountServiceAccountToken"):
            if field in predictor:
                yield f"Knative forbids {field}"
        if "lifecycle" in container:
            yield "Knative forbids lifecycle"
        if len(container.get("ports", [])) > 1:
            yield "Knative forbids a second port"


def knative_alone_reads(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, _ in services(objects, standard=True):
        for field in ("canaryTrafficPercent", "containerConcurrency", "annotations"):
            if field in predictor:
                yield f"in Standard mode {field} is ignored without a word"
        if predictor.get("minReplicas") == 0:
            yield "Standard mode cannot scale to zero"
    for service, _, _ in services(objects, standard=False):
        if "canary" in service["spec"]:
            yield "spec.canary is for Standard mode; Knative's share is canaryTrafficPercent"
        if "serving.kserve.io/autoscalerClass" in service["metadata"].get("annotations", {}):
            yield "autoscalerClass is for Standard mode"


def standard_mode_drains(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, container in services(objects, standard=True):
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if command[:1] != ["sleep"]:
            yield "preStop must sleep: gateways send for some seconds after SIGTERM, when the port is closed"
            continue
        needed = int(command[1]) + int(flags_of(container).get("--grace-period-s", 30))
        if predictor.get("terminationGracePeriodSeconds", 30) <= needed:
            yield f"terminationGracePeriodSeconds must be above {needed} s, preStop and the server's own grace together"
        if predictor.get("deploymentStrategy", {}).get("rollingUpdate", {}).get("maxUnavailable") != 0:
            yield "maxUnavailable must be 0: with one replica 25% is that replica"


def flags_of_knative_are_on(objects: list[Json], flags: Flags) -> Iterator[str]:
    on = {name for name, value in flags.items() if value == "enabled"}
    for name in sorted(flags_needed(objects) - on):
        yield f"{name} is needed and off"


def flags_needed(objects: list[Json]) -> set[str]:
    """The features that Knative must admit for these services."""
    needed: set[str] = set()
    for _, predictor, container in services(objects, standard=False):
        volumes = predictor.get("volumes", [])
        claims = [volume["persistentVolumeClaim"] for volume in volumes if "persistentVolumeClaim" in volume]
        uses = {
            "affinity": "affinity" in predictor,
            "nodeselector": "nodeSelector" in predictor,
            "tolerations": "tolerations" in predictor,
            "topologyspreadconstraints": "topologySpreadConstraints" in predictor,
            "securitycontext": "securityContext" in predictor,
            "init-containers": "initContainers" in predictor,
            "fieldref": any("valueFrom" in variable for variable in container.get("env", [])),
            "volumes-emptydir": any("emptyDir" in volume for volume in volumes),
            "persistent-volume-claim": bool(claims),
            "persistent-volume-write": any(not claim.get("readOnly") for claim in claims),
        }
        needed |= {f"kubernetes.podspec-{name}" for name, is_used in uses.items() if is_used}
    return needed


def probes_ask_the_server(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, _, container in services(objects):
        ports = [port["containerPort"] for port in container["ports"]]
        paths = {}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(name, {})
            if "httpGet" not in probe:
                yield f"{name} must be httpGet: a TCP probe, Standard mode's default, is true while the model loads"
                continue
            paths[name] = probe["httpGet"].get("path")
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


def times_agree(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, predictor, container in services(objects):
        timeout, given = predictor.get("timeout", 0), flags_of(container)
        server = float(given.get("--timeout-s", Settings.model_fields["timeout_s"].default))
        grace = int(given.get("--grace-period-s", Settings.model_fields["grace_period_s"].default))
        if timeout <= server:
            yield f"timeout must be above the server's {server:.0f} s, whose 504 says why"
        if grace <= server:
            yield f"--grace-period-s must be above the server's {server:.0f} s: what runs is finished"
        if is_standard(service):
            continue
        if timeout > 600:
            yield "timeout is at most 600 s in Knative"
        if grace >= timeout:
            yield f"Knative ends a replica after timeout ({timeout} s), before the server's grace of {grace} s"
        deadline = predictor.get("annotations", {}).get("serving.knative.dev/progress-deadline", "600s")
        startup = container.get("startupProbe", {})
        startup_s = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
        if int(deadline.removesuffix("s")) <= startup_s:
            yield f"progress-deadline {deadline} ends before the startup probe's {startup_s} s"


def scale_makes_sense(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, _ in services(objects):
        least, most = predictor.get("minReplicas"), predictor.get("maxReplicas")
        if least is None or most is None or not least <= most or most < 1:
            yield f"minReplicas {least} and maxReplicas {most} must be given, in this order"
        if not 0 <= predictor.get("canaryTrafficPercent", 0) <= 100:
            yield "canaryTrafficPercent is a share of 100"


def a_canary_has_a_tag_and_a_share(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, container in services(objects):
        is_new = tag_of(container["image"]) not in {BASE_TAG, f"{BASE_TAG}-cpu"}
        if is_new != ("canaryTrafficPercent" in predictor):
            yield "a canary's tag and canaryTrafficPercent go in one apply, or the new revision takes everything"


def knative_scales_by_concurrency(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, predictor, container in services(objects, standard=False):
        concurrency = predictor.get("containerConcurrency", 0)
        if concurrency < 2:
            yield "containerConcurrency must be above 1: the engine batches (0 is no limit at all)"
        running = int(flags_of(container).get("--max-running", Settings.model_fields["max_running"].default))
        if concurrency > running:
            yield f"containerConcurrency {concurrency} above --max-running {running}: the rest waits inside"
        if predictor.get("scaleTarget", 0) > concurrency:
            yield "scaleTarget above containerConcurrency is never reached"
        if predictor.get("scaleMetric", "concurrency") not in {"concurrency", "rps"}:
            yield "Knative's autoscaler knows concurrency and rps; cpu and memory are the HPA's"
        retention = "autoscaling.knative.dev/scale-to-zero-pod-retention-period"
        if (predictor.get("minReplicas") == 0) != (retention in predictor.get("annotations", {})):
            yield f"minReplicas 0 and {retention} belong together: without it the last replica goes within a minute"
        if predictor.get("minReplicas") == 0 and predictor.get("timeout", 0) < 600:
            yield "with minReplicas 0 the first request waits for the start: timeout must be Knative's most, 600 s"


def standard_scales_by_keda(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, predictor, _ in services(objects, standard=True):
        name = f"{service['metadata']['name']}-predictor"
        scaled = [item for item in of_kind(objects, "ScaledObject") if item["spec"]["scaleTargetRef"]["name"] == name]
        kind = service["metadata"]["annotations"].get("serving.kserve.io/autoscalerClass")
        if kind != ("external" if scaled else "none"):
            yield f"autoscalerClass {kind} with {len(scaled)} ScaledObjects: KServe would scale on CPU, or nobody would"
        if "scaleMetric" in predictor or "scaleTarget" in predictor:
            yield "scaleMetric and scaleTarget are the HPA's; KServe refuses them with KEDA"
        for item in scaled:
            bounds = item["spec"].get("minReplicaCount"), item["spec"].get("maxReplicaCount")
            if bounds != (predictor.get("minReplicas"), predictor.get("maxReplicas")):
                yield f"the ScaledObject's replicas {bounds} are not the service's"


def environment_is_not_overridden(objects: list[Json], flags: Flags) -> Iterator[str]:
    for _, _, container in services(objects):
        refused = {"PYTHONPATH", "PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"}
        for variable in container.get("env", []):
            if variable["name"] in refused or (variable["name"], variable.get("value")) not in {
                ("PROTOCOL", "v1"),
                ("PROTOCOL", "v2"),
                ("STORAGE_URI", variable.get("value")),
            }:
                yield f"{variable['name']} is KServe's or Knative's: refused or rewritten"


def model_comes_from_the_volume(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, predictor, container in services(objects):
        name, _, folder = flags_of(container).get("--model", "").partition("=")
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        if name != service["metadata"]["name"]:
            yield f"the model is called {name!r}, the service {service['metadata']['name']!r}"
        if storage_uri(container):  # KServe mounts it
            if folder != "/mnt/models" or folder in mounts:
                yield f"KServe mounts STORAGE_URI at /mnt/models; --model reads {folder}, ours are {sorted(mounts)}"
        elif folder not in mounts:
            yield f"nothing is mounted at {folder!r}, where the model is read"
        else:
            volumes = {volume["name"]: volume for volume in predictor["volumes"]}
            claim = volumes[mounts[folder]["name"]].get("persistentVolumeClaim", {})
            if not (claim.get("readOnly") and mounts[folder].get("readOnly")):
                yield "the weights must be mounted read-only"


SERVICE_RULES: tuple[Rule, ...] = (
    deployment_mode_is_pinned,
    annotations_are_known,
    namespace_is_left_to_the_user,
    predictor_is_one_container,
    knative_admits_the_pod,
    knative_alone_reads,
    standard_mode_drains,
    flags_of_knative_are_on,
    probes_ask_the_server,
    times_agree,
    scale_makes_sense,
    a_canary_has_a_tag_and_a_share,
    knative_scales_by_concurrency,
    standard_scales_by_keda,
    environment_is_not_overridden,
    model_comes_from_the_volume,
)

RULES = SERVICE_RULES + POD_RULES + WIRING_RULES
