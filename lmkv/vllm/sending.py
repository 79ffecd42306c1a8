"""The loop's prefill part: feeds the Sender and performs its actions. Loop thread only."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.errors import LmkvError, TransferError, TransportError
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.fanout import Fan, transfer_of
from lmkv.transfer.landing import Share, extents_into_slot, share_of
from lmkv.transfer.outgoing import SenderLimits
from lmkv.transfer.plan import KvMap, extents_for, runs_for
from lmkv.transfer.sender import Sender
from lmkv.transport import Extents, MemoryKind, OpId, PeerId, Transport

from . import dump, memory
from .commands import LayersDone, Ready, StepDone
from .peers import Pal, Peers
from .specs import BlockRange, OfferSpec
from .trace import SendTrace, facts

logger = logging.getLogger(__name__)

_EARLY_TRANSFERS = 1024
_EARLY_SLOTS = 1024
"""Of one transfer, credited before its grant; decode lends a few to each writer."""


@dataclass(slots=True)
class _Source:
    """What the shell knows of one transfer: our block ids by group, the grants that came, the trace."""

    trace: SendTrace
    block_ids: tuple[list[int], ...]
    fan: Fan
    grants: dict[tuple[Incarnation, Epoch], wire.Grant] = field(default_factory=dict)
    outcomes: list[ev.Finished] = field(default_factory=list)
    """Of the lanes that have ended."""


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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._rank = rank
        self._transport = transport
        self._found = found
        self._block_tokens = found.block_tokens
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
        self._shares: dict[tuple[PeerId, int], Share] = {}
        self._sources: dict[TransferId, _Source] = {}
        self._early_credits: OrderedDict[TransferId, list[wire.Credit]] = OrderedDict()
        self._ops: dict[OpId, tuple[TransferId, int]] = {}
        self._done: deque[ev.WriteDone] = deque()
        self._sent: list[RequestId] = []
        self._ledgers: list[dict[str, Any]] = []

    # --- what comes in ---

    def offered(self, offers: tuple[OfferSpec, ...], now_s: float) -> None:
        for offer in offers:
            source = self._source(offer.transfer_id)
            source.trace.offered_s = now_s
            self._tell(source.fan.offer(offer.request_id), now_s)

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
        self._tell(source.fan.compute(ev.Rect(blocks.group, lo, hi, blocks.lo, blocks.hi)), now_s)

    def step_done(self, command: StepDone, now_s: float) -> None:
        for push in command.pushes:
            if push.last and push.transfer_id in self._sources:
                self._tell(self._sources[push.transfer_id].fan.prompt_done(), now_s)

    def withdrawn(self, withdrawals: tuple[tuple[TransferId, str], ...], now_s: float) -> None:
        for tid, reason in withdrawals:
            if tid in self._sources:
                self._tell(self._sources[tid].fan.withdraw(reason), now_s)

    def preempted(self, tids: tuple[TransferId, ...], now_s: float) -> None:
        for tid in tids:
            if tid in self._sources:
                self._tell(self._sources[tid].fan.preempt(), now_s)

    def not_needed_came(self, message: wire.NotNeeded, now_s: float) -> None:
        source = self._sources.get(message.transfer_id)
        lanes = source.fan.ids if source else [message.transfer_id]
        self._tell([ev.NotNeededCame(lane, message.reason) for lane in lanes], now_s)

    def grant_came(self, grant: wire.Grant, now_s: float) -> None:
        if len(grant.block_ids) != len(self._layers) or len(grant.first_block) != len(self._layers):
            logger.warning("grant of %s dropped: it names %d groups", grant.transfer_id, len(grant.block_ids))
            return
        source = self._source(grant.transfer_id)
        # Of a duplicate, or of one that the machine refuses, the block ids must not replace those in use.
        source.grants.setdefault((grant.incarnation, grant.epoch), grant)
        source.trace.granted_s = source.trace.granted_s or now_s
        met = self._peers.met(grant.incarnation)
        ranks = sorted(met[1].sends) if met else [self._rank]
        if not ranks:
            reason = "other ranks have the heads that decode needs"
            self._tell([ev.NotNeededCame(grant.transfer_id, reason)], now_s)
            self._forget_if_closed(grant.transfer_id)
            return
        self._tell(source.fan.open(ranks), now_s)
        blocks = tuple((lo, lo + len(ids)) for lo, ids in zip(grant.first_block, grant.block_ids, strict=True))
        for rank in ranks:
            peer, lane = ev.Peer(grant.incarnation, rank), source.fan.lane(rank)
            slot_bytes = met[0].workers[rank].slot_bytes if met and grant.landing else 0
            self.handle(ev.Granted(peer, lane, grant.epoch, blocks, slot_bytes), now_s)
            if self._forget_if_closed(grant.transfer_id):  # late: it was answered from the tombstone
                self._fail_other(grant, ranks[1:])
                return
        for credit in self._early_credits.pop(grant.transfer_id, []):
            self.credit_came(credit, now_s)

    def _forget_if_closed(self, tid: TransferId) -> bool:
        source = self._sources.get(tid)
        if source is None or not any(self._machine.is_open(lane) for lane in source.fan.ids):
            self._sources.pop(tid, None)
            return True
        return False

    def _fail_other(self, grant: wire.Grant, ranks: list[Rank]) -> None:
        """The transfer has ended, and nothing was ever posted to these."""
        own = self._peers.own_incarnation
        failed = wire.Failed(own, self._rank, grant.transfer_id, grant.epoch, "the transfer has ended")
        for rank in ranks:
            self._answer(ev.Peer(grant.incarnation, rank), failed)

    def _hold_early(self, credit: wire.Credit) -> None:
        held = self._early_credits.setdefault(credit.transfer_id, [])
        if sum(1 + len(early.slots) for early in held) + len(credit.slots) < _EARLY_SLOTS:
            held.append(credit)
        while len(self._early_credits) > _EARLY_TRANSFERS:
            self._early_credits.popitem(last=False)

    def credit_came(self, credit: wire.Credit, now_s: float) -> None:
        """Grants come from decode's engine, credits from its ranks: either may be first."""
        source = self._sources.get(credit.transfer_id)
        if source is None or (credit.incarnation, credit.epoch) not in source.grants:
            self._hold_early(credit)
            return
        lane = source.fan.lane(credit.rank)
        peer = ev.Peer(credit.incarnation, credit.rank)
        self.handle(ev.Credited(peer, lane, credit.epoch, credit.slots), now_s)

    def cancel_came(self, message: wire.Cancel, now_s: float) -> None:
        peer = ev.Peer(message.incarnation, message.rank)
        source = self._sources.get(message.transfer_id)
        lane = source.fan.lane(message.rank) if source else message.transfer_id
        self.handle(ev.CancelCame(peer, lane, message.epoch), now_s)

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> None:
        lane, seq = self._ops.pop(op)
        source = self._sources.get(transfer_of(lane))
        if source is not None:
            source.trace.last_done_s = now_s
        self.handle(ev.WriteDone(lane, seq, str(error) if error is not None else ""), now_s)

    # --- the machine ---

    def _tell(self, events: Sequence[ev.SenderEvent], now_s: float) -> None:
        for event in events:
            self.handle(event, now_s)

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

    def transfer_of_op(self, op: OpId) -> TransferId | None:
        """The transfer that posted it."""
        posted = self._ops.get(op)
        return transfer_of(posted[0]) if posted is not None else None

    def in_flight(self, tid: TransferId) -> int:
        """Writes of the transfer, to whatever rank, whose end is not known."""
        source = self._sources.get(tid)
        return sum(self._machine.in_flight(lane) for lane in (source.fan.ids if source else [tid]))

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
                case ev.SendFailed(peer, lane, epoch, reason, landed_bytes):
                    own, tid = self._peers.own_incarnation, transfer_of(lane)
                    self._answer(peer, wire.Failed(own, self._rank, tid, epoch, reason, landed_bytes))
                case ev.SendCancelled(peer, lane, epoch):
                    own, tid = self._peers.own_incarnation, transfer_of(lane)
                    self._answer(peer, wire.Cancelled(own, self._rank, tid, epoch))
                case ev.Finished():
                    self._finished(action, now_s)

    def _post(self, action: ev.PostWrite) -> None:
        source = self._sources[transfer_of(action.transfer_id)]
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
        trace.last_post_s = self._clock()
        trace.writes += 1

    def _write(self, action: ev.PostWrite, source: _Source) -> OpId | None:
        """Post one write; None when its rectangle has only null blocks, of which a note is sent."""
        pal = self._peers.find(action.peer)
        if pal is None:
            raise TransferError(f"peer {action.peer} is not connected")
        rect, grant = action.rect, source.grants[action.peer.incarnation, action.epoch]
        source_ids = source.block_ids[rect.group][rect.block_lo : rect.block_hi]
        if action.slot >= 0:
            local, remote = self._into_slot(pal, rect, source_ids, action.slot)
        else:
            local, remote = self._into_blocks(pal, rect, source_ids, grant)
        trace = source.trace
        trace.first_post_s = trace.first_post_s or self._clock()
        note = wire.WriteNote(
            grant.transfer_id,
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
            action.slot,
        )
        if len(local) == 0:
            self._transport.notify(pal.transport_id, wire.encode(note))
            return None
        trace.extents += len(local)
        trace.bytes += local.total_bytes
        return self._transport.write(pal.transport_id, local, remote, wire.encode(note))

    def _into_blocks(self, pal: Pal, rect: ev.Rect, ids: list[int], grant: wire.Grant) -> tuple[Extents, Extents]:
        target = self._peer_maps.get(pal.transport_id)
        if target is None:
            target = self._peer_maps[pal.transport_id] = KvMap.from_card(pal.worker)
        first = grant.first_block[rect.group]
        target_ids = grant.block_ids[rect.group][rect.block_lo - first : rect.block_hi - first]
        return extents_for(self._map, target, rect, ids, target_ids)

    def _into_slot(self, pal: Pal, rect: ev.Rect, ids: list[int], slot: int) -> tuple[Extents, Extents]:
        key = (pal.transport_id, rect.group)
        share = self._shares.get(key)
        if share is None:
            heads = pal.engine.meeting.sends[pal.peer.rank][rect.group]
            tokens = self._block_tokens[rect.group]
            share = self._shares[key] = share_of(self._found.geometries[rect.group], heads, tokens)
        worker = pal.worker
        address = worker.slots_address + slot * worker.slot_bytes
        kind, device = MemoryKind(worker.kind), worker.layers[0].device
        return extents_into_slot(self._map, share, rect, ids, address, worker.slot_bytes, kind, device)

    def _seal(self, action: ev.SendSeal, now_s: float) -> None:
        tid = transfer_of(action.transfer_id)
        self._sources[tid].trace.sealed_s = now_s
        pal = self._peers.find(action.peer)
        if pal is None:
            return  # lost: its PeerGone ends the transfer
        note = wire.SealNote(tid, action.epoch, self._rank, action.writes, action.payload_bytes)
        try:
            self._transport.notify(pal.transport_id, wire.encode(note))
        except TransportError as error:
            logger.warning("the seal of %s cannot be sent: %s", tid, error)

    def _answer(self, peer: ev.Peer, message: wire.Failed | wire.Cancelled) -> None:
        address = self._peers.address_of(peer)
        if address is None:
            logger.warning("no address of peer %s for %s", peer, type(message).__name__)
        else:
            self._outbox.send(address, message)

    def _finished(self, action: ev.Finished, now_s: float) -> None:
        """A lane has ended; with the last one the transfer has."""
        tid = transfer_of(action.transfer_id)
        source = self._sources.get(tid)
        if source is None:  # offered after it had ended
            self._sent += [action.request_id] if action.request_id is not None else []
            return
        source.outcomes.append(action)
        source.fan.ended.add(action.transfer_id)
        if not source.fan.over:
            return
        del self._sources[tid]
        if action.request_id is not None:
            self._sent.append(action.request_id)
        worst = next((end for end in source.outcomes if end.outcome is not ev.SendOutcome.SENT), action)
        trace = source.trace
        trace.finished_s, trace.outcome, trace.reason = now_s, worst.outcome.value, worst.reason
        grant = max(source.grants.values(), key=lambda g: g.epoch, default=None)
        lanes = source.fan.lanes
        pal = self._peers.find(ev.Peer(grant.incarnation, min(lanes))) if grant is not None and lanes else None
        if pal is not None:
            trace.clock_offset_s = pal.clock_offset_s
        if worst.outcome is not ev.SendOutcome.SENT:
            logger.info("transfer %s ended as %s %s", tid, worst.outcome.value, worst.reason)
        elif self._settings.debug_dump_dir and grant is not None:
            self._dump(tid, source, grant)
        self._ledgers.append(facts(trace))

    def _dump(self, tid: TransferId, source: _Source, grant: wire.Grant) -> None:
        for group, (lo, ids) in enumerate(zip(grant.first_block, grant.block_ids, strict=True)):
            own = source.block_ids[group][lo : lo + len(ids)]
            path = Path(self._settings.debug_dump_dir, f"{tid}-prefill-{self._rank}-{group}.kv")
            if grant.landing:
                first_token = lo * self._block_tokens[group]
                tokens = (max(first_token, grant.first_token), grant.prompt_tokens)
                dump.dump_page(path, self._found, group, own, tokens, first_token)
            else:
                rect = ev.Rect(group, 0, self._layers[group], lo, lo + len(ids))
                dump.dump_runs(path, runs_for(self._map, rect, own, ids))

    def _source(self, tid: TransferId) -> _Source:
        source = self._sources.get(tid)
        if source is None:
            tables: tuple[list[int], ...] = tuple([] for _ in self._layers)
            source = self._sources[tid] = _Source(SendTrace(tid, self._rank), tables, Fan(tid))
        return source
