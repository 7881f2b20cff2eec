"""Log-probabilities of the prompt's own tokens: transformers' numbers, the same bits in any company, no change to what
is generated."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from predictor.backends.aitextgen import AitextgenBackend
from predictor.backends.base import Backend
from predictor.checkpoints.load import load_compiled
from predictor.engine.engine import Engine
from predictor.engine.params import SamplingParams, Token
from predictor.engine.runner import GPT2Forward
from predictor.engine.scheduler import Batch
from predictor.engine.sequence import new_request
from predictor.engine.speculation import Pace
from predictor.errors import EngineFailed, InvalidRequest
from predictor.text.language_model import LanguageModel
from predictor.text.request import PromptToken, TextRequest
from tests.conftest import open_quietly
from tests.test_determinism import bits, requests
from tests.test_language_model import settled
from tests.test_run_ahead import BY_HOST, KINDS, new_engine

CONTEXT = 128
END = "<|endoftext|>"  # id 0


def ids(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(1, 278, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def scoring(prompt_ids: tuple[int, ...], alternatives: int = 3, **changes: object) -> TextRequest:
    return TextRequest("", prompt_ids, max_new_tokens=0, prompt_logprobs=alternatives, **changes)  # type: ignore[arg-type]


async def score(backend: Backend, *asked: TextRequest) -> list[tuple[PromptToken, ...]]:
    answers = await LanguageModel(backend).generate(list(asked), 60)
    assert all(each.prompt_logprobs is not None for row in answers for each in row)
    return [row[0].prompt_logprobs or () for row in answers]


def by_transformers(oracle: GPT2LMHeadModel, prompt_ids: tuple[int, ...]) -> Tensor:
    """[T - 1, V]: row i is the distribution of token i + 1."""
    with torch.inference_mode():
        return torch.log_softmax(oracle(torch.tensor([prompt_ids])).logits[0, :-1].double(), dim=-1)


def check_against(wanted: Tensor, prompt_ids: tuple[int, ...], scored: tuple[PromptToken, ...], error: float) -> None:
    assert tuple(each.token_id for each in scored) == prompt_ids
    assert scored[0].logprob is None
    assert scored[0].top_logprobs == ()
    for row, each in zip(wanted, scored[1:], strict=True):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=error)
        told = [alternative.logprob for alternative in each.top_logprobs]
        assert told == pytest.approx(row.topk(3).values.tolist(), abs=error)
        assert [row[alternative.token_id].item() for alternative in each.top_logprobs] == pytest.approx(told, abs=error)


# Lengths around the chunks' ends, in chunks of 16, up to the whole context.
@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 32, 33, 100, CONTEXT])
async def test_they_are_transformers_log_softmax(backend: Backend, oracle: GPT2LMHeadModel, length: int) -> None:
    prompt_ids = ids(length)
    (scored,) = await score(backend, scoring(prompt_ids))
    check_against(by_transformers(oracle, prompt_ids), prompt_ids, scored, 1e-3)


async def test_the_transformers_backend_scores(checkpoint: Path, oracle: GPT2LMHeadModel) -> None:
    opened = open_quietly(checkpoint, "transformers", prefill_chunk_tokens=16)
    try:
        asked = [ids(length, seed=length) for length in (1, 16, 17, 60)]
        for prompt_ids, scored in zip(asked, await score(opened, *map(scoring, asked)), strict=True):
            check_against(by_transformers(oracle, prompt_ids), prompt_ids, scored, 1e-3)
    finally:
        opened.stop()
        opened.join(10)


@pytest.mark.parametrize(
    "limits",
    [{"prefill_chunk_tokens": 1}, {"prefill_chunk_tokens": 7}, {}, {"max_running": 1}, {"dtype": "int8"}],
    ids=str,
)
async def test_no_chunk_size_and_no_company_changes_a_bit(checkpoint: Path, limits: dict[str, object]) -> None:
    whole = open_quietly(checkpoint, dtype=limits.get("dtype", "auto"))
    other = open_quietly(checkpoint, **({"prefill_chunk_tokens": 16, "step_tokens": 48} | limits))
    try:
        asked = [scoring(ids(3 + 11 * seed, seed), alternatives=seed) for seed in range(12)]
        alone = [(await score(whole, each))[0] for each in asked]
        company = [each for pair in zip(asked, requests(len(asked)), strict=True) for each in pair]
        answers = await LanguageModel(other).generate(company, 60)
        assert [row[0].prompt_logprobs for row in answers[::2]] == alone
    finally:
        for opened in (whole, other):
            opened.stop()
            opened.join(10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float16"])
async def test_a_completion_is_scored_as_it_was_drawn(checkpoint: Path, dtype: str) -> None:
    """The prompt's rows and the decode steps' are the same rows: the CPU kernels give them the same bits."""
    opened = open_quietly(checkpoint, dtype=dtype, prefill_chunk_tokens=16)
    try:
        model = LanguageModel(opened)
        ask = TextRequest("hello world", max_new_tokens=40, temperature=1.3, seed=5, logprobs=3, ignore_eos=True)
        ((drawn,),) = await model.generate([ask], 60)
        assert drawn.logprobs is not None
        prompt_ids = tuple(model.vocabulary.encode(ask.prompt))
        (scored,) = await score(opened, scoring(prompt_ids + tuple(each.token_id for each in drawn.logprobs)))
        said, wanted = scored[len(prompt_ids) :], list(zip(drawn.logprobs, drawn.top_logprobs, strict=True))
        if dtype == "float16":  # by torch, where a row's last bits may depend on the chunk
            assert [each.logprob for each in said] == pytest.approx([each.logprob for each in drawn.logprobs], abs=1e-2)
        else:
            assert [(each.token_id, each.logprob, each.top_logprobs) for each in said] == [
                (each.token_id, each.logprob, alternatives) for each, alternatives in wanted
            ]
    finally:
        opened.stop()
        opened.join(10)


@pytest.mark.parametrize("dtype", ["float32", "int8", "float16"])
async def test_what_is_generated_is_the_same_with_and_without(checkpoint: Path, dtype: str) -> None:
    opened = open_quietly(checkpoint, dtype=dtype, prefill_chunk_tokens=16, step_tokens=48)
    try:
        model, asked = LanguageModel(opened), requests(24, seed=6)
        plain = await model.generate(asked, 60)
        scored = await model.generate([replace(each, prompt_logprobs=2) for each in asked], 60)
        assert [bits(row) for row in scored] == [bits(row) for row in plain]
        assert all(each.prompt_logprobs is None for row in plain for each in row)
        assert all(each.prompt_logprobs is not None for row in scored for each in row)
    finally:
        opened.stop()
        opened.join(10)


@pytest.mark.parametrize("draft", [False, True], ids=["lookup", "draft"])
async def test_guesses_change_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, draft: bool) -> None:
    monkeypatch.setattr(Pace, "choose", lambda self, sequences, ways: ways[-1])
    asked = TextRequest(
        "hello " * 9, max_new_tokens=60, temperature=0.0, prompt_logprobs=1, logprobs=1, ignore_eos=True, seed=1
    )
    plain = open_quietly(checkpoint, speculation=False)
    guessing = open_quietly(checkpoint, draft=checkpoint if draft else None, prefill_chunk_tokens=16)
    try:
        wanted = await LanguageModel(plain).generate([asked, replace(asked, max_new_tokens=0)], 60)
        told = [
            await LanguageModel(guessing).generate([each], 60) for each in (asked, replace(asked, max_new_tokens=0))
        ]
        assert guessing.load.guessed_tokens > 0
        for (given,), ((got,),) in zip(wanted, told, strict=True):
            assert (bits([got]), got.prompt_logprobs) == (bits([given]), given.prompt_logprobs)
    finally:
        for opened in (plain, guessing):
            opened.stop()
            opened.join(10)


@pytest.mark.parametrize("arrive_every", [1, 3])
def test_cudas_order_of_things_changes_nothing(checkpoint: Path, arrive_every: int) -> None:
    """Steps launched ahead, on the CPU (tests/test_run_ahead.py)."""
    told = []
    for ahead in (False, True):
        engine = new_engine(checkpoint, ahead=ahead)
        sinks: list[list[Token | Exception]] = []
        for number in range(36):
            given = {"max_new_tokens": 3 * number % 11, "seed": number, "n": 1 + number % 3, "prompt_logprobs": 2}
            params = SamplingParams(**given | (BY_HOST + KINDS)[number % 7])  # type: ignore[arg-type]
            params = replace(params, min_new_tokens=min(params.min_new_tokens, params.max_new_tokens))
            mine: list[list[Token | Exception]] = [[] for _ in range(params.n)]
            sinks += mine
            engine.add(new_request(list(ids(1 + number * 5 % 60, number)), params, [each.append for each in mine]))
            for _ in range(arrive_every):
                engine.step()
        while engine.step():
            pass
        assert engine.load.used_slots == engine.load.running_requests == engine.load.waiting_requests == 0
        told.append(sinks)
    for plain, early in zip(*told, strict=True):
        assert [each.id for each in early] == [each.id for each in plain]  # type: ignore[union-attr]
        assert early[-1].finish_reason == plain[-1].finish_reason  # type: ignore[union-attr]
        theirs, ours = plain[0].prompt_logprobs, early[0].prompt_logprobs  # type: ignore[union-attr]
        assert theirs is not None
        assert ours is not None
        assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], abs=1e-3)


# What is answered


async def test_scoring_alone_generates_nothing(backend: Backend) -> None:
    ask = TextRequest("hello world", max_new_tokens=0, prompt_logprobs=0, logprobs=2, n=3, seed=7)
    (samples,) = await LanguageModel(backend).generate([ask], 60)
    for sample in samples:
        assert (sample.text, sample.finish_reason, sample.completion_tokens) == ("", "length", 0)
        assert sample.logprobs == ()
        assert sample.prompt_logprobs is not None
        assert len(sample.prompt_logprobs) == sample.prompt_tokens
    assert [each.seed for each in samples] == [7, 8, 9]
    await settled(backend)


async def test_an_end_token_after_the_prompt_is_no_end_of_a_text_that_was_not_asked_for(backend: Backend) -> None:
    ask = TextRequest("hello", max_new_tokens=0, prompt_logprobs=0, temperature=0.0, logit_bias={0: 100.0})
    ((scored,), (drawn,)) = await LanguageModel(backend).generate([ask, replace(ask, max_new_tokens=5)], 60)
    assert drawn.finish_reason == "stop"
    assert scored.finish_reason == "length"


async def test_they_are_of_the_raw_distribution(backend: Backend) -> None:
    plain = scoring(ids(20))
    edited = replace(plain, temperature=5.0, top_k=1, repetition_penalty=2.0, logit_bias={4: 50.0}, bad_words=("e",))
    first, second = await score(backend, plain, edited)
    assert first == second


async def test_samples_share_the_scores_of_one_prefill(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = count_scored_rows(monkeypatch)
    ask = TextRequest("", ids(50), max_new_tokens=6, prompt_logprobs=1, n=4, seed=1)
    (samples,) = await LanguageModel(backend).generate([ask], 60)
    assert sum(computed) == 49
    assert len({each.prompt_logprobs for each in samples}) == 1
    assert len({each.text for each in samples}) > 1


def count_scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    computed: list[int] = []
    logits = GPT2Forward.logits

    def counted(self: GPT2Forward, batch: Batch) -> Tensor:
        computed.append(sum(work.scores for work in batch.work))
        return logits(self, batch)

    monkeypatch.setattr(GPT2Forward, "logits", counted)
    return computed


async def test_without_the_wish_nothing_is_scored(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = count_scored_rows(monkeypatch)
    ((plain,),) = await LanguageModel(backend).generate([TextRequest("", ids(50), max_new_tokens=6, logprobs=3)], 60)
    assert computed
    assert sum(computed) == 0
    assert plain.prompt_logprobs is None


async def test_the_first_token_has_no_score_and_an_empty_prompt_no_tokens(backend: Backend) -> None:
    one, empty, no_ids, end = await score(
        backend,
        scoring((5,)),
        TextRequest("", max_new_tokens=0, prompt_logprobs=2),
        scoring(()),
        TextRequest(END, max_new_tokens=0, prompt_logprobs=2),
    )
    assert one == (PromptToken(5, "%", None, data=b"%"),)
    assert empty == no_ids == ()
    assert end == (PromptToken(0, END, None, data=b""),)


async def test_tokens_are_shown_as_those_of_a_completion(backend: Backend) -> None:
    (scored,) = await score(backend, TextRequest(f"hello{END} é", max_new_tokens=0, prompt_logprobs=1))
    vocabulary = LanguageModel(backend).vocabulary
    assert [each.token for each in scored] == [vocabulary.show(each.token_id) for each in scored]
    assert END in [each.token for each in scored]
    assert all(
        alternative.token == vocabulary.show(alternative.token_id)
        for each in scored
        for alternative in each.top_logprobs
    )


@pytest.mark.parametrize("text", ["hello world", "", f"a{END}b", "naïve 日本", "  two  spaces ,, n't "])
async def test_a_prompt_of_ids_is_told_as_text(backend: Backend, text: str) -> None:
    model = LanguageModel(backend)
    asked = [
        TextRequest(text, max_new_tokens=1),
        TextRequest("", tuple(model.vocabulary.encode(text)), max_new_tokens=1),
    ]
    answers = await model.generate(asked, 60)
    assert [each.prompt_text for (each,) in answers] == [text, text]
    for (stream,) in await model.submit(asked):
        assert stream.prompt_text == text
        await stream.aclose()


async def test_a_stream_knows_them_at_its_first_delta(backend: Backend) -> None:
    model = LanguageModel(backend)
    asked = [TextRequest("", ids(40), max_new_tokens=new, prompt_logprobs=2, seed=2, n=2) for new in (5, 0)]
    whole = await model.generate(asked, 60)
    pieces = await model.stream(asked, 60)
    seen: set[tuple[int, int]] = set()
    async for piece in pieces:
        assert piece.source.prompt_logprobs == whole[piece.row][piece.sample].prompt_logprobs
        if piece.row == 1:
            assert (piece.delta.text, piece.delta.token_id, piece.delta.finish_reason) == ("", None, "length")
        seen.add((piece.row, piece.sample))
    assert seen == {(0, 0), (0, 1), (1, 0), (1, 1)}


# What is refused


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        (TextRequest("a", max_new_tokens=0), "max_new_tokens", "at least 1, or 0"),
        (TextRequest("a", max_new_tokens=0, logprobs=2), "max_new_tokens", "at least 1, or 0"),
        (TextRequest("a", prompt_logprobs=0, context_overflow="slide"), "context_overflow", "slide"),
        (scoring(ids(CONTEXT + 1)), "prompt", "129 tokens and must fit the context of 128"),
        (TextRequest("", ids(CONTEXT), prompt_logprobs=1), "prompt", "room for one more"),
        (TextRequest("a", max_new_tokens=0, prompt_logprobs=1, min_new_tokens=1), "min_new_tokens", "at most"),
    ],
)
async def test_refused_naming_the_field(backend: Backend, asked: TextRequest, param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await LanguageModel(backend).generate([asked], 60)
    assert caught.value.param == param


async def test_an_answers_log_probabilities_are_counted(backend: Backend) -> None:
    """At most 250,000: prompts x samples x (prompt tokens x (alternatives + 1) + new tokens x (alternatives + 1))."""
    model = LanguageModel(backend)
    # 120 x 21 of the prompt, 1 x 5 of the completion: 2,525 a sample.
    ask = TextRequest("", ids(120), max_new_tokens=1, prompt_logprobs=20, logprobs=4, n=3)
    for row in await model.submit([ask] * 33):  # 249,975
        for stream in row:
            await stream.aclose()
    with pytest.raises(InvalidRequest, match="could hold 252500 of them") as caught:
        await model.submit([replace(ask, n=4)] * 25)
    assert caught.value.param == "logprobs"
    await settled(backend)


def test_aitextgen_refuses_them() -> None:
    params = SamplingParams(max_new_tokens=5, prompt_logprobs=0)
    with pytest.raises(InvalidRequest, match="prompt_logprobs is not available with --backend aitextgen"):
        AitextgenBackend.check(SimpleNamespace(), params)  # type: ignore[arg-type]


# Ends in the midst


class Bench:
    """An engine that is stepped by hand, in chunks of 16."""

    def __init__(self, checkpoint: Path) -> None:
        self.forward = GPT2Forward(load_compiled(checkpoint, "float32", threads=2), 1024)
        self.engine = Engine(self.forward, context=CONTEXT, max_running=8, chunk_tokens=16, step_tokens=32)

    def score(
        self, prompt_ids: tuple[int, ...], n: int = 1, new: int = 0
    ) -> tuple[object, list[list[Token | Exception]]]:
        sinks: list[list[Token | Exception]] = [[] for _ in range(n)]
        params = SamplingParams(max_new_tokens=new, prompt_logprobs=1, n=n)
        request = new_request(list(prompt_ids), params, [each.append for each in sinks])
        self.engine.add(request)
        return request, sinks

    def run(self) -> None:
        while self.engine.step():
            pass
        load = self.engine.load
        assert load.used_slots == load.running_requests == load.waiting_requests == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_cancelled_leader_leaves_its_siblings_the_right_scores(checkpoint: Path, steps: int) -> None:
    bench = Bench(checkpoint)
    _, (wanted,) = bench.score(ids(50))
    bench.run()
    request, sinks = bench.score(ids(50), n=3)
    for _ in range(steps):
        bench.engine.step()
    bench.engine.end(request.leader)  # type: ignore[attr-defined]
    bench.run()
    assert sinks[0] == []
    for sink in sinks[1:]:
        assert sink[0].prompt_logprobs == wanted[0].prompt_logprobs  # type: ignore[union-attr]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_cancelling_all_frees_all(checkpoint: Path, steps: int) -> None:
    bench = Bench(checkpoint)
    request, _ = bench.score(ids(50), n=3, new=9)
    for _ in range(steps):
        bench.engine.step()
    for sequence in (request.leader, *request.pending):  # type: ignore[attr-defined]
        bench.engine.end(sequence)
    for sequence in bench.engine._scheduler.sequences:
        bench.engine.end(sequence)
    bench.run()


async def test_a_client_that_leaves_frees_the_sequences(backend: Backend) -> None:
    model = LanguageModel(backend)
    scoring_now = asyncio.ensure_future(model.generate([scoring(ids(CONTEXT), seed=n) for n in range(20)], 60))
    await asyncio.sleep(0.005)
    scoring_now.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring_now
    await settled(backend)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    bench = Bench(checkpoint)
    logits = bench.forward.logits

    def damaged(batch: Batch) -> Tensor:
        computed = logits(batch)
        if batch.work[0].first_position == 16:
            computed[-1] = bad
        return computed

    monkeypatch.setattr(bench.forward, "logits", damaged)
    _, sinks = bench.score(ids(50), n=2, new=4)
    bench.run()
    for sink in sinks:
        (error,) = sink
        assert isinstance(error, EngineFailed)
