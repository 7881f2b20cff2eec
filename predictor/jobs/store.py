"""What a job store does, and which one a setting names."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from predictor.errors import ConfigurationError, NotReady, PredictorError
from predictor.jobs.job import Job
from predictor.settings import Settings

# Of the jobs that have ended a store keeps the newest, within both of these, until they expire. As many as may wait by
# default; and a quarter of the 1 GiB that the manifests give to /tmp and to Redis: the rest is for what waits and runs.
KEPT_JOBS = 10_000
KEPT_BYTES = 2**28  # of bodies and results


class KeyReused(PredictorError):
    """The idempotency key stands for another body (draft-ietf-httpapi-idempotency-key-header, section 2.7)."""

    status = 422
    code = "idempotency_key_reused"


class StoreUnavailable(NotReady):
    """The store does not answer; what was sent is not kept."""

    def __init__(self, message: str = "the job store does not answer; try again") -> None:
        super().__init__(message)


FULL = "the job store is full; try again when jobs have ended and expired, or remove some that have ended"


@dataclass(slots=True)
class Progress:
    """How far a job of this process is, in tokens; its worker counts it up."""

    job: Job  # as it was taken, or as it ended
    tokens: int = 0
    of: int | None = None
    ending: bool = False  # how it ended is on its way to the store: that counts whoever brings it, without a claim


class JobStore(Protocol):
    """Jobs that outlive a process. Every method raises `StoreUnavailable` where the store does not answer."""

    async def add(self, job: Job, key: str | None) -> Job:
        """Keep a job before this returns; or return the one that `key` stands for already, as long as that is kept.

        Raises `QueueFull` past the limit of waiting jobs, `KeyReused` where that one had another digest.
        """

    async def get(self, job_id: str) -> Job | None:
        """The job; None for unknown and expired ones."""

    async def delete(self, job_id: str) -> Job | None:
        """Cancel a job that has not ended, remove one that has; the job as it is now, or was."""

    async def take(self, models: Sequence[str], wait_s: float, held: Collection[str] = ()) -> Job | None:
        """The longest waiting job of these models, now running here; or one that has ended and `awaits_delivery`.

        Waits up to `wait_s` for one. `held` are the ids of jobs that this process is at work on: what others have left
        behind is none of these. Must not be cancelled: what it was about to return would wait for its takeover.
        """

    async def renew(self, held: Sequence[Progress]) -> set[str]:
        """Say that these jobs are still being worked on here. Returns the ids of those that are no longer ours."""

    async def finish(self, job: Job) -> bool:
        """Keep how a job ended, unless another end is kept already: then False."""

    async def settle(self, job: Job) -> None:
        """Keep the delivery of an ended job's webhook."""

    async def give_back(self, job: Job, *, counted: bool) -> None:
        """Let others run a job that was taken here; `counted` leaves this start in its count."""

    async def queued(self) -> int:
        """Jobs that wait. Also removes what has expired."""

    async def close(self) -> None: ...


def open_store(settings: Settings) -> JobStore:
    """The store that `settings.jobs` names, or the default one; raises `ConfigurationError` for one that cannot work.

    Redis may come later. A named file is made here; the default one by its first job, so that a server on a read-only
    disk starts, and answers jobs with 503.
    """
    limit, expiry_s = settings.job_limit, settings.job_expiry_s
    if settings.redis is not None:
        from predictor.jobs.redis import RedisStore

        worker = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        return RedisStore(settings.redis, worker, limit=limit, expiry_s=expiry_s)
    from predictor.jobs.sqlite import SQLiteStore
    from predictor.jobs.sqlite_file import fault_of

    if settings.jobs is None:
        return SQLiteStore(default_path(settings.port), limit=limit, expiry_s=expiry_s)
    path = Path(settings.jobs.removeprefix("sqlite:///"))
    fault = fault_of(path)
    if fault is not None:
        raise ConfigurationError(f"--jobs {settings.jobs}: {fault}")
    return SQLiteStore(path, limit=limit, expiry_s=expiry_s)


def default_path(port: int) -> Path:
    """A file of this user and port: servers of one machine keep apart, and a restarted one finds its jobs."""
    return Path(tempfile.gettempdir()) / f"gpt2-predictor-{os.getuid()}" / f"jobs-{port}.sqlite3"
