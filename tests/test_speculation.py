"""Guesses change how fast a text comes and nothing of the text."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from predictor.checkpoints.load import load_compiled, load_gpt2, why_not_compiled
from predictor.engine.engine import Engine
from predictor.engine.params import SamplingParams, Token
from predictor.engine.runner import GPT2Forward
from predictor.engine.sequence import new_request
from predictor.engine.speculation import MOST_GUESSES, MOST_SEQUENCES, Lookup, Pace
from predictor.model.config import GPT2Config, parse_config
from predictor.model.cpu.gpt2 import CPUGPT2
from tests.conftest import ROOT, left_out

BARD = ROOT / "models" / "bard"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def model(request: pytest.FixtureRequest) -> CPUGPT2:
    """The bundled model: greedy, it soon says again what it has said, so that guesses hold."""
    config: GPT2Config = parse_config(json.loads((BARD / "config.json").read_text()))
    reason = why_not_compiled(config, request.param)
    if reason is not None:
        left_out(reason)
    return load_compiled(BARD, request.param, threads=2)


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess whenever there is a guess, whatever it costs on this machine."""
    monkeypatch.setattr(Pace, "choose", lambda self, sequences, ways: ways[-1])


def generate(
    model: CPUGPT2, requests: list[tuple[list[int], dict[str, Any]]], speculation: bool
) -> tuple[list[list[Token | Exception]], Engine, int]:
    """Everything each sequence was sent, the engine after it, and how many steps it took."""
    engine = Engine(
        GPT2Forward(model, 4096),
        context=model.config.context, max_running=8, chunk_tokens=16, step_tokens=48, speculation=speculation,
    )  # fmt: skip
    delivered: list[list[Token | Exception]] = []
    for prompt, params in requests:
        given = SamplingParams(**({"max_new_tokens": 100, "temperature": 0.0, "ignore_eos": True} | params))
        lists: list[list[Token | Exception]] = [[] for _ in range(given.n)]
        delivered += lists
        engine.add(new_request(prompt, given, [each.append for each in lists]))
    steps = 0
    while engine.step():
        steps += 1
    assert engine.load.used_slots == 0
    return delivered, engine, steps


