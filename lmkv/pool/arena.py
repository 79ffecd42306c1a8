"""Which bytes of the arena belong to which slot: slabs of equal slots, by size class. Pure.

The arena is cut into slabs. A slab belongs to one size class (page bytes, rounded up to 4 KiB) as long as one of its
slots is in use, and then goes back. A deployment has few page sizes (one a model and KV group), so a class is exact:
nothing is lost to rounding up to powers of two. Slots of a slab are handed out in order, so that the pages of a prompt
lie side by side and are read as one.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from lmkv.errors import ConfigError
from lmkv.layout import PAGE_ALIGNMENT_BYTES

SLAB_BYTES = 64 << 20


def class_bytes(page_bytes: int) -> int:
    """The size of the slots that pages of `page_bytes` get."""
    return -(-page_bytes // PAGE_ALIGNMENT_BYTES) * PAGE_ALIGNMENT_BYTES


@dataclass(slots=True, eq=False)
class _Slab:
    first: int
    """Offset in the arena."""
    slot_bytes: int
    slots: int
    used: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)
    """A heap: the lowest first. All below `fresh`."""
    fresh: int = 0
    """Slots from here on were never used."""

    @property
    def full(self) -> bool:
        return not self.free and self.fresh == self.slots

    def take(self) -> int:
        """The lowest free slot."""
        if self.free:
            index = heapq.heappop(self.free)
        else:
            index, self.fresh = self.fresh, self.fresh + 1
        self.used.add(index)
        return index


class Arena:
    """Offsets in [0, capacity_bytes). Not thread-safe."""

    def __init__(self, capacity_bytes: int, slab_bytes: int = SLAB_BYTES) -> None:
        if capacity_bytes < PAGE_ALIGNMENT_BYTES:
            raise ConfigError(f"an arena of {capacity_bytes} bytes holds no page", hint="give it at least one page")
        self.capacity_bytes = capacity_bytes
        # Sixteen slabs at least: in a small arena one page that is held must not keep a class from everything.
        self._slab_bytes = min(slab_bytes, capacity_bytes // 16)
        self._holes: list[tuple[int, int]] = [(0, capacity_bytes)]
        """(offset, bytes) that belong to no slab, ascending, never touching."""
        self._open: dict[int, list[_Slab]] = {}
        """By slot size: slabs with free slots, the one in use last."""
        self._slab_of: dict[int, _Slab] = {}
        """By offset of a slot in use."""
        self.used_bytes = 0
        self.classes: dict[int, int] = {}
        """Slots in use by slot size."""

    def allocate(self, page_bytes: int) -> int | None:
        """Offset of a slot, or None: there is neither a free slot nor room for a slab."""
        size = class_bytes(page_bytes)
        if not self._open.get(size) and not self._open_slab(size):
            return None
        open_slabs = self._open[size]
        slab = open_slabs[-1]
        index = slab.take()
        if slab.full:
            open_slabs.pop()
        offset = slab.first + index * size
        self._slab_of[offset] = slab
        self.used_bytes += size
        self.classes[size] = self.classes.get(size, 0) + 1
        return offset

    def free(self, offset: int) -> None:
        """The slot at `offset` is nobody's any more. Raises KeyError for what is no slot in use (our bug)."""
        slab = self._slab_of.pop(offset)
        index = (offset - slab.first) // slab.slot_bytes
        slab.used.remove(index)
        self.used_bytes -= slab.slot_bytes
        self.classes[slab.slot_bytes] -= 1
        if not self.classes[slab.slot_bytes]:
            del self.classes[slab.slot_bytes]
        open_slabs = self._open[slab.slot_bytes]
        if slab.full:
            open_slabs.insert(0, slab)
        heapq.heappush(slab.free, index)
        if not slab.used:
            open_slabs.remove(slab)
            self._give_back(slab.first, slab.slots * slab.slot_bytes)

    def slab(self, offset: int) -> int:
        """Where the slab of a slot in use begins."""
        return self._slab_of[offset].first

    def neighbours(self, offset: int) -> Iterator[int]:
        """Offsets of all slots in use of the slab that `offset` is in: to free these makes room for another class."""
        slab = self._slab_of[offset]
        return iter([slab.first + index * slab.slot_bytes for index in sorted(slab.used)])

    def _open_slab(self, slot_bytes: int) -> bool:
        """The first hole with room for a whole slab, else for a single slot at least."""
        wanted = max(self._slab_bytes // slot_bytes, 1) * slot_bytes
        best = -1
        for i, (_, size) in enumerate(self._holes):
            if size >= wanted:
                best = i
                break
            if size >= slot_bytes and (best < 0 or size > self._holes[best][1]):
                best = i
        if best < 0:
            return False
        first, size = self._holes[best]
        slots = min(wanted, size) // slot_bytes
        taken = slots * slot_bytes
        self._holes[best : best + 1] = [(first + taken, size - taken)] if size > taken else []
        slab = _Slab(first, slot_bytes, slots)
        self._open.setdefault(slot_bytes, []).append(slab)
        return True

    def _give_back(self, first: int, size: int) -> None:
        holes = sorted([*self._holes, (first, size)])
        merged: list[tuple[int, int]] = []
        for offset, length in holes:
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((offset, length))
        self._holes = merged
