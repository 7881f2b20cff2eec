"""A row's bits in the compiled step depend on its sequence alone: not on chunks, threads, company or old memory."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel

from predictor.engine.cache import SlotAllocator, SlotRange
from predictor.model.config import parse_config
from predictor.model.cpu.gpt2 import CPUGPT2
from predictor.model.cpu.library import TOKENS_PER_BLOCK
from predictor.model.gpt2 import GPT2, Rows, Span
from predictor.text.language_model import LanguageModel
from tests import test_determinism
from tests.compiled import (
    CPU,
    WIDTHS,
    Part,
    compile_model,
    compiled,
    each_instruction_set,
    each_width,
    fetch_of,
    in_blocks,
    prompt,
    rows_of,
    run,
    same_bits,
    spoilt_kv,
    step,
)
from tests.conftest import byte_tokenizer, open_quietly, tiny_model

__all__ = ["compiled"]


def odd_model() -> GPT2LMHeadModel:
    """Nothing a multiple of what kernels like: two heads of 48, 112 inner, 100 positions."""
    return tiny_model(n_embd=96, n_head=2, n_inner=112, n_positions=100)


CHUNKS = [
    [1] * 100,
    [2] * 50,
    [15, 1, 16, 1, 31, 1, 35],
    [16] * 6 + [4],
    [17, 3, 5, 7, 68],
    [33, 32, 34, 1],
    [99, 1],
    [1, 99],
    [64, 1, 1, 1, 33],
]


@each_width
@each_instruction_set
def test_a_rows_bits_do_not_depend_on_how_a_prompt_is_cut(instruction_set: str, width: str) -> None:
    model = compile_model(odd_model(), width, instruction_set)
    ids = prompt(model.config.vocabulary, 100)
    whole = run(model, ids, [100])
    assert whole.isfinite().all()
    for chunks in CHUNKS:
        assert same_bits(run(model, ids, chunks, first_slot=48), whole), f"{len(chunks)} chunks: {chunks}"


@each_width
@each_instruction_set
def test_a_rows_bits_do_not_depend_on_threads(instruction_set: str, width: str) -> None:
    ids = prompt(len(byte_tokenizer()), 70)
    results = []
    for threads in (1, 2, 3, 5):
        model = compile_model(odd_model(), width, instruction_set, threads)
        kv = spoilt_kv(model, 80 + 16)
        first = [step(model, kv, [Part(ids, 0, 61, 0)])[0]]
        mixed = [step(model, kv, [Part(ids, at, 1, 0), Part(ids, at - 61, 1, 80)]) for at in range(61, 66)]
        last = step(model, kv, [Part(ids, 5, 7, 80), Part(ids, 66, 4, 0)])
        results.append(torch.cat([*first, *(logits for parts in mixed for logits in parts), *last]))
    for threads, result in zip((2, 3, 5), results[1:], strict=True):
        assert same_bits(result, results[0]), f"{threads} threads"


class Conversation(NamedTuple):
    ids: Tensor
    first_slot: int


def conversations(lengths: list[int], vocabulary: int) -> tuple[list[Conversation], int]:
    """Sequences of these lengths side by side in memory, in whole blocks; how many slots they take."""
    placed, slots = [], 0
    for seed, length in enumerate(lengths):
        placed.append(Conversation(prompt(vocabulary, length, seed), slots))
        slots += in_blocks(length)
    return placed, slots


def random_steps(
    placed: list[Conversation], chance: random.Random, sizes: tuple[int, ...]
) -> Iterator[list[tuple[int, Part]]]:
    """Steps, each of a random choice of the sequences in random order, until all are through."""
    done = [0] * len(placed)
    while any(count < len(each.ids) for count, each in zip(done, placed, strict=True)):
        open_ones = [i for i, each in enumerate(placed) if done[i] < len(each.ids)]
        parts = []
        for i in chance.sample(open_ones, chance.randint(1, len(open_ones))):
            count = min(chance.choice(sizes), len(placed[i].ids) - done[i])
            parts.append((i, Part(placed[i].ids, done[i], count, placed[i].first_slot)))
            done[i] += count
        yield parts


@each_width
@each_instruction_set
def test_a_rows_bits_do_not_depend_on_its_company(instruction_set: str, width: str) -> None:
    """Contexts that end beside the edges of blocks; prefills, decode steps and everything between in one step."""
    model = compile_model(odd_model(), width, instruction_set, threads=2)
    placed, slots = conversations([1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100], model.config.vocabulary)
    alone = [run(model, each.ids, [len(each.ids)]) for each in placed]
    kv, chance = spoilt_kv(model, slots), random.Random(0)
    for parts in random_steps(placed, chance, sizes=(1, 1, 1, 1, 2, 3, 9, 16, 17, 40, 100)):
        for (i, part), logits in zip(parts, step(model, kv, [part for _, part in parts]), strict=True):
            wanted = alone[i][part.first : part.first + part.count]
            assert same_bits(logits, wanted), f"sequence {i}, {part.count} rows from {part.first}, among {len(parts)}"


def written(model: CPUGPT2, ids: Tensor, first_slot: int, slots: int) -> Tensor:
    """Which numbers of a memory of `slots` a sequence writes."""
    kv = spoilt_kv(model, slots)
    run(model, ids, [len(ids)], first_slot, kv)
    return ~kv.isnan()


@each_width
def test_a_sequence_writes_its_own_keys_and_values_alone(width: str) -> None:
    model = compile_model(odd_model(), width)
    placed, slots = conversations([1, 16, 17, 31, 96, 100, 5], model.config.vocabulary)
    counts = sum(written(model, each.ids, each.first_slot, slots).int() for each in placed)
    per_token = 2 * model.config.layers * model.config.width
    assert counts.max() == 1, "two sequences wrote one place"
    assert counts.sum() == per_token * sum(len(each.ids) for each in placed)


@each_width
@each_instruction_set
def test_what_lay_in_memory_before_is_not_read(instruction_set: str, width: str) -> None:
    model = compile_model(odd_model(), width, instruction_set)
    ids, longer = (prompt(model.config.vocabulary, length, seed=length) for length in (41, 100))
    wanted = run(model, ids, [41])
    kv = model.new_kv(224).fill_(3e38)
    run(model, longer, [100], first_slot=112, kv=kv)
    assert same_bits(run(model, ids, [32, 1, 7, 1], first_slot=112, kv=kv), wanted)
    assert same_bits(run(model, longer, [100], first_slot=112, kv=kv), run(model, longer, [100]))


@each_width
@each_instruction_set
def test_a_sequence_of_nan_leaves_the_others_alone(instruction_set: str, width: str) -> None:
    oracle = odd_model()
    broken = oracle.transformer.wte.weight.detach().clone()
    broken[7] = torch.nan
    model = compile_model(oracle, width, instruction_set, 2, wte__weight=broken)
    good, bad = torch.arange(20, 60), torch.full((40,), 7)
    kv = spoilt_kv(model, 96)
    others = [token for token in range(model.config.vocabulary) if token != 7]
    wanted = run(model, good, [40])[:, others]
    for first, count in ((0, 30), (30, 9), (39, 1)):
        theirs, ours = step(model, kv, [Part(bad, first, count, 48), Part(good, first, count, 0)])
        assert theirs.isnan().all()
        assert same_bits(ours[:, others], wanted[first : first + count])
        assert ours[:, 7].isnan().all()


@each_width
def test_a_copy_of_keys_and_values_goes_on_as_the_original(width: str) -> None:
    model = compile_model(odd_model(), width)
    ids = prompt(model.config.vocabulary, 60)
    for source, target in ((0, 64), (112, 208), (208, 16)):  # within 128 slots, and across their edges
        kv = spoilt_kv(model, 272)
        original = step(model, kv, [Part(ids, 0, 37, source)])[0]
        step(model, kv, [Part(ids, 37, 2, source)])  # the original has gone on before it is copied
        before = kv.clone()
        model.copy_kv(kv, source, target, 37)
        # 37 tokens are three blocks.
        elsewhere = ~written(model, prompt(model.config.vocabulary, 48), target, 272)
        assert same_bits(kv[elsewhere], before[elsewhere])
        copied = step(model, kv, [Part(ids, 37, 23, target)])[0]
        assert same_bits(torch.cat([original, copied]), run(model, ids, [60]))
        assert same_bits(step(model, kv, [Part(ids, 39, 21, source)])[0], copied[2:])


def test_a_step_without_wanted_rows_gives_none() -> None:
    model = compile_model(tiny_model())
    rows = Rows(prompt(model.config.vocabulary, 4).tolist(), [Span(0, 4, 0, 4)], [])
    assert model.forward(rows, model.new_kv(16)).shape == (0, model.config.vocabulary)


@each_width
def test_wanted_rows_are_the_rows_asked_for(width: str) -> None:
    model = compile_model(odd_model(), width, threads=2)
    ids = prompt(model.config.vocabulary, 90)
    every = run(model, ids, [90])
    for wanted in ([0], [89], [3, 40], [89, 0, 17], list(range(0, 90, 7))):
        rows = rows_of([Part(ids, 0, 90, 0)])
        asked = Rows(rows.token_ids, rows.spans, wanted)
        assert same_bits(model.forward(asked, model.new_kv(96)), every[wanted])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 128), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 128), min_size=1, max_size=4),
    threads=st.sampled_from([1, 2, 3]),
)
def test_any_steps_are_torchs(seed: int, lengths: list[int], sizes: list[int], threads: int) -> None:
    ours, torchs = tiny_models(threads)
    placed, slots = conversations(lengths, ours.config.vocabulary)
    kv, torchs_kv = spoilt_kv(ours, slots), torchs.new_kv(slots)
    for parts in random_steps(placed, random.Random(seed), tuple(sizes)):
        asked = [part for _, part in parts]
        for mine, theirs in zip(step(ours, kv, asked), step(torchs, torchs_kv, asked), strict=True):
            assert (mine - theirs).abs().max() <= 1e-4


@functools.cache
def tiny_models(threads: int) -> tuple[CPUGPT2, GPT2]:
    oracle = tiny_model()
    torchs = GPT2(parse_config(oracle.config.to_dict()), fetch_of(oracle), torch.float32, CPU)
    return compile_model(oracle, threads=threads), torchs


@pytest.mark.parametrize("dtype", WIDTHS)
async def test_answers_are_the_same_alone_and_among_others(checkpoint: Path, dtype: str) -> None:
    backend = open_quietly(checkpoint, dtype=dtype, prefill_chunk_tokens=16, step_tokens=48)
    try:
        assert backend.dtype == dtype
        model = LanguageModel(backend)
        batch = test_determinism.requests(16, seed=5)
        together = await model.generate(batch, 60)
        for request, answers in zip(batch, together, strict=True):
            alone = (await model.generate([request], 60))[0]
            assert test_determinism.bits(alone) == test_determinism.bits(answers)
    finally:
        backend.stop()
        backend.join(10)


@given(
    slots=st.integers(0, 200),
    multiple=st.sampled_from([1, 3, 16]),
    history=st.lists(st.tuples(st.booleans(), st.integers(1, 60), st.integers(0, 100)), max_size=60),
)
def test_slots_come_in_whole_blocks(slots: int, multiple: int, history: list[tuple[bool, int, int]]) -> None:
    allocator = SlotAllocator(slots, multiple)
    usable = slots // multiple * multiple
    assert allocator.slots == usable
    owned: list[SlotRange] = []
    for allocate, length, which in history:
        if allocate:
            taken = allocator.allocate(length)
            free = set(range(usable)) - {slot for r in owned for slot in range(r.first, r.first + r.length)}
            whole = -(-length // multiple) * multiple
            assert (taken is not None) == any(free.issuperset(range(at, at + whole)) for at in free)
            if taken is not None:
                assert taken.first % multiple == 0
                assert taken.length == whole
                assert free.issuperset(range(taken.first, taken.first + taken.length))
                owned.append(taken)
        elif owned:
            allocator.free(owned.pop(which % len(owned)))
        assert allocator.used == sum(each.length for each in owned)
    for each in owned:
        allocator.free(each)
    assert allocator.used == 0
    if usable:
        assert allocator.allocate(usable) == SlotRange(0, usable)


def test_memory_holds_the_slots_that_are_given_out() -> None:
    model = compile_model(tiny_model())
    for slots in (0, 15, 16, 17, 160, 1000):
        usable = SlotAllocator(slots, model.slot_multiple).slots
        assert model.slot_multiple == TOKENS_PER_BLOCK
        assert model.new_kv(slots).numel() >= 2 * model.config.layers * model.config.width * usable


@pytest.mark.parametrize("inner", [16, 256])
@each_width
def test_rows_that_are_not_wanted_leave_the_same_keys_and_values(width: str, inner: int) -> None:
    """The last layer computes the wanted rows alone; what follows reads the others' keys and values all the same."""
    model = compile_model(tiny_model(n_inner=inner, n_embd=64), width, threads=2)
    a, b = prompt(model.config.vocabulary, 40, 1), prompt(model.config.vocabulary, 30, 2)
    together = rows_of([Part(a, 0, 24, 0), Part(b, 0, 1, 48), Part(b, 0, 1, 96)])
    logits, kept = [], []
    for wanted in (list(range(26)), [25, 3, 24], [23], []):
        kv = spoilt_kv(model, 128)
        logits.append(model.forward(Rows(together.token_ids, together.spans, wanted), kv).clone())
        kept.append(kv)
    assert same_bits(logits[1], logits[0][[25, 3, 24]])
    assert same_bits(logits[2], logits[0][[23]])
    assert all(same_bits(kv, kept[0]) for kv in kept)
