"""Loading and unloading models at run time: KServe's and Triton's repository endpoints, for the admin alone."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, StrictBool

from predictor.errors import Forbidden, Unauthenticated
from predictor.guard.keys import parse_admin_key
from predictor.guard.watched import Watched, warn_if_readable_by_all
from predictor.protocols import strict_json
from predictor.protocols.models import VERSION
from predictor.protocols.parameters import validated
from predictor.server.ask import Asker
from predictor.server.body import read_body
from predictor.server.guard import key_holder, refused
from predictor.server.openapi import documented
from predictor.server.predictor import Predictor

_TAG = "Model repository"

# Our states by Triton's names.
_STATES = {"LOADING": "LOADING", "AVAILABLE": "READY", "UNLOADING": "UNLOADING", "END": "UNAVAILABLE"}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _UnloadParameters(_Fields):
    unload_dependents: StrictBool = False  # Triton's clients send it; no model here depends on another


class _Unload(_Fields):
    parameters: _UnloadParameters = _UnloadParameters()


class _Load(_Fields):
    parameters: _Fields = _Fields()  # Triton's override a model's configuration: none of ours can be


class _Index(_Fields):
    ready: StrictBool = False  # list those alone that are ready


_Body = TypeVar("_Body", _Load, _Unload, _Index)


def make_router(ask: Asker) -> APIRouter:
    path = ask.settings.admin_key
    key = None if path is None else Watched("--admin-key", path, parse_admin_key)
    if path is not None:
        warn_if_readable_by_all("--admin-key", path)

    async def admin(request: Request) -> None:
        if key is None:
            raise Forbidden("loading and unloading models over HTTP is switched off")
        try:
            key_holder(request.headers, key.value)
        except Unauthenticated as error:
            refused(error)
            raise

    async def fields(request: Request, of: type[_Body]) -> _Body:
        sent = await read_body(request, ask.settings.max_body_bytes)
        body = strict_json.loads(sent) if sent.strip() else {}
        return validated(of, body, "the body")

    # Whoever has no key of the admin's sees what an example would be answered: nothing here is open to all.
    answers = {403: "switched off"} if key is None else {200: "done", 401: "not the admin's key"}
    router = APIRouter(prefix="/v2/repository", dependencies=[Depends(admin)])

    @router.post("/models/{name}/load", **documented("Load a model", tag=_TAG, answers=answers))
    async def load(name: str, request: Request) -> dict[str, Any]:
        """Answered when the model is loaded, or cannot be. One that is loaded stays as it is."""
        model = ask.find(name)
        await fields(request, _Load)
        await model.start_engine()
        model.language_model()  # raises what came in between: an unload, or the server's end
        return {"name": name, "load": True}

    @router.post("/models/{name}/unload", **documented("Unload a model", tag=_TAG, answers=answers))
    async def unload(name: str, request: Request) -> dict[str, Any]:
        """Answered when the model's memory is given back; what runs has the grace period to finish."""
        model = ask.find(name)
        await fields(request, _Unload)
        await model.unload()
        return {"name": name, "unload": True}

    @router.get("/index", **documented("Models and their states", tag=_TAG, answers=answers))
    async def index() -> list[dict[str, str]]:
        """Every model of this server, loaded or not."""
        return [_entry(ask.find(name)) for name in ask.models.get_models()]

    @router.post("/index", **documented("Models and their states, as Triton asks", tag=_TAG, answers=answers))
    async def triton_index(request: Request) -> list[dict[str, str]]:
        """With `{"ready": true}` those alone that are ready."""
        wanted = await fields(request, _Index)
        return [entry for entry in await index() if not wanted.ready or entry["state"] == "READY"]

    return router


def _entry(model: Predictor) -> dict[str, str]:
    reason = "" if model.alive else "the engine has failed"
    state = _STATES[model.state] if model.alive else "UNAVAILABLE"
    return {"name": model.name, "version": str(VERSION), "state": state, "reason": reason}
