"""The way out of a quarantine that nobody can end: a new data plane, to which old connections do not lead.

Of the thread that owns the data plane.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from lmkv.errors import PeerLostError, StateError, TransportError
from lmkv.process import REMOTE_DRAIN_S
from lmkv.transport import OpId, PeerId, Transport

logger = logging.getLogger(__name__)


class Lender(Protocol):
    """Has lent memory to peers, and cannot always know when they write to it no more."""

    def overdue(self, now_s: float) -> Sequence[object]:
        """Peers on other hosts that are lost, and have held memory for longer than the limit."""

    def is_probe(self, op: OpId) -> bool:
        """The operation is its own, and nobody has to be told of its end."""

    def replaced(self, export: bytes) -> None:
        """The data plane is another one: what peers of other hosts had posted cannot land any more."""


class Replacing:
    """`name` makes a new name for the data plane; `lost(peer, reason)` is told of each of its connections before the
    lenders are, and `completed(op, error, now_s)` of each operation that was in flight, once nothing of it can land any
    more."""

    def __init__(
        self,
        transport: Transport,
        lenders: Sequence[Lender],
        name: Callable[[], str],
        lost: Callable[[PeerId, str], object],
        completed: Callable[[OpId, TransportError, float], object],
    ) -> None:
        self._transport = transport
        self._lenders = lenders
        self._name = name
        self._lost = lost
        self._completed = completed
        self._ops: list[tuple[float, OpId]] = []
        """When the end of an operation is to be told."""
        self._is_impossible = False

    def tick(self, now_s: float) -> None:
        """Replace the data plane if a quarantine has passed its limit.

        Writes of ours that were in flight may still land at their targets for a while: their end is told only then.
        """
        for due_s, op in [lost for lost in self._ops if lost[0] <= now_s]:
            self._ops.remove((due_s, op))
            self._completed(op, PeerLostError("the data plane was made anew"), now_s)
        if self._is_impossible:
            return
        overdue = [peer for lender in self._lenders for peer in lender.overdue(now_s)]
        if not overdue:
            return
        try:
            ops, peers = self._transport.replace(self._name())
        except StateError as error:
            logger.error("memory that %s may still write to stays in quarantine: %s", overdue, error)
            self._is_impossible = True
            return
        logger.error("the data plane was made anew, to free what lost peers may still write: %s", overdue)
        probes = {op for op in ops if any(lender.is_probe(op) for lender in self._lenders)}
        self._ops += [(now_s + REMOTE_DRAIN_S, op) for op in ops if op not in probes]
        for peer in peers:
            self._lost(peer, "the data plane was made anew")
        export = self._transport.export()
        for lender in self._lenders:
            lender.replaced(export)
