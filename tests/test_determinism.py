"""The promise: same request, same seed, same tokens, whoever else is being served. Bit for bit, in fp32 on CPU."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from predictor.backends.base import Backend
from predictor.text.language_model import LanguageModel
from predictor.text.request import Completion, TextRequest
from tests.conftest import open_quietly

TEXTS = ["hello world", "the then there", "", "banana " * 12, "x", "the word banana hello the there then " * 2]


def requests(count: int, seed: int = 0) -> list[TextRequest]:
    """Requests of every kind, all different."""
    chance = random.Random(seed)
    return [
        TextRequest(
            prompt=chance.choice(TEXTS) + str(place),
            max_new_tokens=chance.randint(1, 30),
            temperature=chance.choice([0.0, 0.7, 1.0, 3.0]),
            top_k=chance.choice([0, 5, 50]),
            top_p=chance.choice([1.0, 0.8]),
            repetition_penalty=chance.choice([1.0, 1.2]),
            frequency_penalty=chance.choice([0.0, 0.5]),
            seed=place,
            n=chance.choice([1, 1, 1, 3]),
            logprobs=2,
        )
        for place in range(count)
    ]


def bits(completions: list[Completion]) -> list[object]:
    """Tokens and the exact bits of their log-probabilities."""
    return [(each.text, each.seed, each.logprobs, each.top_logprobs) for each in completions]


async def test_alone_and_among_31_others_are_the_same(backend: Backend) -> None:
    model = LanguageModel(backend)
    batch = requests(32)
    together = await model.generate(batch, 60)
    for request, answers in zip(batch, together, strict=True):
        (alone,) = await model.generate([request], 60)
        assert bits(alone) == bits(answers)


async def test_arriving_at_any_moment_is_the_same(backend: Backend) -> None:
    model = LanguageModel(backend)
    batch = requests(24, seed=1)
    alone = [(await model.generate([request], 60))[0] for request in batch]
    chance = random.Random(2)

    async def later(request: TextRequest) -> list[Completion]:
        await asyncio.sleep(chance.random() * 0.1)
        return (await model.generate([request], 60))[0]

    for _ in range(3):
        answers = await asyncio.gather(*(later(request) for request in batch))
        assert [bits(each) for each in answers] == [bits(each) for each in alone]


async def test_sample_k_is_the_request_with_seed_plus_k(backend: Backend) -> None:
    model = LanguageModel(backend)
    ask = TextRequest(prompt="hello", max_new_tokens=20, temperature=1.5, logprobs=0, seed=2**64 - 2, n=4)
    (samples,) = await model.generate([ask], 60)
    assert [each.seed for each in samples] == [2**64 - 2, 2**64 - 1, 0, 1]
    for sample in samples:
        one = TextRequest(prompt="hello", max_new_tokens=20, temperature=1.5, logprobs=0, seed=sample.seed)
        ((alone,),) = await model.generate([one], 60)
        assert bits([alone]) == bits([sample])


@pytest.mark.parametrize(
    "limits", [{"max_running": 1}, {"max_running": 3}, {"kv_memory_mib": 1}, {"step_tokens": 16}], ids=str
)
async def test_memory_and_seats_change_nothing(checkpoint: Path, backend: Backend, limits: dict[str, int]) -> None:
    batch = requests(12, seed=3)
    wanted = await LanguageModel(backend).generate(batch, 60)
    other = open_quietly(checkpoint, prefill_chunk_tokens=16, **limits)
    try:
        assert [bits(each) for each in await LanguageModel(other).generate(batch, 60)] == [
            bits(each) for each in wanted
        ]
    finally:
        other.stop()
        other.join(10)


async def test_a_new_process_gives_the_same(checkpoint: Path, backend: Backend) -> None:
    """Within one process it could be luck of the heap; a second load of the weights stands in for a restart."""
    other = open_quietly(checkpoint, prefill_chunk_tokens=16)
    try:
        batch = requests(6, seed=4)
        first = await LanguageModel(backend).generate(batch, 60)
        assert [bits(each) for each in await LanguageModel(other).generate(batch, 60)] == [bits(each) for each in first]
    finally:
        other.stop()
        other.join(10)


async def test_random_seeds_are_told_and_reproduce(backend: Backend) -> None:
    model = LanguageModel(backend)
    ask = TextRequest(prompt="hello", max_new_tokens=20, temperature=2.0)
    ((first,),) = await model.generate([ask], 60)
    ((second,),) = await model.generate([ask], 60)
    assert first.seed != second.seed
    told = TextRequest(prompt="hello", max_new_tokens=20, temperature=2.0, seed=first.seed)
    ((again,),) = await model.generate([told], 60)
    assert again.text == first.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_narrow_formats_keep_it_on_this_cpu(checkpoint: Path, dtype: str) -> None:
    other = open_quietly(checkpoint, dtype=dtype, prefill_chunk_tokens=16)
    try:
        model = LanguageModel(other)
        batch = requests(16, seed=5)
        together = await model.generate(batch, 60)
        for request, answers in zip(batch, together, strict=True):
            assert bits((await model.generate([request], 60))[0]) == bits(answers)
    finally:
        other.stop()
        other.join(10)
