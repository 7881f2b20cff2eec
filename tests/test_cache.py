from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from predictor.engine.cache import SlotAllocator, SlotRange


def test_ranges_do_not_overlap_and_memory_comes_back() -> None:
    slots = SlotAllocator(10)
    first, second = slots.allocate(4), slots.allocate(6)
    assert (first, second) == (SlotRange(0, 4), SlotRange(4, 6))
    assert slots.allocate(1) is None
    slots.free(first)
    assert slots.allocate(5) is None
    assert slots.allocate(4) == SlotRange(0, 4)


def test_freed_neighbours_become_one_gap() -> None:
    slots = SlotAllocator(9)
    a, b, c = (slots.allocate(3) for _ in range(3))
    for each in (a, c, b):
        slots.free(each)
    assert slots.allocate(9) == SlotRange(0, 9)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 100)), max_size=80))
def test_any_history_keeps_ranges_apart_and_counts_right(history: list[tuple[bool, int, int]]) -> None:
    slots = SlotAllocator(40)
    owned: list[SlotRange] = []
    for allocate, length, which in history:
        if allocate:
            taken = slots.allocate(length)
            free = set(range(40)) - {s for r in owned for s in range(r.first, r.first + r.length)}
            fits = any(free.issuperset(range(start, start + length)) for start in free)
            assert (taken is not None) == fits, "a gap that is long enough is always found"
            if taken is not None:
                owned.append(taken)
        elif owned:
            slots.free(owned.pop(which % len(owned)))
        covered = [slot for r in owned for slot in range(r.first, r.first + r.length)]
        assert len(covered) == len(set(covered)) == slots.used
        assert all(0 <= slot < 40 for slot in covered)
    for each in owned:
        slots.free(each)
    assert slots.allocate(40) == SlotRange(0, 40)
