"""The worker in this process: what it makes of a job, and whom it tells."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from predictor.backends.base import Backend
from predictor.errors import EngineFailed, Forbidden, InvalidRequest, NotReady, QueueFull
from predictor.jobs import webhook as webhook_module
from predictor.jobs import worker as worker_module
from predictor.jobs.job import Job, shown
from predictor.jobs.redis import RedisStore
from predictor.jobs.sqlite import SQLiteStore
from predictor.jobs.store import StoreUnavailable
from predictor.jobs.submission import submit
from predictor.jobs.webhook import check_webhook
from predictor.jobs.worker import Worker
from predictor.protocols import v1
from predictor.protocols.wire import Limits
from predictor.text.language_model import LanguageModel
from tests.redis_server import running_redis

LIMITS = Limits(max_instances=8, max_timeout_s=60)

# Generates for many seconds, whatever is faster: a job in the middle.
LONG = {
    "instances": ["O"] * 8,
    "parameters": {"max_new_tokens": 1900, "context_overflow": "slide", "ignore_eos": True, "n": 8},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_BEAT_S", 0.05)
    monkeypatch.setattr(worker_module, "_WAIT_S", 0.05)


@pytest.fixture
def model(backend: Backend) -> LanguageModel:
    return LanguageModel(backend)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    opened = SQLiteStore(tmp_path / "jobs.sqlite3", limit=100, expiry_s=60)
    yield opened
    await opened.close()


@asynccontextmanager
async def working(store: Any, models: Any, concurrency: int = 4, **options: Any) -> AsyncIterator[Worker]:
    """A worker over `models`: a dictionary, or what makes one."""
    current: Callable[[], Any] = models if callable(models) else lambda: models
    worker = Worker(store, current, lambda name, rows: None, concurrency=concurrency, timeout_s=60, **options)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.drain()
        await asyncio.wait_for(running, 30)


def asked(body: Any, webhook: str | None = None) -> Job:
    return replace(submit(body, "tiny", LIMITS, ()).job, webhook=webhook)


async def ended(store: Any, job: Job, limit_s: float = 30) -> Job:
    return await until(store, job, lambda each: each.ended, limit_s)


async def until(store: Any, job: Job, condition: Callable[[Job], bool], limit_s: float = 30) -> Job:
    began = time.monotonic()
    while not condition(found := await store.get(job.id)):
        assert time.monotonic() - began < limit_s, found
        await asyncio.sleep(0.02)
    return found


BODY = {
    "instances": ["To be", {"prompt": "or", "n": 2}],
    "parameters": {"max_new_tokens": 9, "seed": 5, "details": True},
}


async def test_the_result_is_the_synchronous_answer(store: SQLiteStore, model: LanguageModel) -> None:
    exchange = v1.FORMAT.parse(BODY, LIMITS)
    expected = exchange.render(await model.generate(exchange.requests, 60))
    async with working(store, {"tiny": model}):
        done = await ended(store, await store.add(asked(BODY), None))
    told = json.loads(shown(done))
    assert told["result"] == json.loads(json.dumps(expected))
    assert told["status"] == "succeeded"
    made = sum(
        each["completion_tokens"]
        for row in told["result"]["predictions"]
        for each in (row if isinstance(row, list) else [row])
    )
    assert told["progress"] == {"tokens": made, "of": 27}
    assert (told["error"], told["url"]) == (None, f"/v1/jobs/{done.id}")


async def test_what_only_the_model_can_refuse_fails_the_job_with_its_reason(
    store: SQLiteStore, model: LanguageModel
) -> None:
    async with working(store, {"tiny": model}):
        body = {"instances": ["x"], "parameters": {"max_new_tokens": 5000}}
        done = await ended(store, await store.add(asked(body), None))
        slow = {**LONG, "parameters": LONG["parameters"] | {"timeout_s": 0.2}}
        late = await ended(store, await store.add(asked(slow), None))
    assert done.status == late.status == "failed"
    assert "max_new_tokens must be at most 127" in done.error
    assert "took longer than 0.2 s" in late.error


async def test_a_job_waits_for_its_model(store: SQLiteStore, model: LanguageModel) -> None:
    models: dict[str, LanguageModel] = {}
    async with working(store, models):
        job = await store.add(asked(BODY), None)
        await asyncio.sleep(0.3)
        assert (await store.get(job.id)).status == "queued"
        models["tiny"] = model
        assert (await ended(store, job)).status == "succeeded"


async def test_a_cancelled_job_stops_generating(store: SQLiteStore, model: LanguageModel) -> None:
    async with working(store, {"tiny": model}):
        job = await store.add(asked(LONG), None)
        at_work = await until(store, job, lambda each: each.tokens > 0)
        assert at_work.status == "running"
        assert at_work.of == 8 * 8 * 1900
        await store.delete(job.id)
        await until_idle(model)
        assert (await store.get(job.id)).status == "cancelled"


async def until_idle(model: LanguageModel) -> None:
    began = time.monotonic()
    while model.backend.load.running_requests:
        assert time.monotonic() - began < 5
        await asyncio.sleep(0.02)


async def test_so_many_jobs_run_together_and_no_more(store: SQLiteStore, model: LanguageModel) -> None:
    async with working(store, {"tiny": model}, concurrency=2):
        jobs = [await store.add(asked(LONG), None) for _ in range(4)]
        await until(store, jobs[1], lambda each: each.status == "running")
        await asyncio.sleep(0.3)
        assert [(await store.get(each.id)).status for each in jobs] == ["running", "running", "queued", "queued"]
        await store.delete(jobs[0].id)
        await until(store, jobs[2], lambda each: each.status == "running")
        for each in jobs:
            await store.delete(each.id)


async def test_a_worker_of_no_jobs_takes_none(store: SQLiteStore, model: LanguageModel) -> None:
    async with working(store, {"tiny": model}, concurrency=0):
        job = await store.add(asked(BODY), None)
        await asyncio.sleep(0.3)
        assert (await store.get(job.id)).status == "queued"


@dataclass
class Scripted:
    """A model that raises what it is told, one after the other, and then answers as the real one."""

    real: LanguageModel
    errors: list[Exception]
    calls: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def check(self, requests: Any) -> int:
        return await self.real.check(requests)

    async def generate(self, requests: Any, timeout_s: float, on_token: Any) -> Any:
        self.calls += 1
        self.started.set()
        if self.errors:
            raise self.errors.pop(0)
        return await self.real.generate(requests, timeout_s, on_token)


async def test_a_full_queue_is_waited_for(store: SQLiteStore, model: LanguageModel) -> None:
    scripted = Scripted(model, [QueueFull("full"), QueueFull("full")])
    async with working(store, {"tiny": scripted}):
        done = await ended(store, await store.add(asked(BODY), None))
    assert (done.status, done.starts, scripted.calls) == ("succeeded", 1, 3)


async def test_a_model_that_stops_gives_its_job_back_uncounted(store: SQLiteStore, model: LanguageModel) -> None:
    scripted = Scripted(model, [NotReady("shutting down")] * 4)
    async with working(store, {"tiny": scripted}):
        done = await ended(store, await store.add(asked(BODY), None))
    assert (done.status, done.starts, scripted.calls) == ("succeeded", 1, 5)


async def test_a_job_that_is_taken_again_before_its_first_run_has_let_go_can_be_cancelled(
    store: SQLiteStore, model: LanguageModel
) -> None:
    slow = Slow(store)
    async with working(slow, {"tiny": Scripted(model, [NotReady("shutting down")])}):
        job = await store.add(asked(LONG), None)
        await until(store, job, lambda each: each.tokens > 0)
        await asyncio.sleep(2 * Slow.REPLY_S)
        before = await store.get(job.id)
        await until(store, job, lambda each: each.tokens > before.tokens)
        await store.delete(job.id)
        await until_idle(model)


class Slow:
    """A store whose reply to `give_back` takes its time; meanwhile the job is taken again."""

    REPLY_S = 0.3

    def __init__(self, store: SQLiteStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def give_back(self, job: Job, *, counted: bool) -> None:
        await self._store.give_back(job, counted=counted)
        await asyncio.sleep(self.REPLY_S)


@pytest.mark.parametrize("error", [EngineFailed("broken"), ValueError("a fault of ours")])
async def test_a_job_that_breaks_the_engine_is_tried_again_and_then_given_up(
    store: SQLiteStore, model: LanguageModel, error: Exception
) -> None:
    for faults, status in ((2, "succeeded"), (3, "failed")):
        scripted = Scripted(model, [error] * faults)
        async with working(store, {"tiny": scripted}):
            done = await ended(store, await store.add(asked(BODY), None))
        assert (done.status, done.starts) == (status, 3)
        assert done.error is None or "broken" not in done.error


class Flaky:
    """A store that is away while `away` is set."""

    def __init__(self, store: SQLiteStore) -> None:
        self._store, self.away = store, False

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            if self.away:
                raise StoreUnavailable
            return await getattr(self._store, name)(*arguments, **options)

        return call


async def test_a_result_waits_for_a_store_that_is_away(store: SQLiteStore, model: LanguageModel) -> None:
    flaky, scripted = Flaky(store), Scripted(model, [])
    async with working(flaky, {"tiny": scripted}):
        job = await store.add(asked(BODY), None)
        await scripted.started.wait()
        flaky.away = True
        await asyncio.sleep(0.5)
        assert (await store.get(job.id)).status == "running"
        flaky.away = False
        assert (await ended(store, job)).status == "succeeded"
    assert scripted.calls == 1


class FirstTimeEndless(Scripted):
    async def generate(self, requests: Any, timeout_s: float, on_token: Any) -> Any:
        if not self.calls:
            self.calls += 1
            self.started.set()
            await asyncio.Event().wait()
        return await super().generate(requests, timeout_s, on_token)


async def test_a_job_comes_back_to_a_worker_that_lost_it_to_one_that_died(model: LanguageModel, tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        stores = [RedisStore(server.url, name, limit=9, expiry_s=60, idle_s=0.5) for name in ("first", "second")]
        first, second = (Flaky(store) for store in stores)
        models = [FirstTimeEndless(model, []) for _ in range(2)]
        async with working(first, {"tiny": models[0]}), working(second, {}) as other:
            job = await stores[0].add(asked(BODY), None)
            await models[0].started.wait()
            first.away = True  # cut off, and still at work
            other._models = lambda: {"tiny": models[1]}
            await models[1].started.wait()
            second.away = True  # dead
            first.away = False
            done = await ended(stores[0], job)
            second.away = False
        for store in stores:
            await store.close()
    assert (done.status, done.starts, models[0].calls) == ("succeeded", 3, 2)


async def test_what_runs_at_the_end_is_finished_and_what_waits_is_left(
    store: SQLiteStore, model: LanguageModel
) -> None:
    scripted = Scripted(model, [])
    async with working(store, {"tiny": scripted}, concurrency=1) as worker:
        first, second = await store.add(asked(BODY), None), await store.add(asked(BODY), None)
        await scripted.started.wait()
        worker.drain()
    assert (await store.get(first.id)).status == "succeeded"
    assert (await store.get(second.id)).status == "queued"


# ----------------------------------------------------------------------------------------------------------- webhooks


class Receiver(BaseHTTPRequestHandler):
    """Answers with the statuses it is told, one after the other, and keeps what came."""

    statuses: ClassVar[list[int]] = []
    came: ClassVar[list[Any]] = []
    endless: ClassVar[bytes] = b""  # sent instead, its last byte again and again

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).came.append((self.path, self.headers["content-type"], json.loads(body)))
        if self.endless:
            with suppress(OSError):
                self.wfile.write(self.endless)
                while True:
                    self.wfile.write(self.endless[-1:])
                    time.sleep(0.02)
            return
        status = self.statuses.pop(0) if self.statuses else 200
        self.send_response(status)
        if status == 307:
            self.send_header("location", "/elsewhere")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(webhook_module, "_PAUSES_S", (0.02, 0.02, 0.02))
    Receiver.statuses, Receiver.came, Receiver.endless = [], [], b""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook?a=b"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("statuses", "calls", "outcome"),
    [
        ([], 1, "delivered"),
        ([500, 429, 204], 3, "delivered"),
        ([503] * 9, 4, "failed: HTTP 503"),
        ([404], 1, "failed: HTTP 404"),
        ([307], 1, "failed: HTTP 307"),
    ],
)
async def test_a_webhook_gets_the_job(
    store: SQLiteStore, model: LanguageModel, receiver: str, statuses: list[int], calls: int, outcome: str
) -> None:
    Receiver.statuses = statuses
    async with working(store, {"tiny": model}):
        job = await store.add(asked(BODY, receiver), None)
        done = await until(store, job, lambda each: each.delivery is not None)
    assert (done.status, done.delivery) == ("succeeded", outcome)
    assert len(Receiver.came) == calls
    path, media_type, body = Receiver.came[-1]
    assert (path, media_type) == ("/hook?a=b", "application/json")
    told = json.loads(shown(done))
    assert told["webhook"] == {"url": receiver, "outcome": outcome}
    assert body == told | {"webhook": {"url": receiver, "outcome": None}}


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nbody", "delivered"),
        (b"HTTP/1.1 200 OK\r\nx: y", "failed: no answer within 0.5 s"),
        (b"HTTP/1.1 404 Not Found\r\n\r\nbody", "failed: HTTP 404"),
    ],
)
async def test_a_webhooks_answer_is_not_read_past_its_status_nor_waited_for(
    store: SQLiteStore,
    model: LanguageModel,
    receiver: str,
    monkeypatch: pytest.MonkeyPatch,
    sent: bytes,
    outcome: str,
) -> None:
    monkeypatch.setattr(webhook_module, "_TIMEOUT_S", 0.5)
    monkeypatch.setattr(webhook_module, "_PAUSES_S", ())
    Receiver.endless = sent
    async with working(store, {"tiny": model}):
        job = await store.add(asked(BODY, receiver), None)
        done = await until(store, job, lambda each: each.delivery is not None, 5)
    assert done.delivery == outcome


async def test_a_webhook_is_called_past_the_environments_proxy(
    store: SQLiteStore, model: LanguageModel, receiver: str, free_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, free_url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with working(store, {"tiny": model}):
        job = await store.add(asked(BODY, receiver), None)
        done = await until(store, job, lambda each: each.delivery is not None)
    assert done.delivery == "delivered"


async def test_a_removed_jobs_webhook_is_not_called_again(
    store: SQLiteStore, model: LanguageModel, receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_module, "_PAUSES_S", (0.5,) * 5)
    Receiver.statuses = [500] * 9
    async with working(store, {"tiny": model}):
        job = await store.add(asked(BODY, receiver), None)
        await until(store, job, lambda each: bool(Receiver.came))
        await store.delete(job.id)
        assert await store.get(job.id) is None
        await asyncio.sleep(1.2)
        assert len(Receiver.came) == 1


async def test_a_webhook_that_nobody_answers_loses_no_result(
    store: SQLiteStore, model: LanguageModel, receiver: str, free_url: str
) -> None:
    async with working(store, {"tiny": model}):
        job = await store.add(asked(BODY, free_url), None)
        done = await until(store, job, lambda each: each.delivery is not None)
    assert done.result is not None
    assert done.delivery == "failed: ConnectError"


@pytest.fixture
def free_url() -> str:
    from tests.processes import free_port

    return f"http://127.0.0.1:{free_port()}/"


async def test_a_webhook_that_the_end_cut_off_is_called_by_the_next_worker(
    store: SQLiteStore, model: LanguageModel, receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_module, "_PAUSES_S", (60.0,))
    Receiver.statuses = [500]
    async with working(store, {"tiny": model}):
        job = await store.add(asked(BODY, receiver), None)
        await until(store, job, lambda each: bool(Receiver.came))
    assert (await store.get(job.id)).delivery is None
    await store.close()  # the next process has a store of its own
    again = SQLiteStore(store._path, limit=100, expiry_s=60)
    async with working(again, {"tiny": model}):
        done = await until(again, job, lambda each: each.delivery is not None)
    await again.close()
    assert (done.delivery, done.starts, len(Receiver.came)) == ("delivered", 1, 2)


@pytest.mark.parametrize(
    ("url", "hosts", "error"),
    [
        ("ftp://a/", ["*"], InvalidRequest),
        ("file:///etc/passwd", ["*"], InvalidRequest),
        ("//a/", ["*"], InvalidRequest),
        ("http://", ["*"], InvalidRequest),
        ("", ["*"], InvalidRequest),
        (7, ["*"], InvalidRequest),
        (None, ["*"], InvalidRequest),
        (["http://a/"], ["*"], InvalidRequest),
        ("http://user:secret@a/", ["*"], InvalidRequest),
        ("http://a/" + "x" * 3000, ["*"], InvalidRequest),
        ("http://a/\0", ["*"], InvalidRequest),
        ("http://a:99999999/", ["*"], InvalidRequest),
        ("http://a/", [], Forbidden),
        ("http://b/", ["a"], Forbidden),
        ("http://a.b/", ["a"], Forbidden),
        ("http://b/?http://a/", ["a"], Forbidden),
        ("http://b#@a/", ["a"], Forbidden),
        ("http://b\\@a/", ["a"], (InvalidRequest, Forbidden)),
        ("http://a/", ["a"], None),
        ("https://A:8443/x?y#z", ["a"], None),
        ("http://[::1]:80/", ["::1"], None),
    ],
)
def test_a_webhook_is_an_url_of_a_host_that_is_allowed(url: Any, hosts: Sequence[str], error: Any) -> None:
    if error is None:
        assert check_webhook(url, hosts) == url
        return
    with pytest.raises(error) as raised:
        check_webhook(url, hosts)
    assert raised.value.status in (400, 403)
    assert "webhook" in str(raised.value)
    assert raised.value.status == 400 or "--webhook-host" in str(raised.value)
