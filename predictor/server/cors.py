"""Which pages of other origins a browser lets call this server."""

from __future__ import annotations

import re

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from predictor.errors import ConfigurationError

# As browsers send it: nothing behind the port, not even a slash.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.\[\]:_-]+")


def add_cors(app: FastAPI, origins: tuple[str, ...]) -> None:
    """Let pages of these origins call every route; * is any. Raises `ConfigurationError` for what is no origin."""
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise ConfigurationError(
                f"--cors must be * or an origin like https://page.example, in lower case and without a path, "
                f"got {origin!r}"
            )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "Retry-After", "Location"),
    )
