"""A host: its identity, and memory that a process of it offers to the others by a descriptor.

Whoever attaches keeps a connection open as long as it uses the memory: the end of the connection tells either side that
the other is gone.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lmkv.errors import ConfigError, PoolError

logger = logging.getLogger(__name__)

MOST_WHO_BYTES = 256
_LENGTH = struct.Struct("<Q")


class Connection(Protocol):
    """One end of the connection between who offers memory and who uses it."""

    def recv(self, size: int, /) -> bytes:
        """b"" when the other end is gone, BlockingIOError while it is there. Raises OSError."""

    def close(self) -> None:
        """The other end sees that we are gone."""


class Offer(Protocol):
    """Memory offered to processes of the host, from `Host.offer` to `close`."""

    @property
    def descriptor(self) -> int:
        """Readable when `turn` has something to do."""

    def turn(self) -> None:
        """Tell who has come and who has gone. Never waits."""

    def close(self) -> None:
        """Everyone who is attached sees that we are gone."""


Joined = Callable[[Connection, bytes], None]
"""Who has come (at most MOST_WHO_BYTES, as it says itself), and its connection. ValueError, KeyError or TypeError
refuses it."""
Left = Callable[[Connection], None]
"""Someone who had joined has gone, and its connection has ended."""


class Host(Protocol):
    def identity(self) -> str:
        """Differs between hosts and between boots."""

    def offer(self, path: str, memory_fd: int, size_bytes: int, joined: Joined, left: Left) -> Offer:
        """Offer the memory behind `memory_fd` at `path`. Raises ConfigError."""

    def attach(self, path: str, who: bytes) -> tuple[int, int, Connection]:
        """(descriptor, bytes, connection) of the memory offered at `path`; the caller closes both. Raises PoolError
        when there is nobody, or not for us."""


class ThisHost:
    """The real one: Unix sockets, for processes of the same user."""

    def identity(self) -> str:
        try:
            return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return socket.gethostname()

    def offer(self, path: str, memory_fd: int, size_bytes: int, joined: Joined, left: Left) -> Offer:
        return _UnixOffer(path, memory_fd, size_bytes, joined, left)

    def attach(self, path: str, who: bytes, timeout_s: float = 2.0) -> tuple[int, int, Connection]:
        """Waits for at most `timeout_s`."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
            connection.send(who)
            head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
            if len(head) != _LENGTH.size or len(descriptors) != 1:
                raise OSError(errno.EPROTO, "no descriptor came")
        except (OSError, ValueError) as error:
            connection.close()
            raise PoolError(f"the arena at {path} cannot be mapped: {error}", code="LMKV-P802") from error
        connection.setblocking(False)
        return descriptors[0], int(_LENGTH.unpack(head)[0]), connection


class _UnixOffer:
    def __init__(self, path: str, memory_fd: int, size_bytes: int, joined: Joined, left: Left) -> None:
        self._path = path
        self._memory_fd = memory_fd
        self._size_bytes = size_bytes
        self._joined = joined
        self._left = left
        self._listener = _listen(path)
        self._poller = select.epoll()
        self._poller.register(self._listener.fileno(), select.EPOLLIN)
        self._connections: dict[int, tuple[socket.socket, bool]] = {}
        """By descriptor, with whether it has joined."""

    @property
    def descriptor(self) -> int:
        return self._poller.fileno()

    def turn(self) -> None:
        for fd, _ in self._poller.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._connections:
                self._hear(fd)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            logger.warning("a process that wanted to map the arena: %s", error)
            return
        connection.setblocking(False)
        self._connections[connection.fileno()] = (connection, False)
        self._poller.register(connection.fileno(), select.EPOLLIN)

    def _hear(self, fd: int) -> None:
        connection, has_joined = self._connections[fd]
        try:
            told = connection.recv(MOST_WHO_BYTES)
            if told and not has_joined:
                self._joined(connection, told)
                has_joined = True
                self._connections[fd] = (connection, True)
                socket.send_fds(connection, [_LENGTH.pack(self._size_bytes)], [self._memory_fd])
            if told:
                return
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("a process that wanted to map the arena: %s", error)
        self._poller.unregister(fd)
        del self._connections[fd]
        if has_joined:
            self._left(connection)
        connection.close()

    def close(self) -> None:
        for connection, _ in self._connections.values():
            connection.close()
        self._poller.close()
        self._listener.close()
        Path(self._path).unlink(missing_ok=True)


def _listen(path: str) -> socket.socket:
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
