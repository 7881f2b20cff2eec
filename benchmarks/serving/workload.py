"""What is asked: prompts, lengths, and when. Pure; the same seed gives the same requests to everyone."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

WORDS = ["the", "king", "shall", "not", "come", "to", "my", "house", "until", "night", "has", "fallen", "over", "hills"]

# Mixed lengths lie between this part of the fixed length and this many times it.
SPREAD = 4
# V1 does not stream: of the requests that come by chance, this share asks for one token, to time the first.
FIRST_TOKEN_SHARE = 0.2


class Lengths(str, Enum):
    fixed = "fixed"
    mixed = "mixed"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; its seed is its name too."""

    prompt: str
    new_tokens: int
    seed: int

    @property
    def body(self) -> bytes:
        """V1's row form; the parameters left out have their defaults: sampled, among 50."""
        parameters = {"max_new_tokens": self.new_tokens, "seed": self.seed, "ignore_eos": True}
        return json.dumps({"instances": [self.prompt], "parameters": parameters}).encode()

    @property
    def for_one_token(self) -> Ask:
        return replace(self, new_tokens=1)


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float  # since the run began
    ask: Ask


@dataclass(frozen=True, slots=True)
class Mix:
    """How long requests are, in words of the prompt (about a token each) and in new tokens."""

    lengths: Lengths
    words: int
    new_tokens: int

    def describe(self) -> str:
        if self.lengths is Lengths.fixed:
            return f"prompts of {self.words} words, answers of {self.new_tokens} tokens"
        words, tokens = _bounds(self.words, 1), _bounds(self.new_tokens, 2)
        return (
            f"prompts of {words[0]} to {words[1]} words, answers of {tokens[0]} to {tokens[1]} tokens, "
            "log-uniform: every doubling as likely as the next"
        )

    @property
    def mean_new_tokens(self) -> float:
        if self.lengths is Lengths.fixed:
            return self.new_tokens
        low, high = _bounds(self.new_tokens, 2)
        return (high - low) / math.log(high / low)

    def clients(self, clients: int, requests: int, seed: int) -> list[list[Ask]]:
        """For each client the requests it sends one after the other."""
        asks = self._asks(f"clients {clients} {seed}")
        return [[next(asks) for _ in range(requests)] for _ in range(clients)]

    def arrivals(self, rate: float, seconds: float, seed: int, first_token_share: float) -> list[Arrival]:
        """A Poisson process of `rate` requests/s: gaps are exponential, nobody waits for an answer."""
        chance = random.Random(f"arrivals {rate} {seed}")
        asks = self._asks(f"rate {rate} {seed}")
        found, at_s = list[Arrival](), chance.expovariate(rate)
        while at_s < seconds:
            ask = next(asks)
            found.append(Arrival(at_s, ask.for_one_token if chance.random() < first_token_share else ask))
            at_s += chance.expovariate(rate)
        return found

    def _asks(self, name: str) -> Iterator[Ask]:
        chance = random.Random(name)
        base = chance.randrange(2**32) << 16  # seeds of a run follow each other, those of two runs are apart

        def one(number: int) -> Ask:
            words = self._length(chance, self.words, 1)
            prompt = " ".join(chance.choice(WORDS) for _ in range(words))
            return Ask(prompt, self._length(chance, self.new_tokens, 2), base + number)

        return map(one, itertools.count())

    def _length(self, chance: random.Random, middle: int, least: int) -> int:
        if self.lengths is Lengths.fixed:
            return middle
        low, high = _bounds(middle, least)
        return round(math.exp(chance.uniform(math.log(low), math.log(high))))


def _bounds(middle: int, least: int) -> tuple[int, int]:
    return max(least, middle // SPREAD), middle * SPREAD


def first_tokens(clients: Sequence[Sequence[Ask]]) -> list[list[Ask]]:
    """Each client's first request, for one token alone."""
    return [[asks[0].for_one_token] for asks in clients]
