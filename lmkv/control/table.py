"""A table from 8 bytes to 4, of many millions of entries, looked up and changed in batches.

Buckets of eight slots. A key lies in one of two buckets, named by the halves of its bits, so looking one up reads two
cache lines, and taking one out empties its slot: there is nothing to step over, however often pages come and go. It
grows by linear hashing: each batch splits as many buckets as it has filled, in order, and what a split moves goes to
the same slot of the new bucket. So there is no pause and never a second copy; the memory is remapped, not copied.
Where both buckets of a key are full an entry of theirs moves to its other bucket; what finds no room even so waits in
spare slots in front of the first bucket for a split.

Not thread-safe. Keys are not 0, values are not 0.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from .prints import Prints

Values = npt.NDArray[np.uint32]
Places = npt.NDArray[np.int64]

SLOTS = 8
LOAD = 0.6
"""Of the slots; more makes spare slots busy: a bucket not yet split has nearly twice the keys of one that is."""
_SPARE_ROWS = 128
_SPARE = _SPARE_ROWS * SLOTS
_FULL = 0xFF


def _tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """By the bits of a bucket's used slots: how many they are; and which slot is the r-th free one (SLOTS: none)."""
    count = np.zeros(256, np.uint8)
    free = np.full((256, SLOTS), SLOTS, np.uint8)
    for used in range(256):
        slots = [slot for slot in range(SLOTS) if not used >> (7 - slot) & 1]
        count[used] = SLOTS - len(slots)
        free[used, : len(slots)] = slots
    return count, free


_COUNT, _FREE = _tables()


