"""Stop strings over a stream of text: cut before the first one that completes, never send a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Text passes through `push`; what could be the beginning of a stop string is held back.

    The outcome does not depend on how the text is cut into pushes: the string that completes first wins, and of
    two that complete at the same character the longer.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what is safe to send. Once `matched` is set, nothing more comes."""
        if self.matched is not None:
            return ""
        buffer = self._held + text
        found = [(end, -len(stop), stop) for stop in self._stops if (end := _end(buffer, stop)) is not None]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return buffer[: end - len(self.matched)]
        keep = max((_overlap(buffer, stop) for stop in self._stops), default=0)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held


def _end(text: str, stop: str) -> int | None:
    """Where the first occurrence of `stop` in `text` ends."""
    start = text.find(stop)
    return None if start < 0 else start + len(stop)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
