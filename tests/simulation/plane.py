"""The data plane of the stepped gear: inproc://, with a descriptor that tells when the next poll is worth it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lmkv.transport import Extents, Notification, OpId, PeerId
from lmkv.transport.inproc import InprocTransport
from tests.simulation.network import Network


class SteppedPlane(InprocTransport):
    """A copy moves on with each poll of its writer, and a poll is worth it `pace_s` after the one before."""

    def __init__(self, url: str, name: str, network: Network) -> None:
        parts = urlsplit(url)
        super().__init__(name, parts.netloc, dict(parse_qsl(parts.query)))
        self._network = network
        self._due_s = float("inf")
        self._descriptor = network.watch(lambda: self._due_s)

    def fds(self) -> list[int]:
        return [self._descriptor]

    def poll(self) -> list[Any]:
        events = super().poll()
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
        pace_s = self._network.pace_s()
        if self.faults.stall or self.faults.hold or self.faults.cut:
            pace_s = max(pace_s, 0.01)
        self._due_s = min(self._due_s, now_s + pace_s)
        self._network.notice(self._descriptor, self._due_s)

    def notice_death(self) -> None:
        """Of a peer: the next poll tells it."""
        if not self.gone:
            self._want()
