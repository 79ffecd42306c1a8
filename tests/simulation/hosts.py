"""Hosts in virtual time: memory offered by one stepped process and mapped by others of the same host."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

from lmkv.control.host import Joined, Left
from lmkv.errors import ConfigError, PoolError

Offers = dict[tuple[str, str], "VirtualOffer"]
"""By (host, path)."""
FIRST_DESCRIPTOR = 1 << 25
"""Real ones, of memory, are counted from here."""


class VirtualConnection:
    """Both ends of the connection between a node and who maps its arena."""

    def __init__(self, gone: Callable[[VirtualConnection], None]) -> None:
        self.is_open = True
        self._gone = gone

    def recv(self, size: int, /) -> bytes:
        if self.is_open:
            raise BlockingIOError
        return b""

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._gone(self)


class VirtualOffer:
    """`wake` gives the offering part a turn."""

    def __init__(
        self, offers: Offers, place: tuple[str, str], memory_fd: int, size_bytes: int, joined: Joined, left: Left
    ) -> None:
        self.process = ""
        self._descriptor = FIRST_DESCRIPTOR + memory_fd
        self._offers = offers
        self._place = place
        self._memory_fd = memory_fd
        self._size_bytes = size_bytes
        self._joined = joined
        self._left = left
        self._open: dict[VirtualConnection, str] = {}
        """Who is attached, with its process."""
        self._gone: deque[VirtualConnection] = deque()

    @property
    def descriptor(self) -> int:
        return self._descriptor

    @property
    def has_news(self) -> bool:
        return bool(self._gone)

    def turn(self) -> None:
        while self._gone:
            self._left(self._gone.popleft())

    def attach(self, who: bytes, process: str) -> tuple[int, int, VirtualConnection]:
        connection = VirtualConnection(self._ended)
        try:
            self._joined(connection, who)
        except (ValueError, KeyError, TypeError) as error:
            raise PoolError(f"the arena at {self._place[1]} cannot be mapped: {error}", code="LMKV-P802") from error
        self._open[connection] = process
        return os.dup(self._memory_fd), self._size_bytes, connection

    def _ended(self, connection: VirtualConnection) -> None:
        if self._open.pop(connection, None) is not None:
            self._gone.append(connection)

    def client_died(self, process: str) -> None:
        for connection in [c for c, owner in self._open.items() if owner == process]:
            connection.close()

    def close(self) -> None:
        """Everyone who is attached sees that we are gone. Idempotent."""
        self._offers.pop(self._place, None)
        for connection in list(self._open):
            connection.is_open = False
        self._open.clear()


class VirtualHost:
    """See lmkv.control.host.Host. One for each process."""

    def __init__(self, offers: Offers, name: str, process: str) -> None:
        self._offers = offers
        self._name = name
        self._process = process

    def identity(self) -> str:
        return f"virtual-{self._name}"

    def offer(self, path: str, memory_fd: int, size_bytes: int, joined: Joined, left: Left) -> VirtualOffer:
        place = (self._name, path)
        if place in self._offers:
            raise ConfigError(f"cannot share the arena at {path}: another node does", hint="give another path")
        made = self._offers[place] = VirtualOffer(self._offers, place, memory_fd, size_bytes, joined, left)
        made.process = self._process
        return made

    def attach(self, path: str, who: bytes) -> tuple[int, int, VirtualConnection]:
        found = self._offers.get((self._name, path))
        if found is None:
            raise PoolError(f"the arena at {path} cannot be mapped: nobody is there", code="LMKV-P802")
        return found.attach(who, self._process)
