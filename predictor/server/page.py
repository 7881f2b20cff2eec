"""The page at /ui: one HTML file, which asks this server as any other client does.

The ranges of its controls are those of protocols/parameters.py, written into the file once, at the start.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from predictor.protocols.parameters import Parameters
from predictor.server.ask import Asker
from predictor.server.openapi import documented

_SOURCE = Path(__file__).with_suffix(".html")

# Where the parameters' JSON Schema goes in the source.
_SCHEMA = "{schema}"

# JavaScript's numbers hold every integer up to here; a larger one, the seed's limit, is written as a string.
_MAX_SAFE_INTEGER = 2**53 - 1


def make_router(ask: Asker) -> APIRouter:
    router = APIRouter()
    document = _document()
    content = document.encode()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _policy(document),
        "Cross-Origin-Opener-Policy": "same-origin",
        "ETag": etag,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @router.head("/ui", include_in_schema=False)
    @router.head("/ui/", include_in_schema=False)
    @router.get("/ui/", include_in_schema=False)
    @router.get("/ui", response_class=HTMLResponse, **documented("A page to try the models", tag="Page"))
    async def page(request: Request) -> Response:
        """Prompt, parameters and live answers in a browser; it loads nothing else and keeps nothing on the server."""
        known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
        if etag in known:
            return Response(status_code=304, headers=headers)
        return HTMLResponse(content, headers=headers)

    return router


def _document() -> str:
    """The page with the parameters' schema in it, where it cannot end the script element."""
    schema = json.dumps(_exact(Parameters.model_json_schema(by_alias=False))).replace("<", "\\u003c")
    return _SOURCE.read_text(encoding="utf-8").replace(_SCHEMA, schema)


def _exact(value: Any) -> Any:
    """`value` with those integers as strings that JavaScript would round."""
    if isinstance(value, dict):
        return {key: _exact(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_exact(each) for each in value]
    return str(value) if isinstance(value, int) and value > _MAX_SAFE_INTEGER else value


def _policy(document: str) -> str:
    """A Content-Security-Policy that runs this page's own script and style and lets it talk to this server alone.

    Trusted Types make the browser refuse any text that the script would turn into elements.
    """
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash(document, 'script')}",
            f"style-src {_hash(document, 'style')}",
            "img-src data:",  # the icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _hash(document: str, element: str) -> str:
    """CSP's name for the one inline `element` without attributes."""
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", document, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
