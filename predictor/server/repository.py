"""Loading and unloading models at run time, through KServe's repository endpoints."""

from __future__ import annotations

from fastapi import APIRouter

from predictor.errors import Forbidden
from predictor.server.ask import Asker


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.post("/v2/repository/models/{name}/load")
    @router.post("/v2/repository/models/{name}/unload")
    async def repository(name: str) -> None:
        raise Forbidden("loading and unloading models over HTTP is switched off")

    return router
