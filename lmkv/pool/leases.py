"""Pins: who holds which pages in place, and until when. Pure.

A pin that runs out is released like any other. What its reader has read by then is thrown away by the reader: it knows
the lease's length, and counts it from before it asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .index import Entry, PoolIndex, Writer

MOST_LEASES = 65536


@dataclass(slots=True)
class _Lease:
    reader: Writer
    entries: Sequence[Entry]
    until_s: float


class Leases:
    """Not thread-safe. At most MOST_LEASES at a time; `most_bytes` bounds what they pin. `first`: a number that no node
    before has come to, so that an unpin meant for that one finds nothing here."""

    def __init__(self, index: PoolIndex, counters: Counter[str], most_bytes: int, first: int = 1) -> None:
        self._index = index
        self._counters = counters
        self._most_bytes = most_bytes
        self._leases: dict[int, _Lease] = {}
        self._next = first
        self._pins: Counter[Entry] = Counter()
        self.pinned_bytes = 0
        """Of pages, each counted once."""

    def fits(self, entries: Sequence[Entry]) -> int:
        """How many of these, from the first on, may be pinned now."""
        if len(self._leases) >= MOST_LEASES:
            return 0
        room = self._most_bytes - self.pinned_bytes
        for count, entry in enumerate(entries):
            room -= entry.page_bytes if entry not in self._pins else 0
            if room < 0:
                return count
        return len(entries)

    def pin(self, reader: Writer, entries: Sequence[Entry], lease_s: float, now_s: float) -> int:
        """Holds them; returns the lease."""
        lease, self._next = self._next, self._next + 1
        for entry in entries:
            self._index.hold(entry)
            self._pins[entry] += 1
            self.pinned_bytes += entry.page_bytes if self._pins[entry] == 1 else 0
        self._leases[lease] = _Lease(reader, entries, now_s + lease_s)
        return lease

    def unpin(self, lease: int) -> bool:
        """False: not (any more) a lease."""
        found = self._leases.pop(lease, None)
        if found is None:
            return False
        for entry in found.entries:
            self._index.release(entry)
            self._pins[entry] -= 1
            if not self._pins[entry]:
                del self._pins[entry]
                self.pinned_bytes -= entry.page_bytes
        return True

    def pinned(self, lease: int) -> Sequence[Entry]:
        """Nothing for what is not (any more) a lease."""
        found = self._leases.get(lease)
        return found.entries if found is not None else ()

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
