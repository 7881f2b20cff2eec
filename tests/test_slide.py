"""Past the context: the window slides by the documented rule, held against a loop of plain full forwards."""

from __future__ import annotations

import asyncio
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from predictor.backends.base import Backend
from predictor.engine.params import SamplingParams, Token
from predictor.engine.sequence import start_of_window
from predictor.engine.stream import TokenStream
from predictor.errors import DeadlineExceeded
from predictor.text.language_model import LanguageModel
from predictor.text.request import Completion, TextRequest
from tests.conftest import open_quietly

CONTEXT = 128
NEW = 220  # three slides or four, wherever the prompt ends
# One token; the context less one, exactly, and more; ends of a later window; several windows.
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
PROMPTS = [1, 100, 127, 128, 129, 191, 192, 193, 700]


def prompt_of(tokens: int) -> list[int]:
    return torch.randint(1, 270, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def greedy(new: int = NEW, **changes: Any) -> SamplingParams:
    """Penalties keep a greedy random model from going round in circles."""
    given = {"window": CONTEXT, "temperature": 0.0, "ignore_eos": True, **PENALTIES}
    return SamplingParams(max_new_tokens=new, **(given | changes))


@pytest.fixture(scope="module")
def wanted(oracle: GPT2LMHeadModel) -> Any:
    """(prompt tokens) -> NEW greedy tokens by the rule in docs/architecture.md, each by a full forward.

    Penalties look at all of the text, the tokens that the window has left included.
    """
    penalize = RepetitionPenaltyLogitsProcessor(PENALTIES["repetition_penalty"])

    @cache
    @torch.inference_mode()
    def generate(prompt_tokens: int) -> list[int]:
        ids, start = prompt_of(prompt_tokens), 0
        for _ in range(NEW):
            while len(ids) - start > CONTEXT:
                start += CONTEXT // 2
            logits = penalize(torch.tensor([ids]), oracle(torch.tensor([ids[start:]])).logits[:, -1])[0]
            counts = torch.bincount(torch.tensor(ids[prompt_tokens:], dtype=torch.int64), minlength=len(logits))
            logits -= PENALTIES["presence_penalty"] * (counts > 0) + PENALTIES["frequency_penalty"] * counts
            ids.append(int(logits.argmax()))
        return ids[prompt_tokens:]

    return generate


async def tokens_of(backend: Backend, *requests: tuple[list[int], SamplingParams]) -> list[list[list[Token]]]:
    """The tokens of each request's samples."""

    async def all_of(stream: TokenStream) -> list[Token]:
        return [token async for token in stream]

    return [await asyncio.gather(*map(all_of, row)) for row in backend.submit(list(requests))]


async def ids_of(backend: Backend, prompt_ids: list[int], params: SamplingParams) -> list[int]:
    (((*tokens,),),) = await tokens_of(backend, (prompt_ids, params))
    assert tokens[-1].finish_reason == "length"
    return [token.id for token in tokens]


async def settled(backend: Backend) -> None:
    for _ in range(500):
        if backend.load.used_slots == backend.load.running_requests == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("sequences leaked")


# The rule.


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 128])
def test_a_full_window_moves_on_by_half(window: int) -> None:
    start = 0
    for length in range(6 * window + 2):
        if length - start > window:
            start += window - window // 2
        assert start_of_window(length, window) == start
        assert length - start <= window
        assert start == 0 or length - start > window // 2


def test_without_a_window_nothing_slides() -> None:
    assert start_of_window(10**6, None) == 0


# Against the oracle.


@pytest.mark.parametrize("prompt_tokens", PROMPTS)
async def test_greedy_tokens_are_those_of_plain_forwards(backend: Backend, wanted: Any, prompt_tokens: int) -> None:
    assert len(set(wanted(prompt_tokens)[-50:])) > 10  # no loop that any window would repeat
    assert await ids_of(backend, prompt_of(prompt_tokens), greedy()) == wanted(prompt_tokens)


@pytest.mark.parametrize("chunk", [1, 7, 64, 65, 128, 1000])
async def test_any_chunk_size_gives_them(checkpoint: Path, wanted: Any, chunk: int) -> None:
    other = open_quietly(checkpoint, prefill_chunk_tokens=chunk, step_tokens=32)
    try:
        for prompt_tokens in (100, 128, 193):
            assert await ids_of(other, prompt_of(prompt_tokens), greedy()) == wanted(prompt_tokens)
    finally:
        other.stop()
        other.join(10)


