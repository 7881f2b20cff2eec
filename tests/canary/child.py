"""A process of the harness: started with a log, watched, and always ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.conftest import ROOT


class Child:
    """A command whose stdout and stderr go to `log`. In our environment without `PREDICTOR_*`, plus `variables`."""

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        self.log = log
        self.began = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREDICTOR_")} | variables
        with log.open("a") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=environment)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def wait_until(self, condition: Callable[[], bool], what: str, limit_s: float = 30) -> None:
        """Poll `condition`; an error when the process ends before it is true."""
        began = time.monotonic()
        while not condition():
            assert self.exit_code is None, f"{what}: the process ended with {self.exit_code}:\n{self.log.read_text()}"
            assert time.monotonic() - began < limit_s, f"{what}: not within {limit_s} s:\n{self.log.read_text()}"
            time.sleep(0.05)

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as the kernel or a lost node does it."""
        self.process.kill()
        self.process.wait(30)

    def close(self) -> None:
        if self.exit_code is None:
            self.kill()


def answers(url: str) -> bool:
    """Whether a GET gives 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
