"""A request's body: which media types are read, how much, and what a disconnect means."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from email.message import Message
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from predictor.errors import Cancelled, PredictorError, TooLarge, UnsupportedMediaType

T = TypeVar("T")

# Larger bodies are decoded and checked in a thread: most take 0.2 ms per KB, and the worst 1 ms.
_INLINE_BYTES = 4_096

# curl -d sends form, simple clients send text/plain or nothing: all of them mean JSON.
_READ_AS_JSON = ("application/json", "application/x-www-form-urlencoded", "text/plain")


def check_media_type(request: Request, also: tuple[str, ...] = ()) -> None:
    """Raise `UnsupportedMediaType` for a body declared to be something else than JSON in UTF-8, or a type of `also`."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedMediaType(f"content-encoding {encoding[:60]} is not read; send the body as it is")
    declared = request.headers.get("content-type", "").strip()
    if not declared:
        return
    header = Message()
    header["content-type"] = declared
    media_type = declared.split(";", 1)[0].strip().lower()
    if media_type not in _READ_AS_JSON + also and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise UnsupportedMediaType(f"content-type {declared[:60]} is not read; send application/json")
    charset = header.get_param("charset", "utf-8")
    if not isinstance(charset, str) or charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"content-type {declared[:60]} is not read; JSON is UTF-8")


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body; raises `TooLarge` as soon as it is known to be over the limit."""
    declared = request.headers.get("content-length", "0")
    too_large = TooLarge(f"the body is larger than {limit_bytes} bytes, the limit of this server")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit_bytes:
                raise too_large
    except ClientDisconnect as error:
        raise Cancelled("the client went away while it sent the body") from error
    return bytes(body)


async def aside(size_bytes: int, work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)`, in a thread if what it works on is large: the event loop is everybody's."""
    return work(*arguments) if size_bytes <= _INLINE_BYTES else await asyncio.to_thread(work, *arguments)


async def unless(
    event: Coroutine[Any, Any, None],
    error: PredictorError,
    work: Coroutine[Any, Any, T],
    discard: Callable[[T], Awaitable[None]] | None = None,
) -> T:
    """Await `work`; when `event` comes first, cancel it, wait until it has let go, and raise `error`.

    `discard` is given a result that came too late to be returned.
    """
    task, coming, taken = asyncio.ensure_future(work), asyncio.ensure_future(event), False
    try:
        await asyncio.wait({task, coming}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise error
        taken = True
        return task.result()
    finally:
        coming.cancel()
        # Again and again: before Python 3.12 `wait_for` swallows a cancel that comes as its work ends.
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=1)
        if discard is not None and not taken and not task.cancelled() and task.exception() is None:
            await discard(task.result())


async def until_disconnect(
    request: Request, work: Coroutine[Any, Any, T], discard: Callable[[T], Awaitable[None]] | None = None
) -> T:
    """Await `work` unless the client goes away; then `Cancelled`. The body must have been read."""
    return await unless(_disconnected(request), Cancelled("the client went away"), work, discard)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
