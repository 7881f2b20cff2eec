"""What rendered objects say of each other: selectors, names, scalers, ports. Rules as in manifest_rules."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.manifests import Flags, Json, Rule, containers, flags_of, of_kind, pods, services, storage_uri

# Of Knative's queue-proxy: HTTP/1, HTTP/2, TLS, admin, metrics for the autoscaler, metrics for people.
QUEUE_PROXY_PORTS = {8012, 8013, 8112, 8022, 9090, 9091}

# The registry's secret is the user's (image-secrets-serviceaccount.patch.yaml); every namespace has the account.
GIVEN = {("Secret", "docker-hub"), ("ServiceAccount", "default")}

# Namespaces of other systems, as they are installed by default.
NAMESPACES = {"knative-serving", "istio-system", "kourier-system", "monitoring", "keda"}

# (wanted, possible) fields of KEDA's triggers, of which the CRD knows only that they are strings.
TRIGGERS = {
    "prometheus": ({"serverAddress", "query", "threshold"}, {"ignoreNullValues"}),
    "redis-streams": ({"address", "stream", "consumerGroup"}, {"lagCount", "pendingEntriesCount", "streamLength"}),
}


def selectors_find_pods(objects: list[Json], flags: Flags) -> Iterator[str]:
    labels = [labels for _, labels, _ in pods(objects)]
    for item in objects:
        for selector in _selectors(item):
            if not selector or not any(selector.items() <= each.items() for each in labels):
                yield f"{item['kind']} {item['metadata']['name']}: no pod has the labels {selector}"


def _selectors(item: Json) -> Iterator[dict[str, str]]:
    spec = item.get("spec", {})
    if item["kind"] == "Service":
        yield spec.get("selector", {})
    elif item["kind"] in {"Deployment", "StatefulSet", "PodDisruptionBudget", "PodMonitor", "AuthorizationPolicy"}:
        yield spec.get("selector", {}).get("matchLabels", {})
    elif item["kind"] == "NetworkPolicy":
        yield spec.get("podSelector", {}).get("matchLabels", {})
        for rule in spec.get("ingress", []):
            yield from (peer["podSelector"].get("matchLabels", {}) for peer in rule["from"] if "podSelector" in peer)


def names_are_of_something(objects: list[Json], flags: Flags) -> Iterator[str]:
    there = GIVEN | {(item["kind"], item["metadata"]["name"]) for item in objects}
    there |= {
        ("Deployment", f"{service['metadata']['name']}-predictor") for service, _, _ in services(objects, standard=True)
    }
    for user, kind, name in _references(objects):
        if (kind, name) not in there:
            yield f"{user}: there is no {kind} {name}"


def _references(objects: list[Json]) -> Iterator[tuple[str, str, str | None]]:
    for user, _, pod in pods(objects):
        yield user, "ServiceAccount", pod.get("serviceAccountName", "default")
        for volume in pod.get("volumes", []):
            if "configMap" in volume:
                yield user, "ConfigMap", volume["configMap"].get("name")
            if "persistentVolumeClaim" in volume:
                yield user, "PersistentVolumeClaim", volume["persistentVolumeClaim"].get("claimName")
    for item in objects:
        user = f"{item['kind']} {item['metadata']['name']}"
        if item["kind"] == "ServiceAccount":
            yield from ((user, "Secret", secret.get("name")) for secret in item.get("imagePullSecrets", []))
        elif item["kind"] == "RoleBinding":
            yield user, item["roleRef"]["kind"], item["roleRef"]["name"]
            yield from ((user, subject["kind"], subject["name"]) for subject in item["subjects"])
        elif item["kind"] == "ScaledObject":
            yield user, item["spec"]["scaleTargetRef"].get("kind", "Deployment"), item["spec"]["scaleTargetRef"]["name"]
            for trigger in (each for each in item["spec"]["triggers"] if each["type"] == "redis-streams"):
                yield user, "Service", trigger.get("metadata", {}).get("address", "").partition(".")[0]
        elif item["kind"] == "StatefulSet":
            yield user, "Service", item["spec"]["serviceName"]
        elif item["kind"] == "LocalModelCache":
            yield from ((user, "LocalModelNodeGroup", group) for group in item["spec"]["nodeGroups"])
    for user, _, container in containers(objects):
        if (url := flags_of(container).get("--jobs", "none")) != "none":
            yield user, "Service", re.sub(r"redis://([^:]+):6379/0", r"\1", url)


def scalers_name_their_fields(objects: list[Json], flags: Flags) -> Iterator[str]:
    for item in of_kind(objects, "ScaledObject"):
        for trigger in item["spec"]["triggers"]:
            wanted, possible = TRIGGERS.get(trigger["type"], (set(), set()))
            given = trigger.get("metadata", {}).keys()
            if not wanted <= given <= wanted | possible:
                yield f"trigger {trigger['type']} with {sorted(given)}, wanted {sorted(wanted)}"
            if trigger["type"] == "redis-streams" and len(given & possible) != 1:
                yield "a trigger of redis-streams counts one thing"
        bounds = item["spec"].get("minReplicaCount"), item["spec"].get("maxReplicaCount")
        if None in bounds:
            yield "minReplicaCount and maxReplicaCount must be given: KEDA's defaults are 0 and 100"


def the_network_admits_knative(objects: list[Json], flags: Flags) -> Iterator[str]:
    for service, _, container in services(objects):
        pod = {"serving.kserve.io/inferenceservice": service["metadata"]["name"]}
        for policy in of_kind(objects, "NetworkPolicy"):
            if policy["spec"].get("podSelector", {}).get("matchLabels") != pod:
                continue
            wanted = QUEUE_PROXY_PORTS | {container["ports"][0]["containerPort"]}
            admitted = {
                namespace: {port.get("port") for port in rule.get("ports", [])}
                for rule in policy["spec"].get("ingress", [])
                for peer in rule.get("from", [])
                for namespace in _namespaces(peer)
            }
            for namespace in ("knative-serving", "istio-system"):
                for port in sorted(wanted - admitted.get(namespace, set())):
                    yield f"{namespace} cannot reach port {port}"
            if 8080 not in admitted.get("monitoring", set()):
                yield "Prometheus cannot reach the metrics"


def namespaces_are_known(objects: list[Json], flags: Flags) -> Iterator[str]:
    for policy in of_kind(objects, "NetworkPolicy"):
        peers = [peer for rule in policy["spec"].get("ingress", []) for peer in rule.get("from", [])]
        for peer in (peer for peer in peers if "namespaceSelector" in peer):
            found = _namespaces(peer)
            if not found or set(found) - NAMESPACES:
                yield f"the policy {policy['metadata']['name']} admits {peer['namespaceSelector']}"


def _namespaces(peer: Json) -> list[str]:
    selector, key = peer.get("namespaceSelector", {}), "kubernetes.io/metadata.name"
    values = [selector["matchLabels"][key]] if key in selector.get("matchLabels", {}) else []
    for expression in selector.get("matchExpressions", []):
        values += expression["values"] if expression["key"] == key else []
    return values


def a_cache_holds_what_is_served(objects: list[Json], flags: Flags) -> Iterator[str]:
    for cache in of_kind(objects, "LocalModelCache"):
        served = {storage_uri(container) for _, _, container in services(objects)}
        if served != {cache["spec"]["sourceModelUri"]}:
            yield f"STORAGE_URI is {served}, the cache holds {cache['spec']['sourceModelUri']}: it would not be used"


def a_budget_lets_nodes_drain(objects: list[Json], flags: Flags) -> Iterator[str]:
    for budget in of_kind(objects, "PodDisruptionBudget"):
        if budget["spec"].get("maxUnavailable") != 1:
            yield "maxUnavailable must be 1: anything else blocks every drain while there is one replica"


def alerts_say_what_to_do(objects: list[Json], flags: Flags) -> Iterator[str]:
    for rules in of_kind(objects, "PrometheusRule"):
        for rule in (rule for group in rules["spec"]["groups"] for rule in group["rules"]):
            if not ("alert" in rule) ^ ("record" in rule):
                yield f"neither an alert nor a record, or both: {sorted(rule)}"
            elif "alert" in rule and rule.get("labels", {}).get("severity") not in {"page", "ticket"}:
                yield f"{rule['alert']}: severity must be page or ticket"
            elif "alert" in rule and rule.get("annotations", {}).keys() != {"summary", "description"}:
                yield f"{rule['alert']} must have summary and description"


def claims_ask_for_storage(objects: list[Json], flags: Flags) -> Iterator[str]:
    asked = [
        (item, item["spec"].get("resources", {}).get("requests")) for item in of_kind(objects, "PersistentVolumeClaim")
    ]
    for item in of_kind(objects, "StatefulSet"):
        for template in item["spec"].get("volumeClaimTemplates", []):
            asked.append((item, template["spec"].get("resources", {}).get("requests")))
    for item in of_kind(objects, "LocalModelNodeGroup"):
        asked.append((item, item["spec"].get("persistentVolumeSpec", {}).get("capacity")))
        claim = item["spec"].get("persistentVolumeClaimSpec", {})
        asked.append((item, claim.get("resources", {}).get("requests")))
    for item, amounts in asked:
        if amounts is None or amounts.keys() != {"storage"}:
            yield f"{item['kind']} {item['metadata']['name']} asks for {amounts}, not for storage"


def configuration_is_read(objects: list[Json], flags: Flags) -> Iterator[str]:
    for item in of_kind(objects, "ConfigMap"):
        if any(name.endswith(".json") for name in item.get("data", {})):
            if item["metadata"].get("labels", {}).get("grafana_dashboard") != "1":
                yield f"the sidecar does not see {item['metadata']['name']} without the label grafana_dashboard"
        elif not any(name == item["metadata"]["name"] for _, kind, name in _references(objects) if kind == "ConfigMap"):
            yield f"nobody mounts {item['metadata']['name']}"


WIRING_RULES: tuple[Rule, ...] = (
    selectors_find_pods,
    names_are_of_something,
    scalers_name_their_fields,
    the_network_admits_knative,
    namespaces_are_known,
    a_cache_holds_what_is_served,
    a_budget_lets_nodes_drain,
    alerts_say_what_to_do,
    claims_ask_for_storage,
    configuration_is_read,
)
