"""What a job store does, and which one a setting names."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from predictor.errors import NotReady, PredictorError
from predictor.jobs.job import Job
from predictor.settings import Settings


class KeyReused(PredictorError):
    """The idempotency key stands for another body (draft-ietf-httpapi-idempotency-key-header, section 2.7)."""

    status = 422
    code = "idempotency_key_reused"


class StoreUnavailable(NotReady):
    """The store does not answer; what was sent is not kept."""

    def __init__(self, message: str = "the job store does not answer; try again") -> None:
        super().__init__(message)


@dataclass(slots=True)
class Progress:
    """How far a running job is, in tokens; its worker counts it up."""

    tokens: int = 0
    of: int | None = None


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

    async def take(self, models: Sequence[str], wait_s: float) -> Job | None:
        """The longest waiting job of these models, now running here; or one that has ended and `awaits_delivery`.

        Waits up to `wait_s` for one. Must not be cancelled: what it was about to return would wait for its takeover.
        """

    async def renew(self, progress: Mapping[str, Progress]) -> set[str]:
        """Say that these jobs are still being worked on here. Returns the ids of those that are no longer ours."""

    async def finish(self, job: Job) -> bool:
        """Keep how a job ended, unless it has ended already: then False. One that `awaits_delivery` stays taken."""

    async def settle(self, job: Job) -> None:
        """Keep the delivery of an ended job's webhook."""

    async def give_back(self, job: Job, *, counted: bool) -> None:
        """Let others run a job that was taken here; `counted` leaves this start in its count."""

    async def queued(self) -> int:
        """Jobs that wait. Also removes what has expired."""

    async def close(self) -> None: ...


def open_store(settings: Settings) -> JobStore:
    """The store that `settings.jobs` names; nothing is opened or connected before its first use."""
    url = settings.jobs
    if url is not None and url.startswith(("redis://", "rediss://")):
        from predictor.jobs.redis import RedisStore

        worker = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        return RedisStore(url, worker, limit=settings.job_limit, expiry_s=settings.job_expiry_s)
    from predictor.jobs.sqlite import SQLiteStore

    path = default_path(settings.port) if url is None else Path(url.removeprefix("sqlite:///"))
    return SQLiteStore(path, limit=settings.job_limit, expiry_s=settings.job_expiry_s)


def default_path(port: int) -> Path:
    """A file of this user and port: servers of one machine keep apart, and a restarted one finds its jobs."""
    return Path(tempfile.gettempdir()) / f"gpt2-predictor-{os.getuid()}" / f"jobs-{port}.sqlite3"
