"""Checksums of KV wherever it lies: made by the sender of a write, compared by its receiver. Loop thread only.

Between two engines whose caches are in host memory they are xxh3. As soon as one side's are on a device both use the
checksum of the kernels (`lmkv.kernels.checksum_runs`), which is the same on every device and on the CPU. Neither
depends on how the bytes are cut into runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmkv.errors import ExtentError, LayoutError
from lmkv.kernels import checksum_runs, kernel_errors
from lmkv.transport import MemoryKind

from . import memory
from .commands import Fence

_WORD_BYTES = 8
_MASK = (1 << 64) - 1


class Algorithm(StrEnum):
    XXH3 = "xxh3-64"
    """Of host memory only."""
    WORDS = "words-64"
    """The sum of mixed words that pages have too (docs/page-format.md)."""


def algorithm_for(ours: MemoryKind, theirs: MemoryKind) -> Algorithm:
    """What two engines with caches of these kinds use; the same from either side."""
    return Algorithm.XXH3 if ours is theirs is MemoryKind.DRAM else Algorithm.WORDS


@dataclass(slots=True)
class Pending:
    """A checksum that a device is making. Belongs to the thread that has begun it."""

    sums: torch.Tensor
    fence: Fence | None

    @property
    def done(self) -> bool:
        """`result` does not wait any more. Raises KernelError when the device has failed."""
        return self.fence is None or self.fence.query()

    def result(self) -> int:
        """Waits for the device if need be; raises KernelError."""
        with kernel_errors("reading a checksum"):
            return int(self.sums.item()) & _MASK


class Checksums:
    """Of runs in the registered memory of `found`, which it keeps alive. `runs` is a table (n, 2) of address and bytes,
    uint64; the checksum is of their bytes in this order."""

    def __init__(self, found: memory.KvMemory) -> None:
        self._device = found.device
        self._own = algorithm_for(found.kind, found.kind)
        self.name = self._own.value
        """Which function `of` computes, for cards: two engines have to use the same."""
        regions = sorted((r for r in found.regions if r.kind is found.kind), key=lambda region: region.address)
        self._bytes = [_bytes_of(region.owner)[: region.bytes] for region in regions]
        self._first = np.array([region.address for region in regions], dtype=np.uint64)
        self._end = np.array([region.address + region.bytes for region in regions], dtype=np.uint64)

    def of(self, runs: NDArray[np.uint64], algorithm: Algorithm | None = None) -> int:
        """By default what two engines with caches like ours use.

        Raises ExtentError for runs outside registered memory, LayoutError for what this algorithm cannot sum, and
        KernelError for what fails on the device.
        """
        if (algorithm or self._own) is Algorithm.XXH3:
            if self._device.kind is not MemoryKind.DRAM:
                raise LayoutError(f"xxh3 is of host memory, not of memory on {self._device.device}")
            return memory.checksum(runs)
        return self.begin(runs).result()

    def begin(self, runs: NDArray[np.uint64]) -> Pending:
        """Enqueue a checksum by `WORDS` on the calling thread's current stream. Raises as `of`."""
        sums, before = None, 0
        for owner, table in self._by_region(runs):
            first, rest = divmod(before, _WORD_BYTES)
            if rest:
                raise LayoutError(f"runs in several regions have {before} bytes in the first of them, not whole words")
            sums = checksum_runs(owner, table, first, sums)
            before += int(table[:, 1].sum())
        if sums is None:
            sums = torch.zeros(1, dtype=torch.int64)
        return Pending(sums, self._device.fence())

    def _by_region(self, runs: NDArray[np.uint64]) -> Iterator[tuple[torch.Tensor, NDArray[np.int64]]]:
        """The bytes of a region, and the runs that follow each other in it as (offset, bytes)."""
        if len(runs) == 0:
            return
        address, size = runs[:, 0].astype(np.uint64), runs[:, 1].astype(np.uint64)
        region = np.searchsorted(self._first, address, side="right") - 1
        outside = (region < 0) | (address + size > self._end[region]) | (address + size < address)
        if outside.any():
            at, count = runs[outside][0].tolist()
            raise ExtentError(f"{count} bytes at {at:#x} are not in the registered memory of the caches")
        offsets = (address - self._first[region]).astype(np.int64)
        table = np.stack([offsets, size.astype(np.int64)], axis=1)
        borders = [0, *(np.flatnonzero(np.diff(region)) + 1).tolist(), len(runs)]
        for lo, hi in pairwise(borders):
            yield self._bytes[int(region[lo])], table[lo:hi]


def _bytes_of(owner: Any) -> torch.Tensor:
    """The memory that a region is of (a storage, a tensor, an array) as one row of bytes."""
    if isinstance(owner, np.ndarray):
        return torch.from_numpy(owner.view(np.uint8).reshape(-1))
    storage = owner.untyped_storage() if isinstance(owner, torch.Tensor) else owner
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    whole.set_(storage, 0, (storage.nbytes(),), (1,))
    first = int(owner.data_ptr()) - int(storage.data_ptr())
    return whole[first:]
