"""The SQLite file of jobs: who may read it, how it is kept, what stands in it."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from pathlib import Path

from predictor.jobs.store import FULL, StoreUnavailable

_SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE; -- one process per file: what is running there and not here died with its process
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL; -- 202 is answered when the disk has the job
PRAGMA secure_delete = ON; -- prompts leave the file with their jobs
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT UNIQUE, model TEXT NOT NULL,
    form TEXT NOT NULL, body TEXT NOT NULL, digest TEXT NOT NULL, webhook TEXT, status TEXT NOT NULL,
    tokens INTEGER NOT NULL, of INTEGER, result TEXT, error TEXT, starts INTEGER NOT NULL, delivery TEXT, expires REAL,
    bytes INTEGER AS (LENGTH(CAST(body AS BLOB)) + IFNULL(LENGTH(CAST(result AS BLOB)), 0)) STORED
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS jobs_by_expiry ON jobs (expires, number, bytes) WHERE expires IS NOT NULL;
UPDATE jobs SET status = 'queued', tokens = 0 WHERE status = 'running';
COMMIT;
"""


def open_database(path: Path) -> sqlite3.Connection:
    """The database, readable for its owner alone, in a folder that others cannot have prepared.

    Raises `sqlite3.Error`, `OSError`, or `StoreUnavailable` for such a folder.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = path.parent.lstat()
    # In a folder of someone else's, or one that others write to, the file could be swapped.
    if folder.st_uid != os.getuid() or not stat.S_ISDIR(folder.st_mode) or folder.st_mode & 0o022:
        raise StoreUnavailable("the job store's folder belongs to someone else, or others may write to it")
    # SQLite gives its write-ahead log the mode of the file.
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(file, 0o600)
    finally:
        os.close(file)
    # Autocommit: transactions begin where the store says so.
    database = sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False)
    try:
        database.executescript(_SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database


def fault_of(path: Path) -> str | None:
    """Why no database can be kept there, found out by opening it. None where one can, or where another process has it:
    that one may be about to end."""
    try:
        open_database(path).close()
    except (sqlite3.Error, OSError, StoreUnavailable) as error:
        return None if _is_locked(error) else str(unavailable(error))
    return None


def unavailable(error: Exception) -> StoreUnavailable:
    """The error that callers see; it names no path."""
    if isinstance(error, StoreUnavailable):
        return error
    if _is_locked(error):
        return StoreUnavailable("another process has the job store's file open; try again")
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the job store's file or its folder cannot be made or opened ({error.strerror})"
    else:
        full = "is full" in str(error)  # "database or disk is full"
        reason = f"the job store's file cannot be used ({error})"
    return StoreUnavailable(FULL if full else reason)


def _is_locked(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