class _Column:
    """An array that grows in place: pages of memory that nobody has written to cost nothing."""

    def __init__(self, rows: int, dtype: Any) -> None:
        self._dtype = np.dtype(dtype)
        self._row_bytes = SLOTS * self._dtype.itemsize
        self._map = mmap.mmap(-1, rows * self._row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view()

    def grow(self, rows: int) -> None:
        del self.rows, self.flat
        self._map.resize(rows * self._row_bytes)
        self._view()

    def _view(self) -> None:
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self.flat = np.frombuffer(self._map, self._dtype)
        self.rows = self.flat.reshape(-1, SLOTS)


class SlotTable:
    """`len()` is the number of entries. A place names a slot until the next `put`; place 0 is nowhere."""

    def __init__(self, buckets: int = 1024) -> None:
        if buckets < SLOTS or buckets & (buckets - 1):
            raise ValueError(f"buckets is {buckets}, has to be a power of two from {SLOTS} on")
        self._low = buckets
        self._next = 0
        """Buckets below have been split into themselves and `_low` further on."""
        self._keys = _Column(_SPARE_ROWS + 2 * buckets, np.uint64)
        self._values = _Column(_SPARE_ROWS + 2 * buckets, np.uint32)
        self._used = 0
        self._spare: set[int] = set()
        """Places in use in front of the buckets."""
        self._doublings = 0
        self.lost = 0
        """Entries for which there was no slot at all."""

    def __len__(self) -> int:
        return self._used

    @property
    def buckets(self) -> int:
        return self._low + self._next

    @property
    def memory_bytes(self) -> int:
        """Of the part in use."""
        return (_SPARE_ROWS + self.buckets) * SLOTS * 12

    # --- reading ---

    @property
    def doublings(self) -> int:
        """How often the memory was remapped to twice as much."""
        return self._doublings

    def find(self, keys: Prints) -> Values:
        """The value of each key; 0: not there."""
        return self._values.flat[self.locate(keys)]

    def locate(self, keys: Prints) -> Places:
        """Where each key is; 0: not there."""
        rows = self._homes(keys)
        hits = (self._keys.rows.take(rows, 0) == keys[:, None, None]).ravel().nonzero()[0]
        places = np.zeros(len(keys), np.int64)
        places[hits >> 4] = (rows.take(hits >> 3) << 3) | (hits & 7)
        if self._spare:
            self._locate_spare(keys, places)
        return places

    def read(self, places: Places) -> Values:
        return self._values.flat[places]

    def part(self, first: int, count: int) -> tuple[Places, Values]:
        """Entries of buckets from `first` on, and with the first those of the spare slots."""
        start = (first + _SPARE_ROWS) * SLOTS if first else 0
        found = self._values.flat[start : (min(first + count, self.buckets) + _SPARE_ROWS) * SLOTS]
        used = np.flatnonzero(found)
        return used + start, found[used]

    def _homes(self, keys: Prints) -> Places:
        """The rows of both buckets of each key, side by side."""
        bits: Places = np.empty((len(keys), 2), np.int64)
        bits[:, 0] = keys.view(np.int64)
        np.right_shift(keys.view(np.int64), 32, out=bits[:, 1])
        bits &= 2 * self._low - 1
        np.subtract(bits, self._low, out=bits, where=bits >= self.buckets)
        bits += _SPARE_ROWS
        return bits

    def _locate_spare(self, keys: Prints, places: Places) -> None:
        spare = np.fromiter(self._spare, np.int64, len(self._spare))
        missing = np.flatnonzero(places == 0)
        at, which = np.nonzero(self._keys.flat[spare][:, None] == keys[missing])
        places[missing[which]] = spare[at]

    # --- writing ---

    def put(self, keys: Prints, places: Places, values: Values) -> None:
        """Give different keys, which `locate` found at `places`, new values; 0 takes an entry out."""
        there = places != 0
        self._write(places[there], values[there])
        new = np.flatnonzero(~there & (values != 0))
        if len(new):
            self._insert_full(*self._insert(keys[new], values[new]))
            self._used += len(new)
            self._grow()

    def write(self, places: Places, values: Values) -> None:
        """Give the entries at these places other values; 0 takes one out."""
        self._write(places, values)

    def _write(self, places: Places, values: Values) -> None:
        self._values.flat[places] = values
        gone = places[values == 0]
        if len(gone):
            self._keys.flat[gone] = 0
            self._used -= len(gone)
            if self._spare:
                self._spare.difference_update(gone[gone < _SPARE].tolist())

    def _insert(self, keys: Prints, values: Values) -> tuple[Prints, Values]:
        """Put into the emptier of each key's buckets; returns those for which both are full."""
        left_keys: list[Prints] = []
        left_values: list[Values] = []
        while len(keys):
            count = len(keys)
            rows = self._homes(keys)
            used = np.packbits(self._keys.rows[rows] != 0, axis=2)[:, :, 0]
            second = _COUNT[used[:, 1]] < _COUNT[used[:, 0]]
            row, used = np.where(second, rows[:, 1], rows[:, 0]), np.where(second, used[:, 1], used[:, 0])
            order = np.argsort(row, kind="stable")
            row, used, keys, values = row[order], used[order], keys[order], values[order]
            rank = np.arange(count) - np.searchsorted(row, row)
            slot = _FREE[used, np.minimum(rank, SLOTS - 1)].astype(np.int64)
            fits = (slot < SLOTS) & (rank < SLOTS)
            places = (row[fits] << 3) | slot[fits]
            self._keys.flat[places] = keys[fits]
            self._values.flat[places] = values[fits]
            # What found its bucket full but not both of them tries again: the other one is emptier now.
            stuck = ~fits & (used == _FULL)
            left_keys.append(keys[stuck])
            left_values.append(values[stuck])
            again = ~fits & ~stuck
            keys, values = keys[again], values[again]
        return np.concatenate(left_keys), np.concatenate(left_values)

    def _insert_full(self, keys: Prints, values: Values) -> None:
        """Those whose buckets are both full: one entry there goes to its other bucket, or the key to a spare slot."""
        for key, value in zip(keys, values, strict=True):
            place = self._make_room(key) or next((p for p in range(1, _SPARE) if p not in self._spare), 0)
            if not place:
                self.lost += 1
                self._used -= 1
                continue
            if place < _SPARE:
                self._spare.add(place)
            self._keys.flat[place] = key
            self._values.flat[place] = value

    def _make_room(self, key: np.uint64) -> int:
        """A free place in one of this key's buckets; 0: all that is there would find its other bucket full as well."""
        mine = np.repeat(self._homes(np.array([key]))[0], SLOTS)
        slots = np.tile(np.arange(SLOTS), 2)
        first, second = self._homes(self._keys.rows[mine, slots]).T
        other = np.where(first == mine, second, first)
        used = _COUNT[np.packbits(self._keys.rows[other] != 0, axis=1)[:, 0]]
        best = int(used.argmin())
        if used[best] == SLOTS:
            return 0
        place = int(mine[best] << 3 | slots[best])
        target = int(other[best] << 3) | int(np.flatnonzero(self._keys.rows[other[best]] == 0)[0])
        for column in (self._keys, self._values):
            column.flat[target] = column.flat[place]
        return place

    # --- growing ---

    def _grow(self) -> None:
        """Split buckets until the load is right again; while spare slots are busy somewhat more."""
        wanted = int(self._used / (SLOTS * LOAD)) + 1 + len(self._spare)
        if wanted <= self.buckets:
            return
        while wanted > self.buckets:
            self._split(min(wanted - self.buckets, self._low - self._next))
            if self._next == self._low:
                self._double()
        if self._spare:
            self._retry_spare()

    def _split(self, count: int) -> None:
        low, first = self._low, self._next
        old = slice(_SPARE_ROWS + first, _SPARE_ROWS + first + count)
        new = slice(old.start + low, old.stop + low)
        keys = self._keys.rows[old]
        bucket = np.arange(first, first + count, dtype=np.uint64)[:, None]
        half, bit = np.uint64(low - 1), np.uint64(low)
        high = keys >> np.uint64(32)
        # An entry stays if one of its two buckets is still this one.
        stays = ((keys & half) == bucket) & ((keys & bit) == 0)
        stays |= ((high & half) == bucket) & ((high & bit) == 0)
        moves = ~stays
        for column in (self._keys, self._values):
            rows = column.rows
            rows[new] = rows[old] * moves
            rows[old] *= stays
        self._next += count

    def _double(self) -> None:
        """All buckets are split: the next round begins. No view of a column may be alive."""
        self._low, self._next = 2 * self._low, 0
        self._doublings += 1
        self._keys.grow(_SPARE_ROWS + 2 * self._low)
        self._values.grow(_SPARE_ROWS + 2 * self._low)

    def _retry_spare(self) -> None:
        places = np.fromiter(self._spare, np.int64, len(self._spare))
        keys, values = self._keys.flat[places], self._values.flat[places]
        self._keys.flat[places] = 0
        self._values.flat[places] = 0
        self._spare.clear()
        self._insert_full(*self._insert(keys, values))
