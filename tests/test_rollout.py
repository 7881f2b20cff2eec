"""A rollout against the stub of the Kubernetes API, with the real client: what is read, what is sent, what is told.

The evidence is scripted here; tests/test_canary.py has the real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import kubernetes
import pytest
from rich.console import Console
from typer.testing import CliRunner

from predictor.cli import app
from predictor.errors import ConfigurationError
from predictor.rollout import by_hand, watch
from predictor.rollout.cluster import Cluster, ClusterError, Conflict
from predictor.rollout.evidence import Histogram, Seen, Shadow
from predictor.rollout.prometheus import Metrics, PrometheusUnavailable
from predictor.rollout.rules import Rules
from predictor.rollout.service import MANAGER, RECORD, Service
from predictor.rollout.shadow import ShadowUnavailable
from predictor.rollout.statistics import Share
from predictor.rollout.watch import Rollout
from tests.canary.apiserver import ApiServer, events_of
from tests.canary.objects import INFERENCE_SERVICES, Object, ObjectStore
from tests.processes import free_port

OLD, NEW = "docker.io/me/gpt2-predictor:0.1.0", "docker.io/me/gpt2-predictor:0.2.0"
STABLE, CANARY, THIRD = (f"aitextgen-predictor-{number:05d}" for number in (1, 2, 3))
WHERE = INFERENCE_SERVICES, "default", "aitextgen"


class KServe:
    """The part of KServe, played by hand: the test says when a revision is made, ready, failed."""

    def __init__(self) -> None:
        self.store = ObjectStore()
        container = {"name": "kserve-container", "image": OLD, "args": ["--model=aitextgen=/mnt/models"]}
        self.store.create(
            INFERENCE_SERVICES,
            "default",
            {
                "metadata": {
                    "name": "aitextgen",
                    "annotations": {"serving.kserve.io/deploymentMode": "Knative", "team": "bard"},
                },
                "spec": {"predictor": {"minReplicas": 1, "containers": [container]}},
            },
        )
        self.report(STABLE, STABLE)

    @property
    def service(self) -> Object:
        return self.store.get(*WHERE)

    @property
    def predictor(self) -> Object:
        found: Object = self.service["spec"]["predictor"]
        return found

    def report(self, created: str, ready: str, *conditions: Object) -> None:
        """Write the status as KServe does, the traffic as the spec asks for it."""
        percent = self.predictor.get("canaryTrafficPercent", 100)
        traffic = [{"revisionName": ready, "percent": percent, "latestRevision": True}]
        rolled_out = STABLE if percent < 100 else ready
        if percent < 100:
            traffic.append({"revisionName": STABLE, "percent": 100 - percent, "latestRevision": False, "tag": "prev"})
        status = {
            "conditions": list(conditions),
            "components": {
                "predictor": {
                    "latestCreatedRevision": created,
                    "latestReadyRevision": ready,
                    "latestRolledoutRevision": rolled_out,
                    "traffic": traffic,
                }
            },
        }
        self.store.change(*WHERE, lambda service: service | {"status": status}, manager="kserve", status=True)

    def change(self, **predictor: Any) -> None:
        def change(service: Object) -> Object:
            service["spec"]["predictor"] |= predictor
            return service

        self.store.change(*WHERE, change, manager="kubectl")

    @property
    def events(self) -> list[tuple[str, str, str]]:
        return [(each["type"], each["reason"], each["message"]) for each in events_of(self.store, "default")]


FAST = Histogram({0.001: 5_000, 0.01: 9_990, math.inf: 10_000})
GOOD = Seen(Share(0, 10_000), FAST, FAST, lately=100)


class ScriptedMetrics(Metrics):
    """Evidence as a test wants it."""

    def __init__(self) -> None:
        self.stable, self.canary = GOOD, GOOD
        self.asked: list[tuple[str, str, float]] = []
        self.down = False

    def read(self, stable: str, canary: str, seconds: float) -> tuple[Seen, Seen]:
        self.asked.append((stable, canary, seconds))
        if self.down:
            raise PrometheusUnavailable("Prometheus does not answer")
        return self.stable, self.canary


class Bench:
    """A rollout with everything that it touches."""

    def __init__(self, kserve: KServe, cluster: Cluster) -> None:
        self.kserve, self.cluster = kserve, cluster
        self.metrics = ScriptedMetrics()
        self.lines: list[str] = []

    def rollout(self, *, dry_run: bool = False, **rules: Any) -> Rollout:
        given = Rules.model_validate({"min_step_s": 0} | rules)
        return Rollout(self.cluster, self.metrics, given, self.lines.append, dry_run=dry_run)

    def started(self, **rules: Any) -> Rollout:
        """A rollout whose canary is ready and has its first share."""
        rollout = self.rollout(**rules)
        rollout.start(NEW, 10)
        self.kserve.report(CANARY, CANARY)
        return rollout


@pytest.fixture
def kserve() -> KServe:
    return KServe()


@pytest.fixture
def api(kserve: KServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with closing(ApiServer(kserve.store)) as server:
        server.write_kubeconfig(tmp_path / "kubeconfig", "default")
        # The client reads KUBECONFIG when it is imported.
        monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture
def bench(kserve: KServe, api: ApiServer) -> Bench:
    return Bench(kserve, Cluster("aitextgen", "default"))


# ---------------------------------------------------------------------------------------------------------- by hand


def test_start_sends_image_share_and_record_in_one_change(bench: Bench) -> None:
    before = int(bench.kserve.service["metadata"]["resourceVersion"])
    bench.rollout().start(NEW, 10)
    service = bench.kserve.service
    assert int(service["metadata"]["resourceVersion"]) == before + 1
    (container,) = service["spec"]["predictor"]["containers"]
    assert container == {"name": "kserve-container", "image": NEW, "args": ["--model=aitextgen=/mnt/models"]}
    assert service["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert service["spec"]["predictor"]["minReplicas"] == 1
    annotations = service["metadata"]["annotations"]
    assert annotations["team"] == "bard"
    assert json.loads(annotations[RECORD])["stable_revision"] == STABLE
    assert bench.kserve.events == [("Normal", "RolloutStarted", f"{OLD} -> {NEW}, 10% of the traffic once it is ready")]


def test_start_takes_the_first_step_of_the_rules(bench: Bench) -> None:
    bench.rollout(steps=[3, 100]).start(NEW, None)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 3


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (OLD, "has the traffic already; a new version needs a new tag"),
        ("docker.io/me/gpt2-predictor", "must be REPO:TAG"),
        ("localhost:5000/gpt2-predictor", "must be REPO:TAG"),
        ("docker.io/me/gpt2-predictor:latest", "must not be tagged latest"),
        (":1", "must be REPO:TAG"),
        ("a b:1", "must be REPO:TAG"),
        ("repo:1\nx", "must be REPO:TAG"),
        ("repo:tag@", "must be REPO:TAG"),
        ("http://x:1", "must be REPO:TAG"),
    ],
)
def test_start_refuses_an_image_that_is_no_new_version(bench: Bench, image: str, complaint: str) -> None:
    before = bench.kserve.service
    with pytest.raises(ConfigurationError, match=complaint):
        bench.rollout().start(image, 10)
    assert bench.kserve.service == before


@pytest.mark.parametrize(
    "args", [["--model=aitextgen=/mnt/models"], ["--dtype", "int8", "--model", "aitextgen=/mnt/models"]]
)
def test_other_weights_are_a_new_version_of_the_same_image(bench: Bench, args: list[str]) -> None:
    bench.kserve.change(containers=[{"name": "kserve-container", "image": OLD, "args": args}])
    rollout = bench.rollout()
    with pytest.raises(ConfigurationError, match="has the traffic already"):
        rollout.start(OLD, 10, "aitextgen=/mnt/models")
    rollout.start(OLD, 10, "aitextgen=/mnt/models/candidates/7")
    (container,) = bench.kserve.predictor["containers"]
    assert container["args"] == [*args[:-1], args[-1] + "/candidates/7"]
    assert bench.lines[-1] == (
        f"{OLD} with aitextgen=/mnt/models -> {OLD} with aitextgen=/mnt/models/candidates/7, "
        "10% of the traffic once it is ready"
    )
    bench.kserve.report(CANARY, CANARY)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 25


def test_other_weights_need_a_model_to_replace(bench: Bench) -> None:
    bench.kserve.change(containers=[{"name": "kserve-container", "image": OLD}])
    with pytest.raises(ConfigurationError, match="no --model to replace"):
        bench.rollout().start(NEW, 10, "aitextgen=/mnt/models")


def test_start_takes_a_digest(bench: Bench) -> None:
    bench.rollout().start("localhost:5000/gpt2-predictor@sha256:" + "0" * 64, 10)


def test_start_refuses_while_another_rollout_runs(bench: Bench) -> None:
    bench.started()
    with pytest.raises(ConfigurationError, match=r"0\.2\.0 is at 10%; promote or abort"):
        bench.rollout().start("docker.io/me/gpt2-predictor:0.3.0", 10)


def test_start_refuses_a_canary_that_was_begun_by_hand(bench: Bench) -> None:
    bench.kserve.change(canaryTrafficPercent=20)
    with pytest.raises(ConfigurationError, match=r"0\.1\.0 has 20% of the traffic, by hand; promote or abort it first"):
        bench.rollout().start(NEW, 10)


def test_start_refuses_a_service_that_never_served(bench: Bench) -> None:
    bench.kserve.store.change(*WHERE, lambda service: service | {"status": {}}, manager="kserve", status=True)
    with pytest.raises(ConfigurationError, match="no revision has served yet"):
        bench.rollout().start(NEW, 10)


@pytest.mark.parametrize("mode", ["Standard", "RawDeployment"])
def test_start_refuses_a_mode_without_canaries(bench: Bench, mode: str) -> None:
    def change(service: Object) -> Object:
        service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] = mode
        return service

    bench.kserve.store.change(*WHERE, change, manager="kubectl")
    with pytest.raises(ConfigurationError, match=f"{mode} mode, where canaryTrafficPercent does nothing"):
        bench.rollout().start(NEW, 10)


def test_start_tells_that_prometheus_is_away_and_goes_on(bench: Bench) -> None:
    bench.metrics.down = True
    bench.rollout().start(NEW, 10)
    assert bench.lines[0] == "Prometheus does not answer; a watcher will hold until it does"
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10


def test_promote_removes_the_share_and_abort_sets_it_to_zero(bench: Bench) -> None:
    bench.started().promote()
    assert "canaryTrafficPercent" not in bench.kserve.predictor
    assert bench.kserve.predictor["containers"][0]["image"] == NEW
    bench.kserve.report(CANARY, CANARY)
    bench.rollout().start("docker.io/me/gpt2-predictor:0.3.0", 10)
    bench.rollout().abort()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0
    assert [each[:2] for each in bench.kserve.events] == [
        ("Normal", "RolloutStarted"),
        ("Normal", "RolloutPromoted"),
        ("Normal", "RolloutStarted"),
        ("Warning", "RolloutAborted"),
    ]


def test_promote_waits_for_readiness(bench: Bench) -> None:
    bench.rollout().start(NEW, 10)
    bench.kserve.report(CANARY, STABLE)
    with pytest.raises(ConfigurationError, match="is not ready"):
        bench.rollout().promote()


@pytest.mark.parametrize("what", ["promote", "abort"])
def test_nothing_is_promoted_or_aborted_where_no_canary_has_a_share(bench: Bench, what: str) -> None:
    with pytest.raises(ConfigurationError, match="no canary has a share"):
        getattr(bench.rollout(), what)()


def test_a_rollout_that_an_apply_has_superseded_can_be_aborted(bench: Bench) -> None:
    """`kubectl apply` of the files sets the image back and keeps the share."""
    bench.started()
    bench.kserve.change(containers=[{"name": "kserve-container", "image": OLD}])
    bench.rollout().abort()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_after_a_rollback_the_stable_image_is_still_the_stable_one(bench: Bench) -> None:
    bench.started().abort()
    bench.kserve.report(CANARY, STABLE)
    bench.rollout().start("docker.io/me/gpt2-predictor:0.3.0", 10)
    record = Service(bench.kserve.service).record
    assert record is not None
    assert (record.stable.image, record.stable_revision) == (OLD, STABLE)
    assert record.newest_revision == CANARY


def test_a_canary_that_was_rolled_back_gets_nothing_while_the_next_one_loads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To Knative it is the latest revision that is ready, to which the new one's share would go."""
    bench.started().abort()
    bench.kserve.report(CANARY, CANARY)
    shares: list[int] = []

    def sleep(seconds: float) -> None:
        assert seconds == 3
        shares.append(bench.kserve.predictor["canaryTrafficPercent"])
        bench.kserve.report(THIRD, CANARY if len(shares) < 3 else THIRD)

    monkeypatch.setattr(by_hand.time, "sleep", sleep)
    bench.rollout().start("docker.io/me/gpt2-predictor:0.3.0", 10, interval_s=3)
    assert shares == [0, 0, 0]
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    assert bench.kserve.events[-1] == (
        "Normal", "RolloutShared", f"{THIRD} is ready and gets 10% of the traffic",
    )  # fmt: skip
    assert not any("dry run" in line for line in bench.lines)


