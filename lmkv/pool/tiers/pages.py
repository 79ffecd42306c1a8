"""What the index says, in memory: where each page lies, which slots are free, and whom the hand comes to next.

`Pages` follows the index: it changes after a commit, never before, so what it shows is durable. Its lock is held for
steps without I/O only.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .segments import Segment


@dataclass(frozen=True, slots=True)
class Place:
    """One stored page. Of two with one key, the one in `Pages` counts."""

    segment: Segment
    slot: int
    generation: int
    page_bytes: int


@dataclass(slots=True)
class SizeClass:
    """The segments of one slot size in the order of their making, and the hand of a CLOCK over their slots: the page it
    comes to next is about the oldest."""

    segments: list[Segment] = field(default_factory=list)
    with_free: dict[int, Segment] = field(default_factory=dict)
    """Those that a page can go into, by number."""
    hand_segment: int = 0
    hand_slot: int = 0

    def victims(self, count: int) -> list[bytes]:
        """Up to `count` pages to give up: the next that were not read since the hand last came by."""
        found: dict[bytes, None] = {}
        for _ in range(2 * self.slots):
            segment, slot = self._step()
            key = segment.keys[slot]
            if key is None or segment.closing:
                continue
            if segment.used[slot]:
                segment.used[slot] = 0
                continue
            found[key] = None
            if len(found) == count:
                break
        return list(found)

    def oldest(self) -> tuple[Segment, bytes] | None:
        """The page that the hand comes to next; it stays where it is."""
        at, slot = self.hand_segment, self.hand_slot
        try:
            for _ in range(self.slots):
                segment, here = self._step()
                key = segment.keys[here]
                if key is not None and not segment.closing:
                    return segment, key
            return None
        finally:
            self.hand_segment, self.hand_slot = at, slot

    def start_at(self, place: Place) -> None:
        """The hand comes to `place` next."""
        self.hand_segment, self.hand_slot = self.segments.index(place.segment), place.slot

    def forget(self, segment: Segment) -> None:
        at = self.segments.index(segment)
        del self.segments[at]
        self.with_free.pop(segment.number, None)
        if at < self.hand_segment:
            self.hand_segment -= 1
        elif at == self.hand_segment:
            self.hand_slot = 0

    @property
    def slots(self) -> int:
        return sum(segment.slots for segment in self.segments)

    @property
    def pending(self) -> int:
        return sum(segment.pending for segment in self.segments)

    def _step(self) -> tuple[Segment, int]:
        """There is a segment."""
        if self.hand_segment >= len(self.segments):
            self.hand_segment, self.hand_slot = 0, 0
        segment, slot = self.segments[self.hand_segment], self.hand_slot
        self.hand_slot += 1
        if self.hand_slot >= segment.slots:
            self.hand_segment, self.hand_slot = self.hand_segment + 1, 0
        return segment, slot


class Pages:
    """Any thread. Methods named `_locked` are called with `lock` held, the others take it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        """A slot that was pending is live, or one became free."""
        self.places: dict[bytes, Place] = {}
        self.classes: dict[int, SizeClass] = {}
        self.used_bytes = 0
        self.file_bytes = 0
        self._generation = 0

    def start_generations(self, last: int) -> None:
        """The next one is higher than `last`."""
        self._generation = max(self._generation, last)

    def clear(self) -> list[Segment]:
        """Forget everything; returns the segments, whose files are the caller's to close."""
        with self.lock:
            segments = [segment for size_class in self.classes.values() for segment in size_class.segments]
            self.classes.clear()
            self.places.clear()
            self.used_bytes = self.file_bytes = 0
            return segments

    def next_generation(self) -> int:
        with self.lock:
            self._generation += 1
            return self._generation

    def allocate(self, slot_bytes: int) -> tuple[Segment, int] | None:
        """A free slot, pending from now on; ends in `put_locked` or `release_locked`."""
        with self.lock:
            size_class = self.classes.get(slot_bytes)
            if size_class is None or not size_class.with_free:
                return None
            segment = next(iter(size_class.with_free.values()))
            slot = segment.free.popleft()
            segment.pending += 1
            if not segment.free:
                del size_class.with_free[segment.number]
            return segment, slot

    def enter(self, key: bytes) -> Place | None:
        """Where a page is, its file held open until `leave`."""
        with self.lock:
            place = self.places.get(key)
            if place is not None:
                place.segment.readers += 1
                place.segment.used[place.slot] = 1
            return place

    def leave(self, segment: Segment) -> None:
        with self.lock:
            segment.readers -= 1
            self._close_if_unused(segment)

    def is_at(self, key: bytes, place: Place) -> bool:
        with self.lock:
            return self.places.get(key) is place

    def close_locked(self, segment: Segment) -> bool:
        """Let nothing new into `segment`. False: somebody writes there right now, and it stays open."""
        if segment.pending or segment.closing:
            return False
        segment.closing = True
        self.classes[segment.slot_bytes].with_free.pop(segment.number, None)
        return True

    def reopen_locked(self, segment: Segment) -> None:
        segment.closing = False
        if segment.free:
            self.classes[segment.slot_bytes].with_free[segment.number] = segment

    def put_locked(self, key: bytes, place: Place) -> None:
        """A pending slot is live; the slot of what had the key is free."""
        self.remove_locked(key)
        segment = place.segment
        self.places[key] = place
        segment.pending -= 1
        segment.keys[place.slot] = key
        segment.used[place.slot] = 0
        self.used_bytes += segment.slot_bytes
        self.changed.notify_all()

    def remove_locked(self, key: bytes, generation: int | None = None) -> bool:
        """Whether it was there (of this generation, if one is given)."""
        place = self.places.get(key)
        if place is None or generation not in (None, place.generation):
            return False
        del self.places[key]
        place.segment.keys[place.slot] = None
        self.used_bytes -= place.segment.slot_bytes
        self._free(place.segment, place.slot)
        return True

    def release_locked(self, segment: Segment, slot: int) -> None:
        """A pending slot is free again."""
        segment.pending -= 1
        self._free(segment, slot)

    def add_segment_locked(self, segment: Segment) -> None:
        size_class = self.classes.setdefault(segment.slot_bytes, SizeClass())
        size_class.segments.append(segment)
        self.file_bytes += segment.file_bytes
        if segment.free:
            size_class.with_free[segment.number] = segment

    def retire_locked(self, segment: Segment) -> None:
        """A closing segment that has nothing any more is forgotten; its file closes with the last reader."""
        size_class = self.classes[segment.slot_bytes]
        size_class.forget(segment)
        if not size_class.segments:
            del self.classes[segment.slot_bytes]
        self.file_bytes -= segment.file_bytes
        segment.retired = True
        self._close_if_unused(segment)

    def _free(self, segment: Segment, slot: int) -> None:
        segment.free.append(slot)
        if not segment.closing:
            self.classes[segment.slot_bytes].with_free[segment.number] = segment
        self.changed.notify_all()

    def _close_if_unused(self, segment: Segment) -> None:
        if segment.retired and segment.readers == 0:
            segment.close()
