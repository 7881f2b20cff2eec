"""Banned strings, kept exactly: a token is banned where it would complete one.

However the string is cut into tokens: the match is on bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from predictor.text.vocabulary import Vocabulary


class BannedStrings:
    """An engine `TokenFilter`. The prompt's end counts: its letters may be the banned string's first half."""

    def __init__(self, strings: Iterable[str], vocabulary: Vocabulary) -> None:
        self._token_bytes = vocabulary.token_bytes
        self._sorted = vocabulary.sorted_tokens
        banned = {string.encode() for string in strings}
        self._always = {token_id for string in banned for token_id in _containing(string, vocabulary)}
        # What must not follow: after text that ends in `head`, no token may begin with the string's rest.
        self._completions: dict[bytes, set[int]] = {}
        for string in banned:
            for cut in range(1, len(string)):
                self._completions.setdefault(string[:cut], set()).update(self._beginning_with(string[cut:]))
        self._longest = max(map(len, banned), default=0)

    def _beginning_with(self, prefix: bytes) -> list[int]:
        first = place = bisect_left(self._sorted, (prefix, -1))
        while place < len(self._sorted) and self._sorted[place][0].startswith(prefix):
            place += 1
        return [token_id for _, token_id in self._sorted[first:place]]

    def banned_after(self, token_ids: Sequence[int]) -> list[int]:
        """The ids that would complete a banned string after `token_ids`."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= self._longest - 1:
                break
            if token_id < len(self._token_bytes):
                tail = self._token_bytes[token_id] + tail
        banned = set(self._always)
        for length in range(1, min(self._longest - 1, len(tail)) + 1):
            banned |= self._completions.get(tail[-length:], set())
        return sorted(banned)


def _containing(string: bytes, vocabulary: Vocabulary) -> Iterator[int]:
    """The ids of the tokens that contain `string` whole."""
    joined, starts = vocabulary.joined_tokens
    place = joined.find(string)
    while place >= 0:
        number = bisect_right(starts, place) - 1
        yield vocabulary.sorted_tokens[number][1]
        place = joined.find(string, starts[number + 1])
