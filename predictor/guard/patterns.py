"""Patterns that no prompt may match."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import re2  # type: ignore[import-untyped]  # google-re2 ships no types

from predictor.errors import ConfigurationError

# Compiled size of a pattern. RE2's time is linear in the text, and this bounds the factor.
_MAX_PATTERN_BYTES = 2**20


class Patterns:
    """Regular expressions of RE2's syntax (no look-around, no back-references): none can be made to run for long."""

    def __init__(self, patterns: dict[int, str]) -> None:
        """`patterns` by line number; upper and lower case are alike unless one says (?-i). Raises
        `ConfigurationError`."""
        options = re2.Options()
        options.case_sensitive = False
        options.log_errors = False
        options.never_capture = True
        options.max_mem = _MAX_PATTERN_BYTES
        self._patterns = []
        for number, pattern in patterns.items():
            try:
                compiled = re2.compile(pattern, options)
            except re2.error as error:
                told = error.args[0]
                told = told.decode(errors="replace") if isinstance(told, bytes) else told
                raise ConfigurationError(f"line {number} is no regular expression: {told}") from error
            if compiled.search(b"") is not None:
                raise ConfigurationError(f"line {number} matches every prompt")
            self._patterns.append((number, compiled))

    def find(self, texts: Iterable[str]) -> int | None:
        """The line number of a pattern that one of `texts` matches, as it stands or folded."""
        for text in texts:
            for variant in {text, _folded(text)}:
                encoded = variant.encode(errors="replace")
                for number, pattern in self._patterns:
                    if pattern.search(encoded) is not None:
                        return number
        return None


def _folded(text: str) -> str:
    """`text` without what makes a word look alike and be another: accents, invisible characters, wide letters."""
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(character for character in decomposed if unicodedata.category(character) not in ("Mn", "Cf"))


def parse_patterns(text: str) -> Patterns:
    """A pattern a line, spaces at its end included; empty lines and those that begin with # say nothing."""
    lines = enumerate(text.splitlines(), 1)
    return Patterns({number: line for number, line in lines if line.strip() and not line.startswith("#")})
