"""KV memory as one row of slots, a slot per token, of which each sequence owns a contiguous range.

A range is as long as the sequence can become, taken at admission: nothing is ever evicted or recomputed, so a
sequence that started always finishes. Contiguity lets every kernel read keys and values in place, by start and
length, with no block table and no gather.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple


class SlotRange(NamedTuple):
    first: int
    length: int


class SlotAllocator:
    """First-fit over free ranges; freeing joins neighbours."""

    def __init__(self, slots: int, multiple: int = 1) -> None:
        """`multiple`: what ranges begin at and end at, for kernels that keep keys and values in blocks."""
        self._multiple = multiple
        slots -= slots % multiple
        self.slots = slots
        self.used = 0
        self._free: list[SlotRange] = [SlotRange(0, slots)]  # sorted, never adjacent

    def allocate(self, length: int) -> SlotRange | None:
        """A range of at least `length` slots, or None while no gap is long enough."""
        length += -length % self._multiple
        for index, gap in enumerate(self._free):
            if gap.length >= length:
                if gap.length == length:
                    del self._free[index]
                else:
                    self._free[index] = SlotRange(gap.first + length, gap.length - length)
                self.used += length
                return SlotRange(gap.first, length)
        return None

    def free(self, slots: SlotRange) -> None:
        """Give back a range that `allocate` returned."""
        self.used -= slots.length
        insort(self._free, slots)
        index = self._free.index(slots)
        for left in (index, index - 1):  # join with the right neighbour, then with the left
            if 0 <= left < len(self._free) - 1:
                a, b = self._free[left], self._free[left + 1]
                if a.first + a.length == b.first:
                    self._free[left : left + 2] = [SlotRange(a.first, a.length + b.length)]
