"""(to be written)"""

from __future__ import annotations

from fastapi import APIRouter

from predictor.server.ask import Asker


def make_router(ask: Asker) -> APIRouter:
    return APIRouter()
