"""Move the pages of a segment that nothing new goes into to other segments of its size, as they are, header and all."""

from __future__ import annotations

from lmkv.pool import faults

from .base import TierError
from .buffers import Buffers
from .pages import Pages, Place
from .record import HEADER_BYTES, payload_digest, read_header
from .segments import Segment

Moved = dict[bytes, tuple[Place, Place]]


class Compaction:
    """Any thread, one at a time."""

    def __init__(self, pages: Pages, buffers: Buffers) -> None:
        self._pages = pages
        self._buffers = buffers

    def copy(self, segment: Segment) -> Moved | None:
        """Synced copies in pending slots, by key: from where, to where. None: there was not enough room after all, and
        everything is as before. What turns out damaged is left out."""
        faults.point("compact:before")
        moved: Moved = {}
        try:
            with self._pages.lock:
                live = [(key, self._pages.places[key]) for key in segment.keys if key is not None]
            with self._buffers.lend(segment.slot_bytes) as buffer:
                for count, (key, old) in enumerate(live):
                    if count == len(live) // 2:
                        faults.point("compact:half_copied")
                    self._copy_page(key, old, buffer, moved)
            for target in dict.fromkeys(new.segment for _, new in moved.values()):
                target.sync()
            faults.point("compact:copied")
        except (OSError, TierError) as error:
            self._give_back(segment, moved)
            if isinstance(error, _NoRoomError):
                return None
            raise TierError(f"{segment.path} cannot be compacted: {error}") from error
        return moved

    def _copy_page(self, key: bytes, old: Place, buffer: memoryview, moved: Moved) -> None:
        length = old.segment.read(old.slot, [buffer])
        header = read_header(buffer)
        whole = length == len(buffer) and header is not None and header.key == key
        if header is None or not whole or header.generation != old.generation:
            return
        payload = buffer[HEADER_BYTES : HEADER_BYTES + header.meta.page_bytes]
        if payload_digest(payload) != header.digest:
            return
        place = self._pages.allocate(old.segment.slot_bytes)
        if place is None:
            raise _NoRoomError("no free slot")
        target, slot = place
        moved[key] = (old, Place(target, slot, old.generation, old.page_bytes))
        target.write(slot, buffer[:HEADER_BYTES], buffer[HEADER_BYTES:])

    def _give_back(self, segment: Segment, moved: Moved) -> None:
        with self._pages.lock:
            for _, new in moved.values():
                self._pages.release_locked(new.segment, new.slot)
            self._pages.reopen_locked(segment)


class _NoRoomError(TierError):
    pass
