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
from lmkv.errors import TransferError
from lmkv.ids import Epoch, Rank, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.incoming import ReceiverLimits
from lmkv.transfer.plan import runs_for
from lmkv.transfer.receiver import Receiver

from . import dump, memory
from .checking import Verifier, demanded_ppm
from .checksums import Checksums
from .landing import LandingSlots
from .peers import Peers
from .specs import ExpectSpec, RankReport
from .trace import ReceiveTrace, facts

logger = logging.getLogger(__name__)

_EARLY_TRANSFERS = 256
_EARLY_NOTES = 4096
_REMEMBERED = 4096

_Key = tuple[TransferId, Epoch]
"""One grant: decode never uses an epoch again, so a transfer id that is used twice makes two grants."""


class Receiving:
    """Notes that come before their Expect wait here, since only the block ids tell what to verify."""

    def __init__(
        self,
        settings: ConnectorSettings,
        rank: Rank,
        found: memory.KvMemory,
        peers: Peers,
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
        self._machine = Receiver(ReceiverLimits(deadline_s=settings.deadline_s, lease_s=settings.lease_s))
        self._verifier = Verifier(demanded_ppm(settings, found), Checksums(found))
        self._landing = LandingSlots(rank, found, peers, settings.convert_dtype, self._verifier)
        self._landed: dict[_Key, int] = {}
        """Failed in landing mode and not drained: the engine does not wait for that. How many slots each holds."""
        self._specs: dict[_Key, ExpectSpec] = {}
        self._traces: dict[_Key, ReceiveTrace] = {}
        self._early: OrderedDict[_Key, list[tuple[ev.Peer, wire.WriteNote | wire.SealNote]]] = OrderedDict()
        self._over: OrderedDict[_Key, None] = OrderedDict()
        self._reports: list[RankReport] = []
        self._ledgers: list[dict[str, Any]] = []

    # --- what comes in ---

    def expected(self, expects: tuple[ExpectSpec, ...], now_s: float) -> None:
        for spec in expects:
            key = (spec.transfer_id, spec.epoch)
            self._specs[key] = spec
            self._traces[key] = ReceiveTrace(spec.transfer_id, self._rank, expected_s=now_s)
            event, known = self._expectation(spec)
            self.handle(event, now_s)
            for peer in event.writers:
                if not spec.incarnation:  # the pair was lost before the grant was sent: nothing can land
                    self.handle(ev.PeerGone(peer, dead=False, fenced=True), now_s)
                elif not known or self._peers.find(peer) is None:
                    fenced = self._peers.is_fenced(peer, spec.pair)
                    self.handle(ev.PeerGone(peer, dead=False, fenced=fenced), now_s)
                elif self._peers.is_fenced(peer, spec.pair):  # and has come back: only this grant is over
                    self.handle(ev.FailedCame(peer, spec.transfer_id, spec.epoch, "the pair was lost"), now_s)
            for sender, note in self._early.pop(key, []):
                self.note_came(sender, note, now_s)

    def _expectation(self, spec: ExpectSpec) -> tuple[ev.Expect, bool]:
        """What the machine is to expect, and whether its writers are peers (still). In landing mode nothing lands for
        those that are not, but they may have the grant, and have to be told that no slot will come."""
        writers = self._landing.writers(spec) if spec.landing else None
        if writers is not None:
            self._landing.open(spec)
            ranges = [(group, lo, hi) for group, (lo, hi) in enumerate(spec.landing) if hi > lo]
            rects = tuple(ev.Rect(group, 0, self._layers[group], lo, hi) for group, lo, hi in ranges)
            payload_bytes = self._landing.payload_bytes(spec, self._layers)
            expect = ev.Expect(spec.transfer_id, spec.request_id, spec.epoch, writers, rects, payload_bytes)
            return expect, True
        peers = self._peers.ranks_of(spec.incarnation) if spec.landing else (ev.Peer(spec.incarnation, self._rank),)
        rects = tuple(ev.Rect(r.group, 0, self._layers[r.group], r.lo, r.hi) for r in spec.blocks if r.ids)
        payload_bytes = sum(self._sizes[r.group] * (r.block_hi - r.block_lo) * r.layer_hi for r in rects)
        known = not spec.landing and self._peers.find(peers[0]) is not None
        return ev.Expect(spec.transfer_id, spec.request_id, spec.epoch, peers, rects, payload_bytes), known

    def abandoned(self, tids: tuple[TransferId, ...], now_s: float) -> None:
        for tid in tids:
            self.handle(ev.Abandon(tid), now_s)

    def fail(self, tid: TransferId, expect: ExpectSpec | None, reason: str) -> None:
        """The transfer is reported as failed, whatever the machine knows of it. `expect`: the grant to be reported if
        it has not got so far. Its blocks stay in quarantine, unless the machine tells that nothing lands in them any
        more."""
        specs = [spec for key, spec in self._specs.items() if key[0] == tid]
        if not specs and expect is not None and (tid, expect.epoch) not in self._over:
            specs = [expect]
        for spec in specs:
            key = (tid, spec.epoch)
            self._specs.pop(key, None)
            self._traces.pop(key, None)
            self._over[key] = None
            self._reports.append(RankReport(tid, spec.request_id, ev.ReceiveOutcome.FAILED.value, False, reason))

    def note_came(self, peer: ev.Peer, note: wire.WriteNote | wire.SealNote, now_s: float) -> None:
        tid, key = note.transfer_id, (note.transfer_id, note.epoch)
        if key not in self._specs and key not in self._over:
            self._hold_early(peer, note)
            return
        trace = self._traces.get(key)
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
        fault = self._taken_out(peer, note, rect) if note.slot >= 0 else self._verify(note, rect)
        if fault:
            logger.error("write %d of %s from rank %d of %s %s", note.seq, tid, note.rank, peer.incarnation, fault)
        self.handle(ev.Landed(peer, tid, note.epoch, note.seq, rect, note.payload_bytes, fault), now_s)

    def _taken_out(self, peer: ev.Peer, note: wire.WriteNote, rect: ev.Rect) -> str:
        """Landing mode: checked and converted into our blocks, as long as they are wanted. Returns the fault."""
        key = (note.transfer_id, note.epoch)
        if key not in self._specs or peer not in self._machine.awaited(note.transfer_id, note.epoch):
            return ""  # late or strange: the machine counts it, and the slot comes back with the transfer's end
        trace, start_s = self._traces[key], self._clock()
        if fault := self._landing.fault(peer, note, rect):
            return fault
        checked_s = self._clock()
        trace.checksum_s += checked_s - start_s
        error = self._landing.take_out(peer, note, rect)
        trace.convert_s += self._clock() - checked_s
        return f"cannot be converted: {error}" if error else ""

    def _hold_early(self, peer: ev.Peer, note: wire.WriteNote | wire.SealNote) -> None:
        notes = self._early.setdefault((note.transfer_id, note.epoch), [])
        if len(notes) < _EARLY_NOTES:
            notes.append((peer, note))
        while len(self._early) > _EARLY_TRANSFERS:
            (tid, _), _ = self._early.popitem(last=False)
            logger.warning("early notes of %s dropped: too many transfers that nobody expects", tid)

    def _verify(self, note: wire.WriteNote, rect: ev.Rect) -> str:
        """What is wrong with the bytes; "" also for a note that the machine will refuse anyway."""
        spec = self._specs.get((note.transfer_id, note.epoch))
        if spec is None:
            return ""
        blocks = spec.blocks[rect.group] if 0 <= rect.group < len(spec.blocks) else None
        if blocks is None or rect.block_lo < blocks.lo or rect.block_hi > blocks.hi:
            return ""
        ids = blocks.ids[rect.block_lo - blocks.lo : rect.block_hi - blocks.lo]
        start_s = self._clock()
        try:
            runs = runs_for(self._map, rect, ids)
        except TransferError as error:
            logger.warning("note of %s: %s", note.transfer_id, error)
            return ""
        fault = self._verifier.fault(note, runs)
        self._traces[note.transfer_id, note.epoch].checksum_s += self._clock() - start_s
        return fault

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
                    self._peers.tell(peer, wire.Cancel(self._peers.own_incarnation, self._rank, tid, epoch))
                case ev.Report():
                    self._report(action, now_s)
                case ev.Drained(tid, request_id, epoch):
                    self._landing.close(tid, epoch)
                    slots = self._landed.pop((tid, epoch), None)
                    if slots != 0:
                        self._reports.append(RankReport(tid, request_id, "drained", True, "", -(slots or 0)))
        if isinstance(event, ev.Landed | ev.Sealed):
            spec = self._specs.get((event.transfer_id, event.epoch))
            if spec is not None and spec.landing:
                awaited = self._machine.awaited(event.transfer_id, event.epoch)
                self._landing.release(event.transfer_id, event.epoch, awaited)

    def tick(self, now_s: float) -> None:
        deadline_s = self._machine.next_deadline_s()
        if deadline_s is not None and deadline_s <= now_s:
            self.handle(ev.Tick(), now_s)

    def deadline_s(self) -> float | None:
        return self._machine.next_deadline_s()

    def holds(self, peer: ev.Peer) -> bool:
        """Blocks or slots of ours may still be written by this peer."""
        return self._machine.holds(peer)

    @property
    def active(self) -> bool:
        return bool(self._specs)

    def take(self) -> tuple[list[RankReport], list[dict[str, Any]]]:
        reports, ledgers = self._reports, self._ledgers
        self._reports, self._ledgers = [], []
        return reports, ledgers

    def _report(self, action: ev.Report, now_s: float) -> None:
        tid, key = action.transfer_id, (action.transfer_id, action.epoch)
        if key not in self._specs:
            return  # `fail` has reported it
        spec, trace = self._specs.pop(key), self._traces.pop(key)
        self._over[key] = None
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
        drained, slots = action.drained, 0
        if drained:
            self._landing.close(tid, action.epoch)
        elif spec.landing:
            # Only slots are written to, and they stay lent until Drained; the blocks are the engine's at once.
            self._landing.failed(tid, action.epoch)
            slots = self._landed[key] = self._landing.held(tid, action.epoch)
            drained = True
        self._reports.append(RankReport(tid, action.request_id, action.outcome.value, drained, action.reason, slots))
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
