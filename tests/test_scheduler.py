"""Who runs when, with a runner that computes nothing."""

from __future__ import annotations

import random

import pytest

from predictor.engine.cache import SlotAllocator
from predictor.engine.params import Sampled, SamplingParams, Token
from predictor.engine.scheduler import Batch, Scheduler
from predictor.engine.sequence import Request, new_request, start_of_window


class Bench:
    """A scheduler, and what it delivered."""

    def __init__(self, slots: int = 1000, max_running: int = 8, chunk: int = 4, step: int = 8) -> None:
        self.slots = SlotAllocator(slots)
        self.chunk, self.step_tokens = chunk, step
        self.scheduler = Scheduler(self.slots, max_running, chunk, step)
        self.memory: dict[int, tuple[int, int]] = {}  # slot -> the token and the position computed there
        self.delivered: dict[tuple[str, int], list[Token | Exception]] = {}

    def add(self, name: str, prompt: int, new: int, n: int = 1, **params: object) -> Request:
        for k in range(n):
            self.delivered[name, k] = []
        sinks = [self.delivered[name, k].append for k in range(n)]
        request = new_request(list(range(prompt)), SamplingParams(max_new_tokens=new, n=n, **params), sinks)
        self.scheduler.add(request)
        return request

    def step(self, token: int = 7) -> Batch:
        batch = self.scheduler.schedule()
        self.check(batch)
        self.write(batch)
        self.scheduler.advance(batch)
        self.scheduler.commit(batch, [Sampled(token)] * len(batch.sampling))
        return batch

    def write(self, batch: Batch) -> None:
        """Keep what a forward would keep in each slot; a row that samples must find all of its window there."""
        for copy in batch.copies:
            for place in range(copy.tokens):
                self.memory[copy.target + place] = self.memory[copy.source + place]
        for work in batch.work:
            assert work.sequence.slots is not None
            first = work.sequence.slots.first
            for position, token_id in enumerate(work.token_ids, work.first_position):
                self.memory[first + position] = (token_id, position)
        for sequence in batch.sampling:
            assert sequence.slots is not None
            window = [*sequence.prompt_ids, *sequence.output_ids][sequence.window_start :]
            held = [self.memory.get(sequence.slots.first + position) for position in range(len(window))]
            assert held == [(token_id, position) for position, token_id in enumerate(window)]

    def check(self, batch: Batch) -> None:
        """What must hold of any batch: every sequence once, rows inside its slots, ranges apart."""
        sequences = [work.sequence for work in batch.work] + batch.forks
        assert len(set(map(id, sequences))) == len(sequences)
        decoding = sum(len(work.token_ids) == 1 for work in batch.work)
        assert sum(rows(batch)) <= max(self.step_tokens, decoding + self.chunk)
        for work in batch.work:
            sequence, first = work.sequence, work.sequence.window_start + work.first_position
            tokens = [*sequence.prompt_ids, *sequence.output_ids]
            assert sequence.window_start == start_of_window(len(tokens), sequence.params.window)
            assert work.token_ids == tokens[first : first + len(work.token_ids)]
            assert work.samples == (first + len(work.token_ids) == len(tokens))
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


def test_nobody_overtakes_a_sample_that_waits_for_memory() -> None:
    bench = Bench(slots=30)
    bench.add("large", prompt=4, new=11, n=3)  # 14 slots each
    bench.step()
    bench.add("small", prompt=1, new=1)
    for _ in range(9):
        bench.step()
    assert bench.tokens("large", 1) > 0
    assert bench.tokens("large", 2) == bench.tokens("small") == 0
    bench.run()
    assert bench.tokens("large", 2) == 11
    assert bench.tokens("small") == 1


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
    bench.scheduler.advance(batch)
    bench.scheduler.commit(batch, [Sampled(None)])
    (error,) = bench.delivered["a", 0]
    assert "no finite logits" in str(error)
    assert bench.slots.used == 0
    assert not bench.step()


def test_a_full_window_is_prefilled_again_from_its_middle() -> None:
    bench = Bench(slots=8, chunk=4)
    bench.add("a", prompt=6, new=8, window=8)
    assert [rows(bench.step()) for _ in range(12)] == [
        [4], [2], [1], [1], [4], [1], [1], [1], [1], [4], [1], []
    ]  # fmt: skip
    assert bench.tokens("a") == 8
    assert bench.slots.used == 0


def test_a_prompt_past_the_window_is_computed_as_far_as_the_window_holds_it() -> None:
    bench = Bench(slots=6, chunk=4)
    request = bench.add("a", prompt=21, new=2, window=8)
    assert request.slots_needed == 6  # the last five tokens and the first new one
    assert [rows(bench.step()) for _ in range(4)] == [[4], [1], [1], []]


def test_samples_that_find_room_copy_the_prompt_before_their_leader_overwrites_it() -> None:
    bench = Bench(slots=24, chunk=8, step=64)
    bench.add("a", prompt=8, new=6, n=3, window=8)
    bench.step()
    second = bench.step()
    assert len(second.copies) == len(second.forks) == 2
    assert [(work.first_position, len(work.token_ids)) for work in second.work] == [(0, 5)]
    bench.run()
    assert [bench.tokens("a", k) for k in range(3)] == [6, 6, 6]


@pytest.mark.parametrize("ended", ["nobody", "the first", "the second", "both"])
@pytest.mark.parametrize("steps", range(12))
def test_samples_that_find_no_room_compute_an_overwritten_prompt_anew(steps: int, ended: str) -> None:
    bench = Bench(slots=8, chunk=2)
    request = bench.add("a", prompt=6, new=9, n=4, window=8)
    first, (second, *_) = request.leader, request.pending
    for _ in range(steps):
        bench.step()
    gone = {"nobody": [], "the first": [first], "the second": [second], "both": [first, second]}[ended]
    for sequence in gone:
        bench.scheduler.end(sequence)
    bench.run()
    for k, sequence in enumerate([first, second]):
        assert (bench.tokens("a", k) == 9) == (sequence not in gone)
    assert [bench.tokens("a", k) for k in (2, 3)] == [9, 9]
    assert bench.slots.used == 0
    assert bench.scheduler.sequences == []


def test_full_windows_and_new_requests_take_turns() -> None:
    bench = Bench(chunk=2, step=2)
    for place in range(6):
        bench.add(str(place), prompt=7, new=2000, window=8)
    for _ in range(1200):
        bench.step()
    tokens = [bench.tokens(str(place)) for place in range(6)]
    assert max(tokens) < 2000
    assert max(tokens) - min(tokens) <= 24


@pytest.mark.parametrize("seed", range(30))
def test_any_mix_of_arrivals_and_ends_leaks_nothing(seed: int) -> None:
    chance = random.Random(seed)
    bench = Bench(slots=chance.randint(60, 200), max_running=chance.randint(1, 6), chunk=chance.randint(1, 9))
    alive = []
    for place in range(60):
        if chance.random() < 0.5:
            prompt, new, n = chance.randint(1, 30), chance.randint(1, 30), chance.choice([1, 1, 2, 5])
            request = bench.add(str(place), prompt, new, n, window=chance.choice([None, None, 3, 10, 25]))
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
