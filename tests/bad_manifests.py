"""A bad manifest for each rule: what is done to something that is rendered, and to the flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.manifests import Flags, Json, container_of, one, predictor_of, rendered

Spoil = Callable[[list[Json], Flags], Any]


def _annotations(objects: list[Json]) -> Json:
    annotations: Json = one(objects, "InferenceService")["metadata"]["annotations"]
    return annotations


def _spec(objects: list[Json], kind: str) -> Json:
    spec: Json = one(objects, kind)["spec"]
    return spec


def _pod(objects: list[Json], kind: str) -> Json:
    spec: Json = one(objects, kind)["spec"]["template"]["spec"]
    return spec


def _trigger(objects: list[Json]) -> Json:
    metadata: Json = one(objects, "ScaledObject")["spec"]["triggers"][0]["metadata"]
    return metadata


def _labels(objects: list[Json], kind: str) -> Json:
    labels: Json = one(objects, kind)["spec"]["selector"]["matchLabels"]
    return labels


def _terms(objects: list[Json]) -> list[Json]:
    node_affinity = predictor_of(objects)["affinity"]["nodeAffinity"]
    terms: list[Json] = node_affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return terms


def _alert(objects: list[Json]) -> Json:
    (rules,) = [item for item in objects if item["metadata"]["name"] == "aitextgen-alerts"]
    alert: Json = rules["spec"]["groups"][0]["rules"][0]
    return alert


GPU_NODES = {"nvidia.com/gpu.present": "true"}
MODE = "serving.kserve.io/deploymentMode"
DEADLINE = "serving.knative.dev/progress-deadline"

# By what is rendered, and the rule that must object: what is done to the objects and to the flags.
BAD: dict[str, dict[str, list[Spoil]]] = {
    "base": {
        "deployment_mode_is_pinned": [lambda o, f: _annotations(o).clear()],
        "annotations_are_known": [
            lambda o, f: _annotations(o).update({MODE: "Serverles"}),
            lambda o, f: _annotations(o).update({"serving.kserve.io/deploymentmode": "Knative"}),
            lambda o, f: predictor_of(o)["annotations"].update({DEADLINE: "30m"}),
        ],
        "namespace_is_left_to_the_user": [
            lambda o, f: one(o, "InferenceService")["metadata"].update(namespace="default")
        ],
        "predictor_is_one_container": [
            lambda o, f: container_of(o).update(name="predictor"),
            lambda o, f: predictor_of(o)["containers"].append({"name": "sidecar", "image": "a:1"}),
            lambda o, f: predictor_of(o).update(batcher={"maxBatchSize": 32}),
        ],
        "knative_admits_the_pod": [
            lambda o, f: container_of(o).update(lifecycle={"preStop": {"sleep": {"seconds": 5}}}),
            lambda o, f: predictor_of(o).update(terminationGracePeriodSeconds=60),
            lambda o, f: predictor_of(o).update(automountServiceAccountToken=False),
            lambda o, f: container_of(o)["ports"].append({"containerPort": 8081}),
        ],
        "knative_alone_reads": [
            lambda o, f: _annotations(o).update({MODE: "Standard"}),
            lambda o, f: _annotations(o).update({"serving.kserve.io/autoscalerClass": "external"}),
            lambda o, f: _spec(o, "InferenceService").update(canary=[{"trafficPercent": 10, "predictor": {}}]),
        ],
        "flags_of_knative_are_on": [
            lambda o, f: f.pop("kubernetes.podspec-affinity"),
            lambda o, f: f.update({"kubernetes.podspec-tolerations": "disabled"}),
            lambda o, f: predictor_of(o).update(nodeSelector=GPU_NODES),
            lambda o, f: predictor_of(o).update(securityContext={"runAsNonRoot": True}),
            lambda o, f: predictor_of(o).update(initContainers=[{"name": "download", "image": "a:1"}]),
            lambda o, f: predictor_of(o)["volumes"][0]["persistentVolumeClaim"].pop("readOnly"),
            lambda o, f: container_of(o).update(env=[{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "a"}}}]),
        ],
        "images_have_fixed_tags": [
            lambda o, f: container_of(o).update(image="docker.io/me/gpt2-predictor:latest"),
            lambda o, f: container_of(o).update(image="localhost:5000/gpt2-predictor"),
            lambda o, f: container_of(o).update(image="gpt2-predictor"),
        ],
        "image_fits_the_device": [
            lambda o, f: container_of(o).update(image="docker.io/me/gpt2-predictor:0.1.0-cpu"),
            lambda o, f: container_of(o)["resources"]["limits"].pop("nvidia.com/gpu"),
        ],
        "resources_fit_the_model": [
            lambda o, f: container_of(o)["resources"]["requests"].update(memory="4Gi"),
            lambda o, f: container_of(o)["resources"]["limits"].pop("memory"),
            lambda o, f: container_of(o)["resources"]["limits"].pop("nvidia.com/gpu"),
            lambda o, f: container_of(o)["resources"]["limits"].update(memroy="12Gi"),
        ],
        "probes_ask_the_server": [
            lambda o, f: container_of(o).pop("readinessProbe"),
            lambda o, f: container_of(o).update(readinessProbe={"tcpSocket": {"port": 8080}}),
            lambda o, f: container_of(o)["readinessProbe"]["httpGet"].update(path="/v2/health/ready"),
            lambda o, f: container_of(o)["livenessProbe"]["httpGet"].update(path="/v1/models/aitextgen"),
            lambda o, f: container_of(o)["livenessProbe"]["httpGet"].update(port=8081),
            lambda o, f: container_of(o)["readinessProbe"].update(timeoutSeconds=30),
        ],
        "times_agree": [
            lambda o, f: predictor_of(o).update(timeout=900),
            lambda o, f: predictor_of(o).update(timeout=300),
            lambda o, f: predictor_of(o).pop("timeout"),
            lambda o, f: predictor_of(o).pop("annotations"),
            lambda o, f: container_of(o)["args"].append("--grace-period-s=400"),
            lambda o, f: container_of(o)["args"].append("--grace-period-s=30"),
            lambda o, f: container_of(o)["args"].append("--timeout-s=340"),
        ],
        "scale_makes_sense": [
            lambda o, f: predictor_of(o).update(minReplicas=5),
            lambda o, f: predictor_of(o).pop("maxReplicas"),
            lambda o, f: predictor_of(o).update(canaryTrafficPercent=110),
        ],
        "knative_scales_by_concurrency": [
            lambda o, f: predictor_of(o).update(containerConcurrency=1),
            lambda o, f: predictor_of(o).pop("containerConcurrency"),
            lambda o, f: predictor_of(o).update(containerConcurrency=96),
            lambda o, f: predictor_of(o).update(scaleTarget=64),
            lambda o, f: predictor_of(o).update(scaleMetric="cpu"),
            lambda o, f: predictor_of(o).update(minReplicas=0),
        ],
        "environment_is_not_overridden": [
            lambda o, f: container_of(o).update(env=[{"name": "PROTOCOL", "value": "v3"}]),
            lambda o, f: container_of(o).update(env=[{"name": "PYTHONPATH", "value": "/app"}]),
            lambda o, f: container_of(o).update(env=[{"name": "K_REVISION", "value": "a"}]),
        ],
        "service_links_are_off": [lambda o, f: predictor_of(o).pop("enableServiceLinks")],
        "security_is_tight": [
            lambda o, f: container_of(o)["securityContext"].pop("runAsNonRoot"),
            lambda o, f: container_of(o)["securityContext"]["capabilities"].update(drop=["NET_RAW"]),
            lambda o, f: container_of(o)["volumeMounts"].pop(),
        ],
        "model_comes_from_the_volume": [
            lambda o, f: container_of(o).update(args=["--model=gpt2=/mnt/models"]),
            lambda o, f: container_of(o).update(args=["--model=aitextgen=/models"]),
            lambda o, f: container_of(o)["volumeMounts"][0].pop("readOnly"),
            lambda o, f: container_of(o).update(env=[{"name": "STORAGE_URI", "value": "hf://a/b"}]),
        ],
        "names_are_of_something": [
            lambda o, f: one(o, "PersistentVolumeClaim")["metadata"].update(name="weights"),
            lambda o, f: predictor_of(o).update(serviceAccountName="predictor"),
        ],
        "mounts_are_of_volumes": [
            lambda o, f: predictor_of(o)["volumes"].pop(),
            lambda o, f: container_of(o)["args"].append("--log-level=$(LEVEL)"),
        ],
        "nodes_are_known_by_their_labels": [
            lambda o, f: _terms(o)[0]["matchExpressions"][0].update(key="gpu.nvidia.com/clas"),
            lambda o, f: _terms(o)[0]["matchExpressions"][0].update(operator="Gt"),
        ],
    },
    "components/standard": {
        "knative_alone_reads": [
            lambda o, f: predictor_of(o).update(canaryTrafficPercent=10),
            lambda o, f: predictor_of(o).update(containerConcurrency=32),
            lambda o, f: predictor_of(o).update(annotations={DEADLINE: "1800s"}),
            lambda o, f: predictor_of(o).update(minReplicas=0),
        ],
        "standard_mode_drains": [
            lambda o, f: container_of(o).pop("lifecycle"),
            lambda o, f: predictor_of(o).pop("terminationGracePeriodSeconds"),
            lambda o, f: predictor_of(o).update(terminationGracePeriodSeconds=320),
            lambda o, f: predictor_of(o).pop("deploymentStrategy"),
        ],
        "standard_scales_by_keda": [
            lambda o, f: _annotations(o).pop("serving.kserve.io/autoscalerClass"),
            lambda o, f: _annotations(o).update({"serving.kserve.io/autoscalerClass": "none"}),
            lambda o, f: _spec(o, "ScaledObject").update(maxReplicaCount=10),
            lambda o, f: predictor_of(o).update(scaleMetric="cpu"),
        ],
        "probes_ask_the_server": [lambda o, f: container_of(o).pop("readinessProbe")],
        "names_are_of_something": [
            lambda o, f: _spec(o, "ScaledObject")["scaleTargetRef"].update(name="aitextgen-predictor-default")
        ],
        "scalers_name_their_fields": [
            lambda o, f: _trigger(o).pop("threshold"),
            lambda o, f: _trigger(o).update(metricName="a"),
            lambda o, f: _spec(o, "ScaledObject").pop("maxReplicaCount"),
        ],
    },
    "components/a100": {
        "arguments_are_given_once": [lambda o, f: container_of(o)["args"].append("--max-running=192")],
    },
    "components/canary": {
        "a_canary_has_a_tag_and_a_share": [
            lambda o, f: predictor_of(o).pop("canaryTrafficPercent"),
            lambda o, f: container_of(o).update(image=container_of(rendered("base"))["image"]),
        ],
        "annotations_are_known": [lambda o, f: _annotations(o).update({"serving.kserve.io/enable-tag-routing": "yes"})],
        "knative_alone_reads": [lambda o, f: _annotations(o).update({MODE: "Standard"})],
    },
    "components/cpu": {
        "image_fits_the_device": [
            lambda o, f: container_of(o).update(image="docker.io/me/gpt2-predictor:0.1.0"),
            lambda o, f: predictor_of(o).update(tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}]),
        ],
    },
    "components/scale-to-zero": {
        "knative_scales_by_concurrency": [
            lambda o, f: predictor_of(o)["annotations"].pop(
                "autoscaling.knative.dev/scale-to-zero-pod-retention-period"
            ),
            lambda o, f: predictor_of(o).update(timeout=330),
        ],
    },
    "components/jobs": {
        "selectors_find_pods": [
            lambda o, f: _spec(o, "Service").update(selector={"app": "redis"}),
            lambda o, f: _labels(o, "Deployment").update({"app.kubernetes.io/name": "worker"}),
            lambda o, f: _spec(o, "NetworkPolicy")["ingress"][0]["from"][0]["podSelector"].update(matchLabels={}),
        ],
        "names_are_of_something": [
            lambda o, f: one(o, "Service")["metadata"].update(name="redis"),
            lambda o, f: one(o, "Deployment")["metadata"].update(name="worker"),
            lambda o, f: _trigger(o).update(address="redis.default.svc:6379"),
        ],
        "mounts_are_of_volumes": [
            lambda o, f: _spec(o, "StatefulSet")["volumeClaimTemplates"][0]["metadata"].update(name="log")
        ],
        "scalers_name_their_fields": [
            lambda o, f: _trigger(o).pop("stream"),
            lambda o, f: _trigger(o).update(streamLength="5"),
        ],
        "namespaces_are_known": [
            lambda o, f: _spec(o, "NetworkPolicy")["ingress"][0]["from"][2]["namespaceSelector"].clear()
        ],
        "claims_ask_for_storage": [
            lambda o, f: _spec(o, "StatefulSet")["volumeClaimTemplates"][0]["spec"].update(
                resources={"requests": {"storag": "5Gi"}}
            )
        ],
        "security_is_tight": [
            lambda o, f: _pod(o, "StatefulSet")["securityContext"].pop("runAsNonRoot"),
            lambda o, f: _pod(o, "Deployment")["containers"][0]["securityContext"].pop("capabilities"),
        ],
    },
    "components/rollout": {
        "names_are_of_something": [
            lambda o, f: one(o, "ServiceAccount")["metadata"].update(name="rollout"),
            lambda o, f: one(o, "Role")["metadata"].update(name="rollout"),
            lambda o, f: one(o, "ServiceAccount")["imagePullSecrets"][0].update(name="dockerhub"),
        ],
        "files_of_arguments_are_mounted": [
            lambda o, f: one(o, "ConfigMap").update(data={"rules.yml": ""}),
            lambda o, f: _pod(o, "Deployment")["containers"][0]["volumeMounts"].pop(0),
        ],
    },
    "components/model-cache": {
        "a_cache_holds_what_is_served": [
            lambda o, f: container_of(o)["env"][0].update(value="hf://openai-community/gpt2")
        ],
        "names_are_of_something": [lambda o, f: one(o, "LocalModelNodeGroup")["metadata"].update(name="a100")],
        "claims_ask_for_storage": [
            lambda o, f: _spec(o, "LocalModelNodeGroup")["persistentVolumeSpec"].update(capacity={"disk": "80Gi"})
        ],
        "model_comes_from_the_volume": [
            lambda o, f: container_of(o).update(args=["--model=aitextgen=/models"]),
            lambda o, f: container_of(o)["volumeMounts"].append({"name": "tmp", "mountPath": "/mnt/models"}),
        ],
    },
    "components/security": {
        "the_network_admits_knative": [
            lambda o, f: _spec(o, "NetworkPolicy")["ingress"][0]["ports"].pop(2),
            lambda o, f: _spec(o, "NetworkPolicy")["ingress"].pop(1),
            lambda o, f: _spec(o, "NetworkPolicy").update(ingress=[]),
        ],
        "namespaces_are_known": [
            lambda o, f: _spec(o, "NetworkPolicy")["ingress"][1]["from"][0]["namespaceSelector"].update(
                matchLabels={"kubernetes.io/metadata.name": "prometheus"}
            )
        ],
        "selectors_find_pods": [
            lambda o, f: _spec(o, "PodDisruptionBudget")["selector"].update(matchLabels={"app": "aitextgen"}),
            lambda o, f: _spec(o, "AuthorizationPolicy").pop("selector"),
        ],
        "a_budget_lets_nodes_drain": [
            lambda o, f: _spec(o, "PodDisruptionBudget").update(minAvailable=1, maxUnavailable=None)
        ],
    },
    "components/monitoring": {
        "alerts_say_what_to_do": [
            lambda o, f: _alert(o)["labels"].clear(),
            lambda o, f: _alert(o)["annotations"].pop("description"),
            lambda o, f: _alert(o).pop("alert"),
        ],
        "configuration_is_read": [
            lambda o, f: one(o, "ConfigMap")["metadata"].pop("labels"),
            lambda o, f: one(o, "ConfigMap").update(data={"dashboard": "{}"}),
        ],
    },
}