async def test_the_transformers_backend_gives_them(checkpoint: Path, wanted: Any) -> None:
    other = open_quietly(checkpoint, "transformers", prefill_chunk_tokens=32, max_running=2)
    try:
        for prompt_tokens in (100, 128, 193):
            samples = await tokens_of(other, (prompt_of(prompt_tokens), greedy(n=3)))
            assert [[token.id for token in tokens] for tokens in samples[0]] == [wanted(prompt_tokens)] * 3
    finally:
        other.stop()
        other.join(10)


async def test_what_fits_the_context_is_the_same_with_and_without(backend: Backend) -> None:
    prompt, params = prompt_of(100), greedy(28, logprobs=2)
    slid = await tokens_of(backend, (prompt, params))
    assert slid == await tokens_of(backend, (prompt, greedy(28, logprobs=2, window=None)))


async def test_a_text_sent_back_as_the_prompt_goes_on_as_it_would_have(backend: Backend) -> None:
    prompt, kept = prompt_of(100), {"presence_penalty": 0, "frequency_penalty": 0}  # those two leave prompts alone
    told = await ids_of(backend, prompt, greedy(NEW, **kept))
    assert len(set(told[-50:])) > 10
    for cut in (1, 28, 29, 60, 93, 94, 219):
        assert await ids_of(backend, prompt + told[:cut], greedy(NEW - cut, **kept)) == told[cut:]


@pytest.mark.parametrize("prompt_tokens", [128, 129])
async def test_one_token_after_a_full_context(backend: Backend, wanted: Any, prompt_tokens: int) -> None:
    assert await ids_of(backend, prompt_of(prompt_tokens), greedy(1)) == wanted(prompt_tokens)[:1]


async def test_no_sequence_holds_more_than_one_context(checkpoint: Path) -> None:
    """2 layers x (K, V) x 64 x 4 bytes = 1 KiB a token: 1 MiB is eight contexts."""
    other = open_quietly(checkpoint, kv_memory_mib=1)
    try:
        assert other.load.slots == 8 * CONTEXT
        rows = other.submit([(prompt_of(300 + k), greedy(400)) for k in range(9)])
        first = [await anext(row[0]) for row in rows[:8]]
        assert len(first) == 8
        assert (other.load.used_slots, other.load.waiting_requests) == (8 * CONTEXT, 1)
        for (stream,) in rows:
            await stream.aclose()
        await settled(other)
    finally:
        other.stop()
        other.join(10)


# Determinism.


