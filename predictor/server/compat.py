"""The routes of older GPT-2 servers, as far as `--compat` names them: their clients need only another address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

from predictor.protocols import cloud_run, huggingface_gpt, nanogpt
from predictor.protocols.wire import WireFormat
from predictor.server.ask import Asker
from predictor.server.openapi import documented
from predictor.server.seldon import mount_seldon
from predictor.settings import Compat


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()
    for name in ask.settings.compat:
        _MOUNTS[name](router, ask)
    return router


class _Asks(APIRoute):
    """A route for queries that have one of the format's fields; others are for whoever else serves the path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is Match.FULL and not cloud_run.asks(scope["query_string"]):
            return Match.NONE, {}
        return match, child


def _mount_cloud_run(router: APIRouter, ask: Asker) -> None:
    tag = "gpt-2-cloud-run"
    # Where CORS is on, its middleware decides who may read what, here as elsewhere.
    headers = {} if ask.settings.cors else {"Access-Control-Allow-Origin": "*"}

    async def told(request: Request, form: WireFormat) -> Response:
        response = await ask(request, form)
        if response.status_code == 200:
            response.headers.update(headers)
        return response

    async def by_query(request: Request) -> Response:
        """`length` 1023 new tokens (cut to what the context leaves), `temperature` 0.7, `top_k` 0 and `top_p` 0 (off),
        `prefix` (its first 500 characters), `truncate` (cut there), `include_prefix` true; also our parameters that
        choose tokens. Without any of these fields it is KServe's liveness, `{"status": "alive"}`."""
        return await told(request, cloud_run.of_query(request.scope["query_string"]))

    router.add_api_route(
        "/",
        by_query,
        methods=["GET"],
        route_class_override=_Asks,
        **documented("Continue a prefix", tag=tag, query={"prefix": "To be, or not", "length": 16, "seed": 7}),
    )

    @router.post(
        "/",
        **documented(
            "Continue a prefix",
            tag=tag,
            examples={
                "prefix": {"prefix": "To be, or not", "length": 16, "temperature": 0.7, "top_k": 40, "top_p": 0.9},
                "strings": {"prefix": "To be", "length": "16", "include_prefix": "false", "truncate": "."},
            },
        ),
    )
    async def by_body(request: Request) -> Response:
        """The fields of `GET /` as JSON; numbers may be strings."""
        twice = cloud_run.asks(request.scope["query_string"])
        return await told(request, cloud_run.ASKED_TWICE if twice else cloud_run.FORMAT)

    @router.head("/", **documented("What a browser may read", tag=tag))
    async def head() -> Response:
        """The headers of an answer, at once."""
        return JSONResponse({"text": ""}, headers=headers)

    if ask.settings.cors:

        @router.options("/", **documented("The methods of this path", tag=tag, answers={204: "in Allow"}))
        async def options() -> Response:
            """Preflight requests are answered for every path."""
            return Response(status_code=204, headers={"Allow": "GET, HEAD, POST, OPTIONS"})


def _mount_huggingface_gpt(router: APIRouter, ask: Asker) -> None:
    form = huggingface_gpt.wire_format(ask.default_model)

    @router.post(
        "/generate",
        **documented(
            "Generate sentences",
            tag="huggingface-gpt",
            examples={
                "plain": {"text": {"plain": "To be, or not"}, "max_length": 32},
                "base64": {"text": {"in_64": "SGVsbG8gd29ybGQhCg=="}, "do_sample": True, "top_p": 90, "max_length": 32},
                "several": {
                    "text": {"plain": "To be"},
                    "do_sample": True,
                    "temperature": 0.6,
                    "max_length": 32,
                    "num_return_sequences": 3,
                },
            },
        ),
    )
    async def generate(request: Request) -> Response:
        """`do_sample` false, `top_p` 100 (per cent, or a share up to 1), `top_k` 50, `temperature` 1.0, `max_length` 20
        (tokens in all), `num_return_sequences` 1; also our parameters that choose tokens. Bad base64 is a 422."""
        return await ask(request, form)


def _mount_nanogpt(router: APIRouter, ask: Asker) -> None:
    query: dict[str, Any] = {"model": ask.default_model, "prompt": "To be, or not", "max_tokens": 16, "stop": "!,?"}

    @router.post("/completions", **documented("Complete a prompt", tag="nanoGPT", query=query))
    async def complete(request: Request) -> Response:
        """OpenAI's completions with `max_tokens` 500, `temperature` 0.8 and `top_k` 200; `stop` is a list separated by
        commas, `logit_bias` JSON. The arguments stand in the query string, or as JSON in the body."""
        return await ask(request, nanogpt.wire_format(ask.default_model, request.scope["query_string"]))


_MOUNTS: dict[Compat, Callable[[APIRouter, Asker], None]] = {
    "cloud-run": _mount_cloud_run,
    "huggingface-gpt": _mount_huggingface_gpt,
    "seldon": mount_seldon,
    "nanogpt": _mount_nanogpt,
}
