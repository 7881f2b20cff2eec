"""OpenAI's routes, under its own prefix and under the one that KServe gives it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from predictor.errors import NotFound
from predictor.protocols.openai import CHAT, COMPLETIONS
from predictor.server.ask import Asker
from predictor.server.errors import answer
from predictor.server.openapi import documented
from predictor.server.tensorflow import model_answer, model_list

_TAG = "OpenAI"


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()
    name = ask.default_model
    completions = documented(
        "Complete prompts",
        tag=_TAG,
        examples={
            "text": {"model": name, "prompt": "To be, or not", "max_tokens": 16, "seed": 7},
            "token ids": {"model": name, "prompt": [[40, 41], [42]], "max_tokens": 4, "n": 2, "best_of": 3},
            "stream": {
                "model": name,
                "prompt": ["To be, or not"],
                "max_tokens": 16,
                "logprobs": 2,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        },
    )
    answered, refused = (200, "the answer"), (400, "a model without a chat template")
    chat = documented(
        "Answer a chat",
        tag=_TAG,
        examples={
            "messages": {"model": name, "messages": [{"role": "user", "content": "To be?"}], "max_completion_tokens": 8}
        },
        # First what the example gets, as far as the settings tell: the tokenizer may bring a template too.
        answers=dict([refused, answered] if ask.settings.chat_template is None else [answered, refused]),
    )

    @router.post("/v1/completions", **completions)
    @router.post("/openai/v1/completions", **completions)
    async def complete(request: Request) -> Response:
        """OpenAI's completions, whole or as server-sent events; further fields are our parameters by our names."""
        return await ask(request, COMPLETIONS)

    @router.post("/v1/chat/completions", **chat)
    @router.post("/openai/v1/chat/completions", **chat)
    async def converse(request: Request) -> Response:
        """OpenAI's chat, whole or as server-sent events, of models that have a chat template."""
        return await ask(request, CHAT)

    @router.get("/openai/v1/models", **documented("All models", tag=_TAG))
    async def models() -> dict[str, Any]:
        """The same object as at `/v1/models`."""
        return model_list(ask)

    @router.get("/openai/v1/models/{name}", **documented("A model", tag=_TAG))
    async def model(name: str) -> Response:
        """The same object as at `/v1/models/{name}`; an unknown name is answered as OpenAI does."""
        try:
            return await model_answer(ask, name)
        except NotFound as error:
            return answer(error, COMPLETIONS.error)

    return router
