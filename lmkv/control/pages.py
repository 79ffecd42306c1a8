"""The page table of a view: which nodes, named by small numbers, hold which page, and in which tiers.

A number belongs to one generation of what a node holds. When that is over (another incarnation, CLEARED, a new snapshot
that has taken its place) the number is retired: nobody asks for it any more, `sweep` takes its pages out step by
step, and it is given out again when the last is gone. Not thread-safe.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .holders import FLAG, NODES, HolderSets
from .prints import Masks, Prints
from .table import SlotTable, Values

Nodes = npt.NDArray[np.uint32]
_FLAG = np.uint32(FLAG)


class PageTable:
    def __init__(self) -> None:
        self._slots = SlotTable()
        self._sets = HolderSets()
        self._held = np.zeros(64, np.int64)
        """Pages by number."""
        self._next = 0
        self._free: list[int] = []
        self._retired: set[int] = set()
        """Not swept yet."""
        self._sweeping: frozenset[int] = frozenset()
        self._position = 0

    @property
    def pages(self) -> int:
        """That at least one number holds, retired ones included."""
        return len(self._slots)

    @property
    def sets(self) -> int:
        return len(self._sets)

    @property
    def lost(self) -> int:
        return self._slots.lost

    @property
    def doublings(self) -> int:
        return self._slots.doublings

    @property
    def memory_bytes(self) -> int:
        """Of the slots; each set takes about 200 bytes besides."""
        return self._slots.memory_bytes

    # --- numbers ---

    def number(self) -> int:
        """A number that holds nothing."""
        if self._free:
            return self._free.pop()
        if self._next == NODES:
            raise OverflowError(f"more than {NODES} generations of nodes at a time")
        if self._next == len(self._held):
            self._held = np.concatenate((self._held, np.zeros_like(self._held)))
        self._next += 1
        return self._next - 1

    def held(self, number: int) -> int:
        """How many pages it holds."""
        return int(self._held[number])

    def retire(self, number: int) -> None:
        """Nothing is applied to it from now on."""
        if self._held[number]:
            self._retired.add(number)
        else:
            self._free.append(number)

    @property
    def unswept(self) -> bool:
        return bool(self._retired or self._sweeping)

    def sweep(self, buckets: int = 4096) -> None:
        """One step of taking out what retired numbers hold: so many buckets of the table."""
        if not self._sweeping:
            self._sweeping, self._position = frozenset(self._retired), 0
            self._retired.clear()
        if not self._sweeping:
            return
        places, values = self._slots.part(self._position, buckets)
        dead = np.zeros(len(self._held), bool)
        dead[list(self._sweeping)] = True
        single = values < _FLAG
        gone = single.copy()
        gone[single] = dead[values[single] >> np.uint32(3)]
        fresh = np.where(gone, np.uint32(0), values)
        self._held -= np.bincount(values[gone] >> np.uint32(3), minlength=len(self._held))
        self._sweep_sets(values, fresh, np.flatnonzero(~single))
        changed = np.flatnonzero(fresh != values)
        self._slots.write(places[changed], fresh[changed])
        self._position += buckets
        if self._position >= self._slots.buckets:
            self._free.extend(self._sweeping)
            self._sweeping = frozenset()

    def _sweep_sets(self, values: Values, fresh: Values, at: npt.NDArray[np.int64]) -> None:
        kinds, inverse, counts = np.unique(values[at], return_inverse=True, return_counts=True)
        results = []
        for value, count in zip(kinds.tolist(), counts.tolist(), strict=True):
            dead = self._sweeping.intersection(member >> 3 for member in self._sets.members(value))
            for number in dead:
                self._held[number] -= count
            results.append(self._sets.without(value, dead, count) if dead else value)
        fresh[at] = np.array(results, np.uint32)[inverse]

    # --- pages ---

    def find(self, prints: Prints) -> Values:
        return self._slots.find(prints)

    def members(self, value: int) -> array[int]:
        """Of a value of `find`: each number << 3 | tiers, sorted."""
        return self._sets.members(value)

    def apply(self, prints: Prints, nodes: Nodes, masks: Masks) -> None:
        """Page by page: this number holds it in these tiers from now on (0: not any more). The last one counts."""
        order = np.argsort(prints, kind="stable")
        prints, nodes, masks = prints[order], nodes[order], masks[order]
        again = prints[1:] == prints[:-1]
        if not again.any():
            self._round(prints, nodes, masks)
            return
        order = np.lexsort((nodes, prints))  # stable
        prints, nodes, masks = prints[order], nodes[order], masks[order]
        last = np.append((prints[1:] != prints[:-1]) | (nodes[1:] != nodes[:-1]), True)
        prints, nodes, masks = prints[last], nodes[last], masks[last]
        rank = np.arange(len(prints)) - np.searchsorted(prints, prints)
        for turn in range(int(rank.max()) + 1):
            mine = rank == turn
            self._round(prints[mine], nodes[mine], masks[mine])

    def _round(self, prints: Prints, nodes: Nodes, masks: Masks) -> None:
        """Each page once."""
        places = self._slots.locate(prints)
        old = self._slots.read(places)
        new = np.where(masks > 0, (nodes << np.uint32(3)) | masks, np.uint32(0))
        hard = np.flatnonzero((old != 0) & ((old >> np.uint32(3)) != nodes))
        held = old != 0
        if len(hard):
            new[hard], held[hard] = self._change(old[hard], nodes[hard], masks[hard])
        self._slots.put(prints, places, new)
        more = (masks > 0).astype(np.int64) - held
        self._held += np.bincount(nodes, more, len(self._held)).astype(np.int64)

    def _change(self, old: Values, nodes: Nodes, masks: Masks) -> tuple[Values, npt.NDArray[np.bool_]]:
        """Where another node holds the page too: once for each kind of change."""
        kind = (old.astype(np.uint64) << np.uint64(32)) | (nodes << np.uint32(3)) | masks
        kinds, inverse, counts = np.unique(kind, return_inverse=True, return_counts=True)
        results: list[tuple[int, bool]] = [
            self._sets.change(change >> 32, (change & 0xFFFFFFFF) >> 3, change & 7, count)
            for change, count in zip(kinds.tolist(), counts.tolist(), strict=True)
        ]
        values, held = zip(*results, strict=True)
        return np.array(values, np.uint32)[inverse], np.array(held, bool)[inverse]

    def tiers(self, values: Values, numbers: Sequence[int]) -> npt.NDArray[np.uint8]:
        """A row for each of the (different) numbers: its tiers of the page with each of these values."""
        rows = np.zeros((len(numbers), len(values)), np.uint8)
        row_of = {number: row for row, number in enumerate(numbers)}
        # Pages of a chain lie at the same nodes: a few stretches of one value each.
        ends = [*(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
        start = 0
        for end in ends:
            for member in self._sets.members(int(values[start])) if len(values) else ():
                row = row_of.get(member >> 3)
                if row is not None:
                    rows[row, start:end] = member & 7
            start = end
        return rows
