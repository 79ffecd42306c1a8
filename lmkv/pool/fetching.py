"""What nodes have been asked to write into our memory, until it is proved that they write it no more.

Of the thread that owns the access. A fetch ends with the node's answer. If that does not come, the node says with its
next PoolWelcome whether it still writes, whenever it is heard again. A node that is lost is not waited for, but our
memory stays lent to it until one of these comes (docs/protocol.md, "What ends a quarantine"):

* a data plane that closes both directions has lost it,
* its process has ended, seen on this host, or by another one at its address there,
* our own data plane is another one, and the node on another host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmkv import poolwire as pw
from lmkv.errors import PeerLostError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.process import drain_s, has_ended, has_followed, may_share_host
from lmkv.transport import Extents, OpId, PeerId

from .link import Link

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
RECALL_S = 5.0
"""A node is asked about a fetch that has not ended by then: its answer may have been lost with a connection."""
_ACCESSES = 4096
"""Fetches of so many nodes are told apart by their numbers."""


@dataclass(slots=True, eq=False)
class _Writer:
    """A node that writes, or wrote, to us: one incarnation of it, over one connection."""

    card: pw.NodeCard
    peer: PeerId
    heard_s: float
    is_lost: bool = False
    looked_s: float = float("-inf")
    ended_s: float | None = None
    """When its process was proven to have ended."""
    tokens: dict[OpId, int] = field(default_factory=dict)
    """What it has not ended, with the questions' tokens."""


class Fetching:
    """`number` tells the accesses of a process apart."""

    def __init__(self, link: Link, who: tuple[Incarnation, Rank], number: int) -> None:
        self._link = link
        self._who = who
        self._number = number % _ACCESSES
        self._count = 0
        self._writers: list[_Writer] = []
        self._asked_s: dict[OpId, float] = {}
        self._ended: list[tuple[OpId, TransportError | None]] = []
        self._lost: list[OpId] = []

    # --- questions ---

    def __len__(self) -> int:
        """Fetches whose memory is lent."""
        return len(self._asked_s)

    def is_lent_to(self, peer: PeerId) -> bool:
        """Some of our memory, over this connection."""
        return any(writer.peer == peer for writer in self._writers)

    def take(self) -> list[tuple[OpId, TransportError | None]]:
        """Those that have ended: the node writes no more of them, or is no more."""
        ended, self._ended = self._ended, []
        return ended

    def take_lost(self) -> list[OpId]:
        """Those whose node is lost. Their end is not known, and told later if ever."""
        lost, self._lost = [op for op in self._lost if op in self._asked_s], []
        return lost

    def overdue(self, now_s: float, limit_s: float) -> list[str]:
        """Nodes on other hosts that have memory of ours, and have not been heard for longer than the limit."""
        return [
            f"{writer.card.name} ({writer.card.incarnation})"
            for writer in self._writers
            if now_s - writer.heard_s > limit_s and not may_share_host(writer.card.process)
        ]

    def doubtful(self, incarnation: Incarnation, now_s: float) -> tuple[int, ...]:
        """Tokens of questions that this node is to be asked about."""
        return tuple(
            token
            for writer in self._writers
            if writer.card.incarnation == incarnation
            for op, token in writer.tokens.items()
            if writer.is_lost or now_s - self._asked_s[op] > RECALL_S
        )

    # --- what comes ---

    def ask(
        self,
        card: pw.NodeCard,
        peer: PeerId,
        lease: int,
        namespace: bytes,
        keys: Sequence[bytes],
        share: tuple[int, int],
        local: Extents,
        now_s: float,
    ) -> OpId:
        """See `NodeAccess.fetch`."""
        self._count += 1
        op = OpId(-self._count * _ACCESSES - self._number)
        writer = self._writer(card, peer, now_s)
        addresses = tuple(int(row) for row in local.table[:, 0])
        joined = b"".join(keys)

        def question(token: int) -> pw.Fetch:
            writer.tokens[op] = token
            return pw.Fetch(token, *self._who, lease, namespace, joined, *share, addresses)

        def fetched(answer: pw.Fetched | None) -> None:
            if answer is not None:  # no answer proves nothing
                self._end(writer, op, TransportError(answer.error) if answer.error else None)

        self._asked_s[op] = now_s
        self._link.ask(question, pw.Fetched, fetched, float("inf"))
        return op

    def _writer(self, card: pw.NodeCard, peer: PeerId, now_s: float) -> _Writer:
        for writer in self._writers:
            if not writer.is_lost and (writer.card.incarnation, writer.peer) == (card.incarnation, peer):
                return writer
        writer = _Writer(card, peer, now_s)
        self._writers.append(writer)
        return writer

    def node_lost(self) -> None:
        """The node that is attached. What it was asked to write may still come."""
        for writer in self._writers:
            if not writer.is_lost:
                writer.is_lost = True
                self._lost += writer.tokens

    def fenced(self, peer: PeerId) -> None:
        """Nothing that came over this connection lands any more."""
        self._end_all([writer for writer in self._writers if writer.peer == peer], "the pool node is lost")

    def replaced(self) -> None:
        """Our data plane is another one. A node of this host may write to us without a connection (CMA)."""
        far = [writer for writer in self._writers if not may_share_host(writer.card.process)]
        self._end_all(far, "the data plane was made anew")

    def heard(self, answer: pw.PoolWelcome, asked: tuple[int, ...], now_s: float) -> None:
        """A node answers at the address, asked about the fetches with these tokens. If it is another one, the one
        before may be proven to have ended."""
        card = answer.card
        for writer in list(self._writers):
            if writer.card.incarnation == card.incarnation:
                writer.heard_s = now_s
                self._recalled(writer, answer.writing, asked)
            elif writer.card.address == card.address and has_followed(card.process, writer.card.process):
                self._note_end(writer, now_s)

    def _recalled(self, writer: _Writer, writing: tuple[int, ...] | None, asked: tuple[int, ...]) -> None:
        if writing is None:
            return
        for op, token in list(writer.tokens.items()):
            if token in asked and token not in writing:
                self._end(writer, op, TransportError("the pool node has written it or not, its answer was lost"))

    def tick(self, now_s: float) -> None:
        """Look for the ends of the processes of nodes that are lost, or silent."""
        for writer in list(self._writers):
            is_suspect = writer.is_lost or now_s - writer.heard_s > RECALL_S
            if is_suspect and writer.ended_s is None and now_s - writer.looked_s >= LOOK_EVERY_S:
                writer.looked_s = now_s
                if has_ended(writer.card.process):
                    self._note_end(writer, now_s)
            if writer.ended_s is not None and now_s - writer.ended_s >= drain_s(writer.card.process):
                self._end_all([writer], "the pool node has ended")

    def _note_end(self, writer: _Writer, now_s: float) -> None:
        if writer.ended_s is None:
            logger.info("the process of pool node %s (%s) has ended", writer.card.name, writer.card.incarnation)
            writer.ended_s = now_s

    def _end_all(self, writers: list[_Writer], why: str) -> None:
        for writer in writers:
            for op in list(writer.tokens):
                self._end(writer, op, PeerLostError(why))

    def _end(self, writer: _Writer, op: OpId, error: TransportError | None) -> None:
        token = writer.tokens.pop(op, None)
        if token is None:
            return
        if not writer.tokens:
            self._writers.remove(writer)
        del self._asked_s[op]
        self._link.forget(token)
        self._ended.append((op, error))
