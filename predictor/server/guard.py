"""The guard's side that faces HTTP: who a request comes from, and how it is refused."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator

from fastapi import FastAPI, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from predictor.errors import BannedPrompt, PredictorError, RateLimited, TooManyStrikes, Unauthenticated
from predictor.guard.counters import RateLimit, Store, Strikes
from predictor.guard.keys import KeyRing, parse_keys
from predictor.guard.patterns import Patterns, parse_patterns
from predictor.guard.watched import Watched, warn_if_readable_by_all
from predictor.observability import REFUSED, STRIKES
from predictor.protocols.wire import Exchange
from predictor.server.errors import answer, body_of_path
from predictor.server.predictor import Predictor
from predictor.settings import Settings, knative_revision
from predictor.text.language_model import LanguageModel
from predictor.text.request import TextRequest

logger = logging.getLogger(__name__)

# What answers without a key: probes, metrics, and pages that hold no secret. Loading and unloading ask for the admin's.
_OPEN = re.compile(
    r"/(health|v2/health/(ready|live)|v1/models/[^/]+|v2/models/[^/]+(/versions/[^/]+)?/ready|metrics|ui/?|docs(/[^/]+)?"
    r"|openapi\.json)"
)
_ADMIN = "/v2/repository/"


class KeyCheck:
    """Answers 401 to every request without a known API key, and notes whose key it is in `request.state.api_key`."""

    def __init__(self, app: ASGIApp, keys: Watched[KeyRing]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope):
            try:
                scope.setdefault("state", {})["api_key"] = key_holder(Headers(scope=scope), self._keys.value)
            except Unauthenticated as error:
                refused(error)
                response = answer(error, body_of_path(scope["path"]))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    if scope["method"] == "OPTIONS" or path.startswith(_ADMIN):
        return True
    if scope["method"] not in ("GET", "HEAD"):
        return False
    return _OPEN.fullmatch(path) is not None or (path == "/" and not scope["query_string"])


def key_holder(headers: Headers, keys: KeyRing) -> str:
    """The name of the key that came as `Authorization: Bearer KEY` or `x-api-key: KEY`; raises `Unauthenticated`."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    name = keys.name_of(key.encode("latin-1"))
    if name is None:
        fault = "the API key is unknown" if key else "an API key is needed"
        raise Unauthenticated(f"{fault}: send Authorization: Bearer KEY, or x-api-key: KEY")
    return name


class Guard:
    """Rate limits, banned prompts and strikes, as far as the settings switch them on."""

    def __init__(self, settings: Settings) -> None:
        """Raises `ConfigurationError` for a file that is no good."""
        self._store = store = Store(settings.redis)
        self.keys = None if settings.api_keys is None else Watched("--api-keys", settings.api_keys, parse_keys)
        if settings.api_keys is not None:
            warn_if_readable_by_all("--api-keys", settings.api_keys)
        self._rate = None if settings.rate_limit is None else RateLimit(store, settings.rate_limit)
        self._banned = None if settings.banned is None else Watched("--banned", settings.banned, parse_patterns)
        self._strikes = Strikes(store, settings.strikes, settings.strikes_expiry_s)
        self._most_strikes = settings.strikes

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Of the app: its end closes the store."""
        yield
        await self._store.close()

    async def arrive(self, request: Request) -> None:
        """Raise `RateLimited`, or let the request go on: before its body is read, whatever is in it."""
        if self._rate is None:
            return
        wait_s = await self._rate.take(_sender(request))
        if wait_s is not None:
            error = RateLimited(f"at most {self._rate.per_minute} requests a minute; try again in {wait_s} s", wait_s)
            refused(error)
            raise error

    async def admit(self, request: Request, exchange: Exchange, predictor: Predictor) -> None:
        """Raise `TooManyStrikes` or `BannedPrompt`, or let the request go on."""
        if self._banned is None:
            return
        try:
            await self._not_banned(self._banned.value, request, exchange, predictor)
        except PredictorError as error:
            refused(error)
            raise

    async def _not_banned(self, patterns: Patterns, request: Request, exchange: Exchange, predictor: Predictor) -> None:
        caller = _striker(request, exchange)
        if await self._strikes.out(caller):
            raise TooManyStrikes(f"too_many_strikes: {self._most_strikes} banned prompts; ask again later")
        model = predictor.language_model()  # whose tokenizer knows what the model will see
        # Off the event loop: RE2 lets go of the interpreter, and a megabyte may take it seconds.
        line = await asyncio.to_thread(lambda: patterns.find(_texts(exchange.requests, model)))
        if line is not None:
            await self._strikes.add(caller)
            STRIKES.labels(knative_revision()).inc()
            logger.info("a prompt matched line %d of the banned patterns", line, extra={"fields": {"caller": caller}})
            raise BannedPrompt("banned_prompt: this prompt is not served")


def refused(error: PredictorError) -> None:
    """Count a refusal of the guard's."""
    if isinstance(error, Unauthenticated | RateLimited | BannedPrompt | TooManyStrikes):
        REFUSED.labels(knative_revision(), error.code).inc()


def _texts(requests: Iterable[TextRequest], model: LanguageModel) -> Iterator[str]:
    """Prompts as a person reads them: token ids are decoded, and special tokens, which are no text, left out.

    A chat is read message by message, and as the model's template puts it.
    """
    tokenizer = model.vocabulary.tokenizer
    special: list[str] = tokenizer.all_special_tokens

    def plain(text: str) -> str:
        for name in special:
            text = text.replace(name, "")
        return text

    for request in requests:
        for message in request.messages or ():
            yield plain(message.content)
            yield plain(message.name or "")
        if request.prompt_ids is None:
            yield plain(model.preparer.as_text(request).prompt)
        else:
            known = [token_id for token_id in request.prompt_ids if token_id < model.backend.vocabulary]
            yield str(tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _sender(request: Request) -> str:
    """The API key's name, or the address. Behind proxies uvicorn has put the client's address in place of theirs: the
    last one of X-Forwarded-For that is not of FORWARDED_ALLOW_IPS, so what a client writes there itself is not read."""
    name: str | None = getattr(request.state, "api_key", None)
    return f"address:{_network(request)}" if name is None else f"key:{name}"


def _striker(request: Request, exchange: Exchange) -> str:
    """Who gets the strike: as `_sender`, but without keys the `user` whom the body names comes before the address."""
    if getattr(request.state, "api_key", None) is None and exchange.user is not None:
        # Its digest: whatever its length and characters, and no person's name in a store or a log.
        return f"user:{hashlib.sha256(exchange.user.encode(errors='replace')).hexdigest()[:32]}"
    return _sender(request)


def _network(request: Request) -> str:
    """The client's IPv4 address, or the /64 of its IPv6 address: whoever has one of these has all of it."""
    host = "" if request.client is None else request.client.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), 64), strict=False))
