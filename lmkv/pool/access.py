"""One pool node as one rank uses it: found, attached to, kept alive; its arena mapped, or reached over the data plane.

The thread that owns the link (and the transport) calls everything here. An access that has lost its node tries on for
ever; a node that has restarted is another one (other incarnation), and all that was asked of the old one is void.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import zmq
from numpy.typing import NDArray

from lmkv import poolwire as pw
from lmkv.errors import ConnectError, PoolError, StateError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.transport import Extents, OpId, PeerId, Transport

from .link import Link
from .memory import ArenaMemory, attach, host_id

logger = logging.getLogger(__name__)

BEAT_S = 1.0
LOST_S = 4.0
ASK_S = 2.0


class Reach(Enum):
    """How far we are with a node."""

    SEEKING = auto()
    WARMING = auto()
    LOCAL = auto()
    """Its arena is mapped here."""
    REMOTE = auto()
    """Its arena is read and written over the data plane."""
    ASKING = auto()
    """We only ask, and touch no bytes."""


@dataclass(frozen=True, slots=True)
class Me:
    """Who uses the node. `scratch`: registered bytes that nobody reads."""

    incarnation: Incarnation
    rank: Rank
    name: str
    transport: Transport | None = None
    scratch: Extents | None = None


class NodeAccess:
    """`changed()` is called when `ready` has changed."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        me: Me,
        changed: Callable[[], None] = lambda: None,
        map_arena: bool = True,
        use_arena: bool = True,
    ) -> None:
        self.link = Link(context, address)
        self.card: pw.NodeCard | None = None
        self.reach = Reach.SEEKING
        self.memory: ArenaMemory | None = None
        self._me = me
        self._changed = changed
        self._map_arena = map_arena
        self._use_arena = use_arena
        self._namespaces: dict[bytes, str] = {}
        self._connection: socket.socket | None = None
        self._peer: PeerId | None = None
        self._warm: OpId | None = None
        self._heard_s = float("-inf")
        self._beat_s = float("-inf")
        self._refused = ""

    # --- questions ---

    @property
    def ready(self) -> bool:
        return self.reach in (Reach.LOCAL, Reach.REMOTE, Reach.ASKING)

    @property
    def incarnation(self) -> Incarnation:
        """Of the node; "" while none is attached."""
        return self.card.incarnation if self.card is not None and self.ready else Incarnation("")

    @property
    def fds(self) -> list[int]:
        return [self.link.fd]

    # --- life ---

    def declare(self, namespace: bytes, description: str) -> None:
        """A namespace that we shall speak of."""
        if namespace not in self._namespaces:
            self._namespaces[namespace] = description
            if self.ready:
                self.link.tell(pw.Declare(namespace, description))

    def tick(self, now_s: float) -> None:
        """Take answers, say that we live, notice that the node does not."""
        self.link.receive(now_s)
        if self._share_is_closed():
            self._lose("it has ended")
        elif self.card is not None and now_s - self._heard_s > LOST_S:
            self._lose(f"silent for {now_s - self._heard_s:.1f} s")
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self._hello(now_s)

    def next_s(self, now_s: float) -> float:
        return max(0.0, min(self._beat_s + BEAT_S - now_s, self.link.next_s(now_s)))

    def _hello(self, now_s: float) -> None:
        """Also the sign of life: the answer tells whether it is still the same node."""
        me, export, scratch = self._me, b"", (0, 0)
        if self._peer is not None and me.transport is not None:
            export = me.transport.export()
            if me.scratch is not None:
                scratch = (int(me.scratch.table[0, 0]), me.scratch.total_bytes)
        spaces = tuple(self._namespaces.items())
        self.link.ask(
            lambda token: pw.PoolHello(token, me.incarnation, me.rank, me.name, export, *scratch, spaces),
            pw.PoolWelcome,
            lambda answer: self._welcome(answer, now_s),
            now_s + ASK_S,
        )

    def _welcome(self, answer: pw.PoolWelcome | None, now_s: float) -> None:
        if answer is None:
            return
        self._heard_s = max(self._heard_s, now_s)
        if answer.refused:
            if answer.refused != self._refused:
                logger.error("pool node %s: %s", self.link.address, answer.refused)
            self._refused = answer.refused
            return
        if self.card is not None and answer.card.incarnation != self.card.incarnation:
            self._lose("another node is at its address")
        if self.card is None:
            self.card = answer.card
            self._reach_arena(answer.card, now_s)
        elif self.reach is Reach.WARMING and self._warm is None:
            self._warm_up()

    def _reach_arena(self, card: pw.NodeCard, now_s: float) -> None:
        me = self._me
        if not self._use_arena:
            self._become(Reach.ASKING)
            return
        if self._map_arena and card.share and card.host == host_id():
            who = json.dumps({"incarnation": me.incarnation, "rank": me.rank}).encode()
            try:
                self.memory, self._connection = attach(card.share, who)
            except PoolError as error:
                logger.info("pool node %s is on this host, but: %s", card.name, error)
            else:
                self._become(Reach.LOCAL)
                return
        if me.transport is None or not card.export:
            logger.error("pool node %s cannot be reached: its arena is not on this host, no data plane", card.name)
            return
        try:
            self._peer = me.transport.connect(card.export)
        except (ConnectError, StateError, TransportError) as error:
            logger.warning("pool node %s: %s", card.name, error)
            self.card = None  # with the next beat again
            return
        self.reach = Reach.WARMING
        self._hello(now_s)  # now with our export

    def _warm_up(self) -> None:
        """The first read of a pair wires it up."""
        me, card = self._me, self.card
        assert me.transport is not None and self._peer is not None and card is not None
        if me.scratch is None:
            self._become(Reach.REMOTE)
            return
        size = min(64, me.scratch.total_bytes)
        here = Extents.of((int(me.scratch.table[0, 0]), size))
        try:
            self._warm = me.transport.read(self._peer, here, Extents.of((card.arena_address, size)))
        except TransportError as error:
            logger.warning("pool node %s cannot be read: %s", card.name, error)

    def completed(self, op: OpId, error: TransportError | None) -> bool:
        """True: the operation was ours."""
        if op != self._warm:
            return False
        self._warm = None
        if error is None and self.reach is Reach.WARMING:
            self._become(Reach.REMOTE)
        return True

    def peer_lost(self, peer: PeerId, reason: str) -> bool:
        """True: it was this node."""
        if peer != self._peer:
            return False
        self._peer = None
        self._lose(reason)
        return True

    def _become(self, reach: Reach) -> None:
        self.reach = reach
        assert self.card is not None
        if reach is not Reach.ASKING:
            how = "its arena is mapped" if reach is Reach.LOCAL else f"over {self.card.scheme}"
            logger.info("pool node %s (%s): %s", self.card.name, self.card.incarnation, how)
        self._changed()

    def _share_is_closed(self) -> bool:
        if self._connection is None:
            return False
        try:
            return self._connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _lose(self, reason: str) -> None:
        name = self.card.name if self.card is not None else self.link.address
        if self.reach is not Reach.ASKING:
            logger.warning("pool node %s is lost: %s", name, reason)
        was_ready = self.ready
        self.card, self.reach, self.memory = None, Reach.SEEKING, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._peer is not None and self._me.transport is not None:
            try:
                self._me.transport.disconnect(self._peer)
            except TransportError as error:
                logger.debug("still connected to %s: %s", name, error)
        self._peer = None
        self._beat_s = float("-inf")
        if was_ready:
            self._changed()

    def close(self) -> None:
        self.link.close()
        if self._connection is not None:
            self._connection.close()

    # --- bytes ---

    def view(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Of the mapped arena (LOCAL)."""
        assert self.memory is not None
        return self.memory.data[offset : offset + size]

    def remote(self, rows: Sequence[tuple[int, int]]) -> Extents:
        """(offset, bytes) of the arena as extents for the data plane."""
        assert self.card is not None
        return Extents.of(*((self.card.arena_address + offset, size) for offset, size in rows))

    def write(self, local: Extents, rows: Sequence[tuple[int, int]]) -> OpId:
        """Raises TransportError."""
        transport, peer = self._data_plane()
        return transport.write(peer, local, self.remote(rows))

    def read(self, local: Extents, rows: Sequence[tuple[int, int]]) -> OpId:
        """Raises TransportError."""
        transport, peer = self._data_plane()
        return transport.read(peer, local, self.remote(rows))

    def _data_plane(self) -> tuple[Transport, PeerId]:
        if self._me.transport is None or self._peer is None or self.card is None:
            raise StateError(f"pool node {self.link.address} is not connected")
        return self._me.transport, self._peer
