"""An asynchronous request as plain data, and the object that clients see."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Literal

import orjson

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]

# Starts of one job. The fourth is not made: a job that has ended three workers would end the next one too.
MAX_STARTS = 3

WORKERS_DIED = (
    f"given up: the job was started {MAX_STARTS} times, and each time its worker died or failed before the end"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One job as a store keeps it."""

    id: str
    model: str
    form: str  # name of the body's wire format
    body: str  # JSON, as that format parses it
    digest: str  # of all that the client sent: what an idempotency key stands for
    webhook: str | None = None
    status: Status = "queued"
    tokens: int = 0  # generated so far, over all prompts and samples
    of: int | None = None  # tokens at most; None until a worker has read the prompts
    result: str | None = None  # the synchronous answer's body, JSON
    error: str | None = None
    starts: int = 0  # how often a worker began with it
    delivery: str | None = None  # what became of the webhook's call; None: not called yet

    @property
    def ended(self) -> bool:
        return self.status in ("succeeded", "failed", "cancelled")

    @property
    def awaits_delivery(self) -> bool:
        """Ended, and its webhook is still to be called. Whoever cancels a job needs no call."""
        return self.status in ("succeeded", "failed") and self.webhook is not None and self.delivery is None

    @property
    def url(self) -> str:
        return f"/v1/jobs/{self.id}"


def new_id() -> str:
    """128 random bits: whoever knows a job's id may read it."""
    return "job-" + secrets.token_urlsafe(16)


def shown(job: Job) -> bytes:
    """The job as JSON for its client."""
    fields: dict[str, Any] = {
        "id": job.id,
        "status": job.status,
        "progress": {"tokens": job.tokens, "of": job.of},
        "result": None if job.result is None else orjson.Fragment(job.result),
        "error": job.error,
        "url": job.url,
    }
    if job.webhook is not None:
        fields["webhook"] = {"url": job.webhook, "outcome": job.delivery}
    return orjson.dumps(fields)
