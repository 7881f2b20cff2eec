"""What both job stores promise, and what each promises by itself."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.commands.core import AsyncScript

from predictor.errors import ConfigurationError, QueueFull
from predictor.jobs import redis as redis_module
from predictor.jobs import sqlite_rows
from predictor.jobs import store as store_module
from predictor.jobs.job import MAX_STARTS, Job, new_id
from predictor.jobs.redis import STREAM, RedisStore
from predictor.jobs.sqlite import SQLiteStore
from predictor.jobs.store import JobStore, KeyReused, Progress, StoreUnavailable, default_path, open_store
from predictor.settings import load_settings
from tests.conftest import ROOT
from tests.processes import free_port
from tests.redis_server import RedisServer, running_redis

WAIT_S = 0.05

# A new store over the same jobs: for SQLite the next process, for Redis another worker. Options as the stores'.
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


def opener(kind: str, request: pytest.FixtureRequest, folder: Path) -> Open:
    if kind == "sqlite":
        path = folder / f"{new_id()}.sqlite3"
        return lambda limit=100, expiry_s=60, idle_s=30.0: SQLiteStore(path, limit=limit, expiry_s=expiry_s)
    server = request.getfixturevalue("redis_server")
    server.client.flushall()
    store = EachTwice if kind == "each script twice" else RedisStore

    def open_redis(limit: int = 100, expiry_s: int = 60, idle_s: float = 30.0) -> RedisStore:
        return store(server.url, new_id(), limit=limit, expiry_s=expiry_s, idle_s=idle_s)

    return open_redis


class EachTwice(RedisStore):
    """Sends each script twice, as the client library does where the first reply was lost."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for name, script in list(vars(self).items()):
            if isinstance(script, AsyncScript):
                setattr(self, name, twice(script))


def twice(script: AsyncScript) -> Callable[..., Any]:
    async def send(keys: Any, arguments: Any, **options: Any) -> Any:
        if not options:  # one of a pipeline is sent with the others, later
            await script(keys, arguments)
        return await script(keys, arguments, **options)

    return send


KINDS = ["sqlite", "redis", "each script twice"]


