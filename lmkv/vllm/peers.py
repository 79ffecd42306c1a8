"""A worker's peers: connecting, warming, heartbeats, and the two ways of losing one.

Used by the worker loop's thread alone. A peer is *silent* when its Beats stay away for a lease or our connection to it
is lost: it may be alive and still write. It is *fenced* when a data plane that closes both directions has lost it:
nothing it had posted lands any more, and it may come back. It is *dead* only by proof: its process has ended (looked up
on the same host), or another process has taken its control address there; then what it had sent gets time to drain.
Proof or the peer's own answer ends the quarantine of its blocks, never a timer; until then the peer is watched.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.errors import ConnectError, LayoutError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.process import DRAIN_S, drain_s, has_ended, has_followed, may_share_host
from lmkv.transfer.events import Peer
from lmkv.transport import Extents, MemoryKind, OpId, PeerId, Transport

from .meeting import Meeting, meeting
from .pal import Engine, Loss, Pal

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 0.1
AGAIN_S = 1.0
DEPARTED_S = 600.0
"""A peer lost without proof that holds nothing of ours is kept connected for so long."""


class Peers:
    """`gone(peer, loss)` is called for each rank lost, and again when a silent one is fenced or proven dead.

    `scratch` are our registered throw-away bytes; `holds(peer)`: something of ours may still be written by it. An
    engine is lost as a whole: with the first of its ranks that is silent or dead.
    """

    def __init__(
        self,
        transport: Transport,
        outbox: Outbox,
        rank: Rank,
        scratch: Extents,
        settings: ConnectorSettings,
        gone: Callable[[Peer, Loss], None],
        holds: Callable[[Peer], bool] = lambda peer: True,
    ) -> None:
        self._transport = transport
        self._outbox = outbox
        self._rank = rank
        self._scratch = scratch
        self._settings = settings
        self._gone = gone
        self._holds = holds
        self._own = Incarnation("")
        self._engines: dict[Incarnation, Engine] = {}
        self._pals: dict[Peer, Pal] = {}
        self._by_transport: dict[PeerId, Peer] = {}
        self._warm_ops: dict[OpId, Peer] = {}
        self._addresses: dict[Peer, str] = {}
        self._departed: dict[Peer, Pal] = {}
        self._leaving: set[PeerId] = set()
        self._exports: dict[PeerId, bytes] = {}
        self._fenced: OrderedDict[Peer, None] = OrderedDict()

    # --- questions ---

    @property
    def own_incarnation(self) -> Incarnation:
        return self._own

    @property
    def warming(self) -> bool:
        return any(peer in self._pals for peer in self._warm_ops.values())

    def is_probe(self, op: OpId) -> bool:
        """The operation is ours (warming or probing)."""
        return op in self._warm_ops

    def find(self, peer: Peer) -> Pal | None:
        return self._pals.get(peer)

    def met(self, incarnation: Incarnation) -> tuple[wire.EngineCard, Meeting] | None:
        """The engine's card, and what our rank has to do with its ranks; None when it is not (any more) a peer."""
        engine = self._engines.get(incarnation)
        return (engine.card, engine.meeting) if engine else None

    def peer_of(self, transport_id: PeerId) -> Peer | None:
        """Whose notes come from `transport_id`."""
        peer = self._by_transport.get(transport_id)
        pal = self._pals.get(peer) if peer is not None else None
        return peer if pal is not None and pal.transport_id == transport_id else None

    def is_fenced(self, peer: Peer) -> bool:
        """It is lost, and nothing that it had posted lands any more."""
        return peer in self._fenced

    def pair_of(self, incarnation: Incarnation) -> int | None:
        """The number that grants of this peer must carry; None when it is not (any more) a peer."""
        engine = self._engines.get(incarnation)
        return engine.pair if engine else None

    def overdue(self, now_s: float) -> list[Peer]:
        """Lost without proof for longer than `quarantine_s`, with blocks or slots of ours in quarantine: a new data
        plane would free them. A process of this host is not among them (see `replaced`)."""
        limit_s = self._settings.quarantine_s
        lost = [pal for pal in self._departed.values() if now_s - pal.parted_s > limit_s and self._holds(pal.peer)]
        return [pal.peer for pal in lost if not may_share_host(pal.worker.process)]

    def address_of(self, peer: Peer) -> str | None:
        """Control address of that rank, also after its engine was dismissed."""
        return self._addresses.get(peer)

    def ranks_of(self, incarnation: Incarnation) -> tuple[Peer, ...]:
        """Those of its ranks that we have been connected to, also after it was dismissed."""
        return tuple(peer for peer in self._addresses if peer.incarnation == incarnation)

    # --- coming and going ---

    def introduce(self, message: wire.Introduce, now_s: float) -> None:
        own, card = message.own, message.card
        self._own = own.incarnation
        known = self._engines.get(card.incarnation)
        if known is not None and (known.card, known.pair) == (card, message.pair):
            self._tell_if_ready(card.incarnation)
            return
        if known is not None:
            self.dismiss(card.incarnation, dead=False)
        self._note_successor(card, now_s)
        try:
            engine = Engine(card, meeting(own, card, self._rank), own.address, now_s, message.pair)
            pals = [self._connect(engine, rank, now_s) for rank in engine.meeting.ranks]
        except (TransportError, LayoutError) as error:
            self._tell_engine(own.address, card.incarnation, f"cannot connect to {card.name!r}: {error}")
            return
        self._engines[card.incarnation] = engine
        for pal in pals:
            self._pals[pal.peer], pal.probe_s = pal, now_s
            self._warm(pal)
        self._tell_if_ready(card.incarnation)

    def _connect(self, engine: Engine, rank: Rank, now_s: float) -> Pal:
        """Raises TransportError. What was connected before stays so, and is found again by the next introduction."""
        worker, peer = engine.card.workers[rank], Peer(engine.card.incarnation, rank)
        self._scratch_of(worker)  # what cannot be warmed is refused before it is connected
        self._departed.pop(peer, None)
        self._fenced.pop(peer, None)
        self._let_go()
        old = [t for t, p in self._by_transport.items() if p == peer]
        transport_id = next((t for t in old if self._exports.get(t) == worker.export), None)
        if transport_id is None:
            transport_id = self._transport.connect(worker.export)
            self._leaving.update(old)
        self._leaving.discard(transport_id)
        self._by_transport[transport_id], self._exports[transport_id] = peer, worker.export
        self._addresses.pop(peer, None)  # the oldest go first
        self._addresses[peer] = worker.address
        while len(self._addresses) > 1024:
            self._addresses.pop(next(iter(self._addresses)))
        return Pal(engine, worker, peer, transport_id, now_s)

    def _scratch_of(self, worker: wire.WorkerCard) -> Extents:
        """Where it is warmed and probed: as many bytes as our own scratch has. Raises ConnectError."""
        if worker.scratch_kind not in list(MemoryKind):
            raise ConnectError(f"its scratch lies in {worker.scratch_kind!r}", hint=f"known: {', '.join(MemoryKind)}")
        if not (0 <= worker.scratch_address < 1 << 63 and 0 <= worker.scratch_device < 1 << 31):
            raise ConnectError(f"its scratch is at {worker.scratch_address} on device {worker.scratch_device}")
        row = (worker.scratch_address, self._scratch.total_bytes)
        return Extents.of(row, device=worker.scratch_device, kind=MemoryKind(worker.scratch_kind))

    def _tell_if_ready(self, incarnation: Incarnation) -> None:
        engine = self._engines[incarnation]
        if all(self._pals[Peer(incarnation, rank)].ready for rank in engine.meeting.ranks):
            self._tell_engine(engine.address, incarnation, "")

    def _warm(self, pal: Pal) -> None:
        """A write that nobody reads. The first of a pair wires it up: hundreds of ms that no request should pay."""
        remote = self._scratch_of(pal.worker)
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
            return True  # a PeerLost follows, or silence ends it, or it is tried again
        pal.suspected = False
        if not pal.ready:
            pal.ready, pal.heard_s = True, now_s
            logger.info(
                "rank %d paired with %s in %.0f ms", self._rank, pal.name, (now_s - pal.engine.introduced_s) * 1e3
            )
            self._tell_if_ready(peer.incarnation)
        return True

    def dismiss(self, incarnation: Incarnation, dead: bool) -> None:
        """`dead`: the control plane's word that its processes have ended, also if it was lost before."""
        engine = self._engines.pop(incarnation, None)
        for rank in engine.meeting.ranks if engine else ():
            self._part(self._pals.pop(Peer(incarnation, rank)), Loss.SILENT)
        for peer, pal in self._departed.items():
            pal.claimed |= dead and peer.incarnation == incarnation

    def part(self, incarnation: Incarnation, reason: str) -> None:
        """A peer that makes trouble is parted from, without proof of its death; our engine is told."""
        pal = next((pal for peer, pal in self._pals.items() if peer.incarnation == incarnation), None)
        if pal is not None:
            self._lose(pal, Loss.SILENT, reason)

    def transport_lost(self, transport_id: PeerId, reason: str) -> None:
        """Our connection to the peer has ended. That is no proof of a death."""
        peer = self._by_transport.pop(transport_id, None)
        self._leaving.discard(transport_id)
        self._exports.pop(transport_id, None)
        if peer is None:
            return
        loss = Loss.FENCED if self._transport.capabilities.loss_is_fence else Loss.SILENT
        pal = self._pals.get(peer)
        if pal is not None and pal.transport_id == transport_id:
            self._lose(pal, loss, reason)
        elif loss is Loss.FENCED and peer in self._departed:
            logger.info("peer %s (incarnation %s) is fenced: %s", self._departed[peer].name, peer.incarnation, reason)
            del self._departed[peer]
            self._end(peer, loss)

    def _lose(self, pal: Pal, loss: Loss, reason: str) -> None:
        """The rank is lost, and the engine with it: its other ranks are parted from without proof."""
        engine, incarnation = pal.engine, pal.peer.incarnation
        logger.warning("peer %s (incarnation %s) is lost: %s", pal.name, incarnation, reason)
        del self._engines[incarnation]
        for rank in engine.meeting.ranks:
            other = self._pals.pop(Peer(incarnation, rank))
            self._part(other, loss if other is pal else Loss.SILENT)
        self._tell_engine(engine.address, incarnation, reason)

    def _part(self, pal: Pal, loss: Loss) -> None:
        """The pair is over. Without proof the peer is watched on."""
        if loss is Loss.SILENT:
            pal.ready, pal.suspected, pal.parted_s = False, False, pal.heard_s
            self._departed[pal.peer] = pal
        else:
            self._leave(pal)
        self._end(pal.peer, loss)

    def _end(self, peer: Peer, loss: Loss) -> None:
        if loss is Loss.FENCED:
            self._fenced[peer] = None
            while len(self._fenced) > 1024:
                self._fenced.popitem(last=False)
        self._gone(peer, loss)

    def replaced(self, export: bytes) -> None:
        """Our data plane was made anew: nothing of the old connections lands any more. All peers have to come again.

        A process of this host may copy into our memory without any connection (CMA, CUDA IPC): what such a peer holds
        stays in quarantine until it answers or its process has ended.
        """
        self._by_transport.clear()
        self._exports.clear()
        self._leaving.clear()
        self._warm_ops.clear()
        lost = {**self._departed, **self._pals}
        address = next((pal.engine.address for pal in lost.values()), "")
        self._engines.clear()
        self._pals.clear()
        self._departed.clear()
        for peer, pal in lost.items():
            near = may_share_host(pal.worker.process)
            logger.warning("peer %s is %s by the new data plane", pal.name, "not fenced" if near else "fenced")
            if near:
                self._departed[peer] = pal
                pal.ready, pal.suspected, pal.parted_s = False, False, pal.parted_s or pal.heard_s
            self._end(peer, Loss.SILENT if near else Loss.FENCED)
        if address:
            self._outbox.send(address, wire.Replaced(self._rank, export))

    # --- proofs of death ---

    def _note_successor(self, card: wire.EngineCard, now_s: float) -> None:
        """On the same host another process listens where a departed rank did: that one's sockets are closed."""
        for pal in self._departed.values():
            old = pal.worker.process
            if pal.engine.card.address != card.address or pal.peer.incarnation == card.incarnation or not old.host:
                continue
            for worker in card.workers:
                if pal.worker.address == worker.address and has_followed(worker.process, old):
                    self._note_end(pal, now_s, "another process has its address")

    def _note_end(self, pal: Pal, now_s: float, how: str) -> None:
        """Its process has ended; `gone` is told when nothing of it is on its way any more."""
        if not pal.ended_s:
            pal.ended_s, pal.drain_s = now_s, drain_s(pal.worker.process)
            logger.info("peer %s (incarnation %s) has ended: %s", pal.name, pal.peer.incarnation, how)

    def _watch_departed(self, now_s: float) -> None:
        probing = set(self._warm_ops.values())
        for peer, pal in list(self._departed.items()):
            if not pal.ended_s and now_s - pal.looked_s >= AGAIN_S:
                pal.looked_s = now_s
                if pal.claimed or has_ended(pal.worker.process):
                    self._note_end(pal, now_s, "the control plane says so" if pal.claimed else "seen on this host")
            if pal.ended_s:
                if now_s - pal.ended_s >= pal.drain_s:
                    del self._departed[peer]
                    self._leave(pal)
                    self._end(peer, Loss.DEAD)
            elif now_s - pal.parted_s > DEPARTED_S and not self._holds(peer):
                del self._departed[peer]
                self._leave(pal)
            elif pal.transport_id in self._by_transport and peer not in probing and now_s - pal.probe_s >= AGAIN_S:
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
            self._exports.pop(transport_id, None)

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
        self._watch_departed(now_s)
        for pal in list(self._pals.values()):
            if pal.peer not in self._pals:
                continue  # lost with another rank of its engine
            if now_s - pal.heard_s > self._settings.lease_s:
                self._lose(pal, Loss.SILENT, f"silent for {now_s - pal.heard_s:.1f} s")
            elif pal.suspected and now_s - pal.probe_s >= PROBE_EVERY_S:
                pal.probe_s = now_s
                if has_ended(pal.worker.process):
                    self._lose(pal, Loss.SILENT, "its process has ended")
                else:
                    self._warm(pal)
            elif not pal.ready and now_s - pal.probe_s >= AGAIN_S and pal.peer not in self._warm_ops.values():
                pal.probe_s = now_s
                self._warm(pal)
            if pal.peer in self._pals and now_s - pal.beat_s >= self._settings.beat_s:
                pal.beat_s = now_s
                held_s = now_s - pal.echo_heard_s if pal.echo_s else 0.0
                self._outbox.send(pal.worker.address, wire.Beat(self._own, self._rank, now_s, pal.echo_s, held_s))

    def next_s(self, now_s: float) -> float:
        """Seconds until `tick` has something to do."""
        ending = any(pal.ended_s for pal in self._departed.values())
        departed_s = DRAIN_S / 4 if ending else AGAIN_S if self._departed else 3600.0
        pals, beat_s = self._pals.values(), self._settings.beat_s
        due = [PROBE_EVERY_S if pal.suspected else max(0.0, pal.beat_s + beat_s - now_s) for pal in pals]
        return min([departed_s, *due])
