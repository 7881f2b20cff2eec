"""Who runs when, with a runner that computes nothing."""

from __future__ import annotations

import random

import pytest

from predictor.engine.cache import SlotAllocator
from predictor.engine.params import Sampled, SamplingParams, Token
from predictor.engine.scheduler import Batch, Scheduler
from predictor.engine.sequence import Request, new_request


class Bench:
    """A scheduler, and what it delivered."""

    def __init__(self, slots: int = 1000, max_running: int = 8, chunk: int = 4, step: int = 8) -> None:
        self.slots = SlotAllocator(slots)
        self.scheduler = Scheduler(self.slots, max_running, chunk, step)
        self.delivered: dict[tuple[str, int], list[Token | Exception]] = {}

    def add(self, name: str, prompt: int, new: int, n: int = 1, **params: object) -> Request:
        for k in range(n):
            self.delivered[name, k] = []
        sinks = [self.delivered[name, k].append for k in range(n)]
        request = new_request([1] * prompt, SamplingParams(max_new_tokens=new, n=n, **params), sinks)
        self.scheduler.add(request)
        return request

    def step(self, token: int = 7) -> Batch:
        batch = self.scheduler.schedule()
        self.check(batch)
        self.scheduler.commit(batch, [Sampled(token)] * len(batch.sampling))
        return batch

    def check(self, batch: Batch) -> None:
        """What must hold of any batch: every sequence once, rows inside its slots, ranges apart."""
        sequences = [work.sequence for work in batch.work] + batch.forks
        assert len(set(map(id, sequences))) == len(sequences)
        for work in batch.work:
            assert work.sequence.slots is not None
            assert work.first_position + len(work.token_ids) <= work.sequence.slots.length
            assert work.first_position == work.sequence.computed
        owned = [s.slots for s in self.scheduler.sequences if s.slots is not None]
        covered = [slot for r in owned for slot in range(r.first, r.first + r.length)]
        assert len(covered) == len(set(covered))

    def run(self) -> int:
        steps = 0
        while self.step():
            steps += 1
            assert steps < 10_000
        return steps

    def tokens(self, name: str, k: int = 0) -> int:
        return len(self.delivered[name, k])


def rows(batch: Batch) -> list[int]:
    return [len(work.token_ids) for work in batch.work]


def test_a_request_is_prefilled_in_chunks_then_decoded() -> None:
    bench = Bench(chunk=4)
    bench.add("a", prompt=10, new=3)
    assert [rows(bench.step()) for _ in range(6)] == [[4], [4], [2], [1], [1], []]
    assert [token.finish_reason for token in bench.delivered["a", 0]] == [None, None, "length"]
    assert bench.slots.used == 0


def test_decode_and_prefill_share_a_step_and_chunks_are_never_cut() -> None:
    bench = Bench(chunk=4, step=8)
    bench.add("a", prompt=4, new=20)
    bench.step()
    bench.add("b", prompt=6, new=5)
    bench.add("c", prompt=8, new=5)
    # 1 decode + 4 of b; c's 4 would make 9 rows of 8
    assert rows(bench.step()) == [1, 4]
    assert rows(bench.step()) == [1, 2, 4]
    assert rows(bench.step()) == [1, 1, 4]


def test_a_chunk_larger_than_the_step_still_runs() -> None:
    bench = Bench(chunk=16, step=4)
    bench.add("a", prompt=16, new=1)
    assert rows(bench.step()) == [16]


def test_nobody_overtakes_who_waits_for_memory() -> None:
    bench = Bench(slots=30)
    bench.add("large", prompt=10, new=11)  # 20 slots
    bench.step()
    bench.add("larger", prompt=10, new=11)
    bench.add("small", prompt=2, new=2)
    bench.step()
    assert bench.tokens("small") == 0
    assert bench.scheduler.waiting_requests == 2
    bench.run()
    assert bench.tokens("larger") == 11
    assert bench.tokens("small") == 2


def test_a_sequence_joins_and_leaves_at_any_step() -> None:
    bench = Bench(max_running=3, chunk=8, step=64)
    for place in range(9):
        bench.add(str(place), prompt=place + 1, new=2 * place + 1)
        bench.step()
    bench.run()
    assert [bench.tokens(str(place)) for place in range(9)] == [2 * place + 1 for place in range(9)]
    assert bench.slots.used == 0


