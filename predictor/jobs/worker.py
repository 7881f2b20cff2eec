"""Takes jobs, generates, keeps the results, calls webhooks. One per process, on its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from predictor.errors import DeadlineExceeded, NotReady, PredictorError, QueueFull
from predictor.jobs.job import Job
from predictor.jobs.store import JobStore, Progress, StoreUnavailable
from predictor.jobs.submission import FORMATS
from predictor.jobs.webhook import deliver, new_client
from predictor.observability import JOBS, JOBS_QUEUED, JOBS_RUNNING
from predictor.protocols.wire import Limits
from predictor.settings import knative_revision
from predictor.text.language_model import LanguageModel
from predictor.text.request import Completion

logger = logging.getLogger(__name__)

# How often claims are renewed, progress is written and cancellation is noticed.
_BEAT_S = 1.0

# How long a worker without work waits before it looks whether it is to stop, or has another model.
_WAIT_S = 1.0

# Between attempts where the store, the model or the engine's queue is not there: doubled up to the second.
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0

# The server that accepted a job has checked it by its own settings.
_ACCEPTED = Limits(max_instances=sys.maxsize, max_timeout_s=math.inf)


class Worker:
    """Runs up to `concurrency` jobs together; with 0 it only keeps the store tidy and its gauge right."""

    def __init__(
        self,
        store: JobStore,
        models: Callable[[], Mapping[str, LanguageModel]],
        count: Callable[[str, Sequence[Sequence[Completion]]], None],
        *,
        concurrency: int,
        timeout_s: float,
    ) -> None:
        """`models` are those that answer now; `count` is told of a model's completions, for its metrics.

        `timeout_s` is for jobs that bring no timeout of their own.
        """
        self._store, self._models, self._count = store, models, count
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._draining = asyncio.Event()
        self._progress: dict[str, Progress] = {}  # of the jobs whose claim is to be renewed
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        self._client = new_client()
        self._store_answers = True

    async def run(self) -> None:
        """Work until `drain`, and until what was taken by then has ended or is given back."""
        beat = asyncio.create_task(self._beat())
        try:
            while not self._draining.is_set():
                await self._take_one()
            # `_handle` ends by itself: at the latest when the model is stopped, which gives its jobs back.
            await asyncio.gather(*self._jobs.values())
        finally:
            # A webhook that has not been called is called by whoever takes the job next.
            for task in (beat, *self._deliveries):
                task.cancel()
            await asyncio.gather(beat, *self._deliveries, return_exceptions=True)
            await self._client.aclose()

    def drain(self) -> None:
        """Take no more jobs."""
        self._draining.set()

    async def _take_one(self) -> None:
        if not self._concurrency:
            await self._draining.wait()
            return
        await self._slots.acquire()
        job = None
        try:
            models = list(self._models())
            if models and not self._draining.is_set():
                job = await self._store.take(models, _WAIT_S)
            else:
                await self._pause(_PAUSE_S)
        except StoreUnavailable as error:
            self._note_store(error)
            await self._pause(_LONGEST_PAUSE_S / 5)
        except Exception:  # the loop must go on: without it jobs would wait for ever
            logger.exception("taking a job failed")
            await self._pause(_LONGEST_PAUSE_S)
        finally:
            if job is None:
                self._slots.release()
        if job is not None:
            task = asyncio.create_task(self._handle(job))
            self._jobs[job.id] = task
            task.add_done_callback(lambda _: self._jobs.pop(job.id, None))

    async def _handle(self, job: Job) -> None:
        """From taken to kept. Cancelled where the job is no longer ours."""
        self._progress[job.id] = Progress(of=job.of)
        labels = (job.model, knative_revision())
        ended: Job | None = job
        try:
            if not job.ended:
                with JOBS_RUNNING.labels(*labels).track_inprogress():
                    ended = await self._run(job)
                if ended is not None:
                    JOBS.labels(*labels, ended.status).inc()
                    fields = {"model": job.model, "status": ended.status, "tokens": ended.tokens}
                    logger.info("a job ended", extra={"fields": fields})
        except asyncio.CancelledError:
            ended = None
        except Exception:  # the job stays taken: its claim lapses, and another worker runs it
            logger.exception("a job was left")
            ended = None
        finally:
            self._slots.release()
            self._progress.pop(job.id, None)
        if ended is not None and ended.awaits_delivery:
            task = asyncio.create_task(self._deliver(ended))
            self._deliveries.add(task)
            task.add_done_callback(self._deliveries.discard)

    async def _run(self, job: Job) -> Job | None:
        """The job as it ended and was kept; None where it is another's to end."""
        try:
            ended = replace(job, status="succeeded", result=await self._answer(job))
        except NotReady:
            await self._patiently(self._store.give_back, job, counted=False)
            return None
        except PredictorError as error:
            if error.status >= 500 and not isinstance(error, DeadlineExceeded):
                await self._fault(job, error)
                return None
            ended = replace(job, status="failed", error=str(error))
        except Exception as error:  # a fault of ours
            await self._fault(job, error)
            return None
        done = self._progress.pop(job.id)  # the end counts whoever brings it: no claim is needed any more
        ended = replace(ended, tokens=done.tokens, of=done.of)
        return ended if await self._patiently(self._store.finish, ended) else None

    async def _fault(self, job: Job, error: Exception) -> None:
        """Another worker, or this one restarted, may do better; after a few starts the store gives the job up."""
        logger.error("a job failed and is queued again", exc_info=error)
        await self._pause(_BEAT_S)
        await self._patiently(self._store.give_back, job, counted=True)

    async def _answer(self, job: Job) -> str:
        """The body of the synchronous answer."""
        model = self._models().get(job.model)
        if model is None:
            raise NotReady(f"the model {job.model} is not loaded any more")
        exchange = FORMATS[job.form].parse(json.loads(job.body), _ACCEPTED)
        progress = self._progress[job.id]
        progress.of = await model.check(exchange.requests)

        def on_token() -> None:
            progress.tokens += 1

        pause_s = _PAUSE_S
        while True:
            try:
                completions = await model.generate(exchange.requests, self._timeout_s, on_token)
                break
            except QueueFull:  # synchronous requests have filled it; a job has time
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._count(job.model, completions)
        return await asyncio.to_thread(lambda: orjson.dumps(exchange.render(completions)).decode())

    async def _deliver(self, job: Job) -> None:
        self._progress[job.id] = Progress(job.tokens, job.of)
        try:
            outcome = await deliver(self._client, job)
            await self._patiently(self._store.settle, replace(job, delivery=outcome))
        finally:
            self._progress.pop(job.id, None)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            try:
                for job_id in await self._store.renew(dict(self._progress)):
                    if job_id in self._jobs:
                        self._jobs[job_id].cancel()
                JOBS_QUEUED.labels(knative_revision()).set(await self._store.queued())
                self._note_store(None)
            except StoreUnavailable as error:
                self._note_store(error)
            except Exception:  # as in _take_one
                logger.exception("renewing the claims of jobs failed")

    async def _patiently(self, change: Callable[..., Coroutine[Any, Any, Any]], job: Job, **options: Any) -> Any:
        """Bring a change to the store, however long it is away; at the end of this process only once."""
        pause_s = _PAUSE_S
        while True:
            try:
                return await change(job, **options)
            except StoreUnavailable as error:
                self._note_store(error)
                if self._draining.is_set():
                    logger.warning("the job store is away: a job of this process will be run again by another")
                    return None
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past `drain`."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._draining.wait(), seconds)

    def _note_store(self, error: StoreUnavailable | None) -> None:
        """One line when the store goes, and one when it is back."""
        if self._store_answers and error is not None:
            logger.warning("%s", error)
        elif not self._store_answers and error is None:
            logger.info("the job store answers again")
        self._store_answers = error is None
