"""Files of API keys. A key is kept as its digest only, compared in constant time, and in no message."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator

from predictor.errors import ConfigurationError

# 16 characters of base64 are 96 bits; a shorter key may be guessed.
_LEAST_CHARACTERS = 16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]+")  # what a header can carry


class KeyRing:
    """Names by key."""

    def __init__(self, keys: dict[str, str]) -> None:
        """`keys` are keys by name."""
        self._digests = [(name, _digest(key.encode())) for name, key in keys.items()]

    def name_of(self, key: bytes) -> str | None:
        """Whose key that is. Every key is compared, so that the time tells nothing of which is near."""
        digest = _digest(key)
        found: str | None = None
        for name, known in self._digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def parse_keys(text: str) -> KeyRing:
    """Lines of NAME:KEY; empty lines and those that begin with # say nothing. Raises `ConfigurationError`."""
    keys: dict[str, str] = {}
    for number, line in _lines(text):
        name, separator, key = line.partition(":")
        if not separator or not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"line {number} must be NAME:KEY, the name in at most 64 letters, digits, '.', '_', '@' and '-'"
            )
        if name in keys:
            raise ConfigurationError(f"line {number} names {name} again")
        _check(key, number)
        if key in keys.values():
            raise ConfigurationError(f"line {number} has a key that stands above already")
        keys[name] = key
    if not keys:
        raise ConfigurationError("there is no key in it")
    return KeyRing(keys)


def parse_admin_key(text: str) -> KeyRing:
    """One key, on a line of its own. Raises `ConfigurationError`."""
    lines = list(_lines(text))
    if len(lines) != 1:
        raise ConfigurationError(f"it must hold one key, and holds {len(lines)} lines")
    number, key = lines[0]
    _check(key, number)
    return KeyRing({"admin": key})


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def _check(key: str, number: int) -> None:
    if len(key) < _LEAST_CHARACTERS or not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"line {number}: a key has at least {_LEAST_CHARACTERS} characters, printable ASCII without spaces"
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
