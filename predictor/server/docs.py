"""`/openapi.json` and `/docs`: every route of ours with its examples, shown by a Swagger UI that needs no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from predictor import __version__
from predictor.server.ask import Asker

_ABOUT = """GPT-2 over TensorFlow's V1, KServe's V2, OpenAI's completions, asynchronous jobs, and older servers' bodies.
Every example here is executed by a test. The page at [/ui](ui) is for people."""

# The page's parts, which the package fastapi_swagger carries; it is here for them alone.
_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")


def add_docs(app: FastAPI, routers: Sequence[APIRouter], ask: Asker) -> None:
    """Make the app's document that of `routers`, and serve it: KServe's own lists routes that ours stand before."""
    routes: list[BaseRoute] = [route for router in routers for route in router.routes]
    # What a path parameter is called in every route, and what stands for it in an example.
    examples = {"name": ask.default_model, "version": "1", "label": "stable", "id": "the id that POST /v1/jobs told"}

    @cache
    def document() -> dict[str, Any]:
        told = get_openapi(title="GPT-2 predictor", version=__version__, description=_ABOUT, routes=routes)
        for path, methods in told["paths"].items():
            # Written anew: FastAPI knows only those that a route's function takes.
            names = re.findall(r"{(\w+)}", path)
            of_path = [_path_parameter(name, examples[name]) for name in names]
            for operation in methods.values():
                rest = [each for each in operation.get("parameters", []) if each["in"] != "path"]
                operation["parameters"] = of_path + rest
        return told

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="GPT-2 predictor",
            swagger_js_url=f"docs/{_FILES[0]}",
            swagger_css_url=f"docs/{_FILES[1]}",
            swagger_favicon_url=f"docs/{_FILES[2]}",
        )

    @app.get("/docs/{file}", include_in_schema=False)
    async def part(file: str) -> FileResponse:
        if file not in _FILES:
            raise HTTPException(404)
        return FileResponse(str(resources.files("fastapi_swagger.resources") / file))


def _path_parameter(name: str, example: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "example": example}
