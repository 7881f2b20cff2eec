"""Readiness and liveness: KServe's own answers are always true, ours are honest."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from predictor.errors import NotReady
from predictor.server.ask import Asker
from predictor.server.openapi import documented
from predictor.server.predictor import Predictor


async def check_ready(model: Predictor) -> None:
    """Raise `NotReady` with the reason unless the model answers."""
    if not await model.healthy():
        model.language_model()  # raises the reason, unless the backend itself has failed
        raise NotReady(f"the model {model.name} has failed and waits for a restart")


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()

    @router.get("/health", **documented("Readiness, where clients of OpenAI's servers ask for it", tag="Health"))
    @router.get("/v2/health/ready", **documented("Whether every model is ready", tag="Health"))
    async def all_ready() -> dict[str, Any]:
        """200, or 503 while a model loads or the server stops."""
        for name in ask.models.get_models():
            if (model := ask.find(name)).awaited:
                await check_ready(model)
        return {"ready": True}

    @router.get("/v2/health/live", **documented("Whether the server lives", tag="Health"))
    async def live() -> dict[str, Any]:
        """503 only when a restart is what helps: a model that is loading is alive."""
        for model in ask.models.get_models().values():
            if isinstance(model, Predictor) and not model.alive:
                raise NotReady(f"the engine of {model.name} has failed; restart the server")
        return {"live": True}

    # Where an older system shares the path, the document has its route, which tells of this one.
    alone = "cloud-run" not in ask.settings.compat

    @router.get("/", include_in_schema=alone, **documented("KServe's liveness", tag="Health"))
    async def root() -> dict[str, Any]:
        """As `/v2/health/live`."""
        await live()
        return {"status": "alive"}

    return router