def test_samples_share_one_prefill() -> None:
    bench = Bench(chunk=100, step=100)
    bench.add("a", prompt=20, new=4, n=3)
    prefill = bench.step()
    assert rows(prefill) == [20]
    second = bench.step()
    assert rows(second) == [1]
    assert len(second.forks) == 2
    assert [copy.tokens for copy in second.copies] == [20, 20]
    bench.run()
    assert [bench.tokens("a", k) for k in range(3)] == [4, 4, 4]
    assert bench.slots.used == 0


def test_sixteen_samples_fit_the_memory_of_one() -> None:
    bench = Bench(slots=24)
    bench.add("a", prompt=20, new=5, n=16)
    bench.add("b", prompt=3, new=2)
    bench.run()
    assert [bench.tokens("a", k) for k in range(16)] == [5] * 16
    assert bench.tokens("b") == 2
    assert bench.slots.used == 0


def test_samples_go_before_later_requests() -> None:
    bench = Bench(slots=40, max_running=2, chunk=4, step=4)
    bench.add("a", prompt=4, new=3, n=3)
    bench.add("b", prompt=4, new=3)
    for _ in range(4):
        bench.step()
    assert bench.tokens("a", 1) > 0
    assert bench.tokens("b") == 0
    bench.run()
    assert bench.tokens("b") == 3


def test_end_token_ends_and_is_marked() -> None:
    bench = Bench()
    bench.add("a", prompt=2, new=9, end_tokens=frozenset({7}))
    bench.run()
    (token,) = bench.delivered["a", 0]
    assert (token.finish_reason, token.is_end) == ("stop", True)


def test_end_token_is_a_token_like_others_with_ignore_eos() -> None:
    bench = Bench()
    bench.add("a", prompt=2, new=3, end_tokens=frozenset({7}), ignore_eos=True)
    bench.run()
    assert [token.finish_reason for token in bench.delivered["a", 0]] == [None, None, "length"]


def test_ending_the_leader_in_prefill_lets_a_sibling_lead() -> None:
    bench = Bench(chunk=4)
    request = bench.add("a", prompt=12, new=3, n=3)
    bench.step()
    bench.scheduler.end(request.leader)
    bench.run()
    assert [bench.tokens("a", k) for k in range(3)] == [0, 3, 3]
    assert bench.slots.used == 0


def test_ending_the_leader_after_prefill_hands_its_slots_on() -> None:
    bench = Bench(slots=14, chunk=100)
    request = bench.add("a", prompt=12, new=3, n=2)
    bench.step()
    bench.scheduler.end(request.leader)
    batch = bench.step()
    assert batch.copies == []
    assert len(batch.forks) == 1
    bench.run()
    assert bench.tokens("a", 1) == 3
    assert bench.slots.used == 0


def test_a_promoted_leader_does_not_block_siblings_that_hold_its_memory() -> None:
    bench = Bench(slots=20, chunk=4, step=4)
    first = bench.add("a", prompt=4, new=8, n=3)
    second = bench.add("b", prompt=8, new=8, n=2)
    bench.step()
    bench.scheduler.end(second.leader)  # b's second sample now leads, and waits for memory
    bench.scheduler.end(first.leader)  # a's memory is held for its siblings
    bench.run()
    assert [bench.tokens("a", k) for k in (1, 2)] == [8, 8]
    assert bench.tokens("b", 1) == 8
    assert bench.slots.used == 0


def test_a_row_without_a_number_ends_with_an_error_and_frees() -> None:
    bench = Bench()
    bench.add("a", prompt=2, new=9)
    batch = bench.scheduler.schedule()
    bench.scheduler.commit(batch, [Sampled(None)])
    (error,) = bench.delivered["a", 0]
    assert "no finite logits" in str(error)
    assert bench.slots.used == 0
    assert not bench.step()


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_arrivals_and_ends_leaks_nothing(seed: int) -> None:
    chance = random.Random(seed)
    bench = Bench(slots=chance.randint(60, 200), max_running=chance.randint(1, 6), chunk=chance.randint(1, 9))
    alive = []
    for place in range(60):
        if chance.random() < 0.5:
            prompt, new, n = chance.randint(1, 30), chance.randint(1, 30), chance.choice([1, 1, 2, 5])
            request = bench.add(str(place), prompt, new, n)
            alive += [request.leader, *request.pending]
        if alive and chance.random() < 0.5:
            bench.scheduler.end(alive.pop(chance.randrange(len(alive))))
        bench.step()
    bench.run()
    assert bench.slots.used == 0
    assert bench.scheduler.sequences == []
    for sequence in alive:
        assert sequence.done
        assert len(sequence.output_ids) == sequence.params.max_new_tokens