def test_a_next_one_that_fails_gets_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.started().abort()
    bench.kserve.report(CANARY, CANARY)
    failed = {"type": "PredictorReady", "status": "False", "reason": "RevisionFailed", "message": "no such image"}
    monkeypatch.setattr(by_hand.time, "sleep", lambda _: bench.kserve.report(THIRD, CANARY, failed))
    with pytest.raises(ConfigurationError, match=r"0\.3\.0 got no traffic: no such image"):
        bench.rollout().start("docker.io/me/gpt2-predictor:0.3.0", 10)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_a_next_one_that_is_never_ready_gets_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.started().abort()
    bench.kserve.report(CANARY, CANARY)
    monkeypatch.setattr(by_hand.time, "sleep", lambda _: None)
    with pytest.raises(ConfigurationError, match="got no traffic: not ready after"):
        bench.rollout(ready_timeout_s=0.05).start("docker.io/me/gpt2-predictor:0.3.0", 10)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_a_version_that_was_rolled_back_may_be_tried_again(bench: Bench) -> None:
    bench.started().abort()
    bench.kserve.report(CANARY, CANARY)
    before = bench.kserve.service["metadata"]["annotations"]
    bench.rollout().start(NEW, 20)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 20
    assert bench.kserve.service["metadata"]["annotations"] == before
    bench.kserve.report(CANARY, CANARY)
    assert Service(bench.kserve.service).phase == "comparing"


