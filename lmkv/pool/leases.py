"""Pins: who holds which pages in place, and until when. Pure.

A pin that runs out is released like any other. What its reader has read by then is thrown away by the reader: it knows
the lease's length, and counts it from before it asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .index import Entry, PoolIndex, Writer


@dataclass(slots=True)
class _Lease:
    reader: Writer
    entries: Sequence[Entry]
    until_s: float


class Leases:
    """Not thread-safe. `most_bytes` bounds what may be pinned at a time."""

    def __init__(self, index: PoolIndex, counters: Counter[str], most_bytes: int) -> None:
        self._index = index
        self._counters = counters
        self._most_bytes = most_bytes
        self._leases: dict[int, _Lease] = {}
        self._next = 1
        self.pinned_bytes = 0

    def fits(self, entries: Sequence[Entry]) -> int:
        """How many of these, from the first on, may be pinned now."""
        room = self._most_bytes - self.pinned_bytes
        for count, entry in enumerate(entries):
            room -= entry.page_bytes
            if room < 0:
                return count
        return len(entries)

    def pin(self, reader: Writer, entries: Sequence[Entry], lease_s: float, now_s: float) -> int:
        """Holds them; returns the lease."""
        lease, self._next = self._next, self._next + 1
        for entry in entries:
            self._index.hold(entry)
        self.pinned_bytes += sum(entry.page_bytes for entry in entries)
        self._leases[lease] = _Lease(reader, entries, now_s + lease_s)
        return lease

    def unpin(self, lease: int) -> bool:
        """False: not (any more) a lease."""
        found = self._leases.pop(lease, None)
        if found is None:
            return False
        for entry in found.entries:
            self._index.release(entry)
        self.pinned_bytes -= sum(entry.page_bytes for entry in found.entries)
        return True

    def expire(self, now_s: float) -> None:
        for lease in [lease for lease, found in self._leases.items() if now_s > found.until_s]:
            self._counters["pin:expired"] += 1
            self.unpin(lease)

    def reader_gone(self, reader: Writer) -> None:
        """It reads no more: its process is dead."""
        for lease in [lease for lease, found in self._leases.items() if found.reader == reader]:
            self.unpin(lease)

    def __len__(self) -> int:
        return len(self._leases)
