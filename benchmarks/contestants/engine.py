"""What an engine module offers. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine may have to reserve memory for, and the threads it has."""

    threads: int
    most_sequences: int  # at once
    most_tokens: int  # of all sequences at once, prompts included


class Engine(Protocol):
    """A model in memory. Made by `load(model, settings, sizes)` of its module."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy, no end token: exactly `new_tokens` ids after each prompt. The prompts are equally long."""


class EngineModule(Protocol):
    """A module of this package that runs an engine. Where it converts nothing, it has no `convert`."""

    PACKAGES: tuple[str, ...]  # whose versions are reported

    def load(self, model: Path, settings: Mapping[str, Any], sizes: Sizes) -> Engine: ...

    def convert(self, checkpoint: Path, out: Path, conversion: str) -> None:
        """Write what `load` reads into the empty folder `out`. Imports what it needs itself, to keep `load` lean."""