# ---------------------------------------------------------------------------------------------------------- watched


def test_a_good_canary_goes_to_all_traffic_by_the_steps(bench: Bench) -> None:
    rollout = bench.started()
    shares = []
    for _ in range(3):
        rollout.step()
        shares.append(bench.kserve.predictor.get("canaryTrafficPercent"))
        bench.kserve.report(CANARY, CANARY)
    assert shares == [25, 50, None]
    assert Service(bench.kserve.service).phase == "promoted"
    assert [each[1] for each in bench.kserve.events] == [
        "RolloutStarted", "RolloutStepped", "RolloutStepped", "RolloutPromoted",
    ]  # fmt: skip
    assert {each[:2] for each in bench.metrics.asked[1:]} == {(STABLE, CANARY)}


def test_the_record_is_written_once(bench: Bench) -> None:
    """KServe copies annotations to the revision's template: another change of them would be another revision."""
    rollout = bench.started()
    annotations = bench.kserve.service["metadata"]["annotations"]
    for _ in range(3):
        rollout.step()
        bench.kserve.report(CANARY, CANARY)
        assert bench.kserve.service["metadata"]["annotations"] == annotations


def test_the_first_error_rolls_back_at_the_next_look(bench: Bench) -> None:
    rollout = bench.started()
    bench.metrics.canary = replace(GOOD, errors=Share(1, 5))
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0
    assert bench.kserve.events[-1] == (
        "Warning", "RolloutErrors", "10% -> 0%; errors 1 of 5, stable 0 of 10000",
    )  # fmt: skip
    assert bench.lines[-1] == "10% rollback: 10% -> 0%; errors 1 of 5, stable 0 of 10000"


