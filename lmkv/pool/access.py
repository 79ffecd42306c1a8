"""One pool node as one rank uses it: found, attached to, kept alive; its arena mapped, or reached over the data plane.

The thread that owns the link (and the transport) calls everything here. An access that has lost its node tries on for
ever. A node that was only silent is the same one when it is heard again: slots and pins of it are as good as their
leases. A node that has restarted is another one (other incarnation), and all that was asked of the old one is void. A
lost connection, or a node that has restarted, is no proof that nothing of the old one lands here: see `Fetching`.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
import zmq
from numpy.typing import NDArray

from lmkv import poolwire as pw
from lmkv.control.host import Connection
from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import PoolError, StateError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.process import own_process
from lmkv.transport import Extents, OpId, PeerId, Transport
from lmkv.wire import ProcessCard

from .fetching import Fetching
from .link import Link
from .memory import ArenaMemory, attach

logger = logging.getLogger(__name__)

BEAT_S = 1.0
LOST_S = 4.0
STALL_S = 1.0
"""After a longer pause between ticks it is us who were away, not the node."""
ASK_S = 2.0
MOST_NAMESPACES = 1024
"""Descriptions that a node is told again when it has restarted, the latest. They are for people who look."""

_numbers = itertools.count()


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
    runtime: Runtime = THREADS
    process: ProcessCard = field(default_factory=own_process)


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
        self.link = Link(context, address, me.runtime.entropy)
        self.card: pw.NodeCard | None = None
        self.reach = Reach.SEEKING
        self.memory: ArenaMemory | None = None
        self.bond = 0
        """Counts attachments. What the node has lent to one is void in the next, unless the node says otherwise."""
        self._me = me
        self._changed = changed
        self._map_arena = map_arena
        self._use_arena = use_arena
        self._namespaces: dict[bytes, str] = {}
        self._connection: Connection | None = None
        self._peer: PeerId | None = None
        self._export = b""
        self._left: dict[PeerId, bytes] = {}
        """Connections to nodes that were lost otherwise, with the nodes' exports."""
        self._warming: dict[OpId, PeerId] = {}
        self._before = Reach.SEEKING
        """How far we were when the node fell silent."""
        self._lender = Incarnation("")
        """The node whose slots the link counts."""
        self._told = Incarnation("")
        """The node that knows all our namespaces."""
        self._heard_s = float("-inf")
        self._answering = Incarnation("")
        """The node that has answered last."""
        self.fetching = Fetching(self.link, (me.incarnation, me.rank), next(_numbers))
        self._beat_s = float("-inf")
        self._tick_s = float("-inf")
        self._complaint = ""

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
            while len(self._namespaces) > MOST_NAMESPACES:
                del self._namespaces[next(iter(self._namespaces))]
            if self.ready:
                self.link.tell(pw.Declare(namespace, description))

    def tick(self, now_s: float) -> None:
        """Take answers, say that we live, notice that the node does not."""
        self.link.receive(now_s)
        if now_s - self._tick_s > STALL_S:
            self._heard_s = max(self._heard_s, now_s)
        self._tick_s = now_s
        if self._share_is_closed():
            self._lose("it has ended")
        elif self.ready and now_s - self._heard_s > LOST_S:
            self._silent(now_s - self._heard_s)
        self.fetching.tick(now_s)
        self._let_go()
        if now_s - self._beat_s >= BEAT_S:
            self._beat_s = now_s
            self._hello(now_s)

    def next_s(self, now_s: float) -> float:
        return max(0.0, min(self._beat_s + BEAT_S - now_s, self.link.next_s(now_s)))

    def _hello(self, now_s: float) -> None:
        """Also the sign of life: the answer tells whether it is still the same node."""
        me, scratch = self._me, (0, 0)
        if self._export and me.scratch is not None:
            scratch = (int(me.scratch.table[0, 0]), me.scratch.total_bytes)
        known = self.card is not None and self._told == self.card.incarnation
        spaces = () if known else tuple(self._namespaces.items())
        fetches = self.fetching.doubtful(self._answering, now_s)
        self.link.ask(
            lambda token: pw.PoolHello(
                token, me.incarnation, me.rank, me.name, self._export, *scratch, spaces,
                settled=self.link.settled, process=me.process, fetches=fetches,
            ),
            pw.PoolWelcome,
            lambda answer: self._welcome(answer, now_s, len(spaces), fetches),
            now_s + ASK_S,
        )  # fmt: skip

    def _welcome(self, answer: pw.PoolWelcome | None, now_s: float, told: int, fetches: tuple[int, ...]) -> None:
        if answer is None:
            return
        self._answering = answer.card.incarnation
        self.fetching.heard(answer, fetches, max(self._tick_s, now_s))
        self._heard_s = max(self._heard_s, now_s)
        if answer.refused:
            self._complain(answer.refused)
            return
        if self.card is not None and answer.card.incarnation != self.card.incarnation:
            self._lose("another node is at its address")
        elif self.card is not None and answer.card.export != self.card.export:
            if self._peer is not None:
                self._lose("its data plane was made anew")
            else:
                self.card = answer.card
        if answer.card.incarnation != self._lender:
            self._lender = answer.card.incarnation
            self.link.void_slots()
        if told == len(self._namespaces):
            self._told = answer.card.incarnation
        if self.card is None:
            self.card = answer.card
            self._reach_arena(answer.card, now_s)
        elif self.reach is Reach.WARMING and self._peer not in self._warming.values():
            self._warm_up()
        elif self._before is not Reach.SEEKING:
            self._become(self._before)

    def _reach_arena(self, card: pw.NodeCard, now_s: float) -> None:
        me = self._me
        if not self._use_arena:
            self._become(Reach.ASKING)
            return
        if self._map_arena and card.share and card.host == me.runtime.host.identity():
            who = json.dumps({"incarnation": me.incarnation, "rank": me.rank}).encode()
            try:
                self.memory, self._connection = attach(me.runtime.host, card.share, who)
            except PoolError as error:
                logger.info("pool node %s is on this host, but: %s", card.name, error)
            else:
                if card.prefault:
                    me.runtime.background("lmkv-arena", self.memory.touch)
                self._become(Reach.LOCAL)
                return
        if me.transport is None or not card.export:
            self._complain("its arena cannot be mapped, and there is no data plane to it")
            self.card = None  # with the next beat again
            return
        try:
            self._peer = self._connect(me.transport, card.export)
        except TransportError as error:
            self._complain(str(error))
            self.card = None
            return
        self._export = me.transport.export()
        self.reach = Reach.WARMING
        self._hello(now_s)  # now with our export

    def _connect(self, transport: Transport, export: bytes) -> PeerId:
        """Raises TransportError."""
        peer = next((peer for peer, other in self._left.items() if other == export), None)
        if peer is None:
            return transport.connect(export)
        del self._left[peer]
        return peer

    def _complain(self, why: str) -> None:
        """Once, not with every beat."""
        if why != self._complaint:
            logger.error("pool node %s: %s", self.link.address, why)
        self._complaint = why

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
            op = me.transport.read(self._peer, here, Extents.of((card.arena_address, size)))
        except TransportError as error:
            self._complain(f"it cannot be read: {error}")
        else:
            self._warming[op] = self._peer

    def completed(self, op: OpId, error: TransportError | None) -> bool:
        """True: the operation was ours."""
        peer = self._warming.pop(op, None)
        if peer is None:
            return False
        if error is None and self.reach is Reach.WARMING and peer == self._peer:
            self._become(Reach.REMOTE)
        return True

    def peer_lost(self, peer: PeerId, reason: str) -> bool:
        """True: it was this node. Our connection to it has ended."""
        is_ours = peer == self._peer
        if not is_ours and peer not in self._left:
            return False
        self._left.pop(peer, None)
        if self._me.transport is not None and self._me.transport.capabilities.loss_is_fence:
            self.fetching.fenced(peer)
        if is_ours:
            self._peer = None
            self._lose(reason)
        return True

    def replaced(self) -> None:
        """Our data plane is another one, with no connections; `peer_lost` was told of those it had."""
        self._left.clear()
        self._warming = dict.fromkeys(self._warming, PeerId(""))  # of the old one: no reason to wait
        self.fetching.replaced()

    def _become(self, reach: Reach) -> None:
        self.reach, self._before, self._complaint = reach, Reach.SEEKING, ""
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

    def _silent(self, silent_s: float) -> None:
        """It may be heard again. Until then it is not asked; our ways to its arena stay, and what it lent us."""
        assert self.card is not None
        logger.warning("pool node %s is silent for %.1f s", self.card.name, silent_s)
        self._before, self.reach = self.reach, Reach.SEEKING
        self._changed()

    def _lose(self, reason: str) -> None:
        name = self.card.name if self.card is not None else self.link.address
        if self.reach is not Reach.ASKING:
            logger.warning("pool node %s is lost: %s", name, reason)
        was_ready = self.ready
        self._detach()
        self._beat_s = float("-inf")
        if was_ready:
            self._changed()

    def _detach(self) -> None:
        self.fetching.node_lost()
        self.bond += 1
        if self._peer is not None and self.card is not None:
            self._left[self._peer] = self.card.export
        self._peer = None
        self.card, self.memory, self._export = None, None, b""
        self.reach = self._before = Reach.SEEKING
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._let_go()

    def _let_go(self) -> None:
        """Of connections that were left. One by which something may still land is kept: its end is a proof."""
        for peer in [peer for peer in self._left if not self.fetching.is_lent_to(peer)]:
            assert self._me.transport is not None
            try:
                self._me.transport.disconnect(peer)
            except TransportError:
                continue  # operations to it are still to end, or its loss is about to be told
            del self._left[peer]

    def close(self) -> None:
        """What is mapped is not to be used any more: the node takes us for dead."""
        self.link.close()
        self._detach()

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

    def fetch(
        self, lease: int, namespace: bytes, keys: Sequence[bytes], share: tuple[int, int], local: Extents
    ) -> OpId:
        """Have the node write bytes [first, first + size) (`share`) of these page keys' pages into `local`, one row a
        page. The end is told by `fetching.take`, under the number returned (below zero: it is no operation of the
        transport); until then the node may write there. Raises StateError."""
        _, peer = self._data_plane()
        assert self.card is not None
        return self.fetching.ask(self.card, peer, lease, namespace, keys, share, local, self._tick_s)

    def _data_plane(self) -> tuple[Transport, PeerId]:
        if self._me.transport is None or self._peer is None or self.card is None:
            raise StateError(f"pool node {self.link.address} is not connected")
        return self._me.transport, self._peer
