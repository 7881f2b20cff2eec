"""TensorFlow Serving's V1 routes, and the models as KServe, TensorFlow Serving and OpenAI list them."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.convertors import StringConvertor, register_url_convertor

from predictor.errors import NotReady, Unimplemented
from predictor.protocols import models, v1
from predictor.server.ask import Asker
from predictor.server.health import check_ready
from predictor.server.openapi import documented
from predictor.server.predictor import Predictor

_TAG = "TensorFlow V1"

# `created` of every model, in seconds since 1970: this module is imported as the server starts.
CREATED = int(time.time())


class _Segment(StringConvertor):
    """A name, version or label, as TensorFlow Serving's paths have them: what follows a colon is a verb."""

    regex = "[^/:]+"


register_url_convertor("segment", _Segment())

_MODEL = "/v1/models/{name:segment}"
_VERSION = _MODEL + "/versions/{version:segment}"
_LABEL = _MODEL + "/labels/{label:segment}"

_ROWS = {"instances": ["To be, or not"], "parameters": {"max_new_tokens": 16, "seed": 7}}
_COLUMNS = {"inputs": {"prompt": ["To be, or not", {"b64": "VG8gYmU="}]}, "parameters": {"max_new_tokens": 16}}
_EXAMPLES = {
    "rows": _ROWS,
    "a row's own parameters": {
        "instances": ["To be,", {"prompt": "or not", "top_k": 5}],
        "parameters": {"max_new_tokens": 16, "details": True},
        "signature_name": v1.SIGNATURE,
    },
    "columns": _COLUMNS,
    "one value": {"inputs": "To be, or not", "parameters": {"max_new_tokens": 16}},
    "stream": {"instances": ["To be, or not"], "parameters": {"max_new_tokens": 16, "stream": True}},
    "the older body": {"text": "To be, or not", "length": 32},
}


def model_list(ask: Asker) -> dict[str, Any]:
    """All models that are loaded or will be."""
    names = [name for name in ask.models.get_models() if ask.find(name).state != "END"]
    return models.all_models(names, CREATED)


async def model_answer(ask: Asker, name: str) -> Response:
    """One model: 200, or 503 while it cannot answer; raises `NotFound`, for one that was unloaded too."""
    status = await _status(ask.find(name))
    return _answer(models.one_model(name, status, CREATED), status)


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()

    def check(request: Request, of_status: bool = False) -> None:
        named, line = request.path_params, _line(request)
        names, version, label = ask.models.get_models(), named.get("version"), named.get("label")
        models.check_servable(names, named["name"], line, version, label, of_status)

    @router.get("/v1/models", **documented("All models", tag=_TAG))
    async def list_models() -> dict[str, Any]:
        """KServe's `models` and OpenAI's `data` in one object."""
        return model_list(ask)

    @router.get(_MODEL, **documented("A model's state", tag=_TAG))
    async def model(request: Request, name: str) -> Response:
        """KServe's, TensorFlow Serving's and OpenAI's fields; 503 while the model loads or the server stops."""
        check(request, of_status=True)
        return await model_answer(ask, name)

    @router.get(_VERSION, **documented("A version's state", tag=_TAG))
    @router.get(_LABEL, **documented("The state of a label's version", tag=_TAG))
    async def version_state(request: Request, name: str) -> Response:
        """TensorFlow Serving's fields alone; 503 while the model loads or the server stops."""
        check(request, of_status=True)
        status = await _status(ask.find(name))
        return _answer(models.version_status(status), status)

    @router.get(_MODEL + "/metadata", **documented("A model's signature", tag=_TAG))
    @router.get(_VERSION + "/metadata", **documented("A version's signature", tag=_TAG))
    @router.get(_LABEL + "/metadata", **documented("The signature of a label's version", tag=_TAG))
    async def metadata(request: Request, name: str) -> dict[str, Any]:
        """Names, types and shapes of inputs and outputs; 503 while the model loads or the server stops."""
        check(request)
        await check_ready(ask.find(name))
        return models.metadata(name)

    @router.post(_MODEL + ":predict", **documented("Complete prompts", tag=_TAG, examples=_EXAMPLES))
    @router.post(_VERSION + ":predict", **documented("Ask a version", tag=_TAG, examples={"rows": _ROWS}))
    @router.post(_LABEL + ":predict", **documented("Ask a label's version", tag=_TAG, examples={"columns": _COLUMNS}))
    async def predict(request: Request, name: str) -> Response:
        """TensorFlow V1's row and column form, and the older `{"text", "length"}` body."""
        check(request)
        return await ask(request, v1.FORMAT, name)

    @router.post(_MODEL + ":explain", include_in_schema=False)  # a verb of KServe's
    async def explain(request: Request, name: str) -> None:
        check(request)
        raise Unimplemented(f"{name} has no explainer")

    @router.post(_MODEL + ":{verb:segment}", include_in_schema=False)
    @router.post(_VERSION + ":{verb:segment}", include_in_schema=False)
    @router.post(_LABEL + ":{verb:segment}", include_in_schema=False)
    async def other_verb(request: Request, verb: str) -> None:
        if verb not in models.OTHER_METHODS:
            raise models.malformed(_line(request))
        check(request)
        raise models.other_method(verb)

    # TensorFlow Serving knows these two methods; the rest are the router's 405.
    @router.get("/v1/models/{path:path}", include_in_schema=False)
    @router.post("/v1/models/{path:path}", include_in_schema=False)
    @router.post("/v1/models", include_in_schema=False)
    async def malformed(request: Request) -> None:
        raise models.malformed(_line(request))

    return router


def _line(request: Request) -> str:
    return f"{request.method} {request.url.path}"


async def _status(model: Predictor) -> models.Status:
    try:
        await check_ready(model)
    except NotReady as error:
        state: models.State = "UNLOADING" if model.stopping else model.state if model.alive else "END"
        return models.Status(state, str(error))
    return models.Status("AVAILABLE")


def _answer(body: dict[str, Any], status: models.Status) -> Response:
    if not status.reason:
        return JSONResponse(body)
    return JSONResponse({"error": status.reason} | body, NotReady.status)