def test_a_revision_that_is_not_ready_is_waited_for(bench: Bench) -> None:
    rollout = bench.rollout()
    rollout.start(NEW, 10)
    rollout.step()  # KServe has not made it yet
    bench.kserve.report(CANARY, STABLE)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    assert len(bench.metrics.asked) == 1  # by `start`
    assert bench.kserve.events[-1][1] == "RolloutWaiting"
    assert len(bench.kserve.events) == 2  # the second look told nothing new


def test_a_revision_that_fails_is_rolled_back(bench: Bench) -> None:
    rollout = bench.rollout()
    rollout.start(NEW, 10)
    failed = {"type": "PredictorReady", "status": "False", "reason": "RevisionFailed", "message": "no such image"}
    bench.kserve.report(STABLE, STABLE, failed)  # of an earlier revision: KServe has not looked yet
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    bench.kserve.report(CANARY, STABLE, failed)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0
    assert bench.kserve.events[-1] == (
        "Warning", "RolloutRevisionFailed", f"10% -> 0%; {CANARY} failed: no such image",
    )  # fmt: skip


def test_a_revision_that_fails_after_it_was_ready_is_rolled_back_too(bench: Bench) -> None:
    rollout = bench.started()
    failed = {"type": "PredictorReady", "status": "False", "reason": "RevisionFailed", "message": "OOMKilled"}
    bench.kserve.report(CANARY, CANARY, failed)
    bench.metrics.canary = Seen()
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_a_revision_that_is_never_ready_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = bench.rollout(ready_timeout_s=60)
    rollout.start(NEW, 10)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    in_seconds(monkeypatch, 61)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0
    assert bench.kserve.events[-1][1] == "RolloutNotReady"


