"""A worker as seen from outside: starting it, asking it, reading its memory and its CPU time, ending it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants.worker import resident_bytes

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class WorkerError(Exception):
    """A contestant that cannot take part, or one answer it cannot give; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What a worker says once its model is loaded."""

    import_s: float
    load_s: float
    imported_bytes: int  # resident after the imports, before the model
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    seconds: float
    tokens: int
    ids: list[list[int]]


class Worker:
    """One process that speaks JSON lines. Raises `WorkerError` with the last line of its log when it ends early."""

    def __init__(self, command: Sequence[str], log: Path, folder: Path, variables: Mapping[str, str]) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=folder,
                    env={**os.environ, **variables},
                    text=True,
                )
        except OSError as error:
            raise WorkerError(f"cannot start {command[0]}: {error.strerror}") from error
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # "" once the process has closed its side
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def ready(self, timeout_s: float) -> Ready:
        said = self._next(timeout_s)
        return Ready(said["import_s"], said["load_s"], said["imported_bytes"], said["versions"])

    def generate(self, prompts: list[list[int]], new_tokens: int, timeout_s: float) -> Answer:
        assert self._process.stdin is not None
        request = {"op": "generate", "prompts": prompts, "new_tokens": new_tokens}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._epitaph()) from None
        said = self._next(timeout_s)
        return Answer(said["seconds"], said["tokens"], said["ids"])

    def _next(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            raise WorkerError(self._epitaph())
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise WorkerError(said["error"])
        return said

    def _epitaph(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"its process ended with status {status}: {lines[-1].strip() if lines else 'its log is empty'}"

    def peak_bytes(self) -> int:
        """The largest resident set so far; mapped files count as far as they were read."""
        return resident_bytes("VmHWM", self._process.pid)

    def cpu_s(self) -> float:
        """CPU time so far of all its threads, in steps of a clock tick (10 ms)."""
        after_name = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = after_name[11:13]  # fields 14 and 15 of proc(5)
        return (int(user) + int(system)) * _TICK_S

    def close(self) -> None:
        """End it now; idempotent."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of what was not sent
            self._process.stdin.close()
        self._reader.join()


def idle_shares(workers: Mapping[str, Worker], seconds: float = 1.0) -> dict[str, float]:
    """CPU seconds per second that each worker takes while nobody asks anything of it."""
    before = {name: worker.cpu_s() for name, worker in workers.items()}
    time.sleep(seconds)
    return {name: (worker.cpu_s() - before[name]) / seconds for name, worker in workers.items()}


def wait_until_idle(workers: Sequence[Worker], at_most_s: float = 2.0) -> None:
    """Let threads that spin after their work go to sleep, so that they take nothing from whom is measured next."""
    deadline = time.monotonic() + at_most_s
    before = [worker.cpu_s() for worker in workers]
    while time.monotonic() < deadline:
        time.sleep(5 * _TICK_S)
        now = [worker.cpu_s() for worker in workers]
        if now == before:
            return
        before = now
