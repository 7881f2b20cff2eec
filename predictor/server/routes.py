"""All routes of ours; they stand before KServe's, which serves the rest (/metrics, /v2 and its metadata)."""

from __future__ import annotations

from fastapi import FastAPI, Request
from kserve import ModelRepository

from predictor.protocols.wire import Exchange
from predictor.server import compat, health, jobs, openai, page, repository, tensorflow, v2
from predictor.server.ask import Asker
from predictor.server.docs import add_docs
from predictor.settings import Settings


def add_routes(app: FastAPI, models: ModelRepository, settings: Settings) -> None:
    """Mount every protocol that the settings switch on."""

    async def admit(request: Request, exchange: Exchange) -> None:
        pass

    ask = Asker(models, settings, admit)
    # The older systems come before `health`, whose `/` answers what theirs leaves.
    routers = [room.make_router(ask) for room in (compat, openai, tensorflow, v2, jobs, page, repository, health)]
    for router in routers:
        app.include_router(router)
    add_docs(app, routers, ask)
