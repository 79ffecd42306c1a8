"""The loop's decode part: verifies what has landed, feeds the Receiver and performs its actions. Loop thread only."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.errors import TransferError
from lmkv.ids import Rank, RequestId, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.incoming import ReceiverLimits
from lmkv.transfer.plan import runs_for
from lmkv.transfer.receiver import Receiver

from . import dump, memory
from .landing import LandingSlots
from .peers import Peers
from .specs import ExpectSpec, RankReport
from .trace import ReceiveTrace, facts

logger = logging.getLogger(__name__)

_EARLY_TRANSFERS = 256
_EARLY_NOTES = 4096
_REMEMBERED = 4096


class Receiving:
    """Notes that come before their Expect wait here, since only the block ids tell what to verify."""

    def __init__(
        self,
        settings: ConnectorSettings,
        rank: Rank,
        found: memory.KvMemory,
        peers: Peers,
        outbox: Outbox,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._rank = rank
        self._found = found
        self._map = found.map()
        self._layers = self._map.layers()
        self._sizes = self._map.layer_block_bytes()
        self._peers = peers
        self._outbox = outbox
        self._machine = Receiver(ReceiverLimits(deadline_s=settings.deadline_s, lease_s=settings.lease_s))
        self._landing = LandingSlots(rank, found, peers, outbox, settings.convert_dtype)
        self._landed: set[TransferId] = set()
        """Failed in landing mode and not drained: the engine does not wait for that."""
        self._specs: dict[TransferId, ExpectSpec] = {}
        self._traces: dict[TransferId, ReceiveTrace] = {}
        self._early: OrderedDict[TransferId, list[tuple[ev.Peer, wire.WriteNote | wire.SealNote]]] = OrderedDict()
        self._over: OrderedDict[TransferId, None] = OrderedDict()
        self._reports: list[RankReport] = []
        self._ledgers: list[dict[str, Any]] = []

    # --- what comes in ---

    def expected(self, expects: tuple[ExpectSpec, ...], now_s: float) -> None:
        for spec in expects:
            self._specs[spec.transfer_id] = spec
            self._traces[spec.transfer_id] = ReceiveTrace(spec.transfer_id, self._rank, expected_s=now_s)
            event, known = self._expectation(spec)
            self.handle(event, now_s)
            for peer in event.writers:
                if not spec.incarnation:  # the pair was lost before the grant was sent: nothing can land
                    self.handle(ev.PeerGone(peer, dead=True), now_s)
                elif not known:
                    self.handle(ev.PeerGone(peer, dead=False), now_s)
            for sender, note in self._early.pop(spec.transfer_id, []):
                self.note_came(sender, note, now_s)

    def _expectation(self, spec: ExpectSpec) -> tuple[ev.Expect, bool]:
        """What the machine is to expect, and whether its writers are peers (still)."""
        writers = self._landing.writers(spec) if spec.landing else None
        if writers is not None:
            self._landing.open(spec)
            ranges = [(group, lo, hi) for group, (lo, hi) in enumerate(spec.landing) if hi > lo]
            rects = tuple(ev.Rect(group, 0, self._layers[group], lo, hi) for group, lo, hi in ranges)
            payload_bytes = self._landing.payload_bytes(spec, self._layers)
            expect = ev.Expect(spec.transfer_id, spec.request_id, spec.epoch, writers, rects, payload_bytes)
            return expect, True
        peer = ev.Peer(spec.incarnation, self._rank)
        rects = tuple(ev.Rect(r.group, 0, self._layers[r.group], r.lo, r.hi) for r in spec.blocks if r.ids)
        payload_bytes = sum(self._sizes[r.group] * (r.block_hi - r.block_lo) * r.layer_hi for r in rects)
        known = not spec.landing and self._peers.find(peer) is not None
        return ev.Expect(spec.transfer_id, spec.request_id, spec.epoch, (peer,), rects, payload_bytes), known

    def abandoned(self, tids: tuple[TransferId, ...], now_s: float) -> None:
        for tid in tids:
            self.handle(ev.Abandon(tid), now_s)

    def fail(self, tid: TransferId, request_id: RequestId | None, reason: str) -> None:
        """The transfer is reported as failed, whatever the machine knows of it (`request_id` None: of that request, if
        it is known). Its blocks stay in quarantine, unless the machine tells that nothing lands in them any more."""
        spec = self._specs.pop(tid, None)
        request_id = spec.request_id if spec is not None else request_id
        if tid in self._over or request_id is None:
            return
        self._traces.pop(tid, None)
        self._over[tid] = None
        self._reports.append(RankReport(tid, request_id, ev.ReceiveOutcome.FAILED.value, False, reason))

    def note_came(self, peer: ev.Peer, note: wire.WriteNote | wire.SealNote, now_s: float) -> None:
        tid = note.transfer_id
        if tid not in self._specs and tid not in self._over:
            self._hold_early(peer, note)
            return
        trace = self._traces.get(tid)
        if isinstance(note, wire.SealNote):
            if trace is not None:
                trace.sealed_s = now_s
            self.handle(ev.Sealed(peer, tid, note.epoch, note.writes, note.payload_bytes), now_s)
            return
        if trace is not None:
            trace.first_landed_s = trace.first_landed_s or now_s
            trace.last_landed_s = now_s
            trace.writes += 1
            trace.bytes += note.payload_bytes
        rect = ev.Rect(note.group, note.layer_lo, note.layer_hi, note.block_lo, note.block_hi)
        valid = self._taken_out(peer, note, rect) if note.slot >= 0 else self._verify(note, rect)
        self.handle(ev.Landed(peer, tid, note.epoch, note.seq, rect, note.payload_bytes, valid), now_s)

    def _taken_out(self, peer: ev.Peer, note: wire.WriteNote, rect: ev.Rect) -> bool:
        """Landing mode: checked and converted into our blocks, as long as they are wanted."""
        spec = self._specs.get(note.transfer_id)
        if spec is None or note.epoch != spec.epoch or peer not in self._machine.awaited(note.transfer_id, note.epoch):
            return True  # late or strange: the machine counts it, and the slot comes back with the transfer's end
        trace, start_s = self._traces[note.transfer_id], self._clock()
        if not self._landing.is_right(peer, note, rect):
            logger.error("what landed of %s %s from rank %d is wrong", note.transfer_id, rect, note.rank)
            return False
        checked_s = self._clock()
        trace.checksum_s += checked_s - start_s
        error = self._landing.take_out(peer, note, rect)
        trace.convert_s += self._clock() - checked_s
        if error:
            logger.error("%s of %s cannot be converted: %s", rect, note.transfer_id, error)
        return not error

    def _hold_early(self, peer: ev.Peer, note: wire.WriteNote | wire.SealNote) -> None:
        notes = self._early.setdefault(note.transfer_id, [])
        if len(notes) < _EARLY_NOTES:
            notes.append((peer, note))
        while len(self._early) > _EARLY_TRANSFERS:
            tid, _ = self._early.popitem(last=False)
            logger.warning("early notes of %s dropped: too many transfers that nobody expects", tid)

    def _verify(self, note: wire.WriteNote, rect: ev.Rect) -> bool:
        """The checksum is right, or there is none to compare, or the machine will refuse the note anyway."""
        spec = self._specs.get(note.transfer_id)
        if spec is None or not note.checksum or not self._settings.checksum or note.epoch != spec.epoch:
            return True
        blocks = spec.blocks[rect.group] if 0 <= rect.group < len(spec.blocks) else None
        if blocks is None or rect.block_lo < blocks.lo or rect.block_hi > blocks.hi:
            return True
        ids = blocks.ids[rect.block_lo - blocks.lo : rect.block_hi - blocks.lo]
        start_s = self._clock()
        try:
            right = memory.checksum(runs_for(self._map, rect, ids)) == note.checksum
        except TransferError as error:
            logger.warning("note of %s: %s", note.transfer_id, error)
            return True
        self._traces[note.transfer_id].checksum_s += self._clock() - start_s
        if not right:
            logger.error("checksum of %s %s from rank %d is wrong", note.transfer_id, rect, note.rank)
        return right

    def answer_came(self, message: wire.Cancelled | wire.Failed, now_s: float) -> None:
        peer = ev.Peer(message.incarnation, message.rank)
        if isinstance(message, wire.Cancelled):
            self.handle(ev.CancelledCame(peer, message.transfer_id, message.epoch), now_s)
        else:
            self.handle(ev.FailedCame(peer, message.transfer_id, message.epoch, message.reason), now_s)

    # --- the machine ---

    def handle(self, event: ev.ReceiverEvent, now_s: float) -> None:
        for action in self._machine.handle(event, now_s):
            match action:
                case ev.SendCancel(peer, tid, epoch):
                    address = self._peers.address_of(peer)
                    if address is not None:
                        self._outbox.send(address, wire.Cancel(self._peers.own_incarnation, self._rank, tid, epoch))
                case ev.Report():
                    self._report(action, now_s)
                case ev.Drained(tid, request_id):
                    self._landing.close(tid)
                    if tid not in self._landed:
                        self._reports.append(RankReport(tid, request_id, "drained", True, ""))
                    self._landed.discard(tid)

    def tick(self, now_s: float) -> None:
        deadline_s = self._machine.next_deadline_s()
        if deadline_s is not None and deadline_s <= now_s:
            self.handle(ev.Tick(), now_s)

    def deadline_s(self) -> float | None:
        return self._machine.next_deadline_s()

    @property
    def active(self) -> bool:
        return bool(self._specs)

    def take(self) -> tuple[list[RankReport], list[dict[str, Any]]]:
        reports, ledgers = self._reports, self._ledgers
        self._reports, self._ledgers = [], []
        return reports, ledgers

    def _report(self, action: ev.Report, now_s: float) -> None:
        tid = action.transfer_id
        if tid not in self._specs:
            return  # `fail` has reported it
        spec, trace = self._specs.pop(tid), self._traces.pop(tid)
        self._over[tid] = None
        while len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        trace.reported_s, trace.outcome, trace.reason = now_s, action.outcome.value, action.reason
        writers = self._landing.writers(spec) if spec.landing else (ev.Peer(spec.incarnation, self._rank),)
        pal = self._peers.find(writers[0]) if writers else None
        if pal is not None:
            trace.clock_offset_s = pal.clock_offset_s
        if action.outcome is not ev.ReceiveOutcome.LOADED:
            logger.info("transfer %s ended as %s: %s", tid, action.outcome.value, action.reason)
        elif self._settings.debug_dump_dir:
            self._dump(spec)
        drained = action.drained
        if drained:
            self._landing.close(tid)
        elif spec.landing:
            # Only slots are written to, and they stay lent until Drained; the blocks are the engine's at once.
            self._landing.failed(tid)
            self._landed.add(tid)
            drained = True
        self._reports.append(RankReport(tid, action.request_id, action.outcome.value, drained, action.reason))
        self._ledgers.append(facts(trace))
        logger.debug("received: %s", self._ledgers[-1])

    def _dump(self, spec: ExpectSpec) -> None:
        for blocks in spec.blocks:
            path = Path(self._settings.debug_dump_dir, f"{spec.transfer_id}-decode-{self._rank}-{blocks.group}.kv")
            if spec.landing:
                first_token = blocks.lo * self._found.block_tokens[blocks.group]
                tokens = (max(first_token, spec.tokens[0]), spec.tokens[1])
                dump.dump_page(path, self._found, blocks.group, blocks.ids, tokens, first_token)
            else:
                rect = ev.Rect(blocks.group, 0, self._layers[blocks.group], blocks.lo, blocks.hi)
                dump.dump_runs(path, runs_for(self._map, rect, blocks.ids))
