"""Registered memory through which pages of remote nodes pass. Loop thread only."""

from __future__ import annotations

import heapq

import torch

from lmkv.transport import Extents, MemoryKind, Region

from ..device import device_of


class Staging:
    """`count` slots of `slot_bytes`. Stores may take `for_stores` of them at most, so that loads need not wait."""

    def __init__(self, staging_bytes: int, slot_bytes: int, device: torch.device) -> None:
        self.slot_bytes = -(-slot_bytes // 4096) * 4096
        self.count = staging_bytes // self.slot_bytes
        self.data = torch.empty(self.count * self.slot_bytes, dtype=torch.uint8, device=device)
        self._device = device_of(self.data)
        self._free = list(range(self.count))
        """A heap: the lowest are taken first, so that they follow each other in memory, and stay in the caches."""
        self._stores_left = max(1, self.count // 2)
        self._of_stores: set[int] = set()

    def region(self) -> Region:
        device = self._device
        return Region(int(self.data.data_ptr()), self.data.numel(), device.kind, device.index, self.data)

    @property
    def in_host_memory(self) -> bool:
        return self._device.kind is MemoryKind.DRAM

    def take(self, most: int, for_store: bool = False) -> list[int]:
        """As many as there are, `most` at most, in ascending order."""
        count = min(most, len(self._free), self._stores_left if for_store else most)
        slots = [heapq.heappop(self._free) for _ in range(count)]
        if for_store:
            self._stores_left -= count
            self._of_stores.update(slots)
        return slots

    def give_back(self, slots: list[int]) -> None:
        """Nothing reads or writes them any more."""
        for slot in slots:
            if slot in self._of_stores:
                self._of_stores.discard(slot)
                self._stores_left += 1
            heapq.heappush(self._free, slot)

    @property
    def idle(self) -> bool:
        return len(self._free) == self.count

    def offset(self, slot: int) -> int:
        return slot * self.slot_bytes

    @property
    def can_store(self) -> bool:
        return bool(self._free) and self._stores_left > 0

    def can_load(self, slots: int) -> bool:
        return len(self._free) >= slots

    def extents(self, slots: list[int], size: int) -> Extents:
        """`size` bytes of each slot."""
        return self.rows([(slot, size) for slot in slots])

    def rows(self, table: list[tuple[int, int]]) -> Extents:
        """(slot, bytes)"""
        device, base = self._device, int(self.data.data_ptr())
        rows = ((base + self.offset(slot), size) for slot, size in table)
        return Extents.of(*rows, device=device.index, kind=device.kind)
