"""Extents: tables of (address, bytes, device) rows, and the merging of runs.

A table is a C-contiguous uint64 array of shape (n, 3). Two tables describe one operation row by row: row i of the
local table and row i of the remote table have equal byte counts.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from lmkv.errors import ExtentError

Table = NDArray[np.uint64]

_FEW_ROWS = 8


class MemoryKind(StrEnum):
    DRAM = "DRAM"
    VRAM = "VRAM"


@dataclass(frozen=True, slots=True)
class Extents:
    """`table` as above, all rows in memory of one `kind`. Not copied; do not write to it afterwards."""

    table: Table
    kind: MemoryKind = MemoryKind.DRAM

    def __post_init__(self) -> None:
        t = self.table
        if t.ndim != 2 or t.shape[1] != 3 or t.dtype != np.uint64 or not t.flags.c_contiguous:
            raise ExtentError(f"an extent table is a C-contiguous uint64 (n, 3) array, got {t.dtype} {t.shape}")

    def __len__(self) -> int:
        return len(self.table)

    @property
    def total_bytes(self) -> int:
        return int(self.table[:, 1].sum())

    @classmethod
    def of(cls, *rows: tuple[int, int], device: int = 0, kind: MemoryKind = MemoryKind.DRAM) -> Extents:
        """Few extents by hand: `Extents.of((address, bytes), …)`."""
        table = np.array([(a, n, device) for a, n in rows], dtype=np.uint64).reshape(len(rows), 3)
        return cls(table, kind)


def check_pair(local: Extents, remote: Extents) -> None:
    """Raise ExtentError unless the two tables agree row by row and are not empty."""
    if len(local) != len(remote) or len(local) == 0:
        raise ExtentError(
            f"local has {len(local)} extents, remote {len(remote)}; both need the same number, at least 1"
        )
    if len(local) == 1 and local.table[0, 1] == remote.table[0, 1]:
        return
    if not (local.table[:, 1] == remote.table[:, 1]).all():
        row = int(np.argmax(local.table[:, 1] != remote.table[:, 1]))
        raise ExtentError(
            f"extent {row} has {local.table[row, 1]} bytes locally, {remote.table[row, 1]} remotely; they must be equal"
        )


def sort_rows(local: Extents, remote: Extents) -> tuple[Extents, Extents]:
    """The same pairs of rows by ascending local address; as they came where they are sorted already."""
    check_pair(local, remote)
    addresses = local.table[:, 0]
    if (addresses[:-1] <= addresses[1:]).all():
        return local, remote
    order = np.argsort(addresses, kind="stable")
    return Extents(local.table[order], local.kind), Extents(remote.table[order], remote.kind)


def merge_runs(local: Extents, remote: Extents) -> tuple[Extents, Extents]:
    """Join neighbouring rows that continue each other on *both* sides. Order and bytes are kept.

    Vectorised: a row starts a run unless it begins where the row before it ends, locally and remotely.
    """
    check_pair(local, remote)
    a, b = local.table, remote.table
    if len(a) == 1:
        return local, remote
    joined = (
        (a[:-1, 0] + a[:-1, 1] == a[1:, 0])
        & (b[:-1, 0] + b[:-1, 1] == b[1:, 0])
        & (a[:-1, 2] == a[1:, 2])
        & (b[:-1, 2] == b[1:, 2])
    )
    starts = np.flatnonzero(np.concatenate(([True], ~joined)))
    if len(starts) == len(a):
        return local, remote
    sizes = np.add.reduceat(a[:, 1], starts)
    out = []
    for extents in (local, remote):
        table = extents.table[starts]
        table[:, 1] = sizes
        out.append(Extents(np.ascontiguousarray(table), extents.kind))
    return out[0], out[1]


class Bounds:
    """Regions prepared once so that many extents can be checked against them. Immutable; any thread.

    A row must lie within one region: regions that touch are not joined, regions that overlap are each taken whole.
    """

    __slots__ = ("_arrays", "_lists")

    def __init__(self, regions: Table) -> None:
        """`regions` is (n, 3): address, bytes, device."""
        self._arrays: dict[int, tuple[Table, Table]] = {}
        self._lists: dict[int, tuple[list[int], list[int]]] = {}
        for device in np.unique(regions[:, 2]):
            mine = regions[regions[:, 2] == device]
            mine = mine[np.argsort(mine[:, 0], kind="stable")]
            # The furthest end of all regions that begin at or before each base: a row fits one of them exactly
            # when it ends no later, also where regions overlap.
            ends = np.maximum.accumulate(mine[:, 0] + mine[:, 1])
            bases = np.ascontiguousarray(mine[:, 0])
            self._arrays[int(device)] = bases, ends
            self._lists[int(device)] = bases.tolist(), ends.tolist()

    def outside(self, extents: Extents) -> int | None:
        """Index of the first row in none of the regions, or None. A zero-length row needs its address in one."""
        if len(extents) <= _FEW_ROWS:
            return self._outside_few(extents)
        table = extents.table
        found = np.zeros(len(table), dtype=bool)
        for device, (bases, ends) in self._arrays.items():
            rows = np.flatnonzero(table[:, 2] == device)
            address, size = table[rows, 0], table[rows, 1]
            at = np.searchsorted(bases, address, side="right") - 1
            end = ends[np.maximum(at, 0)]
            # end - address would wrap where the row begins behind the end; the comparison before it rules that out.
            found[rows] = (at >= 0) & (address <= end) & (size <= end - np.minimum(address, end))
        missing = np.flatnonzero(~found)
        return int(missing[0]) if len(missing) else None

    def _outside_few(self, extents: Extents) -> int | None:
        """The same in plain Python: for a few rows numpy's call costs exceed the work."""
        for row, (address, size, device) in enumerate(extents.table.tolist()):
            bases, ends = self._lists.get(device, ([], []))
            at = bisect_right(bases, address) - 1
            if at < 0 or address + size > ends[at]:
                return row
        return None


def outside(extents: Extents, regions: Table) -> int | None:
    """`Bounds(regions).outside(extents)` for a single check."""
    return Bounds(regions).outside(extents)
