"""Jobs of one process in a SQLite file. What had begun when the process died is queued again by the next one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from predictor.errors import QueueFull
from predictor.jobs.job import MAX_STARTS, WORKERS_DIED, Job
from predictor.jobs.sqlite_file import open_database
from predictor.jobs.store import KeyReused, Progress, StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_COLUMNS = "id, model, form, body, digest, webhook, status, tokens, of, result, error, starts, delivery"
_NAMES = _COLUMNS.split(", ")


class SQLiteStore:
    """A `JobStore` in one file, used from one event loop. The file is made by the first job."""

    def __init__(self, path: Path, *, limit: int, expiry_s: float) -> None:
        self._path, self._limit, self._expiry_s = path, limit, expiry_s
        # SQLite waits for the disk: not on the event loop, and one call after the other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._database: sqlite3.Connection | None = None
        self._added = asyncio.Event()
        self._taken: set[str] = set()

    async def add(self, job: Job, key: str | None) -> Job:
        kept = await self._call(lambda database: self._add(database, job, key), create=True)
        assert kept is not None
        self._added.set()
        return kept

    async def get(self, job_id: str) -> Job | None:
        return await self._call(lambda database: _find(database, "id", job_id))

    async def delete(self, job_id: str) -> Job | None:
        return await self._call(lambda database: self._delete(database, job_id))

    async def take(self, models: Sequence[str], wait_s: float) -> Job | None:
        self._added.clear()
        job = await self._call(lambda database: self._take(database, models))
        if job is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._added.wait(), wait_s)
        return job

    async def renew(self, progress: Mapping[str, Progress]) -> set[str]:
        return await self._call(lambda database: _renew(database, progress)) or set()

    async def finish(self, job: Job) -> bool:
        ended = await self._call(lambda database: self._finish(database, job))
        if not job.awaits_delivery:
            self._taken.discard(job.id)
        return bool(ended)

    async def settle(self, job: Job) -> None:
        await self._call(
            lambda database: database.execute("UPDATE jobs SET delivery = ? WHERE id = ?", (job.delivery, job.id))
        )
        self._taken.discard(job.id)

    async def give_back(self, job: Job, *, counted: bool) -> None:
        change = (
            "UPDATE jobs SET status = 'queued', tokens = 0, starts = starts - ? WHERE id = ? AND status = 'running'"
        )
        await self._call(lambda database: database.execute(change, (not counted, job.id)))
        self._taken.discard(job.id)
        self._added.set()

    async def queued(self) -> int:
        def forget_and_count(database: sqlite3.Connection) -> int:
            _forget_expired(database)
            return _queued(database)

        return await self._call(forget_and_count) or 0

    async def close(self) -> None:
        """A closed store may be used again."""
        if self._database is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
            self._database = None

    async def _call(self, work: Callable[[sqlite3.Connection], T], *, create: bool = False) -> T | None:
        """`work` as one transaction in the store's thread; None where there is no file and none is to be made."""

        def transaction() -> T | None:
            if self._database is None:
                if not create and not self._path.exists():
                    return None
                self._database = open_database(self._path)
            # `with` commits, or rolls back what an error left half done.
            with self._database as database:
                database.execute("BEGIN IMMEDIATE")
                return work(database)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                raise StoreUnavailable("another process has the job store's file open; try again") from error
            logger.error("the job store's file: %s", error)
            raise StoreUnavailable from error

    def _add(self, database: sqlite3.Connection, job: Job, key: str | None) -> Job:
        _forget_expired(database)
        earlier = None if key is None else _find(database, "key", key)
        if earlier is not None:
            if earlier.digest != job.digest:
                raise KeyReused("Idempotency-Key: it stands for another body already; take a new one")
            return earlier
        if _queued(database) >= self._limit:
            raise QueueFull(f"{self._limit} jobs are waiting, the limit of this server; try again later")
        values = (*(getattr(job, name) for name in _NAMES), key)
        database.execute(f"INSERT INTO jobs ({_COLUMNS}, key) VALUES ({', '.join('?' * len(values))})", values)
        return job

    def _delete(self, database: sqlite3.Connection, job_id: str) -> Job | None:
        job = _find(database, "id", job_id)
        if job is None:
            return None
        if job.ended:
            database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            return job
        cancelled = replace(job, status="cancelled")
        self._finish(database, cancelled)
        return cancelled

    def _take(self, database: sqlite3.Connection, models: Sequence[str]) -> Job | None:
        _forget_expired(database)
        job = self._undelivered(database)
        while job is None:
            job = self._waiting(database, models)
            if job is None:
                return None
            if job.starts < MAX_STARTS:
                job = replace(job, status="running", starts=job.starts + 1)
                database.execute(
                    "UPDATE jobs SET status = ?, starts = ? WHERE id = ?", (job.status, job.starts, job.id)
                )
            else:
                job = replace(job, status="failed", error=WORKERS_DIED)
                self._finish(database, job)
                if not job.awaits_delivery:
                    job = None
        self._taken.add(job.id)
        return job

    def _waiting(self, database: sqlite3.Connection, models: Sequence[str]) -> Job | None:
        places = ", ".join("?" * len(models))
        return _job(
            database.execute(
                f"SELECT {_COLUMNS} FROM jobs WHERE status = 'queued' AND model IN ({places}) ORDER BY number LIMIT 1",
                models,
            ).fetchone()
        )

    def _undelivered(self, database: sqlite3.Connection) -> Job | None:
        """A job whose webhook an earlier process was still to call."""
        rows = database.execute(
            f"SELECT {_COLUMNS} FROM jobs "
            "WHERE status IN ('succeeded', 'failed') AND webhook IS NOT NULL AND delivery IS NULL ORDER BY number"
        )
        return next((_job(row) for row in rows if row[0] not in self._taken), None)

    def _finish(self, database: sqlite3.Connection, job: Job) -> bool:
        changed = database.execute(
            "UPDATE jobs SET status = ?, result = ?, error = ?, tokens = ?, of = ?, expires = ? "
            "WHERE id = ? AND status IN ('queued', 'running')",
            (job.status, job.result, job.error, job.tokens, job.of, time.time() + self._expiry_s, job.id),
        )
        return changed.rowcount == 1


def _job(row: Sequence[object] | None) -> Job | None:
    return None if row is None else Job(**dict(zip(_NAMES, row, strict=True)))  # type: ignore[arg-type]


def _find(database: sqlite3.Connection, column: str, value: str) -> Job | None:
    return _job(
        database.execute(
            f"SELECT {_COLUMNS} FROM jobs WHERE {column} = ? AND (expires IS NULL OR expires > ?)", (value, time.time())
        ).fetchone()
    )


def _renew(database: sqlite3.Connection, progress: Mapping[str, Progress]) -> set[str]:
    lost = set()
    for job_id, each in progress.items():
        database.execute(
            "UPDATE jobs SET tokens = ?, of = ? WHERE id = ? AND status = 'running' AND tokens <> ?",
            (each.tokens, each.of, job_id, each.tokens),
        )
        job = _find(database, "id", job_id)
        if job is None or not (job.status == "running" or job.awaits_delivery):
            lost.add(job_id)
    return lost


def _queued(database: sqlite3.Connection) -> int:
    (count,) = database.execute("SELECT COUNT(*) FROM jobs WHERE status = 'queued'").fetchone()
    return int(count)


def _forget_expired(database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM jobs WHERE expires < ?", (time.time(),))
