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
from lmkv.errors import LayoutError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.process import has_ended, may_share_host
from lmkv.transfer.events import Peer
from lmkv.transport import Extents, OpId, PeerId, Transport

from .departed import Departed, Fate
from .meeting import Meeting, meeting
from .pal import AGAIN_S, Engine, Loss, Pal
from .warming import Warming

logger = logging.getLogger(__name__)

PROBE_EVERY_S = 0.1


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
        self._warming = Warming(transport, scratch)
        self._settings = settings
        self._gone = gone
        self._own = Incarnation("")
        self.engine_address = ""
        """Our engine's, once it has written to us."""
        self._engines: dict[Incarnation, Engine] = {}
        self._pals: dict[Peer, Pal] = {}
        self._by_transport: dict[PeerId, Peer] = {}
        self._addresses: dict[Peer, str] = {}
        self._departed = Departed(settings.quarantine_s, holds)
        self._leaving: set[PeerId] = set()
        self._exports: dict[PeerId, bytes] = {}
        self._fenced: OrderedDict[Peer, int] = OrderedDict()
        """Our number of the newest pair in which the peer was fenced."""

    # --- questions ---

    @property
    def own_incarnation(self) -> Incarnation:
        return self._own

    @property
    def warming(self) -> bool:
        return not self._warming.serials.isdisjoint(pal.serial for pal in self._pals.values())

    def is_probe(self, op: OpId) -> bool:
        """The operation is ours (warming or probing)."""
        return self._warming.is_ours(op)

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

    def is_fenced(self, peer: Peer, pair: int) -> bool:
        """Nothing lands any more that it writes for a grant of `pair` (our number) or of an older one."""
        return self._fenced.get(peer, -1) >= pair

    def pair_of(self, incarnation: Incarnation) -> int | None:
        """The number that grants of this peer must carry; None when it is not (any more) a peer."""
        engine = self._engines.get(incarnation)
        return engine.pair if engine else None

    def is_confirmed(self, incarnation: Incarnation) -> bool:
        """Its ranks have confirmed our connections for the pair that we know: grants of that pair may be served."""
        engine = self._engines.get(incarnation)
        return engine is not None and all(self._pals[Peer(incarnation, r)].confirmed for r in engine.meeting.ranks)

    def overdue(self, now_s: float) -> list[Peer]:
        """Peers whose quarantine of our memory only a new data plane would end (see `Departed.overdue`)."""
        return self._departed.overdue(now_s)

    def ranks_of(self, incarnation: Incarnation) -> tuple[Peer, ...]:
        """Those of its ranks that we have been connected to, also after it was dismissed."""
        return tuple(peer for peer in self._addresses if peer.incarnation == incarnation)

    def tell(self, peer: Peer, message: wire.Control) -> None:
        """Send a rank a message, also after its engine was dismissed. One that was never connected hears nothing."""
        address = self._addresses.get(peer)
        if address is None:
            logger.warning("no address of peer %s for %s", peer, type(message).__name__)
        else:
            self._outbox.send(address, message)

    # --- coming and going ---

    def introduce(self, message: wire.Introduce, now_s: float) -> None:
        own, card = message.own, message.card
        self._own, self.engine_address = own.incarnation, own.address
        known = self._engines.get(card.incarnation)
        if known is not None and (known.card, known.pair, known.ours) == (card, message.pair, message.ours):
            self._tell_if_ready(card.incarnation)
            return
        if known is not None:
            self.dismiss(card.incarnation, dead=False)
        self._departed.note_successor(card, now_s)
        try:
            engine = Engine(message, meeting(own, card, self._rank), now_s)
            if self._is_over(engine):
                self.tell_engine(message, "the pair was lost while it was made")
                return
            pals = [self._connect(engine, rank, now_s) for rank in engine.meeting.ranks]
        except (TransportError, LayoutError) as error:
            self.tell_engine(message, f"cannot connect to {card.name!r}: {error}")
            return
        self._engines[card.incarnation] = engine
        for pal in pals:
            self._departed.take(pal.peer)
            self._pals[pal.peer], pal.probe_s = pal, now_s
            self._warming.start(pal, self._own)
            self._confirm(pal)
        self._tell_if_ready(card.incarnation)

    def _is_over(self, engine: Engine) -> bool:
        """A rank was fenced in this pair, which our engine did not know yet: what was granted in it may have been given
        to others, so nobody may hear that it goes on."""
        peers = (Peer(engine.card.incarnation, rank) for rank in engine.meeting.ranks)
        return any(self.is_fenced(peer, engine.ours) for peer in peers)

    def _connect(self, engine: Engine, rank: Rank, now_s: float) -> Pal:
        """Raises TransportError. What was connected before stays so, and is found again by the next introduction."""
        worker, peer = engine.card.workers[rank], Peer(engine.card.incarnation, rank)
        self._warming.remote(worker)  # what cannot be warmed is refused before it is connected
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
        return Pal(engine, worker, peer, transport_id, self._warming.serial(), now_s)

    def _tell_if_ready(self, incarnation: Incarnation) -> None:
        engine = self._engines[incarnation]
        if all(self._pals[Peer(incarnation, rank)].ready for rank in engine.meeting.ranks):
            self.tell_engine(engine.introduction, "")

    def warm_note_came(self, transport_id: PeerId, note: wire.WarmNote) -> None:
        """A peer has connected to us, and asks for a confirmation. It may come before we are introduced."""
        self._warming.note_came(transport_id, note.serial)
        peer = self.peer_of(transport_id)
        if peer is not None:
            self._confirm(self._pals[peer])

    def _confirm(self, pal: Pal) -> None:
        serial = self._warming.asked(pal.transport_id)
        if serial is not None:
            told = wire.Warmed(self._own, self._rank, serial, pal.engine.ours)
            self._outbox.send(pal.worker.address, told)

    def confirmed(self, message: wire.Warmed) -> bool:
        """A rank confirms a connection of ours. True: it was the last one of its engine."""
        peer = Peer(message.incarnation, message.rank)
        pal = self._pals.get(peer)
        if pal is None or pal.confirmed or (message.serial, message.pair) != (pal.serial, pal.engine.pair):
            return False
        pal.confirmed = True
        return self.is_confirmed(peer.incarnation)

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> bool:
        """True if the operation was ours (warming or probing)."""
        ended = self._warming.ended(op)
        if ended is None:
            return False
        peer, serial = ended
        pal = self._pals.get(peer)
        if pal is None or pal.serial != serial:
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
        if dead:
            self._departed.claim(incarnation)

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
        self._warming.forget(transport_id)
        if peer is None:
            return
        loss = Loss.FENCED if self._transport.capabilities.loss_is_fence else Loss.SILENT
        pal = self._pals.get(peer)
        if pal is not None and pal.transport_id == transport_id:
            self._lose(pal, loss, reason)
        elif loss is Loss.FENCED and (departed := self._departed.take_fenced(peer, transport_id)) is not None:
            logger.info("peer %s (incarnation %s) is fenced: %s", departed.name, peer.incarnation, reason)
            self._end(departed, loss)

    def _lose(self, pal: Pal, loss: Loss, reason: str) -> None:
        """The rank is lost, and the engine with it: its other ranks are parted from without proof."""
        engine, incarnation = pal.engine, pal.peer.incarnation
        logger.warning("peer %s (incarnation %s) is lost: %s", pal.name, incarnation, reason)
        del self._engines[incarnation]
        for rank in engine.meeting.ranks:
            other = self._pals.pop(Peer(incarnation, rank))
            self._part(other, loss if other is pal else Loss.SILENT)
        self.tell_engine(engine.introduction, reason)

    def _part(self, pal: Pal, loss: Loss) -> None:
        """The pair is over. Without proof the peer is watched on."""
        if loss is Loss.SILENT:
            self._departed.add(pal, pal.heard_s)
        else:
            self._leave(pal)
        self._end(pal, loss)

    def _end(self, pal: Pal, loss: Loss) -> None:
        peer = pal.peer
        if loss is Loss.FENCED:
            self._fenced[peer] = max(self._fenced.get(peer, -1), pal.engine.ours)
            self._fenced.move_to_end(peer)
            while len(self._fenced) > 1024:
                self._fenced.popitem(last=False)
        self._gone(peer, loss)

    def replaced(self, export: bytes) -> None:
        """Our data plane was made anew: nothing of the old connections lands any more. All peers have to come again:
        our engine is told what they are to connect to.

        A process of this host may copy into our memory without any connection (CMA, CUDA IPC): what such a peer holds
        stays in quarantine until it answers or its process has ended.
        """
        self._by_transport.clear()
        self._exports.clear()
        self._leaving.clear()
        self._warming.clear()
        lost = [*self._departed, *self._pals.values()]
        self._engines.clear()
        self._pals.clear()
        self._departed.clear()
        for pal in lost:
            near = may_share_host(pal.worker.process)
            logger.warning("peer %s is %s by the new data plane", pal.name, "not fenced" if near else "fenced")
            if near:
                self._departed.add(pal, pal.parted_s or pal.heard_s)
            self._end(pal, Loss.SILENT if near else Loss.FENCED)
        if self.engine_address:
            self._outbox.send(self.engine_address, wire.Replaced(self._rank, export))

    def _watch_departed(self, now_s: float) -> None:
        probing = self._warming.serials
        for pal, fate in self._departed.watch(now_s):
            match fate:
                case Fate.DEAD:
                    self._leave(pal)
                    self._end(pal, Loss.DEAD)
                case Fate.FORGOTTEN:
                    self._leave(pal)
                case Fate.PROBED if pal.transport_id in self._by_transport and pal.serial not in probing:
                    pal.probe_s = now_s
                    self._warming.start(pal, self._own)

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

    def tell_engine(self, introduction: wire.Introduce, error: str) -> None:
        """Tell our engine how an introduction goes, or how it has ended. `error` is empty on success."""
        pair, ours = introduction.pair, introduction.ours
        told = wire.Introduced(self._rank, introduction.card.incarnation, error, pair, ours)
        self._outbox.send(introduction.own.address, told)

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
                    self._warming.start(pal, self._own)
            elif not pal.confirmed and now_s - pal.probe_s >= AGAIN_S and pal.serial not in self._warming.serials:
                pal.probe_s = now_s
                self._warming.start(pal, self._own)
            if pal.peer in self._pals and now_s - pal.beat_s >= self._settings.beat_s:
                pal.beat_s = now_s
                held_s = now_s - pal.echo_heard_s if pal.echo_s else 0.0
                self._outbox.send(pal.worker.address, wire.Beat(self._own, self._rank, now_s, pal.echo_s, held_s))

    def next_s(self, now_s: float) -> float:
        """Seconds until `tick` has something to do."""
        pals, beat_s = self._pals.values(), self._settings.beat_s
        due = [PROBE_EVERY_S if pal.suspected else max(0.0, pal.beat_s + beat_s - now_s) for pal in pals]
        return min([self._departed.next_s(), *due])
