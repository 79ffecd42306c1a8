"""A segment: one preallocated file of slots of one size, and what is known in memory about each slot.

A slot is free, pending (lent to a writer, not in the index) or live. Everything here but the I/O is guarded by the lock
of `Pages`.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from lmkv.pool import faults

from .base import TierError
from .record import HEADER_BYTES

_OPEN = os.O_RDWR | os.O_CLOEXEC


def slot_bytes_of(page_bytes: int) -> int:
    """The slot that a page needs: header and payload, in whole blocks."""
    return HEADER_BYTES + -(-page_bytes // HEADER_BYTES) * HEADER_BYTES


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08x}.seg"


class Segment:
    def __init__(self, number: int, slot_bytes: int, slots: int, path: Path, fd: int) -> None:
        self.number = number
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.path = path
        self._fd = fd
        self.keys: list[bytes | None] = [None] * slots
        """Of the live slots."""
        self.used = bytearray(slots)
        """Read since the hand last came by."""
        self.free = deque(range(slots))
        """The next to be used comes first: who was freed first, so that pages stay in order of age."""
        self.pending = 0
        self.readers = 0
        self.closing = False
        """Nothing new goes in."""
        self.retired = False
        """Out of the index; only readers that were already there still use the file."""

    @property
    def file_bytes(self) -> int:
        return self.slot_bytes * self.slots

    @property
    def live(self) -> int:
        return self.slots - len(self.free) - self.pending

    @classmethod
    def create(cls, directory: Path, number: int, slot_bytes: int, slots: int, direct: bool) -> Segment:
        """A new file with all its space, and its name synced. Raises OSError; then there is no file."""
        path = segment_path(directory, number)
        fd = os.open(path, _OPEN | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0), 0o600)
        try:
            os.posix_fallocate(fd, 0, slot_bytes * slots)
            os.fsync(fd)
            sync_directory(directory)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        return cls(number, slot_bytes, slots, path, fd)

    @classmethod
    def open(cls, directory: Path, number: int, slot_bytes: int, slots: int, direct: bool) -> Segment | None:
        """As many slots as the file has room for; None: it is gone, or has room for none."""
        path = segment_path(directory, number)
        try:
            fd = os.open(path, _OPEN | (os.O_DIRECT if direct else 0))
        except FileNotFoundError:
            return None
        slots = min(slots, os.fstat(fd).st_size // slot_bytes)
        if slots == 0:
            os.close(fd)
            return None
        return cls(number, slot_bytes, slots, path, fd)

    def write(self, slot: int, header: memoryview, payload: memoryview) -> None:
        """Not synced. Raises OSError."""
        at = slot * self.slot_bytes
        if faults.armed("spill:half_written"):
            half = len(payload) // 2 // HEADER_BYTES * HEADER_BYTES
            self._write([header, payload[:half]], at)
            faults.point("spill:half_written")
            self._write([payload[half:]], at + len(header) + half)
        else:
            self._write([header, payload], at)

    def read(self, slot: int, into: Sequence[memoryview]) -> int:
        """Fill `into` from the head of the slot on; returns how many bytes there were. Raises OSError."""
        return os.preadv(self._fd, into, slot * self.slot_bytes)

    def sync(self) -> None:
        """What was written is on the disk. Raises OSError."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Once, when nobody reads or writes any more."""
        os.close(self._fd)

    def _write(self, parts: Sequence[memoryview], at: int) -> None:
        length = sum(len(part) for part in parts)
        if length and os.pwritev(self._fd, parts, at) != length:
            raise OSError(errno.ENOSPC, "written in part only")


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def probe_direct(directory: Path) -> bool:
    """Whether the file system takes O_DIRECT in blocks of HEADER_BYTES. Raises TierError when it cannot be written."""
    path = directory / "probe"
    try:
        fd = os.open(path, _OPEN | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise TierError(f"{directory} cannot be written: {error.strerror}", hint="choose another directory") from error
    os.close(fd)
    try:
        return _writes_directly(path)
    finally:
        path.unlink()


def _writes_directly(path: Path) -> bool:
    try:
        fd = os.open(path, _OPEN | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, HEADER_BYTES) as block:
            return os.pwrite(fd, block, 0) == HEADER_BYTES
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise TierError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        os.close(fd)
