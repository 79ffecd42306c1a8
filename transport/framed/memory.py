"""Registered memory as views that can be sliced, and the check that a row lies inside it.

Slicing a view costs a tenth of a microsecond; making one from an address costs several. So each region is made into a
view once, when it is registered.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from ..base import Region


class Memory:
    """This process's regions. Keeps every region's `owner` alive: registration is never undone. Owner thread only."""

    __slots__ = ("_bases", "_ends", "_holders", "_stale", "_views", "regions")

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._views: list[memoryview] = []
        self._stale = True
        self._bases = np.empty(0, dtype=np.uint64)
        self._ends = np.empty(0, dtype=np.uint64)
        self._holders = np.empty(0, dtype=np.intp)

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
        self._stale = False

    def locate(self, rows: NDArray[np.uint64]) -> NDArray[np.intp]:
        """For each (address, bytes) row the position of a region that holds all of it, or -1."""
        if not self.regions:
            return np.full(len(rows), -1, dtype=np.intp)
        if self._stale:
            self._sort()
        addresses, sizes = rows[:, 0], rows[:, 1]
        at = np.searchsorted(self._bases, addresses, side="right") - 1
        ends = self._ends[np.maximum(at, 0)]
        # ends - addresses would wrap where the row begins behind the end; the comparison before it rules that out.
        inside = (at >= 0) & (addresses <= ends) & (sizes <= ends - np.minimum(addresses, ends))
        return np.where(inside, self._holders[np.maximum(at, 0)], -1)

    def views(self, rows: NDArray[np.uint64]) -> tuple[list[memoryview], int | None]:
        """A view a row, in order, and None; or no views and the index of the first row outside."""
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
        out = []
        for region, start, size in zip(found.tolist(), starts, sizes, strict=True):
            offset = start - self.regions[region].address
            out.append(self._views[region][offset : offset + size])
        return out, None
