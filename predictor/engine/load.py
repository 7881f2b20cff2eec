"""How busy an engine is, for gauges and for admission."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is."""

    running_requests: int = 0
    waiting_requests: int = 0  # nothing of them has started
    free_seats: int = 0  # sequences of any length that could start now
    used_slots: int = 0
    slots: int = 0
    guessed_tokens: int = 0  # by speculation, since the start
    held_tokens: int = 0  # of these, how many were what was drawn
