"""Servers, workers and Redis as processes that are killed in mid-job: no job is lost, and each ends once."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from predictor.jobs.job import Job
from predictor.jobs.sqlite import SQLiteStore
from tests.conftest import ROOT
from tests.processes import ServerProcess, free_port, serving
from tests.redis_server import RedisServer, running_redis

# A second or so of work for the tiny model: there is a middle to be killed in.
TOKENS = 600

# Instead of 30 s, so that a takeover is soon seen.
IDLE_S = 4.0

_IMPATIENT = f"""
import sys
from predictor.jobs.redis import RedisStore
RedisStore.__init__.__kwdefaults__["idle_s"] = {IDLE_S}
from predictor.cli import main
main()
"""


def body(number: int, tokens: int = TOKENS, n: int = 2) -> dict[str, Any]:
    parameters = {"max_new_tokens": tokens, "context_overflow": "slide", "ignore_eos": True, "n": n, "seed": number}
    return {"instances": [f"job {number}"], "parameters": parameters}


# Longer than any test waits for.
ENDLESS = {**body(0, 1900, 16), "instances": ["x"] * 16}


class WorkerProcess:
    """`predictor worker`, impatient with the dead."""

    def __init__(self, log: Path, *flags: str) -> None:
        self.log, self._out = log, log.open("w")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREDICTOR_")}
        port = free_port()
        self.metrics = f"http://127.0.0.1:{port}/metrics"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IMPATIENT, "worker", *flags, "--metrics-port", str(port)],
            cwd=ROOT,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self._out.close()


def wait_for(condition: Callable[[], Any], what: str, limit_s: float = 60) -> Any:
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: it did not happen"
        time.sleep(0.02)
    return found


def begin(server: ServerProcess, body: Any, **headers: str) -> str:
    answer = httpx.post(server.url + "/v1/jobs", json=body, headers=headers, timeout=30)
    assert answer.status_code == 202, answer.text
    return str(answer.headers["location"])


def ended(server: ServerProcess, url: str) -> dict[str, Any]:
    def job() -> Any:
        answer = server.get(url)
        return answer.status_code == 200 and answer.json()["status"] not in ("queued", "running") and answer.json()

    return wait_for(job, f"the end of {url}", 90)


def test_a_server_that_is_killed_in_mid_job_answers_it_after_its_restart(checkpoint: Path, tmp_path: Path) -> None:
    kept = f"sqlite:///{tmp_path}/jobs.sqlite3"
    flags = ["--model", f"tiny={checkpoint}", "--jobs", kept, "--job-concurrency", "2", "--grace-period-s", "2"]
    with serving(tmp_path / "first", *flags) as server:
        server.wait_until_ready("tiny")
        bodies = [body(0, 1900, 8), body(1), body(2)]
        urls = [begin(server, each, **{"Idempotency-Key": f"key {n}"}) for n, each in enumerate(bodies)]
        wait_for(lambda: server.get(urls[0]).json()["progress"]["tokens"] > 0, "progress")
        assert server.get(urls[0]).json()["status"] == "running"
        server.process.kill()
        server.wait()
    with serving(tmp_path / "second", *flags) as server:
        server.wait_for_port()
        assert begin(server, bodies[2], **{"Idempotency-Key": "key 2"}) == urls[2]
        server.wait_until_ready("tiny")
        for each, url in zip(bodies, urls, strict=True):
            told = ended(server, url)
            assert told["status"] == "succeeded", told
            assert told["result"] == server.predict("tiny", each).json()
        assert server.get(urls[0]).json()["progress"] == {"tokens": 8 * 1900, "of": 8 * 1900}
        assert server.metric("predictor_jobs_total", 'status="succeeded"') >= 1
        # What has not ended within the grace period is given back, and the process ends with 0.
        endless = begin(server, ENDLESS)
        wait_for(lambda: server.get(endless).json()["progress"]["tokens"] > 0, "progress")
        server.terminate()
        assert server.wait() == 0
    given_back = asyncio.run(_kept(tmp_path / "jobs.sqlite3", endless.removeprefix("/v1/jobs/")))
    assert (given_back.status, given_back.tokens, given_back.starts) == ("queued", 0, 0)


async def _kept(path: Path, job_id: str) -> Job:
    store = SQLiteStore(path, limit=1, expiry_s=1)
    job = await store.get(job_id)
    await store.close()
    assert job is not None
    return job


class Fleet:
    """A Redis, a server that leaves jobs to workers, and workers by process id."""

    def __init__(self, stack: ExitStack, redis: RedisServer, checkpoint: Path, folder: Path) -> None:
        self._stack, self.redis, self._folder = stack, redis, folder
        self._flags = ["--model", f"tiny={checkpoint}", "--jobs", redis.url]
        self.workers: dict[int, WorkerProcess] = {}
        for _ in range(2):
            self.start_worker()
        self.server = stack.enter_context(serving(folder / "server", *self._flags, "--job-concurrency", "0"))
        self.server.wait_until_ready("tiny")

    def start_worker(self) -> None:
        log = self._folder / f"worker-{time.monotonic_ns()}"
        worker = WorkerProcess(log, *self._flags, "--job-concurrency", "2", "--grace-period-s", "1")
        self._stack.callback(worker.close)
        self.workers[worker.process.pid] = worker

    def holder(self, url: str) -> int | None:
        """The process that runs the job."""
        key = "predictor:job:" + url.removeprefix("/v1/jobs/")
        status, worker = self.redis.client.hmget(key, "status", "worker")
        return int(worker.split("-")[-2]) if status == "running" else None


@pytest.fixture(scope="module")
def fleet(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with running_redis(folder) as redis, ExitStack() as stack:
        yield Fleet(stack, redis, checkpoint, folder)


def test_workers_and_redis_are_killed_in_mid_job_and_no_job_is_lost(fleet: Fleet) -> None:
    urls: list[str] = []
    takeovers_s = []
    for kill in range(3):
        urls += [begin(fleet.server, body(len(urls) + number)) for number in range(4)]
        pid = wait_for(lambda: next(filter(None, map(fleet.holder, urls)), None), "a running job")  # noqa: B023
        fleet.workers.pop(pid).process.kill()
        began = time.monotonic()
        hit = [url for url in urls if fleet.holder(url) == pid]
        assert hit, "the worker had nothing to lose"
        fleet.start_worker()
        wait_for(lambda: pid not in map(fleet.holder, hit), "the takeover")  # noqa: B023 - waited for here
        takeovers_s.append(time.monotonic() - began)
        if kill == 1:
            fleet.redis.kill()
            answer = httpx.post(fleet.server.url + "/v1/jobs", json=body(0), timeout=30)
            assert (answer.status_code, bool(answer.headers["retry-after"])) == (503, True)
            fleet.redis.start()
        for url in hit:  # one that lost a third worker would be given up
            ended(fleet.server, url)
    for number, url in enumerate(urls):
        told = ended(fleet.server, url)
        assert told["status"] == "succeeded", told
        assert told["result"] == fleet.server.predict("tiny", body(number)).json()
    # An idle time, a look at most a sixth of it later, and a loaded machine.
    assert max(takeovers_s) < IDLE_S + 15
    assert fleet.redis.client.xlen("predictor:jobs:tiny") == 0


def test_a_worker_told_to_stop_gives_its_job_back_and_a_cancelled_job_frees_the_other(fleet: Fleet) -> None:
    url = begin(fleet.server, ENDLESS)
    first = wait_for(lambda: fleet.holder(url), "a worker")
    stopped = fleet.workers.pop(first)
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.process.wait(30) == 0, stopped.log.read_text()
    second = wait_for(lambda: fleet.holder(url), "another worker")
    assert second != first
    assert fleet.redis.client.hget("predictor:job:" + url.removeprefix("/v1/jobs/"), "starts") == "1"
    wait_for(lambda: fleet.server.get(url).json()["progress"]["tokens"] > 0, "progress, seen by the server")
    assert httpx.delete(fleet.server.url + url, timeout=30).json()["status"] == "cancelled"
    # Both slots of the worker that is left are free again.
    for number in (101, 102):
        assert ended(fleet.server, begin(fleet.server, body(number, 20)))["status"] == "succeeded"
    assert fleet.server.get(url).json()["status"] == "cancelled"


def test_workers_count_the_jobs_that_they_end(fleet: Fleet) -> None:
    def counted() -> float:
        told = "".join(httpx.get(worker.metrics).text for worker in fleet.workers.values())
        lines = [line for line in told.splitlines() if line.startswith('predictor_jobs_total{model_name="tiny"')]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'status="succeeded"' in line)

    before = counted()
    for url in [begin(fleet.server, body(number, 20)) for number in range(200, 205)]:
        assert ended(fleet.server, url)["status"] == "succeeded"
    wait_for(lambda: counted() >= before + 5, "five jobs are counted")


def test_the_servers_gauge_tells_what_waits(fleet: Fleet) -> None:
    wait_for(lambda: fleet.server.metric("predictor_jobs_queued") == 0, "an empty queue")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--jobs", "sqlite:///tmp/x"], "redis://"),
        ([], "redis://"),
        (["--jobs", "none"], "redis://"),
        (["--jobs", "redis://127.0.0.1:1/0", "--metrics-port", "{taken}"], "--metrics-port"),
        (["--jobs", "redis://127.0.0.1:1/0", "--job-concurrency", "0"], "--job-concurrency"),
    ],
)
def test_a_worker_says_what_it_needs(checkpoint: Path, flags: list[str], told: str) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        flags = [flag.format(taken=taken.getsockname()[1]) for flag in flags]
        command = [sys.executable, "-m", "predictor", "worker", "--model", f"tiny={checkpoint}", *flags]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert told in ended.stderr
