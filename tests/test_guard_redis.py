"""Strikes and limits over replicas: two servers and one real Redis, which may fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from predictor.guard.counters import RateLimit, Store, Strikes
from tests.guarded import ALICE, BOB, bearer, begin_early_in_a_minute, body, written
from tests.processes import ServerProcess, serving
from tests.redis_server import RedisServer, running_redis


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[RedisServer]:
    # Not "always": counts need not outlive Redis, and the guard gives it half a second, which a slow disk may take.
    with running_redis(tmp_path, fsync="no") as server:
        yield server


def ask(server: ServerProcess, key: str, prompt: str = "the word") -> httpx.Response:
    return server.predict("tiny", body(prompt), headers=bearer(key))


def test_replicas_share_strikes_and_limits(shared: RedisServer, tmp_path: Path, checkpoint: Path) -> None:
    keys = written(tmp_path / "keys", f"alice:{ALICE}\nbob:{BOB}\n")
    banned = written(tmp_path / "banned", "forbidden\n")
    flags = ["--model", f"tiny={checkpoint}", "--jobs", shared.url, "--api-keys", keys, "--banned", banned]
    flags += ["--strikes", "2", "--rate-limit", "4"]
    with serving(tmp_path / "log 1", *flags) as first, serving(tmp_path / "log 2", *flags) as second:
        for server in (first, second):
            server.wait_until_ready("tiny")
        begin_early_in_a_minute()
        for server in (first, second):
            assert "banned_prompt" in ask(server, ALICE, "the forbidden").json()["error"]
        for server in (first, second):
            refused = ask(server, ALICE)
            assert refused.status_code == 403
            assert "too_many_strikes" in refused.json()["error"]
        assert [ask(server, BOB).status_code for server in (first, second, first, second)] == [200] * 4
        assert [ask(server, BOB).status_code for server in (first, second)] == [429] * 2

        # Nothing that tells a key or a prompt is in the store.
        stored = "".join(shared.client.keys())
        assert "bob" in stored
        assert BOB not in stored
        assert "forbidden" not in stored

        shared.kill()
        # Each replica now counts for itself: neither shuts everybody out, nor lets a banned prompt in.
        for server in (first, second):
            assert ask(server, BOB).status_code == 200
            assert ask(server, BOB, "the forbidden").status_code == 403
        for server in (first, second):
            server.terminate()
            assert server.wait() == 0
    for log in ("log 1", "log 2"):
        text = (tmp_path / log).read_text()
        assert "this process counts for itself" in text
        assert ALICE not in text


async def test_a_redis_that_comes_back_counts_again(
    shared: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("predictor.guard.counters._REDIS_PAUSE_S", 0.2)
    begin_early_in_a_minute()
    store = Store(shared.url)
    strikes, limit = Strikes(store, 1, 60), RateLimit(store, 1)
    await strikes.add("a")
    assert await limit.take("a") is None
    other = Store(shared.url)
    assert await Strikes(other, 1, 60).out("a"), "another replica knows"

    shared.kill()
    with caplog.at_level(logging.WARNING):
        assert not await strikes.out("a")
        assert await limit.take("a") is None
        assert await limit.take("a") is not None
    assert len(caplog.records) == 1, "within the pause it is not asked again"

    shared.start()
    await asyncio.sleep(0.25)
    await strikes.add("b")
    assert await Strikes(other, 1, 60).out("b")
    for each in (store, other):
        await each.close()
