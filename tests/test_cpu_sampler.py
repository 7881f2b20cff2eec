"""The compiled sampler against engine/sampler.py's torch, and both against the rule written down plainly."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from predictor.engine.params import SamplingParams
from predictor.engine.philox import uniform
from predictor.engine.runner import compiled_choice
from predictor.engine.sampler import choose_with_torch
from predictor.model.config import GPT2Config
from predictor.model.cpu.gpt2 import CPUGPT2
from tests.compiled import INSTRUCTION_SETS, compiled, each_instruction_set
from tests.conftest import transformers_distribution

__all__ = ["compiled"]

# Seeds whose first number is 1.2e-10 and 1 - 2.2e-10: the ends of a distribution.
LOWEST, HIGHEST = 2840786748, 1291147972
LARGEST = torch.finfo(torch.float32).max


@dataclass
class Row:
    params: SamplingParams
    seed: int = 0
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)


@functools.cache
def sampler(vocabulary: int, instruction_set: str, threads: int = 1) -> CPUGPT2:
    """As small a model as there can be, of zeros: only its vocabulary and its threads matter."""
    config = GPT2Config(
        vocabulary=vocabulary, context=1, width=16, layers=1, heads=1, inner_width=16, epsilon=1e-5,
        activation="relu", scale_attention=True, scale_by_inverse_layer=False, tied_embeddings=True, end_token=None,
    )  # fmt: skip
    return CPUGPT2(config, lambda _, shape: torch.zeros(shape), "float32", threads, instruction_set)


def choose(logits: Tensor, rows: list[Row], instruction_set: str, threads: int = 1) -> list[int | None]:
    return compiled_choice(sampler(logits.shape[1], instruction_set, threads))(logits, rows)


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 1, "temperature": 1.0, "top_k": 0} | changes))


def plainly(logits: Tensor, row: Row) -> int | None:
    """engine/sampler.py's rule for one row, in Python: among equal logits the lower id comes first."""
    p, scores = row.params, logits.tolist()
    best = max(scores) if not any(map(math.isnan, scores)) else math.nan
    if not math.isfinite(best):
        return None
    if p.temperature == 0:
        return scores.index(best)
    tokens = list(range(len(scores)))
    if 0 < p.top_k < len(scores) or p.top_p < 1:
        tokens.sort(key=lambda token: (-scores[token], token))
    if 0 < p.top_k < len(scores):
        tokens = tokens[: p.top_k]
    weights = [math.exp((scores[token] - best) / p.temperature) for token in tokens]
    total, mass, kept = sum(weights), 0.0, []
    for token, weight in zip(tokens, weights, strict=True):
        if kept and mass >= p.top_p * total:
            break
        mass += weight
        kept.append((token, mass))
    u = uniform([row.seed], [len(row.output_ids)])[0]
    return next(token for token, below in kept if below > u * mass)


KINDS = [
    params(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature in (0.0, 1e-320, 1e-30, 0.05, 0.7, 1.0, 100.0)
    for top_k in (0, 1, 2, 50)
    for top_p in (1.0, 0.9999999999999999, 0.9, 0.3, 1e-320)
]


def random_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def test_every_vocabulary_up_to_100_is_torchs() -> None:
    for vocabulary in range(1, 101):
        logits = random_logits(len(KINDS), vocabulary, seed=vocabulary)
        rows = [Row(kind, seed=1000 * vocabulary + i) for i, kind in enumerate(KINDS)]
        wanted = choose_with_torch(logits, rows)
        for instruction_set in INSTRUCTION_SETS:
            assert choose(logits, rows, instruction_set) == wanted, f"{instruction_set}, {vocabulary} tokens"


# Multiples of what is summed together (256), and of what a register holds, and beside them; GPT-2's own.
@pytest.mark.parametrize("vocabulary", [255, 256, 257, 511, 512, 513, 4097, 50257])
def test_large_vocabularies_are_torchs(vocabulary: int) -> None:
    rows = [Row(kind, seed=i, output_ids=[0] * (i % 5)) for i, kind in enumerate(KINDS)]
    for spread in (0.01, 3.0, 30.0):  # flat to peaked: how many candidates top-p keeps
        logits = random_logits(len(rows), vocabulary, seed=vocabulary, spread=spread)
        wanted = choose_with_torch(logits, rows)
        for instruction_set in INSTRUCTION_SETS:
            assert choose(logits, rows, instruction_set) == wanted, f"{instruction_set}, spread {spread}"


@pytest.mark.parametrize("seed", [LOWEST, HIGHEST])
@each_instruction_set
def test_the_ends_of_a_distribution_are_torchs(instruction_set: str, seed: int) -> None:
    u = uniform([seed], [0])[0]
    assert min(u, 1 - u) < 1e-9
    for vocabulary in (2, 5, 33, 700):
        for gap in (15.0, 20.0, 21.5, 22.0, 22.5, 23.0, 25.0, 700.0, 800.0):
            # A small weight at the beginning, at the end, or everywhere but at one place.
            logits = torch.zeros(4, vocabulary)
            logits[0, 0] = logits[1, -1] = logits[2, 1:] = logits[3, :-1] = -gap
            for kind in (params(), params(top_p=0.9999999999999999), params(top_k=vocabulary - 1), params(top_p=0.999)):
                rows = [Row(kind, seed=seed)] * 4
                found = choose(logits, rows, instruction_set)
                assert found == [plainly(each, row) for each, row in zip(logits, rows, strict=True)]
                if not kind.top_k:  # torch's topk orders equal logits as it likes
                    assert found == choose_with_torch(logits, rows)


@each_instruction_set
def test_a_token_of_no_weight_is_never_drawn(instruction_set: str) -> None:
    """Bans are logits of -inf: at the beginning, at the end, whole stretches of the vocabulary."""
    for vocabulary in (3, 40, 300, 1000):
        for allowed in ([0], [vocabulary - 1], [vocabulary // 2], [0, vocabulary - 1]):
            logits = torch.full((len(KINDS) * 2, vocabulary), -torch.inf)
            logits[:, allowed] = random_logits(len(logits), len(allowed))
            rows = [Row(kind, seed=seed) for kind in KINDS for seed in (LOWEST, HIGHEST)]
            found = choose(logits, rows, instruction_set)
            assert set(found) <= set(allowed)
            assert found == choose_with_torch(logits, rows)


@each_instruction_set
def test_a_row_without_a_finite_largest_logit_says_so(instruction_set: str) -> None:
    for vocabulary in (1, 2, 15, 16, 17, 33, 300):
        for place in sorted({0, vocabulary // 2, vocabulary - 1}):
            logits = random_logits(8, vocabulary)
            logits[0, place] = torch.nan
            logits[1, place] = torch.inf
            logits[2, :] = -torch.inf
            logits[3, :] = torch.nan
            logits[4, place] = -torch.nan
            logits[5, place], logits[5, 0] = torch.inf, torch.nan
            logits[6, place] = LARGEST
            logits[7, :] = -LARGEST
            for kind in KINDS[::7]:
                rows = [Row(kind, seed=7)] * 8
                found = choose(logits, rows, instruction_set)
                assert found[:6] == [None] * 6
                assert found[6] == place
                assert found[7] is not None
                assert found == [plainly(each, row) for each, row in zip(logits, rows, strict=True)]


@each_instruction_set
def test_minus_infinity_beside_finite_logits_is_a_ban_and_no_damage(instruction_set: str) -> None:
    logits = random_logits(len(KINDS), 77)
    logits[:, ::3] = -torch.inf
    rows = [Row(kind, seed=i) for i, kind in enumerate(KINDS)]
    found = choose(logits, rows, instruction_set)
    assert found == choose_with_torch(logits, rows)
    assert all(token is not None and token % 3 for token in found)


@each_instruction_set
def test_greedy_takes_the_first_of_the_largest(instruction_set: str) -> None:
    for vocabulary in range(1, 70):
        rows = [Row(params(temperature=0.0))] * 4
        logits = torch.zeros(4, vocabulary)
        logits[1] = -torch.arange(vocabulary).float()
        logits[2] = torch.arange(vocabulary).float()
        logits[3, vocabulary // 3] = -0.0
        logits[3, : vocabulary // 3] = -1e-45  # the negative number nearest to 0
        assert choose(logits, rows, instruction_set) == [0, 0, vocabulary - 1, vocabulary // 3]
        for value in (LARGEST, -LARGEST, 1e-45, -1e-45, 5.0):
            assert choose(torch.full((1, vocabulary), value), rows[:1], instruction_set) == [0]


@each_instruction_set
def test_among_equal_logits_the_lower_id_comes_first(instruction_set: str) -> None:
    chance = random.Random(0)
    for vocabulary in (3, 16, 50, 257, 900):
        logits = torch.tensor([[float(chance.randrange(4)) for _ in range(vocabulary)] for _ in KINDS])
        logits[0] = 0
        rows = [Row(kind, seed=chance.getrandbits(64)) for kind in KINDS]
        wanted = [plainly(each, row) for each, row in zip(logits, rows, strict=True)]
        assert choose(logits, rows, instruction_set) == wanted
        no_ties = [i for i, row in enumerate(rows) if not 0 < row.params.top_k < vocabulary]  # see above
        assert choose_with_torch(logits[no_ties], [rows[i] for i in no_ties]) == [wanted[i] for i in no_ties]


number = st.one_of(
    st.floats(-50, 50, width=32),
    st.integers(-3, 3).map(float),
    st.sampled_from([-math.inf, 0.0, -0.0, 3e38, -3e38, 1e-45]),
)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(number, min_size=1, max_size=70),
    seed=st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([LOWEST, HIGHEST])),
    position=st.integers(0, 3),
    temperature=st.sampled_from([0.0, 5e-324, 1e-320, 1e-6, 0.3, 1.0, 7.5, 100.0]),
    top_k=st.integers(0, 70),
    top_p=st.one_of(st.just(1.0), st.sampled_from([1e-300, 0.05, 0.7, 0.97])),
)
def test_any_row_is_drawn_by_the_rule(
    logits: list[float], seed: int, position: int, temperature: float, top_k: int, top_p: float
) -> None:
    kind = params(temperature=temperature, top_k=top_k, top_p=top_p)
    row, row_logits = Row(kind, seed, output_ids=[0] * position), torch.tensor([logits])
    wanted = plainly(row_logits[0], row)
    for instruction_set in INSTRUCTION_SETS:
        assert choose(row_logits, [row], instruction_set) == [wanted], instruction_set


@each_instruction_set
def test_every_seed_and_position_draws_philoxs_number(instruction_set: str) -> None:
    """Seen in a flat distribution of 50,257 tokens: the token is the number's place."""
    chance = random.Random(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, *(chance.getrandbits(64) for _ in range(200))]
    rows = [Row(params(), seed, output_ids=[0] * (i % 40)) for i, seed in enumerate(seeds)]
    numbers = uniform(seeds, [len(row.output_ids) for row in rows])
    found = choose(torch.zeros(1, 50257).expand(len(rows), -1).contiguous(), rows, instruction_set)
    assert found == [int(u * 50257) for u in numbers]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 50, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.7, 20, 0.5), (100.0, 0, 1.0), (2.0, 1, 1.0)],
)
@each_instruction_set
def test_draws_follow_transformers_distribution(
    instruction_set: str, temperature: float, top_k: int, top_p: float
) -> None:
    vocabulary, draws = 97, 4000
    logits = random_logits(1, vocabulary)
    rows = [Row(params(temperature=temperature, top_k=top_k, top_p=top_p), seed=seed) for seed in range(draws)]
    drawn = torch.bincount(torch.tensor(choose(logits.repeat(draws, 1), rows, instruction_set)), minlength=vocabulary)
    expected = transformers_distribution(logits, temperature, top_k, top_p) * draws
    assert not drawn[expected == 0].any(), "a token outside top-k or top-p was drawn"
    likely = expected > 5
    error = (drawn - expected)[likely] / expected[likely].sqrt()
    assert error.abs().max() < 5  # five standard deviations, on fixed seeds


@each_instruction_set
def test_a_row_is_drawn_the_same_alone_in_company_and_by_any_threads(instruction_set: str) -> None:
    logits = random_logits(len(KINDS), 300)
    rows = [Row(kind, seed=i, output_ids=[1] * (i % 4)) for i, kind in enumerate(KINDS)]
    alone = [choose(logits[i : i + 1], [row], instruction_set)[0] for i, row in enumerate(rows)]
    for threads in (1, 2, 3, 5):
        for _ in range(3):
            assert choose(logits, rows, instruction_set, threads) == alone


@each_instruction_set
def test_rows_lie_apart_and_what_lies_between_them_is_not_read(instruction_set: str) -> None:
    """As the step's logits do: rows of whole blocks of 32; here also at addresses no vector would choose."""
    wanted = random_logits(len(KINDS), 77)
    rows = [Row(kind, seed=i) for i, kind in enumerate(KINDS)]
    chosen = choose(wanted, rows, instruction_set)
    for pitch, shift in ((96, 0), (77, 1), (78, 3)):
        for between in (torch.nan, torch.inf, 1e30):
            memory = torch.full((len(KINDS) * pitch + shift,), between)
            logits = memory[shift:].view(len(KINDS), pitch)[:, :77]
            logits.copy_(wanted)
            assert choose(logits, rows, instruction_set) == chosen


def test_nothing_to_draw_is_nothing_drawn() -> None:
    assert choose(torch.empty((0, 40)), [], INSTRUCTION_SETS[0]) == []
