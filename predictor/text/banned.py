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
        # After text that ends in `head`, no token may begin with the string's rest: ranges of the sorted table. Only
        # rests that some token begins with are kept, which are the last few cuts of a string.
        self._completions: dict[bytes, list[range]] = {}
        for string in banned:
            for cut in range(max(1, len(string) - vocabulary.longest_token), len(string)):
                if places := self._beginning_with(string[cut:]):
                    self._completions.setdefault(string[:cut], []).append(places)
        self._lengths = sorted({len(head) for head in self._completions})

    def _beginning_with(self, prefix: bytes) -> range:
        """Where in the sorted table the tokens stand that begin with `prefix`."""
        first = bisect_left(self._sorted, (prefix, -1))
        # 0xFF is above every byte of UTF-8; a token of raw bytes that goes on with it is found all the same.
        last = bisect_left(self._sorted, (prefix + b"\xff" * 8, -1), lo=first)
        return range(first, last)

    def banned_after(self, token_ids: Sequence[int]) -> list[int]:
        """The ids that would complete a banned string after `token_ids`."""
        banned = set(self._always)
        if not self._lengths:
            return sorted(banned)
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= self._lengths[-1]:
                break
            if token_id < len(self._token_bytes):
                tail = self._token_bytes[token_id] + tail
        for length in self._lengths:
            for places in self._completions.get(tail[-length:], ()) if length <= len(tail) else ():
                banned.update(self._sorted[place][1] for place in places)
        return sorted(banned)


def _containing(string: bytes, vocabulary: Vocabulary) -> Iterator[int]:
    """The ids of the tokens that contain `string` whole."""
    joined, starts = vocabulary.joined_tokens
    place = joined.find(string)
    while place >= 0:
        number = bisect_right(starts, place) - 1
        yield vocabulary.sorted_tokens[number][1]
        place = joined.find(string, starts[number + 1])
