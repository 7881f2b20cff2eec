"""Jobs as rows of a SQLite database: the statements, each within a transaction of its caller's."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

from predictor.jobs.job import Job
from predictor.jobs.store import KEPT_BYTES, KEPT_JOBS, Progress

COLUMNS = "id, model, form, body, digest, webhook, status, tokens, of, result, error, starts, delivery"
NAMES = COLUMNS.split(", ")


def job_of(row: Sequence[object] | None) -> Job | None:
    return None if row is None else Job(**dict(zip(NAMES, row, strict=True)))  # type: ignore[arg-type]


def find(database: sqlite3.Connection, column: str, value: str) -> Job | None:
    return job_of(
        database.execute(
            f"SELECT {COLUMNS} FROM jobs WHERE {column} = ? AND (expires IS NULL OR expires > ?)", (value, time.time())
        ).fetchone()
    )


def waiting(database: sqlite3.Connection, models: Sequence[str]) -> Job | None:
    places = ", ".join("?" * len(models))
    return job_of(
        database.execute(
            f"SELECT {COLUMNS} FROM jobs WHERE status = 'queued' AND model IN ({places}) ORDER BY number LIMIT 1",
            models,
        ).fetchone()
    )


def undelivered(database: sqlite3.Connection, held: frozenset[str]) -> Job | None:
    """A job whose webhook an earlier process was still to call."""
    rows = database.execute(
        f"SELECT {COLUMNS} FROM jobs "
        "WHERE status IN ('succeeded', 'failed') AND webhook IS NOT NULL AND delivery IS NULL ORDER BY number"
    )
    return next((job_of(row) for row in rows if row[0] not in held), None)


def renew(database: sqlite3.Connection, held: Sequence[Progress]) -> set[str]:
    lost = set()
    for each in held:
        database.execute(
            "UPDATE jobs SET tokens = ?, of = ? WHERE id = ? AND status = 'running' AND tokens <> ?",
            (each.tokens, each.of, each.job.id, each.tokens),
        )
        job = find(database, "id", each.job.id)
        if job is None or not (job.status == "running" or job.awaits_delivery):
            lost.add(each.job.id)
    return lost


def count_queued(database: sqlite3.Connection) -> int:
    (count,) = database.execute("SELECT COUNT(*) FROM jobs WHERE status = 'queued'").fetchone()
    return int(count)


def forget_expired(database: sqlite3.Connection) -> None:
    database.execute("DELETE FROM jobs WHERE expires < ?", (time.time(),))


def forget_oldest(database: sqlite3.Connection) -> None:
    """Of the ended jobs only the newest stay, but always the very newest."""
    database.execute(
        "DELETE FROM jobs WHERE number IN (SELECT number FROM ("
        "SELECT number, ROW_NUMBER() OVER newest AS place, SUM(bytes) OVER newest AS upto FROM jobs "
        "WHERE expires IS NOT NULL WINDOW newest AS (ORDER BY expires DESC, number DESC)"
        ") WHERE place > ? OR upto > ? AND place > 1)",
        (KEPT_JOBS, KEPT_BYTES),
    )
