"""Jobs of one process in a SQLite file. What had begun when the process died is queued again by the next one."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from predictor.errors import QueueFull
from predictor.jobs import sqlite_rows as rows
from predictor.jobs.job import MAX_STARTS, WORKERS_DIED, Job
from predictor.jobs.sqlite_file import open_database, unavailable
from predictor.jobs.store import KeyReused, Progress

T = TypeVar("T")


class SQLiteStore:
    """A `JobStore` in one file, used from one event loop. The file is made by the first job."""

    def __init__(self, path: Path, *, limit: int, expiry_s: float) -> None:
        self._path, self._limit, self._expiry_s = path, limit, expiry_s
        # SQLite waits for the disk: not on the event loop, and one call after the other.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._database: sqlite3.Connection | None = None
        self._added = asyncio.Event()

    async def add(self, job: Job, key: str | None) -> Job:
        kept = await self._call(lambda database: self._add(database, job, key), create=True)
        assert kept is not None
        self._added.set()
        return kept

    async def get(self, job_id: str) -> Job | None:
        return await self._call(lambda database: rows.find(database, "id", job_id))

    async def delete(self, job_id: str) -> Job | None:
        return await self._call(lambda database: self._delete(database, job_id))

    async def take(self, models: Sequence[str], wait_s: float, held: Collection[str] = ()) -> Job | None:
        self._added.clear()
        known = frozenset(held)
        job = await self._call(lambda database: self._take(database, models, known))
        if job is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._added.wait(), wait_s)
        return job

    async def renew(self, held: Sequence[Progress]) -> set[str]:
        return await self._call(lambda database: rows.renew(database, held)) or set()

    async def finish(self, job: Job) -> bool:
        return bool(await self._call(lambda database: self._finish(database, job)))

    async def settle(self, job: Job) -> None:
        await self._call(
            lambda database: database.execute("UPDATE jobs SET delivery = ? WHERE id = ?", (job.delivery, job.id))
        )

    async def give_back(self, job: Job, *, counted: bool) -> None:
        change = (
            "UPDATE jobs SET status = 'queued', tokens = 0, starts = starts - ? WHERE id = ? AND status = 'running'"
        )
        await self._call(lambda database: database.execute(change, (not counted, job.id)))
        self._added.set()

    async def queued(self) -> int:
        def forget_and_count(database: sqlite3.Connection) -> int:
            rows.forget_expired(database)
            return rows.count_queued(database)

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
            raise unavailable(error) from error

    def _add(self, database: sqlite3.Connection, job: Job, key: str | None) -> Job:
        rows.forget_expired(database)
        earlier = None if key is None else rows.find(database, "key", key)
        if earlier is not None:
            if earlier.digest != job.digest:
                raise KeyReused("Idempotency-Key: it stands for another body already; take a new one")
            return earlier
        if rows.count_queued(database) >= self._limit:
            raise QueueFull(f"{self._limit} jobs are waiting, the limit of this server; try again later")
        values = (*(getattr(job, name) for name in rows.NAMES), key)
        database.execute(f"INSERT INTO jobs ({rows.COLUMNS}, key) VALUES ({', '.join('?' * len(values))})", values)
        return job

    def _delete(self, database: sqlite3.Connection, job_id: str) -> Job | None:
        job = rows.find(database, "id", job_id)
        if job is None:
            return None
        if job.ended:
            database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            return job
        cancelled = replace(job, status="cancelled")
        self._finish(database, cancelled)
        return cancelled

    def _take(self, database: sqlite3.Connection, models: Sequence[str], held: frozenset[str]) -> Job | None:
        rows.forget_expired(database)
        job = rows.undelivered(database, held)
        while job is None:
            job = rows.waiting(database, models)
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
        return job

    def _finish(self, database: sqlite3.Connection, job: Job) -> bool:
        changed = database.execute(
            "UPDATE jobs SET status = ?, result = ?, error = ?, tokens = ?, of = ?, expires = ? "
            "WHERE id = ? AND status IN ('queued', 'running')",
            (job.status, job.result, job.error, job.tokens, job.of, time.time() + self._expiry_s, job.id),
        )
        rows.forget_oldest(database)
        return changed.rowcount == 1
