"""Held against the published answers of Random123 (Salmon et al. 2011, kat_vectors, philox4x32 10 rounds)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor.engine.philox import philox, uniform

KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    assert (philox(words(counter), words(key)) == words(answer)).all()


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**20)), min_size=1, max_size=40))
def test_a_number_depends_on_its_seed_and_position_alone(pairs: list[tuple[int, int]]) -> None:
    together = uniform([seed for seed, _ in pairs], [position for _, position in pairs])
    alone = [uniform([seed], [position])[0] for seed, position in pairs]
    assert together.tolist() == alone


def test_numbers_are_uniform() -> None:
    numbers = uniform([7] * 20_000, range(20_000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 43.8  # 99.9% of chi-squared with 19 degrees of freedom; the numbers are fixed


def test_seed_zero_is_a_seed_and_large_seeds_differ() -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    assert len(set(uniform(seeds, [0] * len(seeds)).tolist())) == len(seeds)