@pytest.fixture(params=KINDS)
def open_one(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opener(request.param, request, tmp_path)


@asynccontextmanager
async def opened(open_one: Open, **options: Any) -> AsyncIterator[JobStore]:
    store = open_one(**options)
    try:
        yield store
    finally:
        await store.close()


def job(body: str = "{}", **changes: Any) -> Job:
    return replace(Job(new_id(), "tiny", "v1", body, digest=body), **changes)


async def taken(store: JobStore, *models: str) -> Job | None:
    """What is there to take; Redis needs a second call where the first met an entry of no use."""
    for _ in range(3):
        found = await store.take(models or ("tiny",), WAIT_S)
        if found is not None:
            return found
    return None


async def test_a_job_goes_from_queued_to_its_result(open_one: Open) -> None:
    async with opened(open_one) as store:
        kept = await store.add(job('{"prompt": "\\u00e9 \\u0000"}', webhook=None, of=7), None)
        assert await store.get(kept.id) == kept
        assert await store.queued() == 1
        running = await taken(store)
        assert running == replace(kept, status="running", starts=1)
        assert await store.queued() == 0
        assert await store.renew([Progress(kept, 3, 8)]) == set()
        assert await store.get(kept.id) == replace(running, tokens=3, of=8)
        done = replace(running, status="succeeded", result='{"predictions": ["\u00e9\U0001f600"]}', tokens=8, of=8)
        assert await store.finish(done)
        assert await store.get(kept.id) == done
        assert await taken(store) is None


async def test_no_id_but_the_right_one_finds_a_job(open_one: Open) -> None:
    async with opened(open_one) as store:
        await store.add(job(), None)
        for wrong in (new_id(), "", "*", "%", "job-", "x" * 5000, "\0"):
            assert await store.get(wrong) is None
            assert await store.delete(wrong) is None


async def test_jobs_come_in_order_and_by_model(open_one: Open) -> None:
    async with opened(open_one) as store:
        first, other, second = [await store.add(job(model=name), None) for name in ("a", "b", "a")]
        assert [(await taken(store, "a")).id for _ in range(2)] == [first.id, second.id]
        assert await taken(store, "a") is None
        assert (await taken(store, "a", "b")).id == other.id


async def test_past_the_limit_jobs_are_refused_until_one_is_taken_or_cancelled(open_one: Open) -> None:
    async with opened(open_one, limit=2) as store:
        kept = [await store.add(job(), None) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 jobs are waiting"):
            await store.add(job(), "key")
        await taken(store)
        again = await store.add(job(), "key")  # the refused one has not used its key up
        with pytest.raises(QueueFull):
            await store.add(job(), None)
        await store.delete(kept[1].id)
        await store.add(job(), None)
        assert again.id != kept[0].id


async def test_a_key_is_one_job_however_many_ask_at_once(open_one: Open) -> None:
    async with opened(open_one) as store:
        others = [store] if isinstance(store, SQLiteStore) else [store, open_one(), open_one()]
        asked = [others[i % len(others)].add(job("same"), "key") for i in range(30)]
        assert len({each.id for each in await asyncio.gather(*asked)}) == 1
        assert await store.queued() == 1
        with pytest.raises(KeyReused, match="another body"):
            await store.add(job("another"), "key")
        for each in others[1:]:
            await each.close()


async def test_a_key_lives_as_long_as_its_job(open_one: Open) -> None:
    async with opened(open_one) as store:
        first = await store.add(job(), "key")
        assert (await store.delete(first.id)).status == "cancelled"
        assert (await store.add(job(), "key")).id == first.id  # cancelled, and still there
        assert (await store.delete(first.id)).id == first.id
        assert await store.get(first.id) is None
        assert (await store.add(job(), "key")).id != first.id


async def test_results_and_keys_expire_and_what_waits_does_not(open_one: Open) -> None:
    async with opened(open_one, expiry_s=1) as store:
        done, waits = await store.add(job(), "done"), await store.add(job(), "waits")
        await store.finish(replace(await taken(store), status="succeeded", result="1"))
        cancelled = await store.add(job(), None)
        await store.delete(cancelled.id)
        assert (await store.get(done.id)).result == "1"
        await asyncio.sleep(1.5)
        assert await store.get(done.id) is None
        assert await store.get(cancelled.id) is None
        assert (await store.add(job(), "waits")).id == waits.id
        assert (await store.add(job(), "done")).id != done.id


async def test_a_cancelled_job_is_not_taken_and_a_running_one_is_lost_to_its_worker(open_one: Open) -> None:
    async with opened(open_one) as store:
        waiting, running = await store.add(job(), None), await store.add(job(), None)
        assert (await store.delete(waiting.id)).status == "cancelled"
        assert await store.queued() == 1
        assert (await taken(store)).id == running.id
        await store.delete(running.id)
        assert await store.renew([Progress(running, 5, 9)]) == {running.id}
        assert not await store.finish(replace(running, status="succeeded", result="1"))
        assert (await store.get(running.id)).status == "cancelled"
        assert (await store.get(running.id)).result is None


async def test_what_is_given_back_is_taken_again(open_one: Open) -> None:
    async with opened(open_one) as store:
        await store.add(job(), None)
        for _ in range(MAX_STARTS + 2):  # giving back in order is no failure
            running = await taken(store)
            assert running is not None
            assert running.starts == 1
            await store.give_back(running, counted=False)
        assert await store.queued() == 1


async def test_a_job_that_failed_its_workers_again_and_again_is_given_up(open_one: Open) -> None:
    async with opened(open_one) as store:
        kept = await store.add(job(), None)
        for _ in range(MAX_STARTS):
            await store.give_back(await taken(store), counted=True)
        assert await taken(store) is None
        failed = await store.get(kept.id)
        assert (failed.status, failed.starts) == ("failed", MAX_STARTS)
        assert "started 3 times" in failed.error
        assert await store.queued() == 0


async def test_a_job_whose_workers_die_is_run_again_and_then_given_up(open_one: Open) -> None:
    async with opened(open_one) as store:
        kept = await store.add(job(webhook="http://x/"), None)
    for start in range(MAX_STARTS):
        store = open_one(idle_s=0.01)
        await asyncio.sleep(0.02)
        found = await taken(store)
        assert (found.status, found.starts) == ("running", start + 1)
        # Its process is gone: what it held is not given back.
        await _vanish(store)
    async with opened(open_one, idle_s=0.01) as store:
        await asyncio.sleep(0.02)
        failed = await taken(store)  # its webhook is to be told
        assert failed.status == "failed"
        assert "started 3 times" in failed.error
        assert (await store.get(kept.id)).status == "failed"


async def _vanish(store: Any) -> None:
    if isinstance(store, SQLiteStore):
        await store.close()  # leaves what runs as it is
    else:
        await store._redis.aclose()


async def test_a_webhook_that_was_not_called_is_the_next_workers(open_one: Open) -> None:
    first = open_one(idle_s=0.01)
    kept = await first.add(job(webhook="http://x/"), None)
    done = replace(await taken(first), status="succeeded", result="1")
    assert await first.finish(done)
    assert await first.renew([Progress(kept)]) == set()
    await _vanish(first)
    async with opened(open_one, idle_s=0.01) as store:
        await asyncio.sleep(0.02)
        found = await taken(store)
        assert found.awaits_delivery
        assert found.result == "1"
        await store.settle(replace(found, delivery="delivered"))
        assert (await store.get(kept.id)).delivery == "delivered"
        assert await taken(store) is None


async def test_the_newest_of_the_ended_jobs_are_kept(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (redis_module, sqlite_rows):
        monkeypatch.setattr(module, "KEPT_JOBS", 3)
        monkeypatch.setattr(module, "KEPT_BYTES", 1000)

    async def end(size: int, key: str | None = None) -> Job:
        kept = await store.add(job("x" * 90, webhook="http://x/"), key)
        await store.finish(replace(await taken(store), status="succeeded", result="y" * (size - 90)))
        await store.settle(replace(kept, status="succeeded", delivery="delivered"))
        return kept

    async def there(jobs: list[Job]) -> list[bool]:
        return [await store.get(each.id) is not None for each in jobs]

    async with opened(open_one) as store:
        waits = await store.add(job("z" * 5000, model="other"), None)
        jobs = [await end(100, f"key {number}") for number in range(5)]
        assert await there(jobs) == [False, False, True, True, True]
        assert (await store.add(job("another", model="other"), "key 0")).id != jobs[0].id, "its key went with it"
        jobs = [*jobs[2:], await end(850)]
        assert await there(jobs) == [False, False, True, True], "950 bytes, and 1050 with one more"
        await store.delete(jobs[3].id)
        jobs = [jobs[2], await end(850), await end(5000)]
        assert await there(jobs) == [False, False, True], "the last one whatever its size"
        cancelled = await store.add(job("c" * 900), None)
        await store.delete(cancelled.id)
        assert await there([*jobs, cancelled, waits]) == [False, False, False, True, True]


async def test_a_job_whose_webhook_is_being_called_here_is_not_taken_again(open_one: Open) -> None:
    async with opened(open_one, idle_s=0.05) as store:
        kept = await store.add(job(webhook="http://x/"), None)
        await store.finish(replace(await taken(store), status="succeeded", result="1"))
        await asyncio.sleep(0.1)
        assert await store.take(["tiny"], WAIT_S, {kept.id}) is None


WORDS = ["add", "add", "take", "take", "finish", "give back", "delete", "next"]
OPERATIONS = st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 5)), max_size=25)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_any_order_of_calls_loses_no_job_and_ends_each_once(
    kind: str, operations: list[tuple[str, int]], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    asyncio.run(_follow(opener(kind, request, tmp_path), operations))


async def _follow(open_one: Open, operations: list[tuple[str, int]]) -> None:
    """Beside the store runs a dictionary: id -> status, None for removed."""
    store, known, running = open_one(), {}, []
    for operation, number in operations:
        ids = list(known)
        if operation == "add":
            known[(await store.add(job(), None)).id] = "queued"
        elif operation == "take":
            found = await store.take(["tiny"], 0.001)
            # Redis may have met the entry of a cancelled or removed job.
            may_miss = not {"cancelled", None}.isdisjoint(known.values())
            assert found is not None or may_miss or "queued" not in known.values()
            if found is not None:
                assert known[found.id] == "queued"
                known[found.id] = "running"
                running.append(found)
        elif operation == "finish" and running:
            done = replace(running.pop(number % len(running)), status="succeeded", result="1")
            assert await store.finish(done) == (known[done.id] == "running")
            known[done.id] = "succeeded" if known[done.id] == "running" else known[done.id]
        elif operation == "give back" and running:
            back = running.pop(number % len(running))
            await store.give_back(back, counted=False)
            known[back.id] = "queued" if known[back.id] == "running" else known[back.id]
        elif operation == "delete" and ids:
            each = ids[number % len(ids)]
            await store.delete(each)
            known[each] = "cancelled" if known[each] in ("queued", "running") else None
        elif operation == "next" and isinstance(store, SQLiteStore):
            await store.close()
            store, running = open_one(), []
            known = {each: "queued" if status == "running" else status for each, status in known.items()}
        for each, status in known.items():
            found = await store.get(each)
            assert (None if found is None else found.status) == status
        assert await store.queued() == list(known.values()).count("queued")
    await store.close()


# ------------------------------------------------------------------------------------------------------------- SQLite


async def test_the_file_is_its_owners_alone_and_made_by_the_first_job(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "jobs.sqlite3"
    old = os.umask(0)
    try:
        store = SQLiteStore(path, limit=10, expiry_s=10)
        assert await store.get("job-x") is None
        assert await store.take(["tiny"], WAIT_S) is None
        assert not path.parent.exists()
        await store.add(job("a secret"), None)
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == {"jobs.sqlite3": 0o600, "jobs.sqlite3-wal": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await store.close()


async def test_a_removed_job_leaves_no_prompt_in_the_file(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "jobs.sqlite3", limit=10, expiry_s=10)
    kept = await store.add(job("a secret prompt " * 20), None)
    await store.delete(kept.id)
    await store.delete(kept.id)
    await store.close()
    assert b"a secret prompt" not in (tmp_path / "jobs.sqlite3").read_bytes()


async def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        store = SQLiteStore(tmp_path / name / "jobs.sqlite3", limit=10, expiry_s=10)
        with pytest.raises(StoreUnavailable):
            await store.add(job(), None)
        await store.close()


async def test_a_full_disk_is_told_and_what_is_there_waits(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "jobs.sqlite3", limit=10, expiry_s=10)
    kept = await store.add(job("x" * 50_000), None)
    store._database.execute("PRAGMA max_page_count = 30")  # stands for the disk's end: SQLite says the same
    with pytest.raises(StoreUnavailable, match="the job store is full") as raised:
        await store.add(job("x" * 100_000), None)
    assert raised.value.status == 503
    store._database.execute("PRAGMA max_page_count = 3000")
    assert await taken(store) == replace(kept, status="running", starts=1)
    await store.close()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "Is a directory"),
        ("a file/jobs.sqlite3", "cannot be made or opened"),
        ("open/jobs.sqlite3", "others may write to it"),
        ("a file", "not a database"),
    ],
)
async def test_a_named_file_that_can_never_work_is_found_at_the_start(tmp_path: Path, path: str, told: str) -> None:
    (tmp_path / "a file").write_bytes(b"x" * 5000)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigurationError, match=f"--jobs sqlite:///.*{told}"):
        open_store(load_settings({"jobs": f"sqlite:///{tmp_path}/{path}"}))


