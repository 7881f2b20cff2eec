"""All routes of ours; they stand before KServe's, which serves the rest (/metrics)."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from kserve import ModelRepository

from predictor.server import compat, health, jobs, openai, page, repository, tensorflow, v2
from predictor.server.ask import Asker
from predictor.server.cors import add_cors
from predictor.server.docs import add_docs
from predictor.server.guard import Guard, KeyCheck
from predictor.server.middleware import Boundary
from predictor.settings import Settings


def add_routes(app: FastAPI, models: ModelRepository, settings: Settings) -> None:
    """Mount every protocol that the settings switch on, and what stands before them."""
    guard = Guard(settings)
    ask = Asker(models, settings, guard.admit, guard.arrive)
    # The older systems come before `health`, whose `/` answers what theirs leaves.
    routers = [room.make_router(ask) for room in (compat, openai, tensorflow, v2, jobs, page, repository, health)]
    app.include_router(APIRouter(lifespan=guard.lifespan))
    for router in routers:
        app.include_router(router)
    add_docs(app, routers, ask)
    if guard.keys is not None:
        app.add_middleware(KeyCheck, keys=guard.keys)
    app.add_middleware(Boundary)
    if settings.cors:  # around all: a browser reads errors too, and asks before it sends a key
        add_cors(app, settings.cors)
