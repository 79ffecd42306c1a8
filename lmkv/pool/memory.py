"""The arena's memory: one shared mapping, given to processes of the same host by its file descriptor.

A memfd, with huge pages where the system has enough free ones, else with transparent ones where the kernel gives them.
It is never unmapped while the process lives: peers may still write to it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmkv.control.host import Connection, Host
from lmkv.errors import ConfigError, PoolError

logger = logging.getLogger(__name__)

HUGE_BYTES = 2 << 20
TOUCH_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23
"""Of Linux 5.14; Python has no name for it."""


class ArenaMemory:
    """`data` is the whole arena as bytes, shared; `fd` is what others map (of a node; closed by `close_fd`)."""

    def __init__(self, fd: int, capacity_bytes: int, kind: str) -> None:
        self.fd = fd
        self.kind = kind
        """"huge", or "small" (transparent huge pages at best)."""
        self._map = mmap.mmap(fd, capacity_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        if kind == "small":
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError as error:  # a kernel without them
                logger.debug("no transparent huge pages for the arena: %s", error)
        self.data: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)

    @classmethod
    def create(cls, capacity_bytes: int, huge: bool = True) -> ArenaMemory:
        """`huge`: with huge pages if there are enough free ones. Raises ConfigError when there is no such memory."""
        host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if capacity_bytes > host_bytes:
            raise ConfigError(
                f"an arena of {capacity_bytes} bytes is more than the {host_bytes} bytes of this host's memory",
                hint="lower --capacity",
            )
        kinds = [("huge", os.MFD_HUGETLB)] if huge and _free_huge_bytes() >= capacity_bytes else []
        for kind, flag in [*kinds, ("small", 0)]:
            unit = HUGE_BYTES if flag or capacity_bytes > HUGE_BYTES else mmap.PAGESIZE
            size = -(-capacity_bytes // unit) * unit
            fd = os.memfd_create("lmkv-arena", os.MFD_CLOEXEC | flag)
            try:
                os.ftruncate(fd, size)
                return cls(fd, size, kind)
            except (OSError, ValueError) as error:
                os.close(fd)
                if kind == "small":
                    raise ConfigError(
                        f"no memory for an arena of {capacity_bytes} bytes: {error}", hint="lower --capacity"
                    ) from error
                logger.info("no huge pages for the arena: %s", error)
        raise AssertionError("the last kind returns or raises")

    def touch(self) -> None:
        """Have every page there before it is used: the first use of a page costs more than filling it. Takes a second
        for some gigabytes; what fails only costs that time later."""
        libc = ctypes.CDLL(None, use_errno=True)
        for offset in range(0, self.capacity_bytes, TOUCH_BYTES):
            size = min(TOUCH_BYTES, self.capacity_bytes - offset)
            # Not the mmap's own method: that one would keep Python's lock.
            if libc.madvise(ctypes.c_void_p(self.address + offset), ctypes.c_size_t(size), MADV_POPULATE_WRITE):
                logger.info("the arena's pages come as they are used: %s", os.strerror(ctypes.get_errno()))
                return

    def close_fd(self) -> None:
        """Nobody else can map it from now on; it stays mapped here."""
        os.close(self.fd)
        self.fd = -1

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    @property
    def capacity_bytes(self) -> int:
        return int(self.data.nbytes)

    def view(self, offset: int, size: int) -> memoryview:
        return memoryview(self._map)[offset : offset + size]


def _free_huge_bytes() -> int:
    try:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text()) * HUGE_BYTES
    except (OSError, ValueError):
        return 0


def attach(host: Host, path: str, who: bytes) -> tuple[ArenaMemory, Connection]:
    """Map the arena that a node of this host offers at `path`. `who` tells it who we are.

    The connection is to be kept open as long as the arena is used: its end tells the node that we are gone. Raises
    PoolError when there is nobody, or not for us.
    """
    fd, capacity_bytes, connection = host.attach(path, who)
    try:
        memory = ArenaMemory(fd, capacity_bytes, "attached")
    except (OSError, ValueError) as error:
        os.close(fd)
        connection.close()
        raise PoolError(f"the arena at {path} cannot be mapped: {error}", code="LMKV-P802") from error
    memory.close_fd()  # the mapping has its own
    return memory, connection
