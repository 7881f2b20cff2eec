"""Jobs of many servers and workers in one Redis (7 or later): a hash per job, a stream per model.

A worker that has read an entry owns it while it renews its claim. One whose claim has not been renewed for `idle_s` is
taken over by the next worker that looks. So a job may be run twice; the first end is kept (scripts.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import uuid4

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from predictor.errors import ConfigurationError, QueueFull
from predictor.jobs import scripts
from predictor.jobs.job import MAX_STARTS, WORKERS_DIED, Job
from predictor.jobs.store import FULL, KEPT_BYTES, KEPT_JOBS, KeyReused, Progress, StoreUnavailable

logger = logging.getLogger(__name__)

STREAM = "predictor:jobs:"  # and the model's name
_JOB = "predictor:job:"  # and the job's id
_KEY = "predictor:job-key:"  # and the idempotency key's hash
_WAITING = "predictor:jobs-waiting"
_ENDED, _SIZES = "predictor:jobs-ended", "predictor:jobs-ended-bytes"

# Workers renew every second; so many seconds without it mean that one is dead or cut off. Below a minute with the time
# until another one looks, which is while it has a free slot: with all of them in use it could not run the job. And well
# above what a loaded machine or a restarting Redis makes a live one miss.
_IDLE_S = 30.0

# A worker that has not read for this long and owns nothing is forgotten: each process has a name of its own.
_FORGET_MS = 3_600_000

# An answer takes a millisecond, and `take` waits for a second at most.
_TIMEOUT_S = 5.0


class RedisStore:
    """A `JobStore` for any number of processes, used from one event loop."""

    def __init__(self, url: str, worker: str, *, limit: int, expiry_s: int, idle_s: float = _IDLE_S) -> None:
        """`worker` is this process's name, unlike every other's."""
        try:
            self._redis = redis.asyncio.from_url(
                url,
                decode_responses=True,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                # A connection that Redis closed meanwhile is made anew. Every call may be sent twice: scripts.py.
                retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
            )
        except ValueError as error:
            raise ConfigurationError(f"--jobs: {error}") from error
        self._worker, self._limit, self._idle_s = worker, limit, idle_s
        self._keep = (expiry_s, KEPT_JOBS, KEPT_BYTES)
        self._streams: set[str] = set()  # whose group is known to stand
        self._next_look = 0.0
        register = self._redis.register_script
        self._add, self._begin, self._renew = (register(each) for each in (scripts.ADD, scripts.BEGIN, scripts.RENEW))
        self._finish, self._settle = register(scripts.FINISH), register(scripts.SETTLE)
        self._give_back, self._delete = register(scripts.GIVE_BACK), register(scripts.DELETE)
        self._leave = register(scripts.LEAVE)

    async def add(self, job: Job, key: str | None) -> Job:
        keys = [*_keys(job), *([] if key is None else [_KEY + key])]
        async with _available():
            kept_id = await self._add(keys, [job.id, self._limit, *_flat(job)])
        if kept_id is None:
            raise QueueFull(f"{self._limit} jobs are waiting, the limit of this server; try again later")
        if kept_id == job.id:
            return job
        earlier = await self.get(kept_id)
        if earlier is None:  # it expired just now
            return await self.add(job, key)
        if earlier.digest != job.digest:
            raise KeyReused("Idempotency-Key: it stands for another body already; take a new one")
        return earlier

    async def get(self, job_id: str) -> Job | None:
        async with _available():
            fields: Any = await self._redis.hgetall(_JOB + job_id)
        return _job(fields) if fields else None

    async def delete(self, job_id: str) -> Job | None:
        job = await self.get(job_id)
        if job is None:
            return None
        async with _available():
            await self._delete(_keys(job), [job_id, int(job.ended), *self._keep])
        return job if job.ended else await self.get(job_id)

    async def take(self, models: Sequence[str], wait_s: float, held: Collection[str] = ()) -> Job | None:
        async with _available():
            streams = [STREAM + model for model in models]
            await self._join(streams)
            try:
                found = await self._from_the_dead(streams, held) or await self._new(streams, wait_s)
            except ResponseError as error:
                if "NOGROUP" in str(error):  # Redis has lost its data, or the streams were removed
                    self._streams.clear()
                raise
            if found is None:
                return None
            stream, entry, job_id = found
            keys = [_JOB + job_id, stream, _WAITING, _ENDED, _SIZES]
            rules = (MAX_STARTS, WORKERS_DIED, *self._keep)
            if not await self._begin(keys, [job_id, entry, self._worker, uuid4().hex, *rules]):
                return None
        return await self.get(job_id)

    async def renew(self, held: Sequence[Progress]) -> set[str]:
        if not held:
            return set()
        async with _available(), self._redis.pipeline(transaction=False) as pipeline:
            for each in held:
                await self._renew(_keys(each.job), [self._worker, each.tokens, _text(each.of)], client=pipeline)
            return {each.job.id for each, ours in zip(held, await pipeline.execute(), strict=True) if not ours}

    async def finish(self, job: Job) -> bool:
        fields = {key: _text(getattr(job, key)) for key in ("status", "result", "error", "tokens", "of")}
        flat = [part for item in fields.items() for part in item]
        async with _available():
            return bool(await self._finish(_keys(job), [job.id, self._worker, *self._keep, *flat]))

    async def settle(self, job: Job) -> None:
        async with _available():
            await self._settle(_keys(job), [_text(job.delivery)])

    async def give_back(self, job: Job, *, counted: bool) -> None:
        async with _available():
            await self._give_back(_keys(job), [job.id, self._worker, 0 if counted else -1])

    async def queued(self) -> int:
        async with _available():
            return int(await self._redis.scard(_WAITING))

    async def close(self) -> None:
        with contextlib.suppress(StoreUnavailable):
            async with _available():
                for stream in self._streams:
                    await self._leave([stream], [self._worker])
        await self._redis.aclose()

    async def _join(self, streams: Sequence[str]) -> None:
        """Make the group where nothing has made it yet; from the stream's start, whoever was first."""
        for stream in set(streams) - self._streams:
            try:
                await self._redis.xgroup_create(stream, scripts.GROUP, id="0", mkstream=True)
            except OutOfMemoryError:
                pass  # a full Redis refuses this before it looks; whatever is there to take brought the group with it
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            self._streams.add(stream)

    async def _new(self, streams: Sequence[str], wait_s: float) -> tuple[str, str, str] | None:
        """An entry that nobody has read: (stream, entry, job id)."""
        block_ms = max(1, round(wait_s * 1000))  # 0 would wait for ever
        reply: Any = await self._redis.xreadgroup(
            scripts.GROUP, self._worker, dict.fromkeys(streams, ">"), count=1, block=block_ms
        )
        for stream, entries in reply or ():
            for entry, fields in entries:
                return stream, entry, fields["id"]
        return None

    async def _from_the_dead(self, streams: Sequence[str], held: Collection[str]) -> tuple[str, str, str] | None:
        """An entry whose worker has not renewed its claim. Looked for a few times per `idle_s`, until none is left."""
        if time.monotonic() < self._next_look:
            return None
        for stream in streams:
            start = "0-0"
            while True:
                start, entries, *_ = await self._redis.xautoclaim(
                    stream, scripts.GROUP, self._worker, round(self._idle_s * 1000), start_id=start, count=1
                )
                for entry, fields in entries:
                    # Our own, where Redis was away for so long that we could not renew; or another's, where we have not
                    # heard yet that we lost it: then it is looked at again after another idle time.
                    if fields and fields["id"] not in held:
                        logger.warning("took over a job whose worker does not answer")
                        return stream, entry, fields["id"]
                if start == "0-0":
                    break
            await self._forget_the_dead(stream)
        self._next_look = time.monotonic() + self._idle_s / 6
        return None

    async def _forget_the_dead(self, stream: str) -> None:
        for consumer in await self._redis.xinfo_consumers(stream, scripts.GROUP):
            if consumer["pending"] == 0 and consumer["idle"] > _FORGET_MS:
                await self._leave([stream], [consumer["name"]])


@contextlib.asynccontextmanager
async def _available() -> AsyncIterator[None]:
    """What Redis cannot do now is `StoreUnavailable`: it is away, it loads its log, its memory is full."""
    try:
        yield
    except OutOfMemoryError as error:
        raise StoreUnavailable(FULL) from error
    except (RedisError, OSError, asyncio.TimeoutError) as error:
        logger.debug("Redis: %s", error)
        raise StoreUnavailable from error


def _keys(job: Job) -> list[str]:
    """What the scripts take."""
    return [_JOB + job.id, STREAM + job.model, _WAITING, _ENDED, _SIZES]


def _text(value: object) -> str:
    """A field's value in a hash, which has no None: none of ours is an empty text."""
    return "" if value is None else str(value)


def _flat(job: Job) -> list[str]:
    return [part for name, value in asdict(job).items() for part in (name, _text(value))]


def _job(fields: Mapping[str, str]) -> Job:
    """A hash's fields; besides the job's there are `key`, `entry`, `worker` and `call`."""
    values: dict[str, Any] = {name: fields.get(name) or None for name in Job.__dataclass_fields__}
    for name in ("tokens", "starts", "of"):
        values[name] = None if values[name] is None else int(values[name])
    return Job(**values)
