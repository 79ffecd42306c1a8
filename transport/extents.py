"""Extents: tables of (address, bytes, device) rows, and the merging of runs.

A table is a C-contiguous uint64 array of shape (n, 3). Two tables describe one operation row by row: row i of the
local table and row i of the remote table have equal byte counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from lmkv.errors import ExtentError

Table = NDArray[np.uint64]


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
    if not np.array_equal(local.table[:, 1], remote.table[:, 1]):
        row = int(np.argmax(local.table[:, 1] != remote.table[:, 1]))
        raise ExtentError(
            f"extent {row} has {local.table[row, 1]} bytes locally and {remote.table[row, 1]} remotely; they must be equal"
        )


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


def outside(extents: Extents, regions: Table) -> int | None:
    """Index of the first row that lies in none of the `regions` (n, 3: address, bytes, device), or None.

    A row must lie within one region: regions that touch are not joined. Zero-length rows count as inside.
    """
    if len(regions) == 0:
        return 0 if len(extents) else None
    order = np.lexsort((regions[:, 0], regions[:, 2]))
    found = np.zeros(len(extents), dtype=bool)
    table = extents.table
    for device in np.unique(table[:, 2]):
        rows = np.flatnonzero(table[:, 2] == device)
        mine = regions[order][regions[order][:, 2] == device]
        if len(mine) == 0:
            continue
        at = np.searchsorted(mine[:, 0], table[rows, 0], side="right").astype(np.int64) - 1
        ok = at >= 0
        base, size = mine[np.maximum(at, 0), 0], mine[np.maximum(at, 0), 1]
        offset = table[rows, 0] - base
        found[rows] = ok & (table[rows, 1] <= size) & (offset <= size - np.minimum(table[rows, 1], size))
    missing = np.flatnonzero(~found)
    return int(missing[0]) if len(missing) else None
