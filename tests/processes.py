"""Real server processes for tests: started, watched, and always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], limit_s: float = 30) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, "it did not happen"
        time.sleep(0.02)


class ServerProcess:
    """`python -m predictor serve` on a loopback port."""

    def __init__(self, log: Path, *flags: str, python: str = sys.executable, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._out = log.open("w")
        command = [python, "-m", "predictor", "serve", "--host", "127.0.0.1", "--port", str(self.port), *flags]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREDICTOR_")} | variables
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self._out, stderr=subprocess.STDOUT, env=environment)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def predict(self, name: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/models/{name}:predict", json=body, timeout=120, **options)

    def wait_for_port(self, limit_s: float = 60) -> None:
        began = time.monotonic()
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
                assert time.monotonic() - began < limit_s, "the port did not open"
                time.sleep(0.05)

    def wait_until_ready(self, name: str, limit_s: float = 120) -> None:
        self.wait_for_port()
        began = time.monotonic()
        while self.get(f"/v1/models/{name}").status_code != 200:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            assert time.monotonic() - began < limit_s, f"not ready:\n{self.log.read_text()}"
            time.sleep(0.05)

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's samples, of those with `label` (as it is printed)."""
        lines = [
            line for line in self.get("/metrics").text.splitlines() if line.startswith(name + "{") and label in line
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, limit_s: float = 60) -> int:
        return self.process.wait(limit_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._out.close()


@contextmanager
def serving(log: Path, *flags: str, **options: str) -> Iterator[ServerProcess]:
    server = ServerProcess(log, *flags, **options)
    try:
        yield server
    finally:
        server.close()
