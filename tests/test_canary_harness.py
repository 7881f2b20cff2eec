"""The stub of a cluster that the canary tests stand on, held against the clients that talk to real ones."""

from __future__ import annotations

import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import kubernetes
import pytest

from tests.canary.cluster import NAME, NAMESPACE, Cluster
from tests.canary.objects import INFERENCE_SERVICES
from tests.canary.traffic import DISALLOWED_ANNOTATIONS, propagated, routed_traffic, wanted_traffic, weights
from tests.conftest import left_out

STANDIN = [sys.executable, "-m", "tests.canary.standin"]
IMAGES = {"standin:1": STANDIN, "standin:2": STANDIN, "standin:3": STANDIN}
STATE = "rollout.gpt2-predictor/state"

WHERE = {
    "group": INFERENCE_SERVICES.group,
    "version": INFERENCE_SERVICES.version,
    "plural": INFERENCE_SERVICES.plural,
    "namespace": NAMESPACE,
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    disallowed = (*DISALLOWED_ANNOTATIONS, STATE)
    with Cluster(tmp_path, IMAGES, disallowed_annotations=disallowed, drain_s=0.2, progress_deadline_s=2) as made:
        made.serve("standin:1")
        yield made


@pytest.fixture
def client(cluster: Cluster) -> Iterator[kubernetes.client.ApiClient]:
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
    with kubernetes.client.ApiClient(configuration) as opened:
        yield opened


@pytest.fixture
def services(client: kubernetes.client.ApiClient) -> kubernetes.client.CustomObjectsApi:
    return kubernetes.client.CustomObjectsApi(client)


def canary(image: str, percent: int | None) -> dict[str, Any]:
    """A merge patch that asks for an image and its share."""
    container = {"name": "kserve-container", "image": image}
    return {"spec": {"predictor": {"canaryTrafficPercent": percent, "containers": [container]}}}


def versions(service: dict[str, Any]) -> tuple[str, int]:
    return service["metadata"]["resourceVersion"], service["metadata"]["generation"]


def test_generation_moves_with_the_spec_alone(services: kubernetes.client.CustomObjectsApi) -> None:
    version, generation = versions(services.get_namespaced_custom_object(name=NAME, **WHERE))
    annotated = services.patch_namespaced_custom_object(
        name=NAME, body={"metadata": {"annotations": {STATE: "{}"}}}, **WHERE
    )
    assert int(versions(annotated)[0]) > int(version)
    assert versions(annotated)[1] == generation
    changed = services.patch_namespaced_custom_object(name=NAME, body=canary("standin:1", 10), **WHERE)
    assert versions(changed)[1] == generation + 1
    same = services.patch_namespaced_custom_object(name=NAME, body=canary("standin:1", 10), **WHERE)
    assert versions(same)[1] == generation + 1


def test_managed_fields_say_who_changed_it_and_when(services: kubernetes.client.CustomObjectsApi) -> None:
    began = datetime.now(timezone.utc).replace(microsecond=0)
    changed = services.patch_namespaced_custom_object(
        name=NAME, body=canary("standin:1", 10), field_manager="me", **WHERE
    )
    (mine,) = [each for each in changed["metadata"]["managedFields"] if each["manager"] == "me"]
    assert datetime.fromisoformat(mine["time"].replace("Z", "+00:00")) >= began


def test_a_stale_resource_version_is_a_conflict(services: kubernetes.client.CustomObjectsApi) -> None:
    read = services.get_namespaced_custom_object(name=NAME, **WHERE)["metadata"]["resourceVersion"]
    patch = {"metadata": {"resourceVersion": read, "annotations": {STATE: "mine"}}}
    services.patch_namespaced_custom_object(name=NAME, body=patch, **WHERE)
    patch["metadata"]["annotations"] = {STATE: "theirs"}
    with pytest.raises(kubernetes.client.ApiException) as refused:
        services.patch_namespaced_custom_object(name=NAME, body=patch, **WHERE)
    assert refused.value.status == 409
    assert '"reason":"Conflict"' in refused.value.body
    left = services.get_namespaced_custom_object(name=NAME, **WHERE)["metadata"]["annotations"]
    assert left[STATE] == "mine"


def test_json_patch_tests_before_it_writes(services: kubernetes.client.CustomObjectsApi) -> None:
    path = "/spec/predictor/canaryTrafficPercent"
    kind = "application/json-patch+json"
    added = [{"op": "add", "path": path, "value": 25}]
    services.patch_namespaced_custom_object(name=NAME, body=added, _content_type=kind, **WHERE)
    wrong = [{"op": "test", "path": path, "value": 50}, {"op": "remove", "path": path}]
    with pytest.raises(kubernetes.client.ApiException) as refused:
        services.patch_namespaced_custom_object(name=NAME, body=wrong, _content_type=kind, **WHERE)
    assert refused.value.status == 422
    assert services.get_namespaced_custom_object(name=NAME, **WHERE)["spec"]["predictor"]["canaryTrafficPercent"] == 25


def test_strategic_merge_is_refused_on_a_custom_resource(services: kubernetes.client.CustomObjectsApi) -> None:
    kind = "application/strategic-merge-patch+json"
    with pytest.raises(kubernetes.client.ApiException) as refused:
        services.patch_namespaced_custom_object(name=NAME, body=canary("standin:2", 10), _content_type=kind, **WHERE)
    assert refused.value.status == 415


def test_status_is_out_of_reach_of_a_patch(services: kubernetes.client.CustomObjectsApi, cluster: Cluster) -> None:
    before = cluster.status["latestReadyRevision"]
    forged = {"status": {"components": {"predictor": {"latestReadyRevision": "forged"}}}}
    services.patch_namespaced_custom_object(name=NAME, body=forged, **WHERE)
    assert cluster.status["latestReadyRevision"] == before


def test_an_unknown_service_is_not_found(services: kubernetes.client.CustomObjectsApi) -> None:
    with pytest.raises(kubernetes.client.ApiException) as refused:
        services.get_namespaced_custom_object(name="other", **WHERE)
    assert refused.value.status == 404


def test_a_watch_tells_what_changes(services: kubernetes.client.CustomObjectsApi) -> None:
    seen: list[tuple[str, Any]] = []

    def change() -> None:
        services.patch_namespaced_custom_object(name=NAME, body={"metadata": {"annotations": {STATE: "new"}}}, **WHERE)

    timer = threading.Timer(0.3, change)
    timer.start()
    watch = kubernetes.watch.Watch()
    for event in watch.stream(services.list_namespaced_custom_object, timeout_seconds=10, **WHERE):
        seen.append((event["type"], event["object"]["metadata"]["annotations"].get(STATE)))
        if seen[-1][1] == "new":
            watch.stop()
    timer.join()
    assert seen[0] == ("ADDED", None)
    assert seen[-1] == ("MODIFIED", "new")


def test_events_are_of_their_objects_namespace(client: kubernetes.client.ApiClient, cluster: Cluster) -> None:
    core = kubernetes.client.CoreV1Api(client)
    about = {"kind": "InferenceService", "name": NAME, "namespace": NAMESPACE}
    event = {"metadata": {"generateName": "x-"}, "involvedObject": about, "reason": "Started", "message": "10%"}
    core.create_namespaced_event(NAMESPACE, event)
    core.create_namespaced_event(NAMESPACE, event)
    assert [each["reason"] for each in cluster.events] == ["Started", "Started"]
    with pytest.raises(kubernetes.client.ApiException) as refused:
        core.create_namespaced_event(NAMESPACE, event | {"involvedObject": about | {"namespace": "other"}})
    assert refused.value.status == 422


def test_kubectl_reads_patches_and_waits(cluster: Cluster) -> None:
    if shutil.which("kubectl") is None:
        left_out("kubectl is not installed")
    assert NAME in cluster.run("kubectl", "get", "inferenceservices")
    patch = '{"spec": {"predictor": {"minReplicas": 2, "canaryTrafficPercent": 10}}}'
    assert "patched" in cluster.run("kubectl", "patch", "isvc", NAME, "--type", "merge", "--patch", patch)
    cluster.wait_until(lambda: cluster.share(2) == 10, "the new revision has its share")
    cluster.run("kubectl", "wait", "--for=condition=ready", "--timeout=10s", f"isvc/{NAME}")
    path = "jsonpath={.status.components.predictor.traffic[0].percent}"
    assert cluster.run("kubectl", "get", "isvc", NAME, "-o", path) == "10"


def test_kserves_own_client_reads_and_waits(cluster: Cluster) -> None:
    # In a process of its own: KServe parses sys.argv when it is imported. Its `patch` is left out: in 0.21 it hands a
    # model to the kubernetes client, which takes dictionaries only (37).
    script = f"""
import sys
sys.argv = sys.argv[:1]
from kserve import KServeClient
client = KServeClient()
assert client.is_isvc_ready({NAME!r}, {NAMESPACE!r})
client.wait_isvc_ready({NAME!r}, {NAMESPACE!r}, watch=True, timeout_seconds=30)
print(client.get({NAME!r}, {NAMESPACE!r})["status"]["components"]["predictor"]["latestReadyRevision"])
"""
    assert cluster.run(sys.executable, "-c", script).splitlines()[-1] == cluster.name(1)


def test_a_canary_gets_its_share_when_it_is_ready(
    services: kubernetes.client.CustomObjectsApi, cluster: Cluster
) -> None:
    services.patch_namespaced_custom_object(name=NAME, body=canary("standin:2", 10), **WHERE)
    cluster.wait_until(lambda: cluster.share(2) == 10, "the canary has 10%")
    with httpx.Client() as http:
        answers = [http.post(cluster.envoy.url, content=b"x") for _ in range(500)]
    assert {each.status_code for each in answers} == {200}
    assert all(each.text == each.headers["x-served-by"] for each in answers)
    served = Counter(each.text for each in answers)
    # Binomial(500, 0.1) has a standard deviation of 6.7; 4 of them are 27.
    assert abs(served[cluster.name(2)] - 50) < 27
    assert served[cluster.name(1)] + served[cluster.name(2)] == 500
    assert cluster.envoy.requests(cluster.name(2)) == served[cluster.name(2)]
    both = {cluster.name(1), cluster.name(2)}
    cluster.wait_until(
        lambda: {each["metric"]["pod"] for each in cluster.prometheus.query("standin_up == 1")} == both,
        "Prometheus scrapes both",
    )


def test_promotion_ends_the_old_revision_after_its_traffic(
    services: kubernetes.client.CustomObjectsApi, cluster: Cluster
) -> None:
    services.patch_namespaced_custom_object(name=NAME, body=canary("standin:2", 50), **WHERE)
    cluster.wait_until(lambda: cluster.share(2) == 50, "the canary has half")
    assert cluster.status["latestRolledoutRevision"] == cluster.name(1)
    services.patch_namespaced_custom_object(name=NAME, body=canary("standin:2", None), **WHERE)
    cluster.wait_until(lambda: not cluster.revision(1).running, "the old revision has ended")
    assert cluster.share(2) == 100
    assert cluster.status["latestRolledoutRevision"] == cluster.name(2)
    assert cluster.status["previousRolledoutRevision"] == cluster.name(1)
    stopped_s, moved_s = cluster.revision(1).stopped_at, cluster.controller.shifts[-1][0]
    assert stopped_s is not None
    assert stopped_s - moved_s >= 0.2


def test_a_revision_that_fails_gets_no_traffic_and_says_why(
    services: kubernetes.client.CustomObjectsApi, cluster: Cluster
) -> None:
    services.patch_namespaced_custom_object(name=NAME, body=canary("nowhere:1", 10), **WHERE)

    cluster.wait_until(lambda: cluster.name(2) in cluster.failure, "the condition says so")
    assert cluster.envoy.weights == {cluster.name(1): 100}
    assert cluster.status["latestCreatedRevision"] == cluster.name(2)
    assert cluster.status["latestReadyRevision"] == cluster.name(1)


def test_any_annotation_makes_a_revision_but_those_that_kserve_is_told_to_leave_out(
    services: kubernetes.client.CustomObjectsApi, cluster: Cluster
) -> None:
    services.patch_namespaced_custom_object(name=NAME, body={"metadata": {"annotations": {STATE: "1"}}}, **WHERE)
    services.patch_namespaced_custom_object(name=NAME, body={"metadata": {"annotations": {"other": "1"}}}, **WHERE)
    cluster.wait_until(lambda: cluster.share(2) == 100, "the second annotation made a revision")
    assert len(cluster.controller.revisions) == 2


def traffic(percent: int | None, latest_ready: str, **status: str) -> dict[str, int]:
    """Percent by revision that KServe and Knative would come to."""
    predictor = {} if percent is None else {"canaryTrafficPercent": percent}
    service = {"metadata": {}, "spec": {"predictor": predictor}, "status": {"components": {"predictor": status}}}
    urls = {"one": "http://one", "two": "http://two"}
    return weights(routed_traffic(wanted_traffic(service), latest_ready, urls))


@pytest.mark.parametrize(
    ("percent", "latest_ready", "rolled_out", "expected"),
    [
        (10, "two", "one", {"two": 10, "one": 90}),
        (0, "two", "one", {"one": 100}),
        (100, "two", "one", {"two": 100}),
        (None, "two", "one", {"two": 100}),
        (10, "one", "one", {"one": 100}),  # the new revision is not ready yet
        (10, "one", "", {"one": 100}),  # the first deployment ignores the share
    ],
)
def test_traffic_is_split_as_kserve_does(
    percent: int | None, latest_ready: str, rolled_out: str, expected: dict[str, int]
) -> None:
    assert traffic(percent, latest_ready, latestRolledoutRevision=rolled_out) == expected


def test_a_revision_that_had_everything_gives_it_back() -> None:
    """A share below 100 after a promotion: KServe needs two looks for it."""
    entries = [
        {"latestRevision": True, "percent": 0, "revisionName": "two"},
        {"latestRevision": False, "percent": 100, "revisionName": "two"},
    ]
    status = {"latestRolledoutRevision": "two", "previousRolledoutRevision": "one"}
    assert propagated(status, "two", "two", entries)["latestRolledoutRevision"] == "one"
