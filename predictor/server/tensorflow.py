"""TensorFlow Serving's V1 routes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from predictor.errors import Unimplemented
from predictor.protocols import v1
from predictor.server.ask import Asker
from predictor.server.health import check_ready
from predictor.server.openapi import documented


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models/{name}", **documented("A model's state", tag="TensorFlow V1"))
    async def status(name: str) -> dict[str, Any]:
        """Whether the model is ready: 200, or 503 while it loads or the server stops."""
        if name.endswith((":predict", ":explain")):  # the path of a POST, which this pattern would take for a name
            raise HTTPException(405, headers={"Allow": "POST"})
        await check_ready(ask.find(name))
        return {"name": name, "ready": True}

    @router.post(
        "/v1/models/{name}:predict",
        **documented(
            "Complete prompts",
            tag="TensorFlow V1",
            examples={
                "rows": {"instances": ["To be, or not"], "parameters": {"max_new_tokens": 16, "seed": 7}},
                "stream": {"instances": ["To be, or not"], "parameters": {"max_new_tokens": 16, "stream": True}},
            },
        ),
    )
    async def predict(name: str, request: Request) -> Response:
        """TensorFlow V1's row form, and the older `{"text", "length"}` body."""
        return await ask(request, v1.FORMAT, name)

    @router.post("/v1/models/{name}:explain", include_in_schema=False)
    async def explain(name: str) -> None:
        ask.find(name)
        raise Unimplemented(f"{name} has no explainer")

    return router
