"""Counts of requests and of strikes, by caller: in this process, or in the Redis that replicas share."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from limits import RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A count is a round trip of a millisecond; a Redis that takes this long holds up every request.
_REDIS_TIMEOUT_S = 0.5

# How long a Redis that failed is left alone.
_REDIS_PAUSE_S = 5.0

Storage = MemoryStorage | RedisStorage


class Store:
    """Where counts are kept. While Redis does not answer, each process counts for itself."""

    def __init__(self, url: str | None) -> None:
        """`url` is redis://... or rediss://...; without it counts live in this process and end with it."""
        self._own = MemoryStorage()
        self._shared: RedisStorage | None = None
        self._pause_until = 0.0
        if url is not None:
            self._shared = RedisStorage(
                f"async+{url}",
                implementation="redispy",
                key_prefix="predictor:guard",
                wrap_exceptions=True,
                socket_timeout=_REDIS_TIMEOUT_S,
                socket_connect_timeout=_REDIS_TIMEOUT_S,
            )

    async def use(self, work: Callable[[Storage], Awaitable[T]]) -> T:
        """Do `work` with the storage that answers."""
        if self._shared is None or time.monotonic() < self._pause_until:
            return await work(self._own)
        # Twice: a connection that was idle may have been closed, and the next one is new.
        for attempts_left in (1, 0):
            try:
                return await work(self._shared)
            except StorageError as error:
                if attempts_left:
                    continue
                fault = type(error.storage_error).__name__  # by class: its text may hold the URL, and that a password
                logger.warning("Redis does not answer (%s): this process counts for itself", fault)
        self._pause_until = time.monotonic() + _REDIS_PAUSE_S
        return await work(self._own)

    async def close(self) -> None:
        """Close the connections."""
        if self._shared is not None:
            bridge: Any = self._shared.bridge  # its types leave out what the redis library's client has
            await bridge.get_connection().aclose()


class RateLimit:
    """So many requests per minute and caller.

    The window slides from one minute of the clock to the next: the requests of the last one count by the share of it
    that is still inside, rounded down, as if they had come evenly. So more may follow on what came at its very end.
    """

    def __init__(self, store: Store, per_minute: int) -> None:
        self._store, self._item = store, RateLimitItemPerMinute(per_minute, namespace="rate")
        self.per_minute = per_minute

    async def take(self, caller: str) -> int | None:
        """Count a request; or do not, and say how many seconds until there is room for one."""

        async def take(storage: Storage) -> int | None:
            limiter = SlidingWindowCounterRateLimiter(storage)
            if await limiter.hit(self._item, caller):
                return None
            window = await limiter.get_window_stats(self._item, caller)
            return max(1, math.ceil(window.reset_time - time.time()))

        return await self._store.use(take)


class Strikes:
    """Strikes of a caller; all are forgotten a while after the first of them."""

    def __init__(self, store: Store, most: int, expiry_s: int) -> None:
        self._store, self._item = store, RateLimitItemPerSecond(most, expiry_s, namespace="strikes")

    async def add(self, caller: str) -> None:
        await self._store.use(lambda storage: FixedWindowRateLimiter(storage).hit(self._item, caller))

    async def out(self, caller: str) -> bool:
        """Whether the caller has had as many as there are."""
        return not await self._store.use(lambda storage: FixedWindowRateLimiter(storage).test(self._item, caller))
