"""A load's progress: a bar where a person looks, a line per tenth where a log does."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class LogProgress:
    """Called with (done, total)."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[Any] | None = None
        self._tenth = 0
        self._interactive = sys.stderr.isatty()

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._interactive:
            if self._bar is None:
                self._bar = tqdm(total=total, desc=self._title, unit=" parameters", unit_scale=True)
            self._bar.update(done - self._bar.n)
        elif (tenth := done * 10 // total) > self._tenth:
            self._tenth = tenth
            logger.info("%s: %d%%", self._title, tenth * 10)
