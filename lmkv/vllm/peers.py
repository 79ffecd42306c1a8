"""A worker's peers: connecting, warming, heartbeats, and the two ways of losing one.

Used by the worker loop's thread alone. A peer is *silent* when its Beats stay away for a lease, and *dead* only when
the data plane has proved it (PeerLost); a broken control connection makes us probe with a write. A peer that is lost
without proof stays connected and is probed on: its proven death is what ends the quarantine of blocks granted to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.errors import LayoutError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.transfer.events import Peer
from lmkv.transport import Extents, MemoryKind, OpId, PeerId, Transport

from .meeting import Meeting, meeting

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 0.1
DEPARTED_PROBE_S = 1.0
DEPARTED_S = 600.0
"""A peer lost without proof is probed and kept connected for so long."""


@dataclass(slots=True)
class Engine:
    """An engine that we were introduced to, and how our rank deals with it."""

    card: wire.EngineCard
    meeting: Meeting
    address: str
    """Of our own engine, which wants to hear how it goes."""
    introduced_s: float


@dataclass(slots=True)
class Pal:
    """One of its ranks that we are connected to."""

    engine: Engine
    worker: wire.WorkerCard
    peer: Peer
    transport_id: PeerId
    heard_s: float
    ready: bool = False
    beat_s: float = 0.0
    echo_s: float = 0.0
    echo_heard_s: float = 0.0
    clock_offset_s: float = 0.0
    round_trip_s: float = float("inf")
    suspected: bool = False
    probe_s: float = 0.0
    parted_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.engine.card.name!r} rank {self.peer.rank}"


class Peers:
    """`gone(peer, dead)` is called once for each rank lost. `scratch` are our registered throw-away bytes.

    An engine is lost as a whole: with the first of its ranks that is silent or dead.
    """

    def __init__(
        self,
        transport: Transport,
        outbox: Outbox,
        rank: Rank,
        scratch: Extents,
        settings: ConnectorSettings,
        gone: Callable[[Peer, bool], None],
    ) -> None:
        self._transport = transport
        self._outbox = outbox
        self._rank = rank
        self._scratch = scratch
        self._settings = settings
        self._gone = gone
        self._own = Incarnation("")
        self._engines: dict[Incarnation, Engine] = {}
        self._pals: dict[Peer, Pal] = {}
        self._by_transport: dict[PeerId, Peer] = {}
        self._warm_ops: dict[OpId, Peer] = {}
        self._addresses: dict[Peer, str] = {}
        self._departed: dict[Peer, Pal] = {}
        self._leaving: set[PeerId] = set()

    # --- questions ---

    @property
    def own_incarnation(self) -> Incarnation:
        return self._own

    @property
    def warming(self) -> bool:
        return any(peer in self._pals for peer in self._warm_ops.values())

    def find(self, peer: Peer) -> Pal | None:
        return self._pals.get(peer)

    def met(self, incarnation: Incarnation) -> tuple[wire.EngineCard, Meeting] | None:
        """The engine's card, and what our rank has to do with its ranks; None when it is not (any more) a peer."""
        engine = self._engines.get(incarnation)
        return (engine.card, engine.meeting) if engine else None

    def peer_of(self, transport_id: PeerId) -> Peer | None:
        """Whose notes come from `transport_id`."""
        peer = self._by_transport.get(transport_id)
        return peer if peer in self._pals else None

    def address_of(self, peer: Peer) -> str | None:
        """Control address of that rank, also after its engine was dismissed."""
        return self._addresses.get(peer)

    # --- coming and going ---

    def introduce(self, message: wire.Introduce, now_s: float) -> None:
        own, card = message.own, message.card
        self._own = own.incarnation
        if card.incarnation in self._engines:
            self._tell_if_ready(card.incarnation)
            return
        try:
            engine = Engine(card, meeting(own, card, self._rank), own.address, now_s)
            pals = [self._connect(engine, rank, now_s) for rank in engine.meeting.ranks]
        except (TransportError, LayoutError) as error:
            self._tell_engine(own.address, card.incarnation, f"cannot connect to {card.name!r}: {error}")
            return
        self._engines[card.incarnation] = engine
        for pal in pals:
            self._pals[pal.peer] = pal
            self._warm(pal)
        self._tell_if_ready(card.incarnation)

    def _connect(self, engine: Engine, rank: Rank, now_s: float) -> Pal:
        """Raises TransportError. What was connected before stays so, and is found again by the next introduction."""
        worker, peer = engine.card.workers[rank], Peer(engine.card.incarnation, rank)
        departed = self._departed.pop(peer, None)
        self._let_go()
        known = next((t for t, p in self._by_transport.items() if p == peer), None)
        transport_id = departed.transport_id if departed else known or self._transport.connect(worker.export)
        self._leaving.discard(transport_id)
        self._by_transport[transport_id] = peer
        self._addresses[peer] = worker.address
        while len(self._addresses) > 1024:
            self._addresses.pop(next(iter(self._addresses)))
        return Pal(engine, worker, peer, transport_id, now_s)

    def _tell_if_ready(self, incarnation: Incarnation) -> None:
        engine = self._engines[incarnation]
        if all(self._pals[Peer(incarnation, rank)].ready for rank in engine.meeting.ranks):
            self._tell_engine(engine.address, incarnation, "")

    def _warm(self, pal: Pal) -> None:
        """A write that nobody reads. The first of a pair wires it up: hundreds of ms that no request should pay."""
        remote = Extents.of((pal.worker.scratch_address, self._scratch.total_bytes), kind=MemoryKind.DRAM)
        note = wire.encode(wire.WarmNote(self._own))
        try:
            op = self._transport.write(pal.transport_id, self._scratch, remote, note)
        except TransportError as error:
            # A death is told by PeerLost with the next poll, anything else ends as silence.
            logger.debug("peer %s cannot be reached: %s", pal.name, error)
            return
        self._warm_ops[op] = pal.peer

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> bool:
        """True if the operation was ours (warming or probing)."""
        peer = self._warm_ops.pop(op, None)
        if peer is None:
            return False
        pal = self._pals.get(peer)
        if pal is None:
            return True
        if error is not None:
            logger.warning("peer %s: %s", pal.name, error)
            return True  # a PeerLost follows, or silence ends it
        pal.suspected = False
        if not pal.ready:
            pal.ready, pal.heard_s = True, now_s
            logger.info(
                "rank %d paired with %s in %.0f ms", self._rank, pal.name, (now_s - pal.engine.introduced_s) * 1e3
            )
            self._tell_if_ready(peer.incarnation)
        return True

    def dismiss(self, incarnation: Incarnation, dead: bool) -> None:
        engine = self._engines.pop(incarnation, None)
        for rank in engine.meeting.ranks if engine else ():
            self._part(self._pals.pop(Peer(incarnation, rank)), dead)

    def part(self, incarnation: Incarnation, reason: str) -> None:
        """A peer that makes trouble is parted from, without proof of its death; our engine is told."""
        pal = next((pal for peer, pal in self._pals.items() if peer.incarnation == incarnation), None)
        if pal is not None:
            self._lose(pal, dead=False, reason=reason)

    def transport_lost(self, transport_id: PeerId, reason: str) -> None:
        """The data plane has proved the peer dead."""
        peer = self._by_transport.pop(transport_id, None)
        self._leaving.discard(transport_id)
        if peer is None:
            return
        if peer in self._pals:
            self._lose(self._pals[peer], dead=True, reason=reason)
        elif peer in self._departed:
            pal = self._departed.pop(peer)
            logger.info("peer %s (incarnation %s) is proven dead: %s", pal.name, peer.incarnation, reason)
            self._gone(peer, True)

    def _lose(self, pal: Pal, dead: bool, reason: str) -> None:
        """The rank is lost, and the engine with it: its other ranks are parted from without proof."""
        engine, incarnation = pal.engine, pal.peer.incarnation
        logger.warning("peer %s (incarnation %s) is lost: %s", pal.name, incarnation, reason)
        del self._engines[incarnation]
        for rank in engine.meeting.ranks:
            other = self._pals.pop(Peer(incarnation, rank))
            self._part(other, dead and other is pal)
        self._tell_engine(engine.address, incarnation, reason)

    def _part(self, pal: Pal, dead: bool) -> None:
        """The pair is over: at once if the peer is dead, else it is probed on."""
        if dead:
            self._leave(pal)
        else:
            pal.ready, pal.suspected, pal.parted_s = False, False, pal.heard_s
            self._departed[pal.peer] = pal
        self._gone(pal.peer, dead)

    def _probe_departed(self, now_s: float) -> None:
        probing = set(self._warm_ops.values())
        for peer, pal in list(self._departed.items()):
            if now_s - pal.parted_s > DEPARTED_S:
                del self._departed[peer]
                self._leave(pal)
            elif peer not in probing and now_s - pal.probe_s >= DEPARTED_PROBE_S:
                pal.probe_s = now_s
                self._warm(pal)

    def _leave(self, pal: Pal) -> None:
        if pal.transport_id in self._by_transport:
            self._leaving.add(pal.transport_id)
        self._let_go()

    def _let_go(self) -> None:
        for transport_id in list(self._leaving):
            try:
                self._transport.disconnect(transport_id)
            except TransportError:
                continue  # operations in flight, whose end is needed first, or a death about to be told
            self._leaving.discard(transport_id)
            self._by_transport.pop(transport_id, None)

    def _tell_engine(self, address: str, incarnation: Incarnation, error: str) -> None:
        self._outbox.send(address, wire.Introduced(self._rank, incarnation, error))

    # --- heartbeats ---

    def heard(self, beat: wire.Beat, now_s: float) -> Peer | None:
        """A Beat came: the peer whose leases it renews, if we know it."""
        pal = self._pals.get(Peer(beat.incarnation, beat.rank))
        if pal is None:
            return None
        pal.heard_s, pal.suspected = now_s, False
        if beat.echo_s:
            round_trip_s = now_s - beat.echo_s - beat.held_s
            if round_trip_s <= pal.round_trip_s:
                pal.round_trip_s = round_trip_s
                pal.clock_offset_s = beat.sent_s + round_trip_s / 2 - now_s
        pal.echo_s, pal.echo_heard_s = beat.sent_s, now_s
        return pal.peer

    def tick(self, now_s: float) -> None:
        """Beat, probe the suspected, give up the silent."""
        for address in self._outbox.lost():
            for pal in self._pals.values():
                pal.suspected = pal.suspected or pal.worker.address == address
        self._probe_departed(now_s)
        for pal in list(self._pals.values()):
            if pal.peer not in self._pals:
                continue  # lost with another rank of its engine
            if now_s - pal.heard_s > self._settings.lease_s:
                self._lose(pal, dead=False, reason=f"silent for {now_s - pal.heard_s:.1f} s")
            elif pal.suspected and now_s - pal.probe_s >= PROBE_EVERY_S:
                pal.probe_s = now_s
                self._warm(pal)
            if pal.peer in self._pals and now_s - pal.beat_s >= self._settings.beat_s:
                pal.beat_s = now_s
                held_s = now_s - pal.echo_heard_s if pal.echo_s else 0.0
                self._outbox.send(pal.worker.address, wire.Beat(self._own, self._rank, now_s, pal.echo_s, held_s))

    def next_s(self, now_s: float) -> float:
        """Seconds until `tick` has something to do."""
        departed_s = DEPARTED_PROBE_S if self._departed else 3600.0
        if not self._pals:
            return departed_s
        return min(
            departed_s,
            *(
                PROBE_EVERY_S if pal.suspected else max(0.0, pal.beat_s + self._settings.beat_s - now_s)
                for pal in self._pals.values()
            ),
        )
