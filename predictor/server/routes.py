"""All routes of ours; they stand before KServe's, which serves the rest (/metrics, /v2 and its metadata)."""

from __future__ import annotations

from fastapi import FastAPI, Request
from kserve import ModelRepository

from predictor.protocols.wire import Exchange
from predictor.server import compat, health, jobs, openai, page, repository, tensorflow, v2
from predictor.server.ask import Asker
from predictor.settings import Settings


def add_routes(app: FastAPI, models: ModelRepository, settings: Settings) -> None:
    """Mount every protocol that the settings switch on."""

    async def admit(request: Request, exchange: Exchange) -> None:
        pass

    ask = Asker(models, settings, admit)
    # The older systems come before `health`, whose `/` answers what theirs leaves.
    for room in (compat, openai, tensorflow, v2, jobs, page, repository, health):
        app.include_router(room.make_router(ask))
