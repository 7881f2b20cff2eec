"""A request's own time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from predictor.errors import DeadlineExceeded

T = TypeVar("T")


class Deadline:
    """`timeout_s` from now on, shared by everything that is held to it."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    async def hold(
        self, work: Coroutine[Any, Any, T], name: str, advice: str = "ask for fewer tokens or a longer timeout_s"
    ) -> T:
        """Await `work`, or cancel it and raise `DeadlineExceeded`, with `advice`, when the time is over."""
        try:
            return await asyncio.wait_for(work, max(0.0, self._end - time.monotonic()))
        except asyncio.TimeoutError as error:
            raise DeadlineExceeded(f"{name} took longer than {self.timeout_s:g} s; {advice}") from error
