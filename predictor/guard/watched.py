"""A file whose contents may change while the server runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from predictor.errors import ConfigurationError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What tells one version of a file from the next: a Kubernetes secret is replaced as a link, an editor's as an inode.
_Version = tuple[int, int, int, int]


class Watched(Generic[T]):
    """What a file says, read again when it has changed. A change that cannot be read or parsed is logged and changes
    nothing: a mistake in a file never opens a door that was shut."""

    def __init__(self, name: str, path: str, parse: Callable[[str], T]) -> None:
        """`name` is the file in messages; `parse` raises `ConfigurationError`. Raises it where the file is no good."""
        self._name, self._path, self._parse = name, Path(path), parse
        self._version = self._look()
        self._value = self._read()

    @property
    def value(self) -> T:
        """What the file says now, or said last. Costs one `stat`, some microseconds."""
        version = self._look()
        if version != self._version:
            self._version = version  # a broken version is complained of once
            try:
                self._value = self._read()
                logger.info("%s has changed and was read again", self._name)
            except ConfigurationError as error:
                logger.error("%s has changed and is left out, what it said before holds: %s", self._name, error)
        return self._value

    def _look(self) -> _Version | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> T:
        try:
            return self._parse(self._path.read_text("utf-8"))
        except OSError as error:
            raise ConfigurationError(f"{self._name}: {self._path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{self._name}: {self._path} is not UTF-8") from error
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._name}: {self._path}: {error}") from error


def warn_if_readable_by_all(name: str, path: str) -> None:
    """Log a warning for a file of secrets that every user of the machine may read."""
    if os.stat(path).st_mode & 0o004:
        logger.warning("%s: every user of this machine may read %s; chmod o-r it", name, path)
