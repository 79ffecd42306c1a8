"""Opening a disk tier: what the index says against what is in the slots.

A row counts when its slot's header is whole and says the same; every other row is dropped (`torn`). Files without a row
are removed, slots without one are free. The payloads are checked when they are read. An index that cannot be read is
set aside, and the tier starts empty: which pages had been dropped was written nowhere else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from .base import TierError
from .buffers import BLOCK_BYTES, Buffers
from .counts import Counts
from .disk_index import INDEX_NAME, connect, count_opening
from .pages import Pages, Place
from .record import HEADER_BYTES, read_header, unpack_checksums
from .segments import Segment

OPENING_BITS = 40
"""Generations of the n-th opening start at n << OPENING_BITS, so none is ever used twice."""
READERS = 8
_NOT_THE_INDEX = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
"""Errors that say nothing about what is in the index."""

_Row = tuple[Any, ...]
"""key, segment, slot, generation, page_bytes, checksums, key id; as found, so of any type."""


@dataclass(slots=True)
class Opened:
    db: sqlite3.Connection
    last_number: int


class Recovery:
    def __init__(self, directory: Path, segments: Path, pages: Pages, counts: Counts, buffers: Buffers, direct: bool):
        self._directory = directory
        self._segments = segments
        self._pages = pages
        self._counts = counts
        self._buffers = buffers
        self._direct = direct

    def run(self) -> Opened:
        """Fill `pages`. Raises TierError when the disk cannot be used at all."""
        try:
            return self._open()
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _NOT_THE_INDEX:
                raise TierError(f"the index in {self._directory} cannot be opened: {error}") from error
            self._set_aside()
        try:
            return self._open()
        except sqlite3.Error as error:
            raise TierError(f"no index can be made in {self._directory}: {error}") from error

    def _open(self) -> Opened:
        db = connect(self._directory)
        try:
            self._pages.start_generations(count_opening(db) << OPENING_BITS)
            found = self._open_segments(db)
            self._check_pages(db, found)
        except BaseException:
            self._forget_all()
            db.close()
            raise
        self._remove_strays(found)
        return Opened(db, max(found, default=0))

    def _open_segments(self, db: sqlite3.Connection) -> dict[int, Segment]:
        found: dict[int, Segment] = {}
        for number, slot_bytes, slots in db.execute("SELECT number, slot_bytes, slots FROM segments").fetchall():
            segment = self._open_segment(number, slot_bytes, slots)
            if segment is None:
                self._counts.add("segments_lost")
                db.execute("DELETE FROM segments WHERE number=?", (number,))
                continue
            if segment.slots < slots:
                self._counts.add("segments_cut")
                db.execute("UPDATE segments SET slots=? WHERE number=?", (segment.slots, number))
            found[number] = segment
            segment.free.clear()
            with self._pages.lock:
                self._pages.add_segment_locked(segment)
        return found

    def _open_segment(self, number: Any, slot_bytes: Any, slots: Any) -> Segment | None:
        """None: not there, too short for one slot, or the row makes no sense."""
        if not all(isinstance(value, int) and value > 0 for value in (number, slot_bytes, slots)):
            return None
        if slot_bytes % BLOCK_BYTES or slot_bytes < 2 * BLOCK_BYTES:
            return None
        try:
            return Segment.open(self._segments, number, slot_bytes, slots, self._direct)
        except OSError as error:
            raise TierError(f"segment {number:08x} in {self._segments} cannot be opened: {error.strerror}") from error

    def _check_pages(self, db: sqlite3.Connection, found: dict[int, Segment]) -> None:
        """Fill `pages` with the rows that hold; delete the others in one transaction."""
        columns = "key, segment, slot, generation, page_bytes, checksums, key_id"
        torn: list[Any] = []
        rows = db.execute(f"SELECT {columns} FROM pages ORDER BY segment, slot")
        with ThreadPoolExecutor(READERS, "lmkv-disk-open") as pool:
            for number, group in groupby(rows, itemgetter(1)):
                segment = found.get(number)
                if segment is None:
                    torn += [row[0] for row in group]
                    continue
                batch = list(group)
                for row, good in zip(batch, pool.map(lambda row, at=segment: self._holds(at, row), batch), strict=True):
                    if not (good and self._take(segment, row)):
                        torn.append(row[0])
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM pages WHERE key=?", ((key,) for key in torn))
        db.execute("COMMIT")
        self._counts.add("torn", len(torn))
        self._set_free(found.values())
        self._set_hands()

    def _holds(self, segment: Segment, row: _Row) -> bool:
        """Whether the slot's header is what the row says."""
        key, _, slot, generation, page_bytes, checksums, key_id = row
        if not isinstance(slot, int) or not 0 <= slot < segment.slots or not isinstance(checksums, bytes):
            return False
        with self._buffers.lend(HEADER_BYTES) as block:
            try:
                if segment.read(slot, [block]) != HEADER_BYTES:
                    return False
            except OSError:
                self._counts.add("unreadable")
                return False
            header = read_header(block)
        if header is None or len(checksums) % 8:
            return False
        ours = (key, generation, page_bytes, unpack_checksums(checksums), key_id)
        return ours == (header.key, header.generation, header.meta.page_bytes, header.meta.checksums, header.key_id)

    def _take(self, segment: Segment, row: _Row) -> bool:
        """Let the row count. False: another has its slot."""
        key, _, slot, generation, page_bytes, _, _ = row
        if segment.keys[slot] is not None:
            return False
        with self._pages.lock:
            segment.pending += 1
            self._pages.put_locked(key, Place(segment, slot, generation, page_bytes))
            self._pages.start_generations(generation)
        return True

    def _set_free(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            with self._pages.lock:
                segment.free.extend(slot for slot, key in enumerate(segment.keys) if key is None)
                self._pages.reopen_locked(segment)

    def _set_hands(self) -> None:
        """To the oldest page of each size."""
        oldest: dict[int, Place] = {}
        with self._pages.lock:
            for place in self._pages.places.values():
                first = oldest.setdefault(place.segment.slot_bytes, place)
                if place.generation < first.generation:
                    oldest[place.segment.slot_bytes] = place
            for slot_bytes, place in oldest.items():
                self._pages.classes[slot_bytes].start_at(place)

    def _remove_strays(self, found: dict[int, Segment]) -> None:
        known = {segment.path for segment in found.values()}
        for path in self._strays(known):
            path.unlink()
            self._counts.add("segments_stray")

    def _strays(self, known: set[Path]) -> Iterator[Path]:
        return (path for path in sorted(self._segments.glob("*.seg")) if path not in known)

    def _forget_all(self) -> None:
        for segment in self._pages.clear():
            segment.close()

    def _set_aside(self) -> None:
        self._counts.add("index_lost")
        for suffix in ("", "-wal", "-shm"):
            path = self._directory / (INDEX_NAME + suffix)
            if path.exists():
                path.rename(path.with_name(path.name + ".broken"))
