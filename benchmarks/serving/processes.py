"""The two that are compared, as processes: the server, and the engine alone.

Both get the same PREDICTOR_* variables.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.contestants.process import Worker
from benchmarks.contestants.worker import resident_bytes
from benchmarks.serving.client import MODEL
from benchmarks.serving.load import Run, Served
from benchmarks.serving.workload import Arrival, Ask

ROOT = Path(__file__).resolve().parents[2]


def settings_of(model: Path, dtype: str) -> dict[str, str]:
    """Variables for both: no speculation, because random weights repeat themselves and would be guessed."""
    return {
        "PREDICTOR_MODEL": f"{MODEL}={model.resolve()}",
        "PREDICTOR_DTYPE": dtype,
        "PREDICTOR_SPECULATION": "false",
    }


class ServerProcess:
    """`python -m predictor serve` on a free loopback port."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 - lives as long as the server
        command = [sys.executable, "-m", "predictor", "serve", "--host", "127.0.0.1", "--port", str(port)]
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, cwd=ROOT, env={**os.environ, **variables}
        )
        try:
            self.port_s = self._wait(lambda code: True)
            self.ready_s = self._wait(lambda code: code == 200)
        except BaseException:
            self._process.kill()
            raise

    def _wait(self, done: Callable[[int], bool]) -> float:
        with httpx.Client(base_url=self.url) as client:  # one, because making one takes as long as an answer
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if done(client.get(f"/v1/models/{MODEL}").status_code):
                        return time.perf_counter() - self._began
                if self._process.poll() is not None:
                    raise SystemExit(f"the server ended:\n{self._said()}")
                time.sleep(0.1)

    def _said(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def cpu_s(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def peak_bytes(self) -> int:
        """The largest resident set so far."""
        return resident_bytes("VmHWM", self._process.pid)

    def kv_bytes(self) -> float:
        return float(self._said().split("KV memory: ")[1].split()[0]) * 2**30

    def dtype_and_kernels(self) -> tuple[str, str]:
        """What computes, from the log: the width in use, and our CPU kernels or torch."""
        said = self._said()
        ready = re.search(r"is ready: engine, (\S+) on (\S+)", said)
        kernels = re.search(r"CPU kernels: (.+)", said)
        assert ready is not None
        return ready[1], kernels[1] if kernels else f"torch on {ready[2]}"

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def close(self) -> int:
        """Stop it as a cluster does; the exit status."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)


class EngineProcess(Worker):
    """benchmarks/serving/alone.py, asked with JSON lines."""

    def __init__(self, variables: Mapping[str, str], log: Path) -> None:
        super().__init__([sys.executable, "-m", "benchmarks.serving.alone"], log, ROOT, variables)

    def clients(self, way: str, clients: Sequence[Sequence[Ask]], timeout_s: float) -> Run:
        """`way`: "streams", as the server asks the engine, or "steps", without its thread."""
        sent = [[asdict(ask) for ask in asks] for asks in clients]
        return self._run({"way": way, "clients": sent}, [ask for asks in clients for ask in asks], timeout_s)

    def arrivals(self, arrivals: Sequence[Arrival], timeout_s: float) -> Run:
        sent = [(arrival.at_s, asdict(arrival.ask)) for arrival in arrivals]
        return self._run({"way": "arrivals", "arrivals": sent}, [arrival.ask for arrival in arrivals], timeout_s)

    def _run(self, request: dict[str, Any], asks: Sequence[Ask], timeout_s: float) -> Run:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        said = self._next(timeout_s)
        served = zip(asks, said["latencies_s"], said["first_tokens_s"], said["answers"], strict=True)
        return Run(said["seconds"], [Served(*each) for each in served])
