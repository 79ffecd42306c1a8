"""The loop's prefill part: feeds the Sender and performs its actions. Loop thread only."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.errors import LmkvError, TransferError, TransportError
from lmkv.ids import Incarnation, Rank, RequestId, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.fanout import transfer_of
from lmkv.transfer.outgoing import SenderLimits
from lmkv.transfer.prompt import Prompt
from lmkv.transfer.sender import Sender
from lmkv.transport import Extents, OpId, Transport

from . import memory
from .checking import ALL_PPM, is_checked
from .checksums import Checksums
from .commands import LayersDone, Ready, StepDone
from .early import Early
from .peers import Peers
from .source import Source
from .specs import BlockRange, OfferSpec
from .targets import Targets
from .trace import facts

logger = logging.getLogger(__name__)


class Sending:
    """`take` hands over the requests whose blocks are read no more, and the ledgers of ended transfers."""

    def __init__(
        self,
        settings: ConnectorSettings,
        rank: Rank,
        transport: Transport,
        found: memory.KvMemory,
        peers: Peers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._settings = settings
        self._rank = rank
        self._transport = transport
        self._found = found
        self._map = found.map()
        self._layers = self._map.layers()
        self._checksums = Checksums(found)
        self._targets = Targets(found, self._map)
        self._peers = peers
        self._machine = Sender(
            SenderLimits(
                self._map.layer_block_bytes(),
                self._layers,
                max_post_bytes=settings.max_post_bytes,
                max_inflight_bytes=settings.max_inflight_bytes,
                lease_s=settings.lease_s,
                hold_s=settings.hold_s,
                early_grant_s=settings.deadline_s,
            )
        )
        self._revoked: set[TransferId] = set()
        self._sources: dict[TransferId, Source] = {}
        self._early = Early()
        self._ops: dict[OpId, tuple[TransferId, int]] = {}
        self._done: deque[ev.WriteDone] = deque()
        self._sent: list[RequestId] = []
        self._ledgers: list[dict[str, Any]] = []

    # --- what comes in ---

    def offered(self, offers: tuple[OfferSpec, ...], now_s: float) -> None:
        for offer in offers:
            source = self._source(offer.transfer_id)
            source.trace.offered_s = now_s
            self._tell(source.fan.offer(offer.request_id, offer.prompt), now_s)

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

    def yielded(self, tid: TransferId, now_s: float) -> None:
        if tid in self._sources:
            self._tell([ev.Yield(lane) for lane in self._sources[tid].fan.ids], now_s)

    def preempted(self, tids: tuple[TransferId, ...], now_s: float, gave_up: bool = False) -> None:
        """Their blocks are to be overwritten once nothing of them is in flight.

        `gave_up`: the engine has waited for that, has revoked them, and overwrites now. They fail for good.
        """
        if gave_up:
            self._revoked.update(tids)
            self._fail_revoked(now_s)
            self._revoked.difference_update(tids)
            return
        for tid in tids:
            if tid in self._sources:
                self._tell(self._sources[tid].fan.preempt(), now_s)

    def revoke(self, tids: Iterable[TransferId]) -> None:
        """ENGINE thread: the blocks of these transfers are overwritten as soon as this returns, whatever is in flight.

        Call it when a preemption's fence has timed out, then submit the preemption again with `gave_up`, which ends
        the transfers and forgets them here. No write whose source was overwritten can count afterwards:

        * The loop looks at the set after it has computed a write's checksum and before it posts the write. If the
          transfer is in it, the write is dropped. If not, the checksum was computed before this call, hence from good
          bytes; should other bytes be read later, the receiver sees that they do not match.
        * It looks again after a Completion has been taken and before the machine hears of it. If the transfer is in the
          set, it fails, and is not sealed. If not, the write had completed before this call, hence with good bytes.
          Writes without a checksum count by such completions only (`Granted.all_checked`).
        """
        self._revoked.update(tids)

    def _fail_revoked(self, now_s: float) -> None:
        for tid in tuple(self._revoked):
            source = self._sources.get(tid)
            # One whose offer the machine has not taken yet is failed by the command that follows (`gave_up`).
            if source is not None and not source.revoked and any(map(self._machine.is_open, source.fan.ids)):
                source.revoked = True
                for event in source.fan.revoke("preempted, and its writes did not end in time"):
                    self._perform(self._machine.handle(event, now_s), now_s)

    def not_needed_came(self, message: wire.NotNeeded, now_s: float) -> None:
        source = self._sources.get(message.transfer_id)
        lanes = source.fan.ids if source else [message.transfer_id]
        self._tell([ev.NotNeededCame(lane, message.reason) for lane in lanes], now_s)

    def grant_came(self, grant: wire.Grant, now_s: float) -> None:
        if len(grant.block_ids) != len(self._layers) or len(grant.first_block) != len(self._layers):
            logger.warning("grant of %s dropped: it names %d groups", grant.transfer_id, len(grant.block_ids))
            return
        met, pair = self._peers.met(grant.incarnation), self._peers.pair_of(grant.incarnation)
        if met is None or pair is None or grant.pair > pair or not self._peers.is_confirmed(grant.incarnation):
            self._early.hold_grant(grant)
            return
        source = self._source(grant.transfer_id)
        # Of a duplicate, or of one that the machine refuses, the block ids must not replace those in use.
        source.grants.setdefault((grant.incarnation, grant.epoch), grant)
        source.trace.granted_s = source.trace.granted_s or now_s
        card, ranks = met[0], sorted(met[1].sends)
        if grant.pair != pair and len(source.grants) == 1:
            logger.info("grant of %s dropped: it is from before the pair was made anew", grant.transfer_id)
            self._fail_other(grant, ranks, "it was granted before the pair was made anew")
            self._tell(source.fan.withdraw("its grant is from before the pair was made anew"), now_s)
            del source.grants[grant.incarnation, grant.epoch]
            self._forget_if_closed(grant.transfer_id)
            return
        if not ranks:
            reason = "other ranks have the heads that decode needs"
            self._tell([ev.NotNeededCame(grant.transfer_id, reason)], now_s)
            self._forget_if_closed(grant.transfer_id)
            return
        self._tell(source.fan.open(ranks), now_s)
        blocks = tuple((lo, lo + len(ids)) for lo, ids in zip(grant.first_block, grant.block_ids, strict=True))
        prompt = Prompt(grant.prompt_digest, grant.prompt_tokens)
        for rank in ranks:
            peer, lane = ev.Peer(grant.incarnation, rank), source.fan.lane(rank)
            worker = card.workers[rank]
            slot_bytes = worker.slot_bytes if grant.landing else 0
            checked, wait_s = worker.checked_ppm >= ALL_PPM, card.times.deadline_s
            self.handle(ev.Granted(peer, lane, grant.epoch, blocks, prompt, slot_bytes, wait_s, checked), now_s)
            if self._forget_if_closed(grant.transfer_id):  # late: it was answered from the tombstone
                self._fail_other(grant, ranks[1:])
                return
        for credit in self._early.take_credits(grant.transfer_id):
            self.credit_came(credit, now_s)

    def introduced(self, incarnation: Incarnation, now_s: float) -> None:
        """The engine has become a peer: what it granted in an older pair is over."""
        pair = self._peers.pair_of(incarnation)
        for source in [s for s in self._sources.values() if s.is_void(incarnation, pair)]:
            self._tell(source.fan.revoke("the pair was made anew after its grant"), now_s)

    def confirmed(self, incarnation: Incarnation, now_s: float) -> None:
        """Grants of the engine may be served from now on: those that came early are."""
        for grant in self._early.take_grants(incarnation):
            self.grant_came(grant, now_s)

    def _forget_if_closed(self, tid: TransferId) -> bool:
        source = self._sources.get(tid)
        if source is None or not any(self._machine.is_open(lane) for lane in source.fan.ids):
            self._sources.pop(tid, None)
            return True
        return False

    def _fail_other(self, grant: wire.Grant, ranks: list[Rank], why: str = "the transfer has ended") -> None:
        """Nothing was ever posted to these for this grant."""
        own = self._peers.own_incarnation
        failed = wire.Failed(own, self._rank, grant.transfer_id, grant.epoch, why)
        for rank in ranks:
            self._peers.tell(ev.Peer(grant.incarnation, rank), failed)

    def credit_came(self, credit: wire.Credit, now_s: float) -> None:
        """Grants come from decode's engine, credits from its ranks: either may be first."""
        source = self._sources.get(credit.transfer_id)
        if source is None or (credit.incarnation, credit.epoch) not in source.grants:
            self._early.hold_credit(credit)
            return
        lane = source.fan.lane(credit.rank)
        peer = ev.Peer(credit.incarnation, credit.rank)
        self.handle(ev.Credited(peer, lane, credit.epoch, credit.slots), now_s)

    def cancel_came(self, message: wire.Cancel, now_s: float) -> None:
        peer = ev.Peer(message.incarnation, message.rank)
        self._early.cancel(message.transfer_id)
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
        self._fail_revoked(now_s)  # before a WriteDone: see `revoke`
        self._perform(self._machine.handle(event, now_s), now_s)
        while self._done:  # writes that could not be posted: told only now, the machine is not re-entered
            self._fail_revoked(now_s)
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
                    self._peers.tell(peer, wire.Failed(own, self._rank, tid, epoch, reason, landed_bytes))
                case ev.SendCancelled(peer, lane, epoch):
                    own, tid = self._peers.own_incarnation, transfer_of(lane)
                    self._peers.tell(peer, wire.Cancelled(own, self._rank, tid, epoch))
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
        trace.retries += action.attempt

    def _write(self, action: ev.PostWrite, source: Source) -> OpId | None:
        """Post one write; None when its rectangle has only null blocks, of which a note is sent."""
        pal = self._peers.find(action.peer)
        if pal is None:
            raise TransferError(f"peer {action.peer} is not connected")
        rect, grant = action.rect, source.grants[action.peer.incarnation, action.epoch]
        if not pal.confirmed or grant.pair != pal.engine.pair:
            raise TransferError("it was granted before the pair was made anew")
        source_ids = source.block_ids[rect.group][rect.block_lo : rect.block_hi]
        local, remote = self._targets.extents(pal, rect, source_ids, grant, action.slot)
        trace = source.trace
        trace.first_post_s = trace.first_post_s or self._clock()
        checksum = self._checksum(pal.worker.checked_ppm, action, local)
        note = source.note(action, self._rank, self._machine.limits.rect_bytes(rect), checksum)
        if grant.transfer_id in self._revoked:
            raise TransferError("its blocks are being overwritten")
        if len(local) == 0:
            self._transport.notify(pal.transport_id, wire.encode(note))
            return None
        trace.extents += len(local)
        trace.bytes += local.total_bytes
        return self._transport.write(pal.transport_id, local, remote, wire.encode(note))

    def _checksum(self, ppm: int, action: ev.PostWrite, local: Extents) -> int | None:
        """What the receiver demands of this write."""
        tid = transfer_of(action.transfer_id)
        if not is_checked(ppm, tid, action.epoch, self._rank, action.seq):
            return None
        return self._checksums.of(local.table[:, :2])

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
        self._revoked.discard(tid)
        if action.request_id is not None:
            self._sent.append(action.request_id)
        worst, trace = source.end(action, now_s), source.trace
        grant = max(source.grants.values(), key=lambda g: g.epoch, default=None)
        lanes = source.fan.lanes
        pal = self._peers.find(ev.Peer(grant.incarnation, min(lanes))) if grant is not None and lanes else None
        if pal is not None:
            trace.clock_offset_s = pal.clock_offset_s
        if worst.outcome is not ev.SendOutcome.SENT:
            logger.info("transfer %s ended as %s %s", tid, worst.outcome.value, worst.reason)
        elif self._settings.debug_dump_dir and grant is not None:
            source.dump(self._settings.debug_dump_dir, grant, self._found, self._map)
        self._ledgers.append(facts(trace))

    def _source(self, tid: TransferId) -> Source:
        return self._sources.get(tid) or self._sources.setdefault(tid, Source.of(tid, self._rank, len(self._layers)))
