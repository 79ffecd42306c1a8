"""The arena's memory: one shared mapping, given to processes of the same host by its file descriptor.

A memfd, with huge pages where the system has enough free ones, else with transparent ones where the kernel gives them.
It is never unmapped while the process lives: peers may still write to it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import socket
import struct
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmkv.errors import ConfigError, PoolError

logger = logging.getLogger(__name__)

HUGE_BYTES = 2 << 20
TOUCH_BYTES = 16 << 20
MADV_POPULATE_WRITE = 23
"""Of Linux 5.14; Python has no name for it."""
_LENGTH = struct.Struct("<Q")


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
            size = -(-capacity_bytes // HUGE_BYTES) * HUGE_BYTES
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

    def touch_in_background(self) -> None:
        """Have every page there before it is used: the first use of a page costs more than filling it. Ends by itself;
        what fails only costs that time later."""
        threading.Thread(target=self._touch, name="lmkv-arena", daemon=True).start()

    def _touch(self) -> None:
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


def host_id() -> str:
    """Differs between hosts and between boots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


# --- giving it away ---


def listen_for_sharers(path: str) -> socket.socket:
    """A Unix socket at `path`, for this user's processes only. Raises ConfigError."""
    place = Path(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.parent.stat().st_uid not in (0, os.getuid()):
            raise PermissionError(errno.EPERM, f"{place.parent} belongs to another user")
        _remove_left_over(place)
        listener.bind(path)
        place.chmod(0o600)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot share the arena at {path}: {error}", hint="give another path with --share, or --share none"
        ) from error
    return listener


def _remove_left_over(place: Path) -> None:
    """The socket of a node that has died. Raises OSError when one listens there."""
    if not place.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(place))
        except ConnectionRefusedError:
            place.unlink(missing_ok=True)
            return
    raise OSError(errno.EADDRINUSE, "another pool node listens there")


def give(connection: socket.socket, memory: ArenaMemory) -> None:
    """Send the descriptor. Raises OSError when the other side has gone."""
    socket.send_fds(connection, [_LENGTH.pack(memory.capacity_bytes)], [memory.fd])


def attach(path: str, who: bytes, timeout_s: float = 2.0) -> tuple[ArenaMemory, socket.socket]:
    """Map the arena of the node that listens at `path`. `who` tells it who we are (at most 200 bytes).

    The connection is to be kept open as long as the arena is used: its end tells the node that we are gone. Raises
    PoolError when there is nobody, or not for us.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(timeout_s)
    try:
        connection.connect(path)
        connection.send(who)
        head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
        if len(head) != _LENGTH.size or len(descriptors) != 1:
            raise OSError(errno.EPROTO, "no descriptor came")
        memory = ArenaMemory(descriptors[0], _LENGTH.unpack(head)[0], "attached")
        memory.close_fd()  # the mapping has its own
    except (OSError, ValueError) as error:
        connection.close()
        raise PoolError(f"the arena at {path} cannot be mapped: {error}", code="LMKV-P802") from error
    connection.setblocking(False)
    return memory, connection
