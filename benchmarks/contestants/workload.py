"""What is asked of everyone: the cells, the prompts, and the arithmetic of the shape. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A batch of prompts of one length."""

    prompt_tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt_tokens}"

    def prompts(self, seed: int, vocabulary: int) -> list[list[int]]:
        """Random ids, the same for everyone; another seed, other prompts, so that no cache can have seen them."""
        chance = random.Random(f"{seed} {self}")
        # The last id of GPT-2's vocabulary is the end token.
        return [[chance.randrange(vocabulary - 1) for _ in range(self.prompt_tokens)] for _ in range(self.batch)]


@dataclass(frozen=True, slots=True)
class Shape:
    """GPT-2's sizes; bytes are those of a width of `bits`."""

    layers: int
    width: int
    context: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: Mapping[str, int]) -> Shape:
        return cls(config["n_layer"], config["n_embd"], config["n_positions"], config["vocab_size"])

    @property
    def parameters(self) -> int:
        """The output matrix is the token table."""
        layer = 12 * self.width**2 + 13 * self.width
        return (self.vocabulary + self.context + 2) * self.width + self.layers * layer

    def weight_bytes(self, bits: int) -> float:
        return self.parameters * bits / 8

    def step_bytes(self, bits: int) -> float:
        """Weights that a step of one sequence reads: all but the position table, of which it reads a row."""
        return (self.parameters - self.context * self.width) * bits / 8

    def kv_bytes(self, bits: int, tokens: int) -> int:
        """Keys and values of `tokens` tokens: 4 bytes a number at 32 bits, else 2."""
        return tokens * 2 * self.layers * self.width * (4 if bits == 32 else 2)
