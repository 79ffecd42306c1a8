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
from lmkv.errors import TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.transfer.events import Peer
from lmkv.transport import Extents, MemoryKind, OpId, PeerId, Transport

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 0.1
DEPARTED_PROBE_S = 1.0
DEPARTED_S = 600.0
"""A peer lost without proof is probed and kept connected for so long."""


@dataclass(slots=True)
class _Pal:
    card: wire.EngineCard
    worker: wire.WorkerCard
    peer: Peer
    transport_id: PeerId
    engine_address: str
    introduced_s: float
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


class Peers:
    """`gone(peer, dead)` is called once for each loss. `scratch` are our registered throw-away bytes."""

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
        self._pals: dict[Incarnation, _Pal] = {}
        self._by_transport: dict[PeerId, Incarnation] = {}
        self._warm_ops: dict[OpId, Incarnation] = {}
        self._addresses: dict[Incarnation, str] = {}
        self._departed: dict[Incarnation, _Pal] = {}
        self._leaving: set[PeerId] = set()

    # --- questions ---

    @property
    def own_incarnation(self) -> Incarnation:
        return self._own

    @property
    def warming(self) -> bool:
        return any(incarnation in self._pals for incarnation in self._warm_ops.values())

    def find(self, incarnation: Incarnation) -> _Pal | None:
        return self._pals.get(incarnation)

    def peer_of(self, transport_id: PeerId) -> Peer | None:
        """Whose notes come from `transport_id`."""
        incarnation = self._by_transport.get(transport_id)
        pal = self._pals.get(incarnation) if incarnation is not None else None
        return pal.peer if pal is not None else None

    def address_of(self, incarnation: Incarnation) -> str | None:
        """Control address of our rank's counterpart, also after it was dismissed."""
        return self._addresses.get(incarnation)

    # --- coming and going ---

    def introduce(self, message: wire.Introduce, now_s: float) -> None:
        self._own = message.incarnation
        card = message.card
        if card.incarnation in self._pals:
            if self._pals[card.incarnation].ready:
                self._tell_engine(message.engine_address, card.incarnation, "")
            return
        worker = card.workers[self._rank]
        departed = self._departed.pop(card.incarnation, None)
        try:
            self._let_go()
            transport_id = departed.transport_id if departed else self._transport.connect(worker.export)
        except TransportError as error:
            self._tell_engine(message.engine_address, card.incarnation, f"cannot connect to {worker.address}: {error}")
            return
        pal = _Pal(card, worker, Peer(card.incarnation, self._rank), transport_id, message.engine_address, now_s, now_s)
        self._pals[card.incarnation] = pal
        self._by_transport[transport_id] = card.incarnation
        self._addresses[card.incarnation] = worker.address
        while len(self._addresses) > 1024:
            self._addresses.pop(next(iter(self._addresses)))
        self._warm(pal)

    def _warm(self, pal: _Pal) -> None:
        """A write that nobody reads. The first of a pair wires it up: hundreds of ms that no request should pay."""
        remote = Extents.of((pal.worker.scratch_address, self._scratch.total_bytes), kind=MemoryKind.DRAM)
        note = wire.encode(wire.WarmNote(self._own))
        try:
            op = self._transport.write(pal.transport_id, self._scratch, remote, note)
        except TransportError as error:
            # A death is told by PeerLost with the next poll, anything else ends as silence.
            logger.debug("peer %r cannot be reached: %s", pal.card.name, error)
            return
        self._warm_ops[op] = pal.card.incarnation

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> bool:
        """True if the operation was ours (warming or probing)."""
        incarnation = self._warm_ops.pop(op, None)
        if incarnation is None:
            return False
        pal = self._pals.get(incarnation)
        if pal is None:
            return True
        if error is not None:
            logger.warning("peer %r: %s", pal.card.name, error)
            return True  # a PeerLost follows, or silence ends it
        pal.suspected = False
        if not pal.ready:
            pal.ready, pal.heard_s = True, now_s
            logger.info(
                "paired with %r rank %d in %.0f ms", pal.card.name, self._rank, (now_s - pal.introduced_s) * 1e3
            )
            self._tell_engine(pal.engine_address, incarnation, "")
        return True

    def dismiss(self, incarnation: Incarnation, dead: bool) -> None:
        pal = self._pals.pop(incarnation, None)
        if pal is not None:
            self._part(pal, dead)

    def transport_lost(self, transport_id: PeerId, reason: str) -> None:
        """The data plane has proved the peer dead."""
        incarnation = self._by_transport.pop(transport_id, None)
        self._leaving.discard(transport_id)
        if incarnation is None:
            return
        if incarnation in self._pals:
            self._lose(self._pals[incarnation], dead=True, reason=reason)
        elif incarnation in self._departed:
            pal = self._departed.pop(incarnation)
            logger.info("peer %r (incarnation %s) is proven dead: %s", pal.card.name, incarnation, reason)
            self._gone(pal.peer, True)

    def _lose(self, pal: _Pal, dead: bool, reason: str) -> None:
        logger.warning("peer %r (incarnation %s) is lost: %s", pal.card.name, pal.card.incarnation, reason)
        self._pals.pop(pal.card.incarnation, None)
        self._part(pal, dead)
        self._tell_engine(pal.engine_address, pal.card.incarnation, reason)

    def _part(self, pal: _Pal, dead: bool) -> None:
        """The pair is over: at once if the peer is dead, else it is probed on."""
        if dead:
            self._leave(pal)
        else:
            pal.ready, pal.suspected, pal.parted_s = False, False, pal.heard_s
            self._departed[pal.card.incarnation] = pal
        self._gone(pal.peer, dead)

    def _probe_departed(self, now_s: float) -> None:
        probing = set(self._warm_ops.values())
        for incarnation, pal in list(self._departed.items()):
            if now_s - pal.parted_s > DEPARTED_S:
                del self._departed[incarnation]
                self._leave(pal)
            elif incarnation not in probing and now_s - pal.probe_s >= DEPARTED_PROBE_S:
                pal.probe_s = now_s
                self._warm(pal)

    def _leave(self, pal: _Pal) -> None:
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
        pal = self._pals.get(beat.incarnation)
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
            if now_s - pal.heard_s > self._settings.lease_s:
                self._lose(pal, dead=False, reason=f"silent for {now_s - pal.heard_s:.1f} s")
            elif pal.suspected and now_s - pal.probe_s >= PROBE_EVERY_S:
                pal.probe_s = now_s
                self._warm(pal)
            if pal.card.incarnation in self._pals and now_s - pal.beat_s >= self._settings.beat_s:
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
