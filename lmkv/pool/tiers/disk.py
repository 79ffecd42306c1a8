"""The disk tier: pages in slots of preallocated segment files, an index in sqlite. docs/tiers.md has the format.

A `put` writes the slot, then the file is synced, then the row is committed; a slot is used again only when the row that
freed it is committed. So a crash at any point leaves the old page or the new one, and what is read is checked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from lmkv.pool import faults
from lmkv.poolwire import Tier

from .base import CorruptError, Evicted, PageMeta, StoreTier, TierError
from .buffers import Buffers, is_aligned
from .changes import Describe, PutPage, RemovePages, RemovePrefix
from .compaction import Compaction
from .counts import Counts
from .disk_index import DiskIndex
from .pages import Pages, Place
from .record import (
    HEADER_BYTES,
    Header,
    Seal,
    associated,
    check_page,
    check_target,
    payload_digest,
    read_header,
    write_header,
)
from .recovery import Recovery
from .room import Room
from .sealing import Sealer
from .segments import Segment, probe_direct, slot_bytes_of

READ_ATTEMPTS = 16
CLOSE_WAIT_S = 30.0
COUNTERS = (
    *("puts", "gets", "misses", "put_bytes", "got_bytes", "dropped", "evicted", "corrupt", "wrong_key", "torn"),
    *("failed", "no_space", "unreadable", "compacted", "compaction_failed"),
    *("segments_lost", "segments_cut", "segments_stray", "index_lost"),
)


class InUseError(TierError):
    """Another process has the directory of a disk tier open."""

    code = "LMKV-P822"


class DiskTier(StoreTier):
    """One directory, one process. Any thread."""

    tier: ClassVar[Tier] = Tier.DISK

    def __init__(
        self,
        directory: Path,
        capacity_bytes: int,
        *,
        evicted: Evicted,
        sealer: Sealer | None = None,
        segment_bytes: int = 256 << 20,
        direct: bool | None = None,
    ) -> None:
        """`direct`: with O_DIRECT; None: where the file system takes it. `capacity_bytes` bounds the segment files, 0:
        no bound. Raises TierError."""
        segments = directory / "segments"
        try:
            segments.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise TierError(f"the directory {directory} cannot be made: {error.strerror}") from error
        self._lock_fd = _lock(directory)
        try:
            able = probe_direct(segments)
            if direct and not able:
                raise TierError(f"the file system of {directory} takes no O_DIRECT", hint="leave `direct` open")
            self.direct = able if direct is None else direct
            self._counts = Counts(*COUNTERS)
            self._buffers = Buffers()
            self._pages = Pages()
            opened = Recovery(directory, segments, self._pages, self._counts, self._buffers, self.direct).run()
        except BaseException:
            os.close(self._lock_fd)
            raise
        self._capacity_bytes = capacity_bytes
        self._sealer = sealer
        self._key_id = sealer.key_id if sealer is not None else b""
        self._index = DiskIndex(opened.db, directory, self._pages)
        self._room = Room(
            segments,
            self._pages,
            self._index,
            Compaction(self._pages, self._buffers),
            self._counts,
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes,
            direct=self.direct,
            evicted=evicted,
            last_number=opened.last_number,
        )
        self._calls = 0
        self._closed = False
        self._idle = threading.Condition()

    def put(self, key: bytes, meta: PageMeta, data: memoryview) -> None:
        with self._call():
            page = check_page(key, meta, data)
            try:
                faults.point("spill:before_write")
                segment, slot = self._room.slot_for(slot_bytes_of(meta.page_bytes))
                self._store(segment, slot, key, meta, page)
            except TierError:
                self._counts.add("failed")
                raise
            self._counts.add("puts")
            self._counts.add("put_bytes", meta.page_bytes)

    def get(self, key: bytes, into: memoryview) -> PageMeta | None:
        with self._call():
            for _ in range(READ_ATTEMPTS):
                place = self._pages.enter(key)
                if place is None:
                    self._counts.add("misses")
                    return None
                try:
                    header = self._read(place, key, check_target(into, place.page_bytes))
                finally:
                    self._pages.leave(place.segment)
                if isinstance(header, Header):
                    self._counts.add("gets")
                    self._counts.add("got_bytes", header.meta.page_bytes)
                    return header.meta
                if self._pages.is_at(key, place):
                    self._bad(key, place, header)
                    return None
            raise TierError(
                f"page {key.hex()} was replaced {READ_ATTEMPTS} times while it was read", hint="read it again"
            )

    def drop(self, keys: Sequence[bytes]) -> int:
        with self._call():
            faults.point("drop:before")
            removal = RemovePages(dict.fromkeys(keys))
            self._index.run(removal)
            return self._dropped(len(removal.removed))

    def drop_namespace(self, namespace: bytes) -> int:
        with self._call():
            faults.point("drop:before")
            removal = RemovePrefix(namespace)
            self._index.run(removal)
            return self._dropped(removal.removed)

    def scan(self) -> Iterator[tuple[bytes, PageMeta]]:
        with self._call():
            return self._index.scan(self._key_id)

    def describe(self, namespace: bytes, description: str) -> None:
        with self._call():
            if self._index.descriptions().get(namespace) != description:
                self._index.run(Describe(namespace, description))

    def descriptions(self) -> dict[bytes, str]:
        with self._call():
            return self._index.descriptions()

    def compact(self) -> int:
        """Take back what half empty segments leave unused; returns how many files went. Raises TierError."""
        with self._call():
            return self._room.compact()

    @property
    def used_bytes(self) -> int:
        """Of the slots in use."""
        return self._pages.used_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    def counters(self) -> dict[str, int]:
        gauges = {"direct": int(self.direct), "file_bytes": self._pages.file_bytes, "commits": self._index.commits}
        return self._counts.read() | gauges

    def close(self) -> None:
        """Waits for calls under way (at most CLOSE_WAIT_S, then the files stay open: TierError)."""
        with self._idle:
            if self._closed:
                return
            self._closed = True
            if not self._idle.wait_for(lambda: self._calls == 0, CLOSE_WAIT_S):
                raise TierError(f"{self._calls} calls of the disk tier have not ended within {CLOSE_WAIT_S:.0f} s")
        self._index.close()
        for segment in self._pages.clear():
            segment.close()
        os.close(self._lock_fd)

    @contextmanager
    def _call(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise TierError("the disk tier is closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def _store(self, segment: Segment, slot: int, key: bytes, meta: PageMeta, page: memoryview) -> None:
        """From a pending slot to a live one; or it is free again, and TierError."""
        try:
            place = Place(segment, slot, self._pages.next_generation(), meta.page_bytes)
            self._write(place, key, meta, page)
            faults.point("spill:written")
            # Each by itself: the kernel joins syncs that come together.
            segment.sync()
            faults.point("spill:synced")
        except BaseException as error:
            with self._pages.lock:
                self._pages.release_locked(segment, slot)
            if isinstance(error, OSError):
                hint = "free space on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
                raise TierError(f"{segment.path} cannot be written: {error.strerror}", hint=hint) from error
            raise
        self._index.run(PutPage(key, place, meta, self._key_id))

    def _write(self, place: Place, key: bytes, meta: PageMeta, page: memoryview) -> None:
        segment = place.segment
        if self._sealer is None and (not self.direct or is_aligned(page)):
            with self._buffers.lend(HEADER_BYTES) as block:
                write_header(Header(key, meta, place.generation, payload_digest(page), None), block)
                segment.write(place.slot, block, page)
            return
        with self._buffers.lend(segment.slot_bytes) as buffer:
            payload = buffer[HEADER_BYTES : HEADER_BYTES + len(page)]
            seal: Seal | None = None
            if self._sealer is not None:
                seal = self._sealer.seal(associated(key, meta), page, payload)
            else:
                payload[:] = page
            buffer[HEADER_BYTES + len(page) :] = bytes(len(buffer) - HEADER_BYTES - len(page))
            write_header(Header(key, meta, place.generation, payload_digest(payload), seal), buffer)
            segment.write(place.slot, buffer[:HEADER_BYTES], buffer[HEADER_BYTES:])

    def _read(self, place: Place, key: bytes, target: memoryview) -> Header | str:
        """The header, with the page in `target`; or the counter of what is wrong with it. Raises TierError."""
        faults.point("promote:before_read")
        in_place = self._sealer is None and (not self.direct or is_aligned(target))
        with self._buffers.lend(HEADER_BYTES if in_place else place.segment.slot_bytes) as buffer:
            block, rest = buffer[:HEADER_BYTES], buffer[HEADER_BYTES:]
            try:
                length = place.segment.read(place.slot, [block, target if in_place else rest])
            except OSError as error:
                raise TierError(f"{place.segment.path} cannot be read: {error.strerror}") from error
            faults.point("promote:read")
            payload = target if in_place else rest[: place.page_bytes]
            return self._check(place, key, length, read_header(block), payload, target)

    def _check(
        self, place: Place, key: bytes, length: int, header: Header | None, payload: memoryview, target: memoryview
    ) -> Header | str:
        if header is None or (header.key, header.generation) != (key, place.generation):
            return "corrupt"
        if header.meta.page_bytes != len(payload) or length < HEADER_BYTES + len(payload):
            return "corrupt"
        if payload_digest(payload) != header.digest:
            return "corrupt"
        if header.key_id != self._key_id:
            return "wrong_key"
        if self._sealer is not None and header.seal is not None:
            if not self._sealer.open(header.seal, associated(key, header.meta), payload, target):
                return "corrupt"
        elif payload is not target:
            target[:] = payload
        return header

    def _bad(self, key: bytes, place: Place, what: str) -> None:
        """Raises CorruptError, with the page thrown away; or it is a miss."""
        self._counts.add(what)
        if what == "wrong_key":
            return
        self._index.run(RemovePages({key: place.generation}))
        raise CorruptError(
            f"page {key.hex()} in {place.segment.path}, slot {place.slot}, is damaged; it was thrown away",
            hint="look at the disk's state if this comes again",
        )

    def _dropped(self, count: int) -> int:
        self._counts.add("dropped", count)
        if count:
            try:
                self._room.trim()
            except TierError:
                # The pages are gone all the same; their files go another time.
                self._counts.add("compaction_failed")
        return count


def _lock(directory: Path) -> int:
    """The directory is this process's until the descriptor is closed. Raises TierError."""
    path = directory / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TierError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        raise InUseError(
            f"the disk tier's directory {directory} is in use by process {holder}",
            hint="give each node a directory of its own",
        ) from None
    except OSError as error:
        os.close(fd)
        raise TierError(f"{path} cannot be locked: {error.strerror}") from error
    return fd
