"""Memory that O_DIRECT takes: whole blocks at block boundaries."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

BLOCK_BYTES = 4096
"""What O_DIRECT is aligned to: no disk's logical block is larger."""
KEPT_BYTES = 64 << 20


def whole_blocks(length: int) -> int:
    """`length` rounded up to blocks."""
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def is_aligned(view: memoryview) -> bool:
    """Whether O_DIRECT takes `view` (not empty) as it is."""
    return len(view) % BLOCK_BYTES == 0 and np.frombuffer(view, np.uint8).ctypes.data % BLOCK_BYTES == 0


class Buffers:
    """Lends buffers, one or two a call, and keeps up to KEPT_BYTES of those given back. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[mmap.mmap] = []
        self._idle_bytes = 0

    @contextmanager
    def lend(self, size: int) -> Iterator[memoryview]:
        """`size` bytes (whole blocks), with whatever they held before."""
        buffer = self._take(size)
        try:
            with memoryview(buffer) as whole, whole[:size] as view:
                yield view
        finally:
            self._keep(buffer)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            for at, buffer in enumerate(self._idle):
                if size <= len(buffer) <= 2 * size + 2 * BLOCK_BYTES:
                    self._idle_bytes -= len(buffer)
                    return self._idle.pop(at)
        return mmap.mmap(-1, whole_blocks(size))

    def _keep(self, buffer: mmap.mmap) -> None:
        with self._lock:
            if self._idle_bytes + len(buffer) <= KEPT_BYTES:
                self._idle.append(buffer)
                self._idle_bytes += len(buffer)