def test_prometheus_down_holds_for_ever(bench: Bench) -> None:
    rollout = bench.started(step_timeout_s=0.001)
    bench.metrics.down = True
    for _ in range(5):
        rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    assert [each[1] for each in bench.kserve.events] == ["RolloutStarted", "RolloutPrometheusUnavailable"]
    bench.metrics.down = False
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 25


def test_too_few_samples_hold(bench: Bench) -> None:
    rollout = bench.started()
    bench.metrics.canary = replace(GOOD, errors=Share(0, 99))
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    assert bench.kserve.events[-1][1] == "RolloutTooFewSamples"


def in_seconds(monkeypatch: pytest.MonkeyPatch, seconds: float) -> datetime:
    """Let the watcher's clock be that much ahead."""
    later = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    for module in (watch, by_hand):
        monkeypatch.setattr(module, "now", lambda: later)
    return later


def test_a_step_is_measured_from_the_api_servers_books(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence from the last patch on, the step's time from readiness if that was later; a watcher that saw neither."""
    bench.started()
    bench.kserve.change(maxReplicas=3)  # somebody else's patch does not count
    now = in_seconds(monkeypatch, 100)
    bench.rollout().look()
    assert bench.metrics.asked[-1][2] == pytest.approx(100, abs=3)
    since = (now - timedelta(seconds=40)).strftime("%Y-%m-%dT%H:%M:%SZ")
    bench.kserve.report(CANARY, CANARY, {"type": "PredictorReady", "status": "True", "lastTransitionTime": since})
    look = bench.rollout(min_step_s=60).look()
    assert bench.metrics.asked[-1][2] == pytest.approx(100, abs=3)
    assert look.decision is not None
    assert look.decision.kind == "StepLasts"
    assert int(look.decision.message.split(" of 60 s")[0]) == pytest.approx(40, abs=3)


def test_whoever_set_the_share_is_in_the_books() -> None:
    owner = {"fieldsV1": {"f:spec": {"f:predictor": {"f:canaryTrafficPercent": {}}}}}
    fields = [
        {
            "manager": MANAGER,
            "time": "2026-11-21T10:00:00Z",
            "fieldsV1": {"f:spec": {"f:predictor": {"f:containers": {}}}},
        },
        {"manager": "kubectl", "time": "2026-11-21T11:00:00.123456789Z", **owner},
        {"manager": "kubectl-edit", "time": "2026-11-21T12:00:00Z", "fieldsV1": {}},
        {"manager": "odd", "time": None, **owner},
    ]
    metadata = {"resourceVersion": "1", "managedFields": fields}
    service = Service({"metadata": metadata, "spec": {"predictor": {}}})
    assert service.shared_at == datetime(2026, 11, 21, 11, 0, 0, 123456, tzinfo=timezone.utc)


def test_without_the_books_a_watcher_goes_by_what_it_saw(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "shared_at", None)
    monkeypatch.setattr(Service, "ready_since", None)
    in_seconds(monkeypatch, -1000)
    rollout = bench.started()
    in_seconds(monkeypatch, 0)
    rollout.step()
    bench.kserve.report(CANARY, CANARY)
    rollout.look()
    in_seconds(monkeypatch, 50)
    rollout.look()
    assert bench.metrics.asked[-1][2] == pytest.approx(50, abs=3)
    bench.rollout().look()  # another process knows when the rollout began
    assert bench.metrics.asked[-1][2] == pytest.approx(1050, abs=3)


def test_a_watcher_that_starts_again_goes_on(bench: Bench) -> None:
    bench.started().step()
    bench.kserve.report(CANARY, CANARY)
    bench.rollout().step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 50


def test_two_watchers_agree(bench: Bench) -> None:
    """Both decide on the same service; the second's patch carries a version that is no more."""
    bench.started()
    first, second = bench.cluster.read(), bench.cluster.read()
    bench.cluster.patch(first.shift(25))
    with pytest.raises(Conflict, match="changed by somebody else"):
        bench.cluster.patch(second.shift(25))
    assert bench.kserve.predictor["canaryTrafficPercent"] == 25


def test_a_change_by_hand_ends_the_rollout_and_is_left_alone(bench: Bench) -> None:
    rollout = bench.started()
    container = {"name": "kserve-container", "image": "docker.io/me/gpt2-predictor:9"}
    bench.kserve.change(containers=[container])
    bench.metrics.canary = replace(GOOD, errors=Share(5, 5))
    service = rollout.step()
    assert service.phase == "superseded"
    assert not service.running
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10


def test_a_share_set_by_hand_is_taken_up(bench: Bench) -> None:
    rollout = bench.started()
    bench.kserve.change(canaryTrafficPercent=30)
    bench.kserve.report(CANARY, CANARY)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 50


def test_a_dry_run_writes_nothing(bench: Bench) -> None:
    before = bench.kserve.service
    bench.rollout(dry_run=True).start(NEW, 10)
    assert bench.kserve.service == before
    bench.started()
    before, told = bench.kserve.service, bench.kserve.events
    bench.rollout(dry_run=True).step()
    bench.rollout(dry_run=True).abort()
    assert bench.kserve.service == before
    assert bench.kserve.events == told
    assert "dry run, not sent: canaryTrafficPercent 25" in bench.lines
    assert "dry run, not sent: canaryTrafficPercent 0" in bench.lines


def test_a_shadow_difference_rolls_back_even_without_prometheus(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = bench.started(shadow={"prompts": ["To be"]})
    bench.metrics.down = True
    monkeypatch.setattr(watch, "compare", lambda *_: Shadow(0, 1, "prompts[0]"))
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0
    assert bench.kserve.events[-1][1] == "RolloutShadowDiffers"


def test_a_shadow_that_cannot_be_asked_holds(bench: Bench) -> None:
    rollout = bench.started(shadow={"prompts": ["To be"]})
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    assert bench.kserve.events[-1][1] == "RolloutShadowUnavailable"
    assert "enable-tag-routing" in bench.kserve.events[-1][2]
    rollout = bench.rollout(
        shadow={"prompts": ["a"], "stable_url": f"http://127.0.0.1:{free_port()}", "canary_url": "http://x"}
    )
    with pytest.raises(ShadowUnavailable, match="the stable version"):
        watch.compare(rollout._rules.shadow, "aitextgen", None, None)  # type: ignore[arg-type]


def test_a_revision_that_has_traffic_while_another_is_made_is_judged(bench: Bench) -> None:
    """KServe lags, or the service was changed again: what has a share may be bad meanwhile, and goes no further."""
    rollout = bench.started()
    bench.kserve.report(THIRD, CANARY)
    rollout.step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 10
    assert bench.kserve.events[-1][1] == "RolloutWaiting"
    bench.metrics.canary = replace(GOOD, errors=Share(1, 5))
    rollout.step()
    assert bench.metrics.asked[-1][:2] == (STABLE, CANARY)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_a_share_changed_by_hand_is_judged_on_evidence_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "shared_at", None)
    in_seconds(monkeypatch, -100)
    rollout = bench.started(min_step_s=60)
    rollout.step()
    in_seconds(monkeypatch, 0)
    rollout.look()
    bench.kserve.change(canaryTrafficPercent=90)
    bench.kserve.report(CANARY, CANARY)
    in_seconds(monkeypatch, 10)
    rollout.step()
    assert bench.metrics.asked[-1][2] == pytest.approx(10, abs=1)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 90


def test_a_watcher_of_a_rollout_that_has_ended_says_so_and_ends(bench: Bench) -> None:
    bench.started().abort()
    assert bench.rollout().watch(1, forever=False).phase == "rolled back"
    assert bench.lines[-1] == "the rollout has ended: rolled back"


def test_an_abort_insists_where_kserve_writes_meanwhile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, read = bench.started(), bench.cluster.read
    reads: list[Service] = []

    def read_and_lose() -> Service:
        reads.append(read())
        if len(reads) < 4:
            bench.kserve.report(CANARY, CANARY, {"type": "Ready", "status": str(len(reads))})
        return reads[-1]

    monkeypatch.setattr(bench.cluster, "read", read_and_lose)
    monkeypatch.setattr(by_hand.time, "sleep", lambda _: None)
    rollout.abort()
    assert len(reads) == 4
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_start_waits_for_the_last_change_to_be_seen_through(bench: Bench) -> None:
    """With 0% or a share before that, KServe would give the rest to the version before."""
    bench.started().promote()
    bench.kserve.report(THIRD, CANARY)
    with pytest.raises(ConfigurationError, match="has not all the traffic yet"):
        bench.rollout().start("docker.io/me/gpt2-predictor:0.3.0", 10)


def test_weights_that_failed_are_not_carried_into_the_next_image(bench: Bench) -> None:
    bench.rollout().start(OLD, 10, "aitextgen=/mnt/models/bad")
    bench.kserve.report(CANARY, STABLE)
    bench.rollout().abort()
    bench.rollout().start(NEW, 10)
    (container,) = bench.kserve.predictor["containers"]
    assert container["args"] == ["--model=aitextgen=/mnt/models"]


@pytest.mark.parametrize("model", ["", "nonsense", "other=/mnt/models", "aitextgen=", "aitextgen=/a\nb"])
def test_weights_are_of_the_name_that_clients_ask_for(bench: Bench, model: str) -> None:
    with pytest.raises(ConfigurationError, match="--model must be aitextgen=SOURCE"):
        bench.rollout().start(NEW, 10, model)


def test_the_stable_version_itself_is_nothing_to_roll_out(bench: Bench) -> None:
    bench.started().abort()
    with pytest.raises(ConfigurationError, match="has the traffic already"):
        bench.rollout().start(OLD, 10)


def test_a_status_without_traffic_goes_by_readiness(bench: Bench) -> None:
    rollout = bench.started()

    def without(service: Object) -> Object:
        del service["status"]["components"]["predictor"]["traffic"]
        return service

    bench.kserve.store.change(*WHERE, without, manager="kserve", status=True)
    rollout.step()
    assert bench.metrics.asked[-1][:2] == (STABLE, CANARY)
    assert bench.kserve.predictor["canaryTrafficPercent"] == 25


def test_a_damaged_record_leaves_abort_and_a_watcher_that_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = bench.started()

    def damage(service: Object) -> Object:
        service["metadata"]["annotations"][RECORD] = "{"
        return service

    bench.kserve.store.change(*WHERE, damage, manager="kubectl")

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        rollout.watch(1, forever=True)
    assert bench.lines[-1] == f"{NEW} has 10% of the traffic, and no rollout is recorded: not watched"
    rollout.abort()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0


def test_a_long_failure_is_one_line(bench: Bench) -> None:
    rollout = bench.rollout()
    rollout.start(NEW, 10)
    failed = {"type": "Ready", "status": "False", "reason": "RevisionFailed", "message": "Traceback\n  x\n" * 500}
    bench.kserve.report(CANARY, STABLE, failed)
    rollout.step()
    assert "\n" not in bench.kserve.events[-1][2]
    assert len(bench.kserve.events[-1][2]) < 700
    assert "[/mnt/models]" not in shown(bench)


# ------------------------------------------------------------------------------------------------------- the cluster


@pytest.mark.parametrize(
    "found", [[], None, "text", {"kind": "Status"}, {"metadata": {"resourceVersion": "1"}, "spec": {}}]
)
def test_an_answer_that_is_no_service_is_an_error_that_a_watcher_outlives(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, found: Any
) -> None:
    monkeypatch.setattr(bench.cluster._services, "get_namespaced_custom_object", lambda *_, **__: found)
    with pytest.raises(ClusterError, match="makes no sense"):
        bench.cluster.read()


def test_a_service_that_is_not_there_is_named(bench: Bench) -> None:
    with pytest.raises(
        ClusterError, match=r'InferenceService other in the namespace default: .*"other" not found; see'
    ):
        Cluster("other", "default").read()


def test_an_api_that_is_away_is_told_and_outlived(
    bench: Bench, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = bench.started()
    api.close()
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(by_hand.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        rollout.watch(0.5, forever=False)
    assert len([line for line in bench.lines if "the Kubernetes API cannot be reached" in line]) == 3


def test_a_missing_kubeconfig_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes.config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="no cluster is configured"):
        Cluster("aitextgen", "default")
    (tmp_path / "none").write_text("clusters: 7")
    with pytest.raises(ConfigurationError, match="no cluster is configured"):
        Cluster("aitextgen", "default")


def test_events_that_cannot_be_posted_stop_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ClusterError("cannot create events")

    monkeypatch.setattr(bench.cluster, "tell", refuse)
    bench.started().step()
    assert bench.kserve.predictor["canaryTrafficPercent"] == 25
    assert "cannot create events" in bench.lines


# ------------------------------------------------------------------------------------------------- the command line


def shown(bench: Bench) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(bench.rollout().report())
    return captured.get()


def test_status_tells_the_traffic_the_history_and_what_comes_next(bench: Bench) -> None:
    assert "No rollout is recorded." in shown(bench)
    rollout = bench.started()
    rollout.step()
    bench.kserve.report(CANARY, CANARY)
    text = shown(bench)
    for part in (
        f"{CANARY} 25%, {STABLE} 75%",
        "comparing, at 25%",
        f"{OLD} ({STABLE})",
        f"{NEW} ({CANARY})",
        "10% -> 25%",
        "errors                             0.0% of 10000  0.0% of 10000      2%",
        "time to first token past 10 ms in  0.1% of 10000  0.1% of 10000     10%",
        "A watcher would now step: 25% -> 50%",
    ):
        assert part in text, text


@pytest.mark.parametrize("command", ["start", "status", "promote", "abort", "watch"])
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, ["rollout", command, "--help"])
    assert result.exit_code == 0
    assert "--name" in result.output
    assert "--namespace" in result.output


def test_the_commands_act_on_the_cluster_of_kubeconfig(bench: Bench, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("steps: [20, 100]\n")
    prometheus = f"http://127.0.0.1:{free_port()}"  # nobody there
    runner = CliRunner()
    flags = ["--prometheus", prometheus, "--rules", str(rules)]
    started = runner.invoke(app, ["rollout", "start", "--image", NEW, *flags])
    assert started.exit_code == 0, started.output
    assert "Prometheus" in started.output
    assert bench.kserve.predictor["canaryTrafficPercent"] == 20
    bench.kserve.report(CANARY, CANARY)
    status = runner.invoke(app, ["rollout", "status", *flags])
    assert status.exit_code == 0, status.output
    assert "A watcher would now hold: Prometheus at" in status.output
    assert runner.invoke(app, ["rollout", "abort", "--dry-run"]).exit_code == 0
    assert bench.kserve.predictor["canaryTrafficPercent"] == 20
    aborted = runner.invoke(app, ["rollout", "abort", *flags])
    assert aborted.exit_code == 0, aborted.output
    assert bench.kserve.predictor["canaryTrafficPercent"] == 0
    assert "a watcher would have decided: hold: Prometheus at" in aborted.output


@pytest.mark.parametrize(("command", "revision"), [("promote", CANARY), ("abort", STABLE)])
def test_promote_and_abort_follow_the_traffic_where_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, command: str, revision: str
) -> None:
    bench.started()
    monkeypatch.setattr(by_hand.time, "sleep", lambda _: bench.kserve.report(CANARY, CANARY))
    result = CliRunner().invoke(app, ["rollout", command, "--interval", "2"])
    assert result.exit_code == 0, result.output
    assert f"{CANARY} 10%, {STABLE} 90%" in result.output
    assert result.output.rstrip().endswith(f"{revision} has all the traffic")


def test_traffic_that_does_not_move_is_told(bench: Bench) -> None:
    bench.started()
    with pytest.raises(ConfigurationError, match=f"{STABLE} does not have all the traffic after 0 s: {CANARY} 10%"):
        bench.rollout(ready_timeout_s=0.01).follow(STABLE, 0.02)