def prompt_of(seed: int, tokens: int = 20) -> list[int]:
    return random.Random(seed).choices(range(2048), k=tokens)


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.4, "seed": 3},
    "sampled over all": {"temperature": 0.3, "top_k": 0, "top_p": 0.9, "seed": 4},
    "penalties": {"repetition_penalty": 1.02, "frequency_penalty": 0.02, "presence_penalty": 0.1},
    "biased": {"logit_bias": {5: 2.0, 11: -3.0}},
    "logprobs": {"logprobs": 3},
    "several samples": {"n": 3, "temperature": 0.2, "seed": 9},
    "past the context": {"max_new_tokens": 600, "window": 256},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "to the end of the context": {"max_new_tokens": 256 - 20},
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_without_guesses(model: CPUGPT2, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    eager(monkeypatch)
    requests = [(prompt_of(1), CASES[case])]
    plain, _, plain_steps = generate(model, requests, speculation=False)
    guessed, engine, steps = generate(model, requests, speculation=True)
    assert guessed == plain  # log-probabilities and finish reasons too
    if case in ("greedy", "past the context"):
        assert engine.load.held_tokens > 20
        assert steps < 0.9 * plain_steps


def test_an_end_among_the_guesses_ends_the_text(model: CPUGPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    prompt = prompt_of(1)
    (plain,), _, _ = generate(model, [(prompt, {})], speculation=False)
    for place in (30, 45, 60, 75):
        end = plain[place].id
        params = {"ignore_eos": False, "end_tokens": frozenset({end})}
        wanted, _, _ = generate(model, [(prompt, params)], speculation=False)
        told, _, _ = generate(model, [(prompt, params)], speculation=True)
        assert told == wanted
        assert told[0][-1].finish_reason == "stop"


def test_mixes_of_requests_get_what_they_get_alone(model: CPUGPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    requests = [(prompt_of(seed, 5 + 9 * seed), {"max_new_tokens": 40 + 10 * seed, "seed": seed}) for seed in range(6)]
    together, engine, _ = generate(model, requests, speculation=True)
    assert engine.load.guessed_tokens > 0
    for request, told in zip(requests, together, strict=True):
        assert generate(model, [request], speculation=False)[0] == [told]


def test_more_sequences_than_pay_are_not_guessed_for(model: CPUGPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    requests = [(prompt_of(1), {}) for _ in range(MOST_SEQUENCES + 1)]
    assert generate(model, requests, speculation=True)[1].load.guessed_tokens == 0


def test_a_forward_whose_rows_may_differ_is_not_guessed_for(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    eager(monkeypatch)
    forward = GPT2Forward(load_gpt2(checkpoint, torch.float32, CPU), 512)
    engine = Engine(forward, context=128, max_running=8, chunk_tokens=16, step_tokens=48, speculation=True)
    engine.add(new_request([1, 2, 3] * 10, SamplingParams(max_new_tokens=60, temperature=0.0), [lambda token: None]))
    while engine.step():
        pass
    assert engine.load.guessed_tokens == 0


def test_a_guess_is_what_followed_the_longest_run_last_time() -> None:
    lookup = Lookup()
    lookup.learn(guessed=4, kept=4)  # guesses have held: look further
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 7, 1, 2, 3, 4], most=3) == [5, 9, 2]
    assert lookup.guess([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 7, 1, 2, 3, 4, 8, 3, 4], most=3) == [8, 3, 4]
    assert Lookup().guess([1, 2, 3, 4], most=3) == []
    assert Lookup().guess([1], most=3) == []
    assert Lookup().guess([1, 2, 1, 2], most=0) == []


def test_guesses_reach_as_far_as_they_hold() -> None:
    lookup, ids = Lookup(), [1, 2, 3] * 20
    assert len(lookup.guess(ids, most=50)) == 2
    lookup.learn(guessed=2, kept=2)
    assert len(lookup.guess(ids, most=50)) == 3  # what is known to follow ends with the text
    ids = list(range(50)) * 2
    for reach in (2, 4, 8, MOST_GUESSES, MOST_GUESSES):
        if reach == 2:
            lookup = Lookup()
        assert len(lookup.guess(ids, most=50)) == min(reach, 50)
        lookup.learn(guessed=reach, kept=reach)
    lookup.learn(guessed=8, kept=0)
    assert len(lookup.guess(ids, most=50)) == 1


class Clock:
    """Steps of a pace, each way of which takes so many seconds and yields so many tokens."""

    def __init__(self, **ways: tuple[float, int]) -> None:
        self.pace, self.ways = Pace(), ways

    def choices(self, steps: int, sequences: int = 1) -> Counter[str]:
        chosen: Counter[str] = Counter()
        for _ in range(steps):
            way = self.pace.choose(sequences, list(self.ways))
            chosen[way] += 1
            self.pace.measured(sequences, way, *self.ways[way])
        return chosen


def test_the_fastest_way_is_taken_and_the_others_tried_again() -> None:
    clock = Clock(plain=(1.0, 1), lookup=(1.5, 1), draft=(1.2, 2))
    first = clock.choices(24)
    assert first == {"plain": 8, "lookup": 8, "draft": 8}
    assert clock.choices(200) == {"draft": 200}
    later = clock.choices(2640)
    assert later["draft"] > 0.9 * 2640
    assert min(later["plain"], later["lookup"]) > 50
    clock.ways["draft"] = (3.0, 2)  # the text has changed: what it guesses no longer holds
    clock.choices(50)
    assert clock.choices(200)["plain"] >= 200 - 2 * 8
    assert clock.choices(24, sequences=3) == first, "a step of three sequences has costs of its own"


def test_tokens_per_second_decide_though_steps_differ() -> None:
    """By the mean of each step's seconds per token, 0.825, guessing would be given up; 24 tokens in 13.2 s gain."""
    clock = Clock(plain=(0.7, 1))
    clock.choices(8)
    for tokens in (1, 1, 4, 1, 1, 4, 1, 4, 1, 1, 4, 1):
        clock.pace.choose(1, ["plain", "draft"])
        clock.pace.measured(1, "draft", 1.1, tokens)
    assert clock.pace.choose(1, ["plain", "draft"]) == "draft"


def test_a_way_that_never_gets_ready_is_given_up_for_a_while() -> None:
    pace, chosen = Pace(), list[str]()
    for _ in range(560):
        way = pace.choose(1, ["plain", "draft"])
        chosen.append(way)
        if way == "plain":
            pace.measured(1, "plain", 0.01, 1)
        else:
            pace.unmeasured(1, "draft")
    # A trial of 32 steps, 256 choices without it, and so on.
    assert Counter(chosen)["draft"] == 64
    assert chosen[8:40] == ["draft"] * 32
    assert set(chosen[40:290]) == {"plain"}


def test_a_way_that_is_not_to_be_had_is_not_taken() -> None:
    clock = Clock(plain=(1.0, 1), lookup=(1.0, 5))
    clock.choices(50)
    assert clock.pace.choose(1, ["plain"]) == "plain"
    assert clock.pace.choose(1, ["plain", "lookup"]) == "lookup"
