"""Takes jobs, generates, keeps the results, calls webhooks. One per process, on its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from predictor.errors import DeadlineExceeded, NotReady, PredictorError
from predictor.jobs.answer import answer
from predictor.jobs.job import Job
from predictor.jobs.store import JobStore, Progress, StoreUnavailable
from predictor.jobs.webhook import deliver, new_client
from predictor.observability import JOBS, JOBS_QUEUED, JOBS_RUNNING
from predictor.settings import knative_revision
from predictor.text.language_model import LanguageModel
from predictor.text.request import Completion

logger = logging.getLogger(__name__)

# How often claims are renewed, progress is written and cancellation is noticed.
_BEAT_S = 1.0

# How long a worker without work waits before it looks whether it is to stop, or has another model.
_WAIT_S = 1.0

# Between attempts where the store or the model is not there: doubled up to the second.
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0


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
        # Each from its taking until this process is done with it. By task, not by id: one that was given back may be
        # taken again before its first task has ended.
        self._jobs: dict[asyncio.Task[None], Progress] = {}
        self._client = new_client()
        self._store_answers = True

    async def run(self) -> None:
        """Work until `drain`, and until what was taken by then has ended or is given back."""
        beat = asyncio.create_task(self._beat())
        try:
            while not self._draining.is_set():
                await self._take_one()
            while self._jobs:
                # What generates ends by itself: at the latest when the model is stopped, which gives its jobs back. A
                # webhook that has not been called within a beat is called by whoever takes the job next.
                await asyncio.wait(self._jobs, timeout=_BEAT_S)
                await _cancel(*(task for task, progress in self._jobs.items() if progress.job.ended))
        finally:
            await _cancel(beat)
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
                job = await self._store.take(models, _WAIT_S, {each.job.id for each in self._jobs.values()})
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
            progress = Progress(job, of=job.of)
            task = asyncio.create_task(self._handle(progress))
            self._jobs[task] = progress
            task.add_done_callback(self._jobs.pop)

    async def _handle(self, progress: Progress) -> None:
        """From taken to kept and told. Cancelled where the job is no longer ours."""
        try:
            try:
                if not progress.job.ended:
                    await self._run(progress)
            finally:
                self._slots.release()
            if progress.job.awaits_delivery and not self._draining.is_set():
                outcome = await deliver(self._client, progress.job)
                await self._patiently(self._store.settle, replace(progress.job, delivery=outcome))
        except Exception:
            # A fault of ours. In Redis its claim lapses, and whoever looks next takes it; in SQLite the next process.
            logger.exception("a job was left")

    async def _run(self, progress: Progress) -> None:
        """To the job's end, which then stands in `progress`, or until it is given back."""
        job = progress.job
        labels = (job.model, knative_revision())
        with JOBS_RUNNING.labels(*labels).track_inprogress():
            ended = await self._ended(progress)
            if ended is None:
                return
            progress.ending = True
            if not await self._patiently(self._store.finish, ended):
                return
        progress.job, progress.ending = ended, False
        JOBS.labels(*labels, ended.status).inc()
        fields = {"model": job.model, "status": ended.status, "tokens": ended.tokens}
        logger.info("a job ended", extra={"fields": fields})

    async def _ended(self, progress: Progress) -> Job | None:
        """The job as it ends; None where it was given back."""
        job = progress.job
        try:
            model = self._models().get(job.model)
            if model is None:
                raise NotReady(f"the model {job.model} is not loaded any more")
            ended = replace(job, status="succeeded", result=await answer(model, progress, self._timeout_s, self._count))
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
        return replace(ended, tokens=progress.tokens, of=progress.of)

    async def _fault(self, job: Job, error: Exception) -> None:
        """Another worker, or this one restarted, may do better; after a few starts the store gives the job up."""
        logger.error("a job failed and is queued again", exc_info=error)
        await self._pause(_BEAT_S)
        await self._patiently(self._store.give_back, job, counted=True)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            held = {task: progress for task, progress in self._jobs.items() if not progress.ending}
            try:
                lost = await self._store.renew(list(held.values()))
                for task, progress in held.items():
                    # One whose end is on its way by now may be lost to that.
                    if progress.job.id in lost and not progress.ending:
                        task.cancel()
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


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel and wait: again and again, since a cancel that comes as a call ends may be swallowed (by `wait_for` before
    Python 3.12, and by redis 8.1)."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_BEAT_S)
