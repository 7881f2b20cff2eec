"""KServe's V2 (Open Inference) routes, and the generate extension of Triton. gRPC is not served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from predictor import __version__
from predictor.errors import NotFound
from predictor.protocols import generate, v2
from predictor.server.ask import Asker
from predictor.server.health import check_ready
from predictor.server.openapi import documented
from predictor.server.predictor import Predictor

_TAG = "KServe V2"
_PARAMETERS = {"max_new_tokens": 16, "seed": 7}
_INPUT = {"name": v2.INPUT, "shape": [1], "datatype": "BYTES", "data": ["To be, or not"]}
_INFER = {
    "one prompt": {"inputs": [_INPUT], "parameters": _PARAMETERS},
    "two prompts, two outputs": {
        "id": "42",
        "inputs": [{**_INPUT, "shape": [2, 1], "data": ["To be, or not", "Speak"]}],
        "outputs": [{"name": "text_output"}, {"name": "finish_reason"}],
        "parameters": _PARAMETERS,
    },
}
_GENERATE = {
    "parameters": {"text_input": "To be, or not", "parameters": _PARAMETERS},
    "parameters beside the text": {"text_input": "To be, or not", **_PARAMETERS},
}


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()

    @router.get("/v2", **documented("The server", tag=_TAG))
    async def server() -> dict[str, Any]:
        """Name, version, and the extensions of the protocol that are served."""
        extensions = ["binary_tensor_data", "parameters", "generate"]
        if ask.settings.admin_key is not None:
            extensions.append("model_repository_extension")
        return {"name": "predictor", "version": __version__, "extensions": extensions}

    @router.get("/v2/models", **documented("The models", tag=_TAG))
    async def models() -> dict[str, Any]:
        """Their names, loaded or not."""
        return {"models": sorted(ask.models.get_models())}

    async def latest(name: str) -> Predictor:
        return ask.find(name)

    async def specific(name: str, version: str) -> Predictor:
        model = ask.find(name)
        if version != v2.VERSION:
            raise NotFound(f"{name} has no version {version[:60]}; it has version {v2.VERSION}")
        return model

    _add_model(router, "/v2/models/{name}", latest, ask)
    _add_model(router, "/v2/models/{name}/versions/{version}", specific, ask)
    return router


def _add_model(router: APIRouter, path: str, find: Callable[..., Awaitable[Predictor]], ask: Asker) -> None:
    """The routes of one model; `find` gives the one that `path` names, or raises `NotFound`."""
    named: Any = Depends(find)

    @router.get(path, **documented("A model's inputs and outputs", tag=_TAG))
    async def metadata(model: Predictor = named) -> dict[str, Any]:
        """The tensors of `infer`; -1 is the number of prompts."""
        return {
            "name": model.name,
            "versions": [v2.VERSION],
            "platform": "predictor_gpt2",
            "inputs": [{"name": v2.INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": name, "datatype": output.datatype, "shape": [-1]} for name, output in v2.OUTPUTS.items()
            ],
        }

    @router.get(f"{path}/ready", **documented("Whether a model is ready", tag=_TAG))
    async def ready(model: Predictor = named) -> dict[str, Any]:
        """200, or 503 while the model loads or the server stops."""
        await check_ready(model)
        return {"name": model.name, "ready": True}

    @router.post(f"{path}/infer", **documented("Complete prompts", tag=_TAG, examples=_INFER))
    async def infer(request: Request, model: Predictor = named) -> Response:
        """`text_input` (BYTES, [rows] or [rows, 1]) into `text_output`, as JSON or in the binary extension's form."""
        return await ask(request, v2.infer_format(model.name), model.name)

    @router.post(f"{path}/generate", **documented("Complete a prompt", tag=_TAG, examples=_GENERATE))
    async def whole(request: Request, model: Predictor = named) -> Response:
        """Triton's generate extension; parameters stand in `parameters` or beside `text_input`."""
        return await ask(request, generate.generate_format(model.name, streamed=False), model.name)

    @router.post(f"{path}/generate_stream", **documented("Stream a completion", tag=_TAG, examples=_GENERATE))
    async def streamed(request: Request, model: Predictor = named) -> Response:
        """The same as server-sent events, each with the next piece of text; `stream: false` makes it one event."""
        return await ask(request, generate.generate_format(model.name, streamed=True), model.name)