async def test_a_named_file_that_an_ending_process_still_has_stops_no_start(tmp_path: Path) -> None:
    ending = SQLiteStore(tmp_path / "jobs.sqlite3", limit=10, expiry_s=10)
    kept = await ending.add(job(), None)
    store = await asyncio.to_thread(open_store, load_settings({"jobs": f"sqlite:///{tmp_path}/jobs.sqlite3"}))
    with pytest.raises(StoreUnavailable, match="another process"):
        await store.get(kept.id)
    await ending.close()
    assert (await store.get(kept.id)).id == kept.id
    await store.close()


async def test_a_default_file_that_cannot_be_made_is_told_as_503_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr(store_module, "default_path", lambda port: tmp_path / "a file" / "jobs.sqlite3")
    store = open_store(load_settings({}))
    with pytest.raises(StoreUnavailable, match="cannot be made or opened"):
        await store.add(job(), None)
    await store.close()


async def test_a_file_that_is_no_database_is_told_as_503(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(b"x" * 5000)
    store = SQLiteStore(tmp_path / "jobs.sqlite3", limit=10, expiry_s=10)
    with pytest.raises(StoreUnavailable) as raised:
        await store.add(job(), None)
    assert raised.value.status == 503
    assert raised.value.retry_after_s
    await store.close()


async def test_a_file_is_one_processs_and_survives_its_kill(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    script = f"""
import asyncio
from pathlib import Path
from predictor.jobs.job import Job
from predictor.jobs.sqlite import SQLiteStore
async def main():
    store = SQLiteStore(Path({str(path)!r}), limit=10, expiry_s=10)
    for name in ("first", "second"):
        await store.add(Job(name, "tiny", "v1", "body", "digest"), "key of " + name)
    await store.take(["tiny"], 1)
    print("there", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    command = [sys.executable, "-c", script]
    other = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert other.stdout is not None
    assert await other.stdout.readline() == b"there\n"
    store = SQLiteStore(path, limit=10, expiry_s=10)
    with pytest.raises(StoreUnavailable, match="another process"):
        await store.get("first")
    other.kill()
    await other.wait()
    assert (await store.get("first")).status == "queued"
    assert [(await taken(store)).id for _ in range(2)] == ["first", "second"]
    assert (await store.get("first")).starts == 2
    assert (await store.add(job("digest"), "key of first")).id == "first"
    await store.close()


def test_the_default_file_is_of_the_user_and_the_port() -> None:
    settings = load_settings({"port": 8123})
    assert isinstance(open_store(settings), SQLiteStore)
    assert default_path(8123).name == "jobs-8123.sqlite3"
    assert default_path(8123).parent.name == f"gpt2-predictor-{os.getuid()}"


# -------------------------------------------------------------------------------------------------------------- Redis


@pytest.fixture
def open_redis(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opener("redis", request, tmp_path)


async def test_a_claim_that_is_renewed_is_not_taken_over_and_one_that_is_not_is(
    open_redis: Open, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(redis_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    async with opened(open_redis) as first, opened(open_redis) as second:
        kept = await first.add(job(), None)
        running = await taken(first)
        stream = STREAM + "tiny"
        (entry,) = redis_server.client.xpending_range(stream, "workers", "-", "+", 1)

        def pass_50_s() -> None:
            """Here and, for the claim, in Redis."""
            nonlocal now_s
            now_s += 50
            claimed = [entry["message_id"]]
            redis_server.client.xclaim(stream, "workers", first._worker, 0, claimed, idle=50_000, justid=True)

        for _ in range(6):
            pass_50_s()
            assert await first.renew([Progress(kept, 1, 2)]) == set()
            assert await second.take(["tiny"], 0.001) is None
        pass_50_s()
        found = await second.take(["tiny"], 0.001)
        assert found is not None
        assert (found.id, found.starts) == (kept.id, 2)
        # The first has woken up: it is told, gives back nothing that is not its, and may still be the first to end.
        assert await first.renew([Progress(kept, 1, 2)]) == {kept.id}
        await first.give_back(running, counted=False)
        assert (await first.get(kept.id)).status == "running"
        assert await first.finish(replace(running, status="succeeded", result='"first"'))
        assert not await second.finish(replace(found, status="succeeded", result='"second"'))
        assert (await second.get(kept.id)).result == '"first"'


async def test_a_dead_workers_job_is_taken_over_within_a_minute(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis_server.client.flushall()
    now_s = 0.0
    monkeypatch.setattr(redis_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    dead, other = (RedisStore(redis_server.url, name, limit=9, expiry_s=9) for name in ("dead", "other"))
    kept = await dead.add(job(), None)
    await taken(dead)
    (entry,) = redis_server.client.xpending_range(STREAM + "tiny", "workers", "-", "+", 1)

    def renewed_ago(seconds: int) -> None:
        nonlocal now_s
        now_s = float(seconds)
        redis_server.client.xclaim(
            STREAM + "tiny", "workers", "dead", 0, [entry["message_id"]], idle=seconds * 1000, justid=True
        )

    for seconds in (0, 10, 20):  # one that is only slow keeps its job
        renewed_ago(seconds)
        assert await other.take(["tiny"], 0.001) is None
    renewed_ago(50)
    assert (await other.take(["tiny"], 0.001)).id == kept.id
    for store in (dead, other):
        await store.close()


async def test_a_job_comes_back_to_a_worker_that_had_lost_it(open_redis: Open) -> None:
    first, second = open_redis(idle_s=0.2), open_redis(idle_s=0.2)
    kept = await first.add(job(), None)
    running = await taken(first)
    await asyncio.sleep(0.25)  # cut off
    assert (await taken(second)).id == kept.id
    assert await first.renew([Progress(running)]) == {kept.id}
    await _vanish(second)
    await asyncio.sleep(0.25)
    again = await taken(first)
    assert (again.id, again.starts) == (kept.id, 3)
    assert await first.renew([Progress(again)]) == set()
    await first.close()


async def test_what_a_worker_is_at_work_on_it_does_not_take_again(open_redis: Open) -> None:
    async with opened(open_redis, idle_s=0.05) as store:
        kept = await store.add(job(), None)
        await taken(store)
        await asyncio.sleep(0.1)  # Redis was away: no claim was renewed
        assert await store.take(["tiny"], WAIT_S, {kept.id}) is None
        assert (await store.get(kept.id)).starts == 1


async def test_a_full_redis_refuses_new_jobs_and_lets_the_others_end(
    open_redis: Open, redis_server: RedisServer
) -> None:
    first = open_redis()
    waits, runs, ended = [await first.add(job("x" * 9), None) for _ in range(3)]
    redis_server.client.config_set("maxmemory", 1)
    try:
        async with opened(open_redis) as store:  # a worker that starts now
            with pytest.raises(StoreUnavailable, match="the job store is full") as raised:
                await store.add(job(), "key")
            assert raised.value.status == 503
            for each in (waits, runs, ended):
                assert (await taken(store)).id == each.id
            await store.give_back(replace(waits, status="running"), counted=False)
            assert await store.renew([Progress(runs, 1, 2)]) == set()
            assert await store.finish(replace(ended, status="succeeded", result="1"))
            await store.delete(ended.id)
            assert await store.get(ended.id) is None
            assert (await taken(store)).id == waits.id
    finally:
        redis_server.client.config_set("maxmemory", 0)
    await first.add(job(), None)
    await first.close()


async def test_nothing_is_left_of_jobs_that_are_done_with(open_redis: Open, redis_server: RedisServer) -> None:
    async with opened(open_redis) as store:
        for webhook in (None, "http://x/"):
            await store.add(job(webhook=webhook), "key")
            done = replace(await taken(store), status="succeeded", result="1")
            await store.finish(done)
            if webhook:
                await store.settle(replace(done, delivery="delivered"))
            assert redis_server.client.xlen(STREAM + "tiny") == 0
            assert 0 < redis_server.client.ttl("predictor:job:" + done.id) <= 60
            assert 0 < redis_server.client.ttl("predictor:job-key:key") <= 60
            await store.delete(done.id)
    assert redis_server.client.keys() == [STREAM + "tiny"]
    assert redis_server.client.xinfo_consumers(STREAM + "tiny", "workers") == []


async def test_the_groups_lag_is_what_waits_before_any_worker_and_after(
    open_redis: Open, redis_server: RedisServer
) -> None:
    """By lag and pending entries workers are scaled: manifests/components/jobs."""

    def seen() -> tuple[int, int]:
        (group,) = redis_server.client.xinfo_groups(STREAM + "tiny")
        return group["lag"], group["pending"]

    async with opened(open_redis) as store:
        kept = [await store.add(job(), None) for _ in range(4)]
        assert seen() == (4, 0)
        first = await taken(store)
        assert seen() == (3, 1)
        await store.finish(replace(first, status="failed", error="x"))
        assert seen() == (3, 0)
        await store.delete(kept[2].id)
        assert seen() == (3, 0)  # its entry is still to be read
        await taken(store)
        await taken(store)
        assert seen() == (0, 2)


async def test_a_redis_that_is_away_is_told_as_503(open_redis: Open) -> None:
    store = RedisStore(f"redis://127.0.0.1:{free_port()}/0", "w", limit=1, expiry_s=1)
    for call in (store.add(job(), "k"), store.get("x"), store.delete("x"), store.take(["tiny"], 0.1), store.queued()):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as raised:
            await call
        assert raised.value.status == 503
        assert time.monotonic() - began < 5
    await store.close()


async def test_a_redis_that_lost_its_data_serves_new_jobs(open_redis: Open, redis_server: RedisServer) -> None:
    async with opened(open_redis) as store:
        lost = await store.add(job(), None)
        await taken(store)
        redis_server.client.flushall()
        assert await store.renew([Progress(lost)]) == {lost.id}
        kept = await store.add(job(), None)
        assert (await taken(store)).id == kept.id


async def test_a_worker_without_jobs_is_forgotten(
    open_redis: Open, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "_FORGET_MS", 50)
    idle, busy = open_redis(), open_redis()
    await idle.add(job(), None)
    await taken(busy)
    await idle.take(["tiny"], 0.001)
    await asyncio.sleep(0.1)
    async with opened(open_redis) as store:
        await store.take(["tiny"], 0.001)
        names = {each["name"] for each in redis_server.client.xinfo_consumers(STREAM + "tiny", "workers")}
        assert idle._worker not in names
        assert busy._worker in names
    await _vanish(idle)
    await _vanish(busy)


async def test_a_worker_that_leaves_with_a_job_leaves_it_to_be_taken_over(open_redis: Open) -> None:
    async with opened(open_redis) as first:
        kept = await first.add(job(), None)
        await taken(first)
    async with opened(open_redis, idle_s=0.01) as second:
        await asyncio.sleep(0.02)
        assert (await taken(second)).id == kept.id


def test_an_address_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="--jobs"):
        open_store(load_settings({"jobs": "redis://127.0.0.1:port/0"}))
