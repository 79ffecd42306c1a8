"""The data plane of the stepped gear: inproc://, with a descriptor that tells when the next poll is worth it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lmkv.errors import PeerLostError
from lmkv.transport import Extents, Notification, OpId, PeerId, PeerLost
from lmkv.transport.inproc import InprocTransport
from tests.simulation.network import Network


class SteppedPlane(InprocTransport):
    """A copy moves on with each poll of its writer, and a poll is worth it `pace_s` after the one before."""

    def __init__(self, url: str, name: str, network: Network) -> None:
        parts = urlsplit(url)
        super().__init__(name, parts.netloc, dict(parse_qsl(parts.query)))
        self._network = network
        self._pace = network.unlike()
        self._broken: set[str] = set()
        """Peers to which the connection has broken, until that has been told."""
        self._due_s = float("inf")
        self._descriptor = network.watch(lambda: self._due_s)

    def fds(self) -> list[int]:
        return [self._descriptor]

    def break_with(self, other: SteppedPlane) -> bool:
        """Their connection ends, both ways; nothing that was in flight lands any more. False: there is none."""
        pairs = [(one, its) for one, its in ((self, other), (other, self)) if its.name in one._peers]
        for one, its in pairs:
            one._broken.add(its.name)
            one._want()
        return bool(pairs)

    def _advance(self, op: OpId, peer: PeerId, move: Any, budget_bytes: int) -> int:
        if peer in self._broken:
            self._ops.settle(op, PeerLostError(f"the connection to {peer} has ended"))
            return 0
        return super()._advance(op, peer, move, budget_bytes)

    def _end_broken(self) -> list[Any]:
        ended = [peer for peer in self._peers if peer in self._broken and not self._ops.busy(peer)]
        for peer in ended:
            self._broken.discard(peer)
            self._forget(peer)
        return [PeerLost(peer, "the connection has ended") for peer in ended]

    def poll(self) -> list[Any]:
        events = super().poll() + self._end_broken()
        self._due_s = float("inf")
        if self.in_flight or self._outbox or self._inbox:
            self._want()
        return events

    def _post(self, is_write: bool, peer: PeerId, local: Extents, remote: Extents, note: bytes) -> OpId:
        op = super()._post(is_write, peer, local, remote, note)
        self._want()
        return op

    def deliver(self, note: Notification) -> None:
        super().deliver(note)
        self._want()

    def _want(self) -> None:
        """A poll, soon."""
        now_s = self._network.now()
        pace_s = self._network.pace_s() * self._pace
        if self.faults.stall or self.faults.hold or self.faults.cut:
            pace_s = max(pace_s, 0.01)
        self._due_s = min(self._due_s, now_s + pace_s)
        self._network.notice(self._descriptor, self._due_s)

    def notice_death(self) -> None:
        """Of a peer: the next poll tells it."""
        if not self.gone:
            self._want()
