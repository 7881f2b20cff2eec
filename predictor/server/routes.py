"""The routes we own; they stand before KServe's, which serve the rest (/, /metrics, /v1/models, /v2/...)."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from kserve import ModelRepository
from starlette.exceptions import HTTPException

from predictor.errors import Forbidden, NotFound, NotReady, Unimplemented
from predictor.observability import REQUEST_SECONDS, REQUESTS
from predictor.protocols import strict_json
from predictor.server.body import check_media_type, read_body, until_disconnect
from predictor.server.errors import answer
from predictor.server.predictor import Predictor
from predictor.settings import Settings
from predictor.text.deadline import Deadline

logger = logging.getLogger(__name__)


def make_router(models: ModelRepository, settings: Settings) -> APIRouter:
    """Our routes over KServe's registry of models."""
    router = APIRouter(include_in_schema=False)  # /openapi.json: KServe's own until ours has examples

    def find(name: str) -> Predictor:
        model = models.get_model(name)
        if not isinstance(model, Predictor):
            raise NotFound(f"Servable not found for request: Latest({name}); this server has {_names(models)}")
        return model

    @router.get("/v1/models/{name}")
    async def status(name: str) -> dict[str, Any]:
        """Whether the model is ready: 200, or 503 while it loads or the server stops."""
        if name.endswith((":predict", ":explain")):  # the path of a POST, which this pattern would take for a name
            raise HTTPException(405, headers={"Allow": "POST"})
        model = find(name)
        if not await model.healthy():
            model.language_model()  # raises the reason, unless the backend itself has failed
            raise NotReady(f"the model {name} has failed and waits for a restart")
        return {"name": name, "ready": True}

    @router.post("/v1/models/{name}:predict")
    async def predict(name: str, request: Request) -> Response:
        """TensorFlow V1's row form, and the older `{"text", "length"}` body."""
        model = find(name)
        began = time.perf_counter()
        try:
            response: Response = await _predict(model, request, settings)
        except Exception as error:  # answered here, so that it is counted and logged like any other answer
            response = answer(error)
        seconds = time.perf_counter() - began
        REQUESTS.labels(*model.labels, response.status_code).inc()
        REQUEST_SECONDS.labels(*model.labels).observe(seconds)
        fields = {"model": name, "code": response.status_code, "seconds": round(seconds, 3)}
        logger.info("predict", extra={"fields": fields | {"request_id": request.state.request_id}})
        return response

    @router.post("/v1/models/{name}:explain")
    async def explain(name: str) -> None:
        find(name)
        raise Unimplemented(f"{name} has no explainer")

    @router.post("/v2/models/{name}/infer")
    @router.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(name: str) -> None:
        find(name)
        raise Unimplemented(f"V2 inference is not served; send V1 to /v1/models/{name}:predict")

    @router.get("/v2/models/{name}/ready")
    @router.get("/v2/models/{name}/versions/{version}/ready")
    async def ready(name: str) -> dict[str, Any]:
        return await status(name)

    @router.get("/v2/health/ready")
    async def all_ready() -> dict[str, Any]:
        """KServe's own answer is always true; ours is true when every model is ready."""
        for name in models.get_models():
            await status(name)
        return {"ready": True}

    @router.get("/v2/health/live")
    async def live() -> dict[str, Any]:
        """An error only when a restart is what helps: a model that is loading is alive."""
        for model in models.get_models().values():
            if isinstance(model, Predictor) and not model.alive:
                raise NotReady(f"the engine of {model.name} has failed; restart the server")
        return {"live": True}

    @router.get("/")
    async def root() -> dict[str, Any]:
        """KServe's own liveness answer, made honest."""
        await live()
        return {"status": "alive"}

    @router.post("/v2/repository/models/{name}/load")
    @router.post("/v2/repository/models/{name}/unload")
    async def repository(name: str) -> None:
        raise Forbidden("loading and unloading models over HTTP is switched off")

    return router


async def _predict(model: Predictor, request: Request, settings: Settings) -> Response:
    model.language_model()  # 503 before the body is read
    check_media_type(request)
    reading = read_body(request, settings.max_body_bytes)
    sent = await model.unless_stopping(Deadline(settings.timeout_s).hold(reading, "sending the body"))
    body = strict_json.loads(sent)
    result, _ = await until_disconnect(request, model(body, headers=dict(request.headers)))
    # orjson, because the standard library's encoder is ten times slower and nothing else runs meanwhile.
    return Response(await asyncio.to_thread(orjson.dumps, result), media_type="application/json")


def _names(models: ModelRepository) -> str:
    return ", ".join(sorted(models.get_models()))
