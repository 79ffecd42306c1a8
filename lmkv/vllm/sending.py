"""The loop's prefill part: feeds the Sender and performs its actions. Loop thread only."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.errors import LmkvError, TransferError, TransportError
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.outgoing import SenderLimits
from lmkv.transfer.plan import KvMap, extents_for, runs_for
from lmkv.transfer.sender import Sender
from lmkv.transport import MemoryKind, OpId, PeerId, Transport

from . import memory
from .commands import LayersDone, Ready, StepDone
from .metadata import BlockRange, OfferSpec
from .peers import Peers
from .trace import SendTrace, facts

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    """What the shell knows of one transfer: our block ids by group, the grants that came, the trace."""

    trace: SendTrace
    block_ids: tuple[list[int], ...]
    grants: dict[tuple[Incarnation, Epoch], wire.Grant] = field(default_factory=dict)
    offered: bool = False


class Sending:
    """`take` hands over the requests whose blocks are read no more, and the ledgers of ended transfers."""

    def __init__(
        self,
        settings: ConnectorSettings,
        rank: Rank,
        transport: Transport,
        found: memory.KvMemory,
        peers: Peers,
        outbox: Outbox,
    ) -> None:
        self._settings = settings
        self._rank = rank
        self._transport = transport
        self._map = found.map()
        self._layers = self._map.layers()
        self._checksum = settings.checksum and found.kind is MemoryKind.DRAM
        self._peers = peers
        self._outbox = outbox
        self._machine = Sender(
            SenderLimits(
                self._map.layer_block_bytes(),
                self._layers,
                max_post_bytes=settings.max_post_bytes,
                max_inflight_bytes=settings.max_inflight_bytes,
                lease_s=settings.lease_s,
                hold_s=settings.hold_s,
            )
        )
        self._peer_maps: dict[PeerId, KvMap] = {}
        self._sources: dict[TransferId, _Source] = {}
        self._ops: dict[OpId, tuple[TransferId, int]] = {}
        self._done: deque[ev.WriteDone] = deque()
        self._sent: list[RequestId] = []
        self._ledgers: list[dict[str, Any]] = []

    # --- what comes in ---

    def offered(self, offers: tuple[OfferSpec, ...], now_s: float) -> None:
        for offer in offers:
            source = self._source(offer.transfer_id)
            source.offered, source.trace.offered_s = True, now_s
            self.handle(ev.Offer(offer.transfer_id, offer.request_id), now_s)

    def ready(self, command: Ready, now_s: float) -> None:
        for push in command.pushes:
            for blocks in push.cached:
                self._computed(push.transfer_id, blocks, 0, self._layers[blocks.group], command.time_s, now_s)

    def layers_done(self, command: LayersDone, now_s: float) -> None:
        for push in command.pushes:
            for blocks in push.computed:
                if blocks.group == command.group:
                    self._computed(push.transfer_id, blocks, command.lo, command.hi, command.time_s, now_s)

    def _computed(self, tid: TransferId, blocks: BlockRange, lo: int, hi: int, time_s: float, now_s: float) -> None:
        source = self._sources.get(tid)
        if source is None:
            return  # ended already: not needed, cancelled, …
        table = source.block_ids[blocks.group]
        if len(table) < blocks.hi:
            table.extend([0] * (blocks.hi - len(table)))
        table[blocks.lo : blocks.hi] = blocks.ids
        source.trace.first_computed_s = source.trace.first_computed_s or time_s
        source.trace.last_computed_s = time_s
        self.handle(ev.Computed(tid, ev.Rect(blocks.group, lo, hi, blocks.lo, blocks.hi)), now_s)

    def step_done(self, command: StepDone, now_s: float) -> None:
        for push in command.pushes:
            if push.last:
                self.handle(ev.PromptDone(push.transfer_id), now_s)

    def withdrawn(self, withdrawals: tuple[tuple[TransferId, str], ...], now_s: float) -> None:
        for tid, reason in withdrawals:
            self.handle(ev.Withdraw(tid, reason), now_s)

    def preempted(self, tids: tuple[TransferId, ...], now_s: float) -> None:
        for tid in tids:
            self.handle(ev.Preempted(tid), now_s)

    def grant_came(self, grant: wire.Grant, now_s: float) -> None:
        if len(grant.block_ids) != len(self._layers) or len(grant.first_block) != len(self._layers):
            logger.warning("grant of %s dropped: it names %d groups", grant.transfer_id, len(grant.block_ids))
            return
        source = self._source(grant.transfer_id)
        # Of a duplicate, or of one that the machine refuses, the block ids must not replace those in use.
        source.grants.setdefault((grant.incarnation, grant.epoch), grant)
        source.trace.granted_s = source.trace.granted_s or now_s
        blocks = tuple((lo, lo + len(ids)) for lo, ids in zip(grant.first_block, grant.block_ids, strict=True))
        peer = ev.Peer(grant.incarnation, self._rank)
        self.handle(ev.Granted(peer, grant.transfer_id, grant.epoch, blocks), now_s)
        if not self._machine.is_open(grant.transfer_id):
            self._sources.pop(grant.transfer_id, None)  # late: it was answered from the tombstone

    def cancel_came(self, message: wire.Cancel, now_s: float) -> None:
        peer = ev.Peer(message.incarnation, message.rank)
        self.handle(ev.CancelCame(peer, message.transfer_id, message.epoch), now_s)

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> None:
        tid, seq = self._ops.pop(op)
        source = self._sources.get(tid)
        if source is not None:
            source.trace.last_done_s = now_s
        self.handle(ev.WriteDone(tid, seq, str(error) if error is not None else ""), now_s)

    # --- the machine ---

    def handle(self, event: ev.SenderEvent, now_s: float) -> None:
        self._perform(self._machine.handle(event, now_s), now_s)
        while self._done:  # writes that could not be posted: told only now, the machine is not re-entered
            self._perform(self._machine.handle(self._done.popleft(), now_s), now_s)

    def tick(self, now_s: float) -> None:
        deadline_s = self._machine.next_deadline_s()
        if deadline_s is not None and deadline_s <= now_s:
            self.handle(ev.Tick(), now_s)

    def deadline_s(self) -> float | None:
        return self._machine.next_deadline_s()

    def in_flight(self, tid: TransferId) -> int:
        return self._machine.in_flight(tid)

    def take(self) -> tuple[list[RequestId], list[dict[str, Any]]]:
        sent, ledgers = self._sent, self._ledgers
        self._sent, self._ledgers = [], []
        return sent, ledgers

    def _perform(self, actions: list[ev.SenderAction], now_s: float) -> None:
        for action in actions:
            match action:
                case ev.PostWrite():
                    self._post(action)
                case ev.SendSeal():
                    self._seal(action, now_s)
                case ev.SendFailed():
                    failed = wire.Failed(
                        self._peers.own_incarnation,
                        self._rank,
                        action.transfer_id,
                        action.epoch,
                        action.reason,
                        action.landed_bytes,
                    )
                    self._answer(action.peer, failed)
                case ev.SendCancelled():
                    self._answer(
                        action.peer,
                        wire.Cancelled(self._peers.own_incarnation, self._rank, action.transfer_id, action.epoch),
                    )
                case ev.Finished():
                    self._finished(action, now_s)

    def _post(self, action: ev.PostWrite) -> None:
        source = self._sources[action.transfer_id]
        trace = source.trace
        try:
            op = self._write(action, source)
        except LmkvError as error:
            logger.warning("a write of %s cannot be posted: %s", action.transfer_id, error)
            self._done.append(ev.WriteDone(action.transfer_id, action.seq, str(error)))
            return
        if op is None:
            self._done.append(ev.WriteDone(action.transfer_id, action.seq))
        else:
            self._ops[op] = (action.transfer_id, action.seq)
        trace.last_post_s = time.monotonic()
        trace.writes += 1

    def _write(self, action: ev.PostWrite, source: _Source) -> OpId | None:
        """Post one write; None when its rectangle has only null blocks, of which a note is sent."""
        pal = self._peers.find(action.peer.incarnation)
        if pal is None:
            raise TransferError(f"peer {action.peer.incarnation} is not connected")
        rect, grant = action.rect, source.grants[action.peer.incarnation, action.epoch]
        target_map = self._peer_maps.get(pal.transport_id)
        if target_map is None:
            target_map = self._peer_maps[pal.transport_id] = KvMap.from_card(pal.worker)
        first = grant.first_block[rect.group]
        target_ids = grant.block_ids[rect.group][rect.block_lo - first : rect.block_hi - first]
        source_ids = source.block_ids[rect.group][rect.block_lo : rect.block_hi]
        local, remote = extents_for(self._map, target_map, rect, source_ids, target_ids)
        trace = source.trace
        trace.first_post_s = trace.first_post_s or time.monotonic()
        note = wire.WriteNote(
            action.transfer_id,
            action.epoch,
            self._rank,
            action.seq,
            rect.group,
            rect.layer_lo,
            rect.layer_hi,
            rect.block_lo,
            rect.block_hi,
            self._machine.limits.rect_bytes(rect),
            memory.checksum(local.table[:, :2]) if self._checksum else 0,
        )
        if len(local) == 0:
            self._transport.notify(pal.transport_id, wire.encode(note))
            return None
        trace.extents += len(local)
        trace.bytes += local.total_bytes
        return self._transport.write(pal.transport_id, local, remote, wire.encode(note))

    def _seal(self, action: ev.SendSeal, now_s: float) -> None:
        source = self._sources[action.transfer_id]
        source.trace.sealed_s = now_s
        pal = self._peers.find(action.peer.incarnation)
        if pal is None:
            return  # lost: its PeerGone ends the transfer
        note = wire.SealNote(action.transfer_id, action.epoch, self._rank, action.writes, action.payload_bytes)
        try:
            self._transport.notify(pal.transport_id, wire.encode(note))
        except TransportError as error:
            logger.warning("the seal of %s cannot be sent: %s", action.transfer_id, error)

    def _answer(self, peer: ev.Peer, message: wire.Failed | wire.Cancelled) -> None:
        address = self._peers.address_of(peer.incarnation)
        if address is None:
            logger.warning("no address of peer %s for %s", peer.incarnation, type(message).__name__)
        else:
            self._outbox.send(address, message)

    def _finished(self, action: ev.Finished, now_s: float) -> None:
        source = self._sources.pop(action.transfer_id, None)
        if action.request_id is not None:
            self._sent.append(action.request_id)
        if source is None:
            return
        trace = source.trace
        trace.finished_s, trace.outcome, trace.reason = now_s, action.outcome.value, action.reason
        grant = max(source.grants.values(), key=lambda g: g.epoch, default=None)
        pal = self._peers.find(grant.incarnation) if grant is not None else None
        if pal is not None:
            trace.clock_offset_s = pal.clock_offset_s
        if action.outcome is not ev.SendOutcome.SENT:
            logger.info("transfer %s ended as %s %s", action.transfer_id, action.outcome.value, action.reason)
        elif self._settings.debug_dump_dir and grant is not None:
            self._dump(action.transfer_id, source, grant)
        self._ledgers.append(facts(trace))
        logger.debug("sent: %s", self._ledgers[-1])

    def _dump(self, tid: TransferId, source: _Source, grant: wire.Grant) -> None:
        for group, (lo, ids) in enumerate(zip(grant.first_block, grant.block_ids, strict=True)):
            rect = ev.Rect(group, 0, self._layers[group], lo, lo + len(ids))
            own = source.block_ids[group][lo : lo + len(ids)]
            path = Path(self._settings.debug_dump_dir, f"{tid}-prefill-{self._rank}-{group}.kv")
            memory.dump(path, runs_for(self._map, rect, own, ids))

    def _source(self, tid: TransferId) -> _Source:
        source = self._sources.get(tid)
        if source is None:
            source = self._sources[tid] = _Source(SendTrace(tid, self._rank), tuple([] for _ in self._layers))
        return source
