"""Asynchronous requests: `POST /v1/jobs`, and what became of them. The app's lifespan runs this process's worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response

from predictor.errors import NotFound, PredictorError
from predictor.jobs.job import shown
from predictor.jobs.store import JobStore, open_store
from predictor.jobs.submission import form_of, key_of, submit
from predictor.jobs.worker import Worker
from predictor.protocols import v1
from predictor.protocols.wire import Limits, plain_error
from predictor.server.ask import Asker
from predictor.server.body import aside, until_disconnect
from predictor.server.errors import answer
from predictor.server.openapi import documented
from predictor.server.predictor import Predictor
from predictor.settings import Settings
from predictor.text.language_model import LanguageModel
from predictor.text.request import Completion

_TAG = "Jobs"


def make_router(ask: Asker) -> APIRouter:
    if ask.settings.jobs == "none":
        return APIRouter()
    store = open_store(ask.settings)

    @contextlib.asynccontextmanager
    async def working(app: FastAPI) -> AsyncIterator[None]:
        worker = new_worker(store, lambda: _predictors(ask), ask.settings)
        running = asyncio.create_task(worker.run())
        yield
        # HTTP has ended by now. What still runs is finished, or given back when the server stops its models.
        worker.drain()
        await running
        await store.close()

    router = APIRouter(lifespan=working)
    name = ask.default_model
    posted = documented(
        "Begin a job",
        tag=_TAG,
        examples={
            "instances": {"instances": ["To be"], "parameters": {"max_new_tokens": 8, "seed": 7}},
            "prompt": {"model": name, "prompt": "To be", "max_tokens": 8},
        },
        answers={202: "the job, and its path in `Location`"},
    )

    @router.post("/v1/jobs", **posted)
    async def post(request: Request) -> Response:
        """A body of V1 or of OpenAI's completions and chats, with `model` and `webhook` beside its fields.

        The header `Idempotency-Key` makes a repeated request the same job.
        """
        return await _post(ask, store, request)

    @router.get("/v1/jobs/{id}", **documented("A job", tag=_TAG, answers={200: "the job", 404: "unknown or expired"}))
    async def get(id: str) -> Response:
        """Its status, its progress in tokens, and its result: what a synchronous request would have been answered."""
        job = await store.get(id)
        if job is None:
            raise _unknown()
        return _json(await asyncio.to_thread(shown, job))

    @router.delete(
        "/v1/jobs/{id}",
        **documented("Cancel or remove a job", tag=_TAG, answers={200: "the job", 404: "unknown or expired"}),
    )
    async def delete(id: str) -> Response:
        """Cancels a job that has not ended; removes one that has."""
        job = await store.delete(id)
        if job is None:
            raise _unknown()
        return _json(await asyncio.to_thread(shown, job))

    return router


def new_worker(store: JobStore, predictors: Callable[[], Sequence[Predictor]], settings: Settings) -> Worker:
    """The worker of a process that holds these models."""

    def models() -> Mapping[str, LanguageModel]:
        return {each.name: model for each in predictors() if (model := _answering(each)) is not None}

    def count(name: str, rows: Sequence[Sequence[Completion]]) -> None:
        for each in predictors():
            if each.name == name:
                each.count(rows)

    return Worker(store, models, count, concurrency=settings.job_concurrency, timeout_s=settings.timeout_s)


def _predictors(ask: Asker) -> list[Predictor]:
    return [model for model in ask.models.get_models().values() if isinstance(model, Predictor)]


def _answering(predictor: Predictor) -> LanguageModel | None:
    """Its model, unless that is loading, stopping or broken."""
    try:
        return predictor.language_model() if predictor.alive else None
    except PredictorError:
        return None


def _model_of(predictor: Predictor) -> LanguageModel | None:
    """Its model. None while that loads: a job waits for it, and a fault that only the model can see fails the job.

    Raises `NotFound` for one that is unloaded: nobody says that it will come back.
    """
    loading = predictor.state == "LOADING" and not predictor.stopping
    return None if loading else predictor.language_model()


async def _post(ask: Asker, store: JobStore, request: Request) -> Response:
    settings = ask.settings
    error_body: Callable[[PredictorError], Any] = plain_error
    try:
        # A body that cannot be read is answered as V1 answers it; all of a job's formats are JSON.
        body, size_bytes = await ask.read(request, v1.FORMAT, ask.find(ask.default_model))
        error_body = form_of(body).error
        limits = Limits(settings.max_instances, settings.timeout_s)
        asked = await aside(size_bytes, submit, body, ask.default_model, limits, settings.webhook_host)
        predictor = ask.find(asked.job.model)
        model = _model_of(predictor)
        await ask.admit(request, asked.exchange, predictor)
        of = None if model is None else await until_disconnect(request, model.check(asked.exchange.requests))
        key = key_of(request.headers.get("idempotency-key"), getattr(request.state, "api_key", None) or "")
        job = await store.add(replace(asked.job, of=of), key)
    except Exception as error:
        return answer(error, error_body)
    return _json(shown(job), 202, {"Location": job.url})


def _unknown() -> NotFound:
    return NotFound("no such job: its id is wrong, or it has been removed, or it has expired")


def _json(content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status, dict(headers or {}), "application/json")
