"""KServe's V2 (Open Inference) routes, and the generate extension of Triton."""

from __future__ import annotations

from fastapi import APIRouter

from predictor.errors import Unimplemented
from predictor.server.ask import Asker


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.post("/v2/models/{name}/infer")
    @router.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(name: str) -> None:
        ask.find(name)
        raise Unimplemented(f"V2 inference is not served; send V1 to /v1/models/{name}:predict")

    return router
