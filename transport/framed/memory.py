"""Registered memory as views that can be sliced, and the check that a row lies inside it.

Slicing a view costs a tenth of a microsecond; making one from an address costs several. So each region is made into a
view once, when it is registered.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from ..base import Region

_FEW_ROWS = 16


class Memory:
    """This process's regions. Keeps every region's `owner` alive: registration is never undone. Owner thread only."""

    __slots__ = ("_bases", "_ends", "_holders", "_lists", "_stale", "_views", "regions")

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._views: list[memoryview] = []
        self._stale = True
        self._bases = np.empty(0, dtype=np.uint64)
        self._ends = np.empty(0, dtype=np.uint64)
        self._holders = np.empty(0, dtype=np.intp)
        self._lists: tuple[list[int], list[int], list[int]] = ([], [], [])

    def add(self, region: Region) -> None:
        """The caller has checked that the region can exist and is DRAM."""
        raw = (ctypes.c_char * region.bytes).from_address(region.address)
        self.regions.append(region)
        self._views.append(memoryview(raw).cast("B"))
        self._stale = True

    def _sort(self) -> None:
        """For each base the furthest end of all regions that begin at or before it, and which region that is: a row
        behind that base lies in one of them exactly when it ends no later, also where regions overlap."""
        bases = np.array([r.address for r in self.regions], dtype=np.uint64)
        ends = bases + np.array([r.bytes for r in self.regions], dtype=np.uint64)
        order = np.argsort(bases, kind="stable")
        self._bases = bases[order]
        self._ends = np.maximum.accumulate(ends[order])
        furthest = np.where(ends[order] == self._ends, np.arange(len(order)), 0)
        self._holders = order[np.maximum.accumulate(furthest)]
        self._lists = self._bases.tolist(), self._ends.tolist(), self._holders.tolist()
        self._stale = False

    def locate(self, rows: NDArray[np.uint64]) -> NDArray[np.intp]:
        """For each (address, bytes) row the position of a region that holds all of it, or -1."""
        if self._stale:
            self._sort()
        if not self.regions:
            return np.full(len(rows), -1, dtype=np.intp)
        addresses, sizes = rows[:, 0], rows[:, 1]
        at = np.searchsorted(self._bases, addresses, side="right") - 1
        ends = self._ends[np.maximum(at, 0)]
        # ends - addresses would wrap where the row begins behind the end; the comparison before it rules that out.
        inside = (at >= 0) & (addresses <= ends) & (sizes <= ends - np.minimum(addresses, ends))
        return np.where(inside, self._holders[np.maximum(at, 0)], -1)

    def views(self, rows: NDArray[np.uint64]) -> tuple[list[memoryview], int | None]:
        """A view a row, in order, and None; or no views and the index of the first row outside."""
        if len(rows) <= _FEW_ROWS:
            return self._few_views(rows.tolist())
        found = self.locate(rows)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            return [], int(missing[0])
        first = int(found[0])
        starts = rows[:, 0].tolist()
        sizes = rows[:, 1].tolist()
        if (found == first).all():
            view, base = self._views[first], self.regions[first].address
            return [view[s - base : s - base + n] for s, n in zip(starts, sizes, strict=True)], None
        return [self._view(*row) for row in zip(found.tolist(), starts, sizes, strict=True)], None

    def _few_views(self, rows: list[list[int]]) -> tuple[list[memoryview], int | None]:
        """The same in plain Python. Between copies of megabytes numpy's code is no longer in the cache, and a dozen of
        its calls cost as much as a tenth of the copy."""
        if self._stale:
            self._sort()
        bases, ends, holders = self._lists
        out = []
        for index, (address, size) in enumerate(rows):
            at = bisect_right(bases, address) - 1
            if at < 0 or address + size > ends[at]:
                return [], index
            out.append(self._view(holders[at], address, size))
        return out, None

    def _view(self, region: int, address: int, size: int) -> memoryview:
        offset = address - self.regions[region].address
        return self._views[region][offset : offset + size]
