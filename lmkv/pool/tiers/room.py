"""Where a new page goes: a free slot, a new segment, or what older pages leave.

The space of all segment files is bounded by the capacity. When it is used up, whoever needs a slot first takes back a
segment of another size that is mostly empty (its pages move together), then gives up the pages that the hand comes to:
of its own size, or, where the oldest page is of another, a whole segment of that one.
"""

from __future__ import annotations

import errno
import threading
from pathlib import Path

from .base import Evicted, TierError
from .changes import AddSegment, RemovePages, RetireSegment
from .compaction import Compaction
from .counts import Counts
from .disk_index import DiskIndex
from .pages import Pages, SizeClass
from .segments import Segment, segment_path

ROOM_WAIT_S = 60.0
PENDING_WAIT_S = 1.0
EVICT_PAGES = 16
ATTEMPTS = 64


class Room:
    """Any thread."""

    def __init__(
        self,
        directory: Path,
        pages: Pages,
        index: DiskIndex,
        compaction: Compaction,
        counts: Counts,
        *,
        capacity_bytes: int,
        segment_bytes: int,
        direct: bool,
        evicted: Evicted,
        last_number: int,
    ) -> None:
        self._directory = directory
        self._pages = pages
        self._index = index
        self._compaction = compaction
        self._counts = counts
        self._capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes
        self._direct = direct
        self._evicted = evicted
        self._last_number = last_number
        self._making = threading.Lock()

    def slot_for(self, slot_bytes: int) -> tuple[Segment, int]:
        """A pending slot. Raises TierError when there is no room and nothing that could be given up."""
        for _ in range(ATTEMPTS):
            place = self._pages.allocate(slot_bytes)
            if place is not None:
                return place
            self._report(self._make_room(slot_bytes))
        raise TierError("others took every slot that became free", hint="raise the disk tier's capacity")

    def compact(self) -> int:
        """Take back what segments leave unused; returns how many went. Raises TierError."""
        freed = 0
        with self._lock():
            for slot_bytes in list(self._pages.classes):
                while self._take_back(slot_bytes):
                    freed += 1
        return freed

    def trim(self) -> None:
        """Take back empty segments, all but one of a size."""
        with self._lock():
            while (segment := self._next_empty()) is not None:
                self._finish(RetireSegment(segment, {}, {}))

    def _lock(self) -> _Held:
        return _Held(self._making)

    def _report(self, keys: list[bytes]) -> None:
        if keys:
            self._counts.add("evicted", len(keys))
            self._evicted(keys)

    def _make_room(self, slot_bytes: int) -> list[bytes]:
        """Free at least one slot of that size; returns what was given up for it."""
        with self._lock():
            with self._pages.lock:
                size_class = self._pages.classes.get(slot_bytes)
                if size_class is not None and size_class.with_free:
                    return []
            if self._add_segment(slot_bytes) or self._reclaim(slot_bytes):
                return []
            return self._give_up(slot_bytes, size_class)

    def _add_segment(self, slot_bytes: int) -> bool:
        """False: the capacity or the disk is used up."""
        slots = max(1, self._segment_bytes // slot_bytes)
        if self._capacity_bytes:
            slots = min(slots, (self._capacity_bytes - self._pages.file_bytes) // slot_bytes)
        if slots <= 0:
            return False
        self._last_number += 1
        try:
            segment = Segment.create(self._directory, self._last_number, slot_bytes, slots, self._direct)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._counts.add("no_space")
                return False
            raise TierError(
                f"no segment can be made in {self._directory}: {error.strerror}", hint="look at the disk's state"
            ) from error
        try:
            self._index.run(AddSegment(segment))
        except TierError:
            segment.close()
            segment.path.unlink()
            raise
        return True

    def _reclaim(self, slot_bytes: int) -> bool:
        """Take back a segment of another size."""
        with self._pages.lock:
            others = [each for each in self._pages.classes if each != slot_bytes]
        return any(self._take_back(other) for other in others)

    def _take_back(self, slot_bytes: int) -> bool:
        """Empty one segment of that size into the others, if it is at most half full and they have room."""
        with self._pages.lock:
            size_class = self._pages.classes.get(slot_bytes)
            segment = _emptiest(size_class) if size_class is not None else None
            if segment is None or not self._pages.close_locked(segment):
                return False
        try:
            moved = self._compaction.copy(segment)
        except TierError:
            self._counts.add("compaction_failed")
            return False
        if moved is None:
            return False
        damaged = {key: generation for key, generation in self._live(segment).items() if key not in moved}
        retirement = RetireSegment(segment, moved, damaged)
        self._finish(retirement)
        self._counts.add("compacted", len(moved))
        self._counts.add("corrupt", len(retirement.removed))
        return True

    def _live(self, segment: Segment) -> dict[bytes, int]:
        with self._pages.lock:
            return self._live_locked(segment)

    def _live_locked(self, segment: Segment) -> dict[bytes, int]:
        return {key: self._pages.places[key].generation for key in segment.keys if key is not None}

    def _give_up(self, slot_bytes: int, own: SizeClass | None) -> list[bytes]:
        with self._pages.lock:
            foreign = self._oldest_segment(slot_bytes, own)
            if foreign is not None:
                self._pages.close_locked(foreign)
                retirement = RetireSegment(foreign, {}, self._live_locked(foreign))
            elif own is not None:
                victims = own.victims(max(1, min(EVICT_PAGES, own.slots // 8)))
                removal = RemovePages({key: self._pages.places[key].generation for key in victims})
                if not victims and own.pending:
                    self._pages.changed.wait(PENDING_WAIT_S)
                    return []
        if foreign is not None:
            self._finish(retirement)
            return retirement.removed
        if own is not None and removal.keys:
            self._index.run(removal)
            return removal.removed
        raise TierError(
            f"no room for a page of {slot_bytes} bytes in {self._directory} "
            f"({self._pages.file_bytes} of {self._capacity_bytes} bytes are in use, nothing can be given up)",
            hint="raise the disk tier's capacity, or free space on its disk",
        )

    def _oldest_segment(self, slot_bytes: int, own: SizeClass | None) -> Segment | None:
        """The segment of another size whose page is older than any of ours. With the lock of `Pages` held."""
        mine = own.oldest() if own is not None else None
        oldest = self._pages.places[mine[1]].generation if mine is not None else None
        found: Segment | None = None
        for size, size_class in self._pages.classes.items():
            theirs = size_class.oldest() if size != slot_bytes else None
            if theirs is None or theirs[0].pending:
                continue
            generation = self._pages.places[theirs[1]].generation
            if oldest is None or generation < oldest:
                found, oldest = theirs[0], generation
        return found

    def _next_empty(self) -> Segment | None:
        """An empty segment beside another one of its size, closed."""
        with self._pages.lock:
            for size_class in self._pages.classes.values():
                empty = [each for each in size_class.segments if not each.live and not each.pending]
                if len(empty) > 1 and self._pages.close_locked(empty[0]):
                    return empty[0]
        return None

    def _finish(self, retirement: RetireSegment) -> None:
        self._index.run(retirement)
        segment_path(self._directory, retirement.segment.number).unlink(missing_ok=True)


def _emptiest(size_class: SizeClass) -> Segment | None:
    """With the lock of `Pages` held."""
    idle = [segment for segment in size_class.segments if not segment.pending and not segment.closing]
    if not idle:
        return None
    segment = min(idle, key=lambda each: each.live)
    elsewhere = sum(len(each.free) for each in size_class.segments if each is not segment and not each.closing)
    return segment if segment.live * 2 <= segment.slots and segment.live <= elsewhere else None


class _Held:
    """A lock that is waited for a bounded time."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=ROOM_WAIT_S):
            raise TierError(
                f"room on the disk was not made within {ROOM_WAIT_S:.0f} s", hint="look at the disk's state"
            )

    def __exit__(self, *error: object) -> None:
        self._lock.release()
