"""The harness in one object: the Kubernetes stub, Envoy, Prometheus and the revisions of one InferenceService."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tests.canary.apiserver import ApiServer, events_of
from tests.canary.child import Child
from tests.canary.envoy import Envoy
from tests.canary.kserve_controller import KServeController
from tests.canary.objects import INFERENCE_SERVICES, Object, ObjectStore
from tests.canary.prometheus import Prometheus
from tests.canary.revisions import MODEL, Revision
from tests.canary.traffic import DISALLOWED_ANNOTATIONS, component_status
from tests.conftest import ROOT

NAMESPACE = "default"
NAME = "aitextgen"

# One thread: two revisions, Envoy, Prometheus and the load share two cores.
SERVE = [sys.executable, "-m", "predictor", "serve"]
FLAGS = ["--model", f"{MODEL}={ROOT / 'models' / 'bard'}", "--threads", "1", "--log-level", "warning"]
HEALTHY = [*SERVE, *FLAGS]


def faulty(fault: str, *options: str) -> list[str]:
    """The command of a predictor with a planted fault (faulty.py)."""
    return [sys.executable, "-m", "tests.canary.faulty", fault, *options, "--", "serve", *FLAGS]


def inference_service(image: str) -> Object:
    """The InferenceService of the tests, as a user would apply it: as much of manifests/base as a rollout touches."""
    container = {"name": "kserve-container", "image": image, "args": [f"--model={MODEL}=/mnt/models"]}
    # Tag routing gives each version an address of its own, which the shadow check asks.
    annotations = {"serving.kserve.io/deploymentMode": "Knative", "serving.kserve.io/enable-tag-routing": "true"}
    return {
        "apiVersion": INFERENCE_SERVICES.api_version,
        "kind": INFERENCE_SERVICES.kind,
        "metadata": {"name": NAME, "annotations": annotations},
        "spec": {"predictor": {"minReplicas": 1, "containers": [container]}},
    }


class Cluster:
    """Everything that a rollout touches, running in `folder`; a context manager that ends it all."""

    def __init__(
        self,
        folder: Path,
        images: dict[str, list[str]],
        *,
        disallowed_annotations: tuple[str, ...] = DISALLOWED_ANNOTATIONS,
        progress_deadline_s: float = 60,
        drain_s: float = 2,
        timeout_s: float = 60,
    ) -> None:
        """`images`: the command that each image stands for; `drain_s`: from the loss of its traffic to SIGTERM;
        `timeout_s`: how long Envoy waits for an answer.
        """
        self.folder = folder
        self.images = images
        self._progress_deadline_s = progress_deadline_s
        self.store = ObjectStore()
        self.kubeconfig = folder / "kubeconfig"
        self._ending = ExitStack()
        with self._ending as ending:  # what has started is ended if the rest cannot start
            self.api = ending.enter_context(closing(ApiServer(self.store)))
            self.api.write_kubeconfig(self.kubeconfig, NAMESPACE)
            self.prometheus = ending.enter_context(closing(Prometheus(folder / "prometheus")))
            self.envoy = ending.enter_context(closing(Envoy(folder / "envoy", timeout_s)))
            self.controller = KServeController(
                self.store,
                NAMESPACE,
                NAME,
                self._start,
                self.envoy,
                self.prometheus,
                disallowed_annotations,
                drain_s,
            )
            ending.enter_context(closing(self.controller))
            self._ending = ending.pop_all()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def _start(self, revision: str, image: str) -> Revision:
        command = self.images.get(image, [sys.executable, "-c", f"raise SystemExit('no such image: {image}')"])
        return Revision(revision, command, self.folder, self._progress_deadline_s)

    def serve(self, image: str) -> None:
        """Create the InferenceService and wait until its first revision has all the traffic."""
        self.store.create(INFERENCE_SERVICES, NAMESPACE, inference_service(image))
        self.wait_until(lambda: "latestRolledoutRevision" in self.status, "the first revision has the traffic")

    def apply(self, image: str, percent: int | None) -> None:
        """Ask for an image and its share, as `kubectl apply` of both does; None: no share, all the traffic."""

        def change(service: Object) -> Object:
            predictor = service["spec"]["predictor"]
            predictor["containers"][0]["image"] = image
            predictor["canaryTrafficPercent"] = percent
            if percent is None:
                del predictor["canaryTrafficPercent"]
            return service

        self.store.change(INFERENCE_SERVICES, NAMESPACE, NAME, change, manager="kubectl-client-side-apply")

    def name(self, number: int) -> str:
        """The name of the Nth revision, from 1."""
        return f"{NAME}-predictor-{number:05d}"

    def revision(self, number: int) -> Revision:
        return self.controller.revisions[number - 1]

    @property
    def service(self) -> Object:
        """The InferenceService as it is now."""
        return self.store.get(INFERENCE_SERVICES, NAMESPACE, NAME)

    @property
    def status(self) -> Object:
        """`status.components.predictor` of the InferenceService."""
        return component_status(self.service)

    @property
    def failure(self) -> str:
        """Why the newest revision has failed; "" while it has not."""
        conditions = self.service.get("status", {}).get("conditions", [])
        ready = next((each for each in conditions if each["type"] == "Ready"), {})
        return str(ready["message"]) if ready.get("reason") == "RevisionFailed" else ""

    @property
    def events(self) -> list[Object]:
        return events_of(self.store, NAMESPACE)

    def share(self, number: int) -> int:
        """Percent of the traffic that the Nth revision has."""
        return self.envoy.weights.get(self.name(number), 0)

    def wait_until(self, condition: Callable[[], Any], what: str, limit_s: float = 60) -> None:
        began = time.monotonic()
        while not condition():
            assert self.controller.alive, f"{what}: the controller's stub ended"
            assert time.monotonic() - began < limit_s, f"not within {limit_s} s: {what}\n{self.service}"
            time.sleep(0.02)

    def command(self, *arguments: str, log: str) -> Child:
        """Start `predictor ARGUMENTS` against this cluster."""
        command = [sys.executable, "-m", "predictor", *arguments]
        child = Child(command, self.folder / log, KUBECONFIG=str(self.kubeconfig))
        self._ending.callback(child.close)
        return child

    def run(self, *command: str) -> str:
        """Run a command such as kubectl against this cluster; its stdout. Raises when it fails."""
        environment = os.environ | {"KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout
