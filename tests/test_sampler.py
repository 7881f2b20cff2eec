"""Each step of the sampler against transformers' own processors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from predictor.engine.params import SamplingParams
from predictor.engine.sampler import edit_logits, sample
from tests.conftest import transformers_distribution

V = 97


@dataclass
class Row:
    params: SamplingParams
    seed: int = 0
    prompt_ids: list[int] = field(default_factory=lambda: [3, 5, 5, 8])
    output_ids: list[int] = field(default_factory=list)


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 50} | changes))


def random_logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def counts(logits: Tensor, chosen: SamplingParams, draws: int = 4000) -> Tensor:
    """How often each token is drawn from one row of logits, over seeds."""
    rows = [Row(chosen, seed=seed) for seed in range(draws)]
    tokens = [each.token_id for each in sample(logits.repeat(draws, 1), rows)]
    return torch.bincount(torch.tensor(tokens), minlength=V)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 50, 1.0),
        (1.3, 5, 1.0),
        (1.0, 0, 0.8),
        (0.7, 20, 0.5),
        (100.0, 0, 1.0),
        (1.0, V, 0.9),
        (2.0, 1, 1.0),
    ],
)
def test_draws_follow_transformers_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits()
    drawn = counts(logits, params(temperature=temperature, top_k=top_k, top_p=top_p))
    probability = transformers_distribution(logits, temperature, top_k, top_p)
    assert not drawn[probability == 0].any(), "a token outside top-k or top-p was drawn"
    likely = probability * drawn.sum() > 5
    error = (drawn - probability * drawn.sum())[likely] / (probability * drawn.sum())[likely].sqrt()
    assert error.abs().max() < 5  # five standard deviations, on fixed seeds


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    rows = [Row(params(temperature=1.0, top_k=0, top_p=0.8), seed=seed) for seed in range(500)]
    assert {each.token_id for each in sample(logits.repeat(500, 1), rows)} == {0, 1}
    rows = [Row(params(temperature=1.0, top_k=0, top_p=0.801), seed=seed) for seed in range(500)]
    assert {each.token_id for each in sample(logits.repeat(500, 1), rows)} == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-320, 5e-324, 1e-300, 1e-30, 1e-9])
@pytest.mark.parametrize("top_k", [0, 50])
def test_a_vanishing_temperature_is_greedy(temperature: float, top_k: int) -> None:
    logits = random_logits()
    (drawn,) = sample(logits.clone(), [Row(params(temperature=temperature, top_k=top_k))])
    assert drawn.token_id == int(logits.argmax())


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(1, V)
    assert sample(logits, [Row(params(temperature=0.0))])[0].token_id == 0


@pytest.mark.parametrize("penalty", [0.5, 1.2, 10.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits, row = random_logits(), Row(params(repetition_penalty=penalty), output_ids=[9, 5])
    seen = torch.tensor([row.prompt_ids + row.output_ids])
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    edit_logits(logits[0], row)
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=0)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    logits, row = random_logits(), Row(params(presence_penalty=0.5, frequency_penalty=0.25), output_ids=[9, 9, 4])
    wanted = logits.clone()
    wanted[0, 9] -= 0.5 + 2 * 0.25
    wanted[0, 4] -= 0.5 + 0.25
    edit_logits(logits[0], row)
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=0)


def test_min_new_tokens_is_transformers() -> None:
    for already in (0, 2, 3):
        logits, row = (
            random_logits(),
            Row(params(min_new_tokens=3, end_tokens=frozenset({7})), output_ids=[1] * already),
        )
        ids = torch.tensor([row.prompt_ids + row.output_ids])
        wanted = MinNewTokensLengthLogitsProcessor(len(row.prompt_ids), 3, [7])(ids, logits.clone())
        edit_logits(logits[0], row)
        assert torch.equal(logits, wanted)


def test_bias_moves_logits_and_a_filter_bans() -> None:
    class Ban:
        def banned_after(self, token_ids: list[int]) -> list[int]:
            assert token_ids == [3, 5, 5, 8, 2]
            return [11, 12]

    logits, row = random_logits(), Row(params(logit_bias={4: 2.5, 6: -100.0}, token_filter=Ban()), output_ids=[2])
    wanted = logits.clone()
    wanted[0, 4] += 2.5
    wanted[0, 6] -= 100
    wanted[0, [11, 12]] = -math.inf
    edit_logits(logits[0], row)
    torch.testing.assert_close(logits, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", [1e-320, 1e-300, 1e-30, 10.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 0.7, 100.0])
def test_extreme_penalties_still_give_a_token(penalty: float, temperature: float) -> None:
    logits = random_logits()
    logits[0, 5] = 0.0
    (drawn,) = sample(logits, [Row(params(repetition_penalty=penalty, temperature=temperature))])
    assert drawn.token_id is not None


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits()
    raw = logits.log_softmax(-1)[0]
    chosen = params(temperature=0.0, logit_bias={17: 100.0}, logprobs=3)
    (drawn,) = sample(logits, [Row(chosen)])
    assert drawn.token_id == 17
    assert drawn.logprob == pytest.approx(raw[17].item(), abs=1e-6)
    values, ids = raw.topk(3)
    assert [token_id for token_id, _ in drawn.top_logprobs] == ids.tolist()
    assert [value for _, value in drawn.top_logprobs] == pytest.approx(values.tolist(), abs=1e-6)


def test_logprobs_zero_gives_the_chosen_tokens_alone() -> None:
    (drawn,) = sample(random_logits(), [Row(params(logprobs=0))])
    assert drawn.logprob is not None
    assert drawn.top_logprobs == ()


def test_a_row_without_a_finite_logit_says_so_and_leaves_its_neighbours() -> None:
    logits = random_logits(3)
    logits[1] = math.nan
    first, second, third = sample(logits, [Row(params()), Row(params()), Row(params(temperature=0.0))])
    assert second.token_id is None
    assert first.token_id is not None
    assert third.token_id is not None


def test_a_row_is_drawn_the_same_alone_and_in_company() -> None:
    kinds = [
        params(temperature=0.0), params(), params(top_k=0), params(top_k=0, top_p=0.7), params(top_k=7, top_p=0.9),
        params(repetition_penalty=1.3), params(logprobs=4), params(top_k=V), params(temperature=1e-320),
    ]  # fmt: skip
    rows = [Row(kinds[i % len(kinds)], seed=i, output_ids=[1, 2, 3][: i % 4]) for i in range(60)]
    logits = random_logits(len(rows), seed=5)
    together = sample(logits.clone(), rows)
    alone = [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    assert together == alone
