"""What the sender remembers of its peers: lease, window, and the rectangles that wait for them, in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import inf

from lmkv.ids import TransferId

from .events import MOST_DEAD, Granted, Peer, Rect
from .outgoing import Outgoing, SenderLimits
from .rects import clip
from .timers import Timers


@dataclass(frozen=True, slots=True)
class Queued:
    """A rectangle that waits for lease or window."""

    transfer_id: TransferId
    rect: Rect
    attempt: int
    slot: int = -1


@dataclass(slots=True)
class Lane:
    """One decode rank. `lease_end_s` is -inf until it is heard: an unknown peer gets nothing."""

    peer: Peer
    lease_end_s: float = -inf
    dead: bool = False
    inflight_bytes: int = 0
    queue: deque[Queued] = field(default_factory=deque)

    def may_post(self, now_s: float) -> bool:
        return not self.dead and now_s < self.lease_end_s

    def fits(self, size: int, window: int) -> bool:
        return self.inflight_bytes == 0 or self.inflight_bytes + size <= window

    def purge(self, transfer_id: TransferId) -> list[Queued]:
        """Take the rectangles of one transfer out of the queue."""
        mine = [item for item in self.queue if item.transfer_id == transfer_id]
        if mine:
            self.queue = deque(item for item in self.queue if item.transfer_id != transfer_id)
        return mine


class Lanes:
    """One lane a peer. It is forgotten when its peer has been silent so long that every transfer to it has ended. Of
    the dead it is remembered that they are (an incarnation dies once, and seldom)."""

    def __init__(self, limits: SenderLimits, timers: Timers[TransferId | Peer]) -> None:
        self._limits = limits
        self._timers = timers
        self._lanes: dict[Peer, Lane] = {}

    def find(self, peer: Peer) -> Lane | None:
        return self._lanes.get(peer)

    def of(self, peer: Peer) -> Lane:
        lane = self._lanes.get(peer)
        if lane is None:
            lane = self._lanes[peer] = Lane(peer)
        return lane

    def in_flight_bytes(self, peer: Peer) -> int:
        lane = self.find(peer)
        return lane.inflight_bytes if lane else 0

    def queued(self, peer: Peer) -> int:
        """Rectangles that wait for the peer's lease or window."""
        lane = self.find(peer)
        return len(lane.queue) if lane else 0

    def enqueue(self, transfer: Outgoing, grant: Granted, rects: list[Rect]) -> Lane:
        """Queue the cells of `rects` that the grant covers and that are not taken yet, cut to the size of a post.

        In landing mode they wait for slots first, so that one transfer without any does not hold up the others."""
        lane = self.of(grant.peer)
        for rect in rects:
            part = clip(rect, grant.blocks[rect.group])
            for piece in transfer.taken.missing(part) if part else ():
                transfer.taken.add(piece)
                cuts = self._limits.cuts(piece, grant.slot_bytes)
                transfer.queued += len(cuts)
                if grant.slot_bytes:
                    transfer.waiting.extend(cuts)
                else:
                    lane.queue.extend(Queued(transfer.transfer_id, cut, 0) for cut in cuts)
        self.feed(transfer, lane)
        return lane

    @staticmethod
    def feed(transfer: Outgoing, lane: Lane) -> None:
        """Landing mode: what waits and has a slot joins the queue."""
        while transfer.waiting and transfer.slots:
            lane.queue.append(Queued(transfer.transfer_id, transfer.waiting.popleft(), 0, transfer.slots.popleft()))

    def purge(self, transfer: Outgoing) -> list[Queued]:
        """Take out what of this transfer has not been posted."""
        if not transfer.queued or transfer.grant is None:
            return []
        transfer.queued = 0
        waiting = [Queued(transfer.transfer_id, rect, 0) for rect in transfer.waiting]
        transfer.waiting.clear()
        return self.of(transfer.grant.peer).purge(transfer.transfer_id) + waiting

    def renew(self, peer: Peer, now_s: float) -> Lane:
        """The peer was heard; a dead one stays dead."""
        lane = self.of(peer)
        if not lane.dead:
            lane.lease_end_s = max(lane.lease_end_s, now_s + self._limits.lease_s)
        self._timers.arm(peer, self._idle_s(lane))
        return lane

    def lapse(self, peer: Peer, dead: bool, now_s: float) -> None:
        """The lease is over now, unless it was already."""
        lane = self.of(peer)
        lane.dead |= dead
        if lane.lease_end_s > now_s or lane.lease_end_s == -inf:
            lane.lease_end_s = now_s
        self._timers.arm(peer, self._idle_s(lane))

    def drop_idle(self, peer: Peer, now_s: float) -> None:
        lane = self._lanes[peer]
        if self._idle_s(lane) > now_s:
            self._timers.arm(peer, self._idle_s(lane))
        elif lane.inflight_bytes or lane.queue:
            self._timers.arm(peer, now_s + self._limits.hold_s)
        elif not lane.dead or sum(other.dead for other in self._lanes.values()) > MOST_DEAD:
            del self._lanes[peer]

    def _idle_s(self, lane: Lane) -> float:
        return lane.lease_end_s + self._limits.hold_s + self._limits.tombstone_s
