"""Peers that were lost without proof: they may be alive and still write. Loop thread only.

They are watched until they are proven dead, and forgotten when they hold nothing of ours for long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from enum import Enum, auto

from lmkv import wire
from lmkv.ids import Incarnation
from lmkv.process import DRAIN_S, drain_s, has_ended, has_followed, may_share_host
from lmkv.transfer.events import Peer
from lmkv.transport import PeerId

from .pal import AGAIN_S, Pal

logger = logging.getLogger(__name__)

DEPARTED_S = 600.0
"""One that holds nothing of ours is kept connected for so long."""


class Fate(Enum):
    """Says what is to be done with a departed peer."""

    DEAD = auto()
    """Nothing of it is on its way any more."""
    FORGOTTEN = auto()
    PROBED = auto()


class Departed:
    """`holds(peer)`: something of ours may still be written by it."""

    def __init__(self, quarantine_s: float, holds: Callable[[Peer], bool]) -> None:
        self._quarantine_s = quarantine_s
        self._holds = holds
        self._pals: dict[Peer, Pal] = {}

    def __iter__(self) -> Iterator[Pal]:
        return iter(self._pals.values())

    def add(self, pal: Pal, since_s: float) -> None:
        pal.ready, pal.suspected, pal.parted_s = False, False, since_s
        self._pals[pal.peer] = pal

    def take(self, peer: Peer) -> Pal | None:
        """Take the peer out: it has come back, or is fenced."""
        return self._pals.pop(peer, None)

    def take_fenced(self, peer: Peer, transport_id: PeerId) -> Pal | None:
        """Take out the peer whose connection has ended. None if it was lost over another one: a later connection, made
        for a return that failed, proves nothing of the first."""
        pal = self._pals.get(peer)
        return self.take(peer) if pal is not None and pal.transport_id == transport_id else None

    def clear(self) -> None:
        self._pals.clear()

    def overdue(self, now_s: float) -> list[Peer]:
        """Lost for longer than `quarantine_s`, with blocks or slots of ours in quarantine: a new data plane would free
        them. A process of this host is not among them (see `Peers.replaced`)."""
        lost = [pal for pal in self if now_s - pal.parted_s > self._quarantine_s and self._holds(pal.peer)]
        return [pal.peer for pal in lost if not may_share_host(pal.worker.process)]

    # --- proofs of death ---

    def claim(self, incarnation: Incarnation) -> None:
        """The control plane says that its processes have ended."""
        for peer, pal in self._pals.items():
            pal.claimed |= peer.incarnation == incarnation

    def note_successor(self, card: wire.EngineCard, now_s: float) -> None:
        """On the same host another process listens where a departed rank did: that one's sockets are closed."""
        for pal in self:
            old = pal.worker.process
            if pal.engine.card.address != card.address or pal.peer.incarnation == card.incarnation or not old.host:
                continue
            for worker in card.workers:
                if pal.worker.address == worker.address and has_followed(worker.process, old):
                    self._note_end(pal, now_s, "another process has its address")

    def _note_end(self, pal: Pal, now_s: float, how: str) -> None:
        """Its process has ended. What it had sent gets time to drain."""
        if not pal.ended_s:
            pal.ended_s, pal.drain_s = now_s, drain_s(pal.worker.process)
            logger.info("peer %s (incarnation %s) has ended: %s", pal.name, pal.peer.incarnation, how)

    def watch(self, now_s: float) -> Iterator[tuple[Pal, Fate]]:
        """Yields the peers with which something is to be done. The dead and the forgotten have been taken out then."""
        for peer, pal in list(self._pals.items()):
            if not pal.ended_s and now_s - pal.looked_s >= AGAIN_S:
                pal.looked_s = now_s
                if pal.claimed or has_ended(pal.worker.process):
                    self._note_end(pal, now_s, "the control plane says so" if pal.claimed else "seen on this host")
            if pal.ended_s:
                if now_s - pal.ended_s >= pal.drain_s:
                    del self._pals[peer]
                    yield pal, Fate.DEAD
            elif now_s - pal.parted_s > DEPARTED_S and not self._holds(peer):
                del self._pals[peer]
                yield pal, Fate.FORGOTTEN
            elif now_s - pal.probe_s >= AGAIN_S:
                yield pal, Fate.PROBED

    def next_s(self) -> float:
        """Seconds until `watch` has something to do."""
        if any(pal.ended_s for pal in self):
            return DRAIN_S / 4
        return AGAIN_S if self._pals else 3600.0
