"""The way out of a quarantine that nobody can end: a new data plane, to which old connections do not lead.

Loop thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from lmkv.errors import PeerLostError, StateError, TransportError
from lmkv.transport import OpId, PeerId, Transport

from .pal import REMOTE_DRAIN_S
from .peers import Peers

logger = logging.getLogger(__name__)


class Replacing:
    """`name` makes a new name for the data plane; `lost(peer, reason)` is told of each of the pool's connections, and
    `completed(op, error, now_s)` of each operation that was in flight, once nothing of it can land any more."""

    def __init__(
        self,
        transport: Transport,
        peers: Peers,
        name: Callable[[], str],
        lost: Callable[[PeerId, str], object],
        completed: Callable[[OpId, TransportError, float], None],
    ) -> None:
        self._transport = transport
        self._peers = peers
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
        overdue = self._peers.overdue(now_s)
        if not overdue or self._is_impossible:
            return
        try:
            ops, peers = self._transport.replace(self._name())
        except StateError as error:
            logger.error("blocks that %s may still write stay in quarantine: %s", overdue, error)
            self._is_impossible = True
            return
        logger.error("the data plane was made anew, to free what lost peers may still write: %s", overdue)
        for peer in peers:
            self._lost(peer, "the data plane was made anew")
        self._ops += [(now_s + REMOTE_DRAIN_S, op) for op in ops if not self._peers.is_probe(op)]
        self._peers.replaced(self._transport.export())