def requests(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    chance = random.Random(seed)
    return [
        (
            prompt_of(chance.choice([3, 60, 127, 128, 129, 150, 400])),
            SamplingParams(
                max_new_tokens=chance.choice([1, 70, 150]),
                window=CONTEXT,
                temperature=chance.choice([0.0, 0.7, 3.0]),
                top_p=chance.choice([1.0, 0.8]),
                repetition_penalty=chance.choice([1.0, 1.2]),
                frequency_penalty=chance.choice([0.0, 0.5]),
                end_tokens=frozenset({0}),
                ignore_eos=chance.random() < 0.7,
                seed=place,
                n=chance.choice([1, 1, 3]),
                logprobs=2,
            ),
        )
        for place in range(count)
    ]


async def test_alone_and_among_others_are_the_same_bit_for_bit(backend: Backend) -> None:
    batch = requests(20, seed=1)
    answers = await tokens_of(backend, *batch)
    for request, answer in zip(batch, answers, strict=True):
        assert await tokens_of(backend, request) == [answer]
    assert sum(len(tokens) for row in answers for tokens in row) > 1500


@pytest.mark.parametrize(
    "limits",
    [{"max_running": 1}, {"max_running": 3}, {"kv_memory_mib": 1}, {"step_tokens": 16}, {"step_tokens": 4096}],
    ids=str,
)
async def test_memory_and_seats_change_nothing(checkpoint: Path, backend: Backend, limits: dict[str, int]) -> None:
    batch = requests(16, seed=2)
    other = open_quietly(checkpoint, prefill_chunk_tokens=16, **limits)
    try:
        assert await tokens_of(other, *batch) == await tokens_of(backend, *batch)
        assert other.load.used_slots == 0
    finally:
        other.stop()
        other.join(10)


@pytest.mark.parametrize("prompt_tokens", [100, 128, 300])
@pytest.mark.parametrize("seats", [1, 2, 5])
async def test_sample_k_is_the_request_with_seed_plus_k(checkpoint: Path, prompt_tokens: int, seats: int) -> None:
    """With one seat the samples follow one another; with two, a sample slides while others still wait."""
    other = open_quietly(checkpoint, prefill_chunk_tokens=16, max_running=seats)
    asked: dict[str, Any] = {"temperature": 2.0, "logprobs": 0}
    try:
        (samples,) = await tokens_of(other, (prompt_of(prompt_tokens), greedy(90, seed=5, n=5, **asked)))
        for k, sample in enumerate(samples):
            one = greedy(90, seed=5 + k, **asked)
            assert await tokens_of(other, (prompt_of(prompt_tokens), one)) == [[sample]]
    finally:
        other.stop()
        other.join(10)


# Everything else that ends or shapes a text, past the context.


def ask(**fields: Any) -> TextRequest:
    given = {"prompt": "hello", "context_overflow": "slide", "temperature": 2.0, "seed": 1, "ignore_eos": True}
    return TextRequest(**(given | fields))


async def complete(backend: Backend, request: TextRequest) -> Completion:
    ((completion,),) = await LanguageModel(backend).generate([request], 60)
    return completion


async def test_an_end_token_ends_past_the_context_and_not_before_min_new_tokens(backend: Backend) -> None:
    endless = await tokens_of(backend, (prompt_of(100), greedy(400, temperature=3.0)))
    ids = [token.id for token in endless[0][0]]
    end = next(token for token in ids[200:] if token not in ids[:200])  # stands in for an end-of-text token
    ((ended,),) = await tokens_of(
        backend, (prompt_of(100), greedy(400, temperature=3.0, ignore_eos=False, end_tokens=frozenset({end})))
    )
    assert [token.id for token in ended] == ids[: ids.index(end) + 1]
    assert (ended[-1].finish_reason, ended[-1].is_end) == ("stop", True)
    least = ids.index(end) + 5
    ((held,),) = await tokens_of(
        backend,
        (
            prompt_of(100),
            greedy(400, temperature=3.0, ignore_eos=False, end_tokens=frozenset({end}), min_new_tokens=least),
        ),
    )
    assert len(held) > least
    assert end not in [token.id for token in held[:least]]


async def test_a_stop_string_past_the_context_cuts_the_text(backend: Backend) -> None:
    whole = await complete(backend, ask(max_new_tokens=400))
    assert whole.completion_tokens == 400
    stop = whole.text[-40:-34]
    cut = await complete(backend, ask(max_new_tokens=400, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.completion_tokens > CONTEXT


async def test_banned_strings_never_come(backend: Backend) -> None:
    whole = await complete(backend, ask(max_new_tokens=300))
    banned = tuple(sorted(set(re.findall("[a-z]{2}", whole.text[-200:]))))[:9]  # bytes that are no text read alike
    assert len(banned) > 3
    other = await complete(backend, ask(max_new_tokens=300, bad_words=banned))
    assert other.completion_tokens == 300
    assert not any(word in other.text for word in banned)


async def test_a_cut_prompt_is_counted_and_told_whole(backend: Backend) -> None:
    prompt = "hello world " * 90
    completion = await complete(backend, ask(prompt=prompt, max_new_tokens=3))
    assert completion.prompt_tokens == len(backend.tokenizer.encode(prompt)) > CONTEXT
    assert completion.completion_tokens == 3


async def test_logprobs_come_for_every_token(backend: Backend) -> None:
    completion = await complete(backend, ask(max_new_tokens=300, logprobs=3))
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.top_logprobs) == 300


async def test_leaving_at_any_moment_frees_everything(backend: Backend) -> None:
    model, chance = LanguageModel(backend), random.Random(3)
    for _ in range(12):
        asks = [ask(prompt="hello world " * chance.choice([1, 30]), max_new_tokens=600, n=4) for _ in range(6)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.generate(asks, 60), 0.02 + 0.2 * chance.random())
    with pytest.raises(DeadlineExceeded):
        await model.generate([ask(max_new_tokens=1500, timeout_s=0.1)], 60)
    await settled(backend)
