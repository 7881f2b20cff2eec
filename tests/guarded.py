"""A server in process with settings of its own, over the session's tiny model."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from kserve import ModelRepository

from predictor.server.errors import add_error_handlers
from predictor.server.routes import add_routes
from predictor.settings import load_settings

# Keys of the tests: 32 characters that open nothing else.
ALICE = "alice-key-0123456789abcdefghijkl"
BOB = "bob-key-0123456789abcdefghijklmn"
ADMIN = "admin-key-0123456789abcdefghijkl"

PREDICT = "/v1/models/tiny:predict"


def begin_early_in_a_minute() -> None:
    """Before a test that counts up to a limit: as a minute of the clock ends, one request more may pass."""
    left_s = 60 - time.time() % 60
    if left_s < 10:
        time.sleep(left_s)


def body(prompt: Any = "the word", **parameters: Any) -> dict[str, Any]:
    return {"instances": [prompt], "parameters": {"max_new_tokens": 1, "seed": 1} | parameters}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def written(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


@asynccontextmanager
async def guarded(predictor: Any, folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with these settings."""
    models = ModelRepository()
    models.update(predictor)
    app = FastAPI(docs_url=None, redoc_url=None)
    jobs = {"jobs": f"sqlite:///{folder}/jobs.db"}
    add_routes(app, models, load_settings({"model": "tiny=/nowhere"} | jobs | settings))
    add_error_handlers(app)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    ) as client:
        yield client
