"""Pool nodes as `lmkv.client` uses them: questions that block with a deadline, pages read and written. One thread."""

from __future__ import annotations

import logging
import mmap
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import zmq
from numpy.typing import NDArray

from lmkv import poolwire as pw
from lmkv.errors import TransportError
from lmkv.ids import Incarnation, Rank, make_incarnation
from lmkv.pool.access import Me, NodeAccess, Reach
from lmkv.transport import Completion, Extents, OpId, PeerLost, Region, Transport, open_transport

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
SCRATCH_BYTES = 4096
SLICE_S = 0.05
POLL_S = 0.0005
"""Between polls of a data plane without descriptors."""

A = TypeVar("A", bound=pw.PoolMessage)
R = TypeVar("R")
Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class _Flight:
    """An operation on a staging slot. `over` is set when nobody waits for it any more, and runs at its end."""

    done: bool = False
    error: TransportError | None = None
    over: Callable[[], None] | None = None


class Nodes:
    """`transport` "": only nodes of this host can be used. Raises ConfigError, SchemeError."""

    def __init__(self, addresses: Sequence[str], name: str, transport: str, page_bytes: int) -> None:
        self.incarnation: Incarnation = make_incarnation(os.urandom(8))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._transport: Transport | None = None
        self._flights: dict[OpId, _Flight] = {}
        self._page_bytes = page_bytes
        self._free: list[int] = []
        """Slots of the staging memory, for pages on their way over the data plane."""
        scratch = None
        if transport:
            self._transport = open_transport(transport, f"lmkv-client-{self.incarnation}")
            count = max(2, min(32, STAGING_BYTES // page_bytes))
            # Never unmapped while a peer may still write to it: the transport keeps it.
            self._data = np.frombuffer(mmap.mmap(-1, count * page_bytes + SCRATCH_BYTES), dtype=np.uint8)
            self._transport.register(Region(self._data.ctypes.data, self._data.nbytes, owner=self._data))
            scratch = Extents.of((self._data.ctypes.data + count * page_bytes, SCRATCH_BYTES))
            self._free = list(range(count))
        me = Me(self.incarnation, Rank(0), name, self._transport, scratch)
        self._all: list[NodeAccess] = []
        try:
            for address in addresses:
                self._all.append(NodeAccess(self._context, address, me))
        except BaseException:
            self.close()
            raise

    # --- waiting ---

    def ready(self) -> list[NodeAccess]:
        """Those that can be used now, the host's own first."""
        self.tick()
        return sorted((n for n in self._all if n.ready), key=lambda node: node.reach is not Reach.LOCAL)

    def declare(self, namespace: bytes, description: str) -> None:
        for node in self._all:
            node.declare(namespace, description)

    def tick(self) -> None:
        now_s = time.monotonic()
        for node in self._all:
            node.tick(now_s)
        if self._transport is None:
            return
        for event in self._transport.poll():
            match event:
                case Completion(op, error):
                    self._transport.release(op)
                    self._completed(op, error)
                case PeerLost(peer, reason):
                    for node in self._all:
                        node.peer_lost(peer, reason)

    def wait(self, condition: Callable[[], object], until_s: float) -> bool:
        """False: it did not come true in time."""
        poller = select.poll()
        data = self._transport.fds() if self._transport is not None else []
        for fd in (*(fd for node in self._all for fd in node.fds), *data):
            poller.register(fd, select.POLLIN)
        most_s = POLL_S if self._transport is not None and not data else SLICE_S
        while True:
            self.tick()
            if condition():
                return True
            now_s = time.monotonic()
            if now_s >= until_s:
                return False
            pause_s = min([most_s, until_s - now_s, *(node.next_s(now_s) for node in self._all)])
            poller.poll(max(0.0, pause_s) * 1000)

    def ask(
        self, nodes: Sequence[NodeAccess], question: Callable[[int], pw.PoolMessage], kind: type[A], until_s: float
    ) -> list[A | None]:
        """The answers, by node; None: none in time."""
        answers: dict[int, A | None] = {}
        for i, node in enumerate(nodes):
            node.link.ask(question, kind, partial(answers.__setitem__, i), until_s)
        # The link itself gives up at `until_s`.
        self.wait(lambda: len(answers) == len(nodes), until_s + 1.0)
        return [answers.get(i) for i in range(len(nodes))]

    # --- pages ---

    def write(
        self,
        node: NodeAccess,
        offset: int,
        fill: Callable[[Bytes], R],
        until_s: float,
        drained: Callable[[], None],
        bond: int,
    ) -> R | None:
        """`fill` writes a page; returns what it returns. None: the page is not whole at the node; then `drained` is
        called once nothing more of it can land: at once, or from a later `tick`. So it is if `fill` raises. `bond`: the
        attachment over which the page was reserved."""
        local = node.reach is Reach.LOCAL
        slot = None if local else self._take_slot(until_s)
        if (slot is None and not local) or node.bond != bond:
            self._free += [slot] if slot is not None else []
            drained()
            return None
        try:
            told = fill(node.view(offset, self._page_bytes) if slot is None else self._staging(slot))
        except BaseException:
            self._free += [slot] if slot is not None else []
            drained()
            raise
        if slot is None:
            return told
        return told if self._move(node, node.write, slot, offset, until_s, drained) else None

    def read(self, node: NodeAccess, offset: int, use: Callable[[Bytes], R], until_s: float) -> R | None:
        """What `use` returns of a page's bytes; None: they did not come in time."""
        if node.reach is Reach.LOCAL:
            return use(node.view(offset, self._page_bytes))
        slot = self._take_slot(until_s)
        if slot is None or not self._move(node, node.read, slot, offset, until_s, lambda: None, keep=True):
            return None
        try:
            return use(self._staging(slot))
        finally:
            self._free.append(slot)

    def _move(
        self,
        node: NodeAccess,
        move: Callable[[Extents, Sequence[tuple[int, int]]], OpId],
        slot: int,
        offset: int,
        until_s: float,
        drained: Callable[[], None],
        keep: bool = False,
    ) -> bool:
        """True: done (with `keep`, the staging slot stays the caller's). False: the slot is free once it is over."""
        here = Extents.of((self._staging(slot).ctypes.data, self._page_bytes))
        try:
            op = move(here, [(offset, self._page_bytes)])
        except TransportError as error:
            logger.warning("a page of %s cannot be moved: %s", node.link.address, error)
            self._free.append(slot)
            drained()
            return False
        flight = self._flights[op] = _Flight()
        if self.wait(lambda: flight.done, until_s) and flight.error is None:
            if not keep:
                self._free.append(slot)
            return True

        def over() -> None:
            self._free.append(slot)
            drained()

        if flight.done:
            over()
        else:
            flight.over = over
        return False

    def _completed(self, op: OpId, error: TransportError | None) -> None:
        flight = self._flights.pop(op, None)
        if flight is None:
            for node in self._all:
                node.completed(op, error)
            return
        flight.done, flight.error = True, error
        if flight.over is not None:
            flight.over()

    def _take_slot(self, until_s: float) -> int | None:
        return self._free.pop() if self.wait(lambda: self._free, until_s) else None

    def _staging(self, slot: int) -> Bytes:
        return self._data[slot * self._page_bytes : (slot + 1) * self._page_bytes]

    def close(self) -> None:
        for node in self._all:
            node.close()
        if self._transport is not None:
            self._transport.abort()
        self._context.destroy(linger=100)
