"""A stub of KServe's and Knative's controllers for one InferenceService in Knative mode.

It watches the object, starts a process for each revision, moves Envoy's weights, tells Prometheus what to scrape and
writes the status, in the order of the real ones: a revision gets traffic when it is ready, and loses its pod some time
after its traffic. `traffic.py` has the rules and where they come from.

Where it differs from a cluster: one replica per revision, no autoscaler, no activator, no queue-proxy; weights are live
within a second and not in several; a process that dies after it was ready is not started again; predictor only.
As in a cluster, `status.observedGeneration` is the Knative Service's generation, not the InferenceService's, so it
moves with annotations too. A revision whose entry in `traffic` has 0 percent is kept running.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tests.canary.envoy import Envoy
from tests.canary.objects import INFERENCE_SERVICES, ApiError, Object, ObjectStore, now
from tests.canary.prometheus import Prometheus
from tests.canary.revisions import Revision
from tests.canary.traffic import (
    component_status,
    propagated,
    revision_template,
    routed_traffic,
    wanted_traffic,
    weights,
)

_EVERY_S = 0.05


class KServeController:
    """Reconciles in a thread of its own until `close`, which raises what went wrong there."""

    def __init__(
        self,
        store: ObjectStore,
        namespace: str,
        name: str,
        start: Callable[[str, str], Revision],
        envoy: Envoy,
        prometheus: Prometheus,
        disallowed_annotations: tuple[str, ...],
        drain_s: float,
    ) -> None:
        """`start(revision, image)` starts a revision's process."""
        self._store = store
        self._where = INFERENCE_SERVICES, namespace, name
        self._start = start
        self._envoy = envoy
        self._prometheus = prometheus
        self._disallowed = disallowed_annotations
        self._drain_s = drain_s
        self.revisions: list[Revision] = []
        self.shifts: list[tuple[float, dict[str, int]]] = []  # time.monotonic(), percent by revision from then on
        self._template: Object | None = None
        self._service: Object = {}  # the Knative Service's spec, whose changes its generation counts
        self._generation = 0
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kserve-controller", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self._closing.set()
        self._thread.join(60)
        for revision in self.revisions:
            revision.child.close()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._closing.wait(_EVERY_S):
                self._reconcile()
        except BaseException as error:  # told by `close`, in the test's thread
            self._error = error

    def _reconcile(self) -> None:
        try:
            service = self._store.get(*self._where)
        except ApiError:
            return
        self._make_revision(service)
        for revision in self.revisions:
            revision.look()
        ready = [each for each in self.revisions if each.ready]
        latest_ready = ready[-1].name if ready else ""
        wanted = wanted_traffic(service)
        if self._service != (spec := {"template": self._template, "traffic": wanted}):
            self._service, self._generation = spec, self._generation + 1
        urls = {each.name: each.url for each in self.revisions}
        traffic = routed_traffic(wanted, latest_ready, urls) if latest_ready else []
        self._route(weights(traffic))
        self._write_status(propagated(component_status(service), self.revisions[-1].name, latest_ready, traffic))
        routed = {entry["revisionName"] for entry in traffic} | {self.revisions[-1].name}
        for revision in self.revisions:
            revision.retire(revision.name in routed, self._drain_s)
        self._prometheus.scrape({each.name: each.port for each in self.revisions if each.running})

    def _make_revision(self, service: Object) -> None:
        template = revision_template(service, self._disallowed)
        if template == self._template:
            return
        self._template = template
        name = f"{self._where[2]}-predictor-{len(self.revisions) + 1:05d}"
        self.revisions.append(self._start(name, template["predictor"]["containers"][0]["image"]))

    def _route(self, percents: dict[str, int]) -> None:
        # A cluster stays until its process has ended: requests that it still answers must not be cut off.
        ports = {each.name: each.port for each in self.revisions if each.ready and each.running}
        self._envoy.route(percents, ports)
        if percents and (not self.shifts or self.shifts[-1][1] != percents):
            self.shifts.append((time.monotonic(), percents))

    def _write_status(self, predictor: dict[str, Any]) -> None:
        newest = self.revisions[-1]
        url = self._envoy.url

        def change(current: Object) -> Object:
            # What the client changed meanwhile is seen the next time.
            status = current.get("status", {})
            current["status"] = status | {
                "observedGeneration": self._generation,
                "deploymentMode": "Knative",
                "components": {"predictor": predictor | ({"url": url} if newest.ready else {})},
                "conditions": _conditions(newest, status.get("conditions", [])),
                "modelStatus": _model_status(newest, any(each.ready for each in self.revisions)),
            }
            if newest.ready:
                current["status"]["url"] = url
            return current

        self._store.change(*self._where, change, manager="manager", status=True)


def _conditions(newest: Revision, before: list[Object]) -> list[Object]:
    """KServe's conditions; a time of transition moves when the condition does."""
    if newest.ready:
        configuration: Object = {"status": "True"}
    elif newest.failure:
        message = f'Revision "{newest.name}" failed with message: {newest.failure}.'
        configuration = {"status": "False", "reason": "RevisionFailed", "message": message}
    else:
        configuration = {"status": "Unknown"}
    states = {
        "IngressReady": {"status": "True"},
        "LatestDeploymentReady": configuration,
        "PredictorConfigurationReady": configuration,
        "PredictorReady": configuration,
        "PredictorRouteReady": {"status": "True"},
        "Ready": configuration,
        "RoutesReady": {"status": "True"},
    }
    old = {each["type"]: each for each in before}
    conditions = []
    for kind, state in states.items():
        same = kind in old and old[kind]["status"] == state["status"]
        conditions.append(
            {"type": kind, **state, "lastTransitionTime": old[kind]["lastTransitionTime"] if same else now()}
        )
    return conditions


def _model_status(newest: Revision, any_ready: bool) -> Object:
    if newest.ready:
        return {"transitionStatus": "UpToDate", "states": {"activeModelState": "Loaded", "targetModelState": "Loaded"}}
    states = {"activeModelState": "Loaded" if any_ready else "Pending"}
    if not newest.failure:
        return {"transitionStatus": "InProgress", "states": states | {"targetModelState": "Loading"}}
    failure = {"reason": "ModelLoadFailed", "message": newest.failure}
    if newest.child.exit_code is not None:
        failure["exitCode"] = newest.child.exit_code
    failed = {"transitionStatus": "BlockedByFailedLoad", "states": states | {"targetModelState": "FailedToLoad"}}
    return failed | {"lastFailureInfo": failure}
