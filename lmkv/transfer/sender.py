"""The prefill side: which rectangle is posted when, and what is owed to the decode rank in the end.

Invariants (tests/protocol checks each):

* nothing is posted for a grant whose prompt is not the offered one: such a transfer fails ("prompt: …");
* exactly one Finished per Offer; every tid is OVER in bounded time after PromptDone or Withdraw;
* a cell is posted at most once an epoch, but for the one retry of a failed write, which is the same rectangle;
* nothing is posted when the lease is over, the window is full, the epoch is old, or the transfer is ending;
* without checksums of all writes, a seal is sent only once they are done, and never after a Revoke;
* SendCancelled and SendFailed are true when they are sent: nothing of that epoch or an older one is in flight;
* a record with writes in flight is never forgotten, so an unknown tid has none and its Cancel is answered at once.
"""

from __future__ import annotations

from math import inf

from lmkv.ids import TransferId

from . import events as ev
from .lanes import Lane, Lanes, Queued
from .outgoing import Debt, Flight, Outgoing, Phase, SenderCounters, SenderLimits
from .rects import is_proper
from .timers import Timers

__all__ = ["Sender", "SenderCounters", "SenderLimits"]


class Sender:
    """All transfers of one prefill rank. Not thread-safe; `now_s` never runs backwards."""

    def __init__(self, limits: SenderLimits) -> None:
        self.limits = limits
        self.counters = SenderCounters()
        self._transfers: dict[TransferId, Outgoing] = {}
        self._timers: Timers[TransferId | ev.Peer] = Timers()
        self.lanes = Lanes(limits, self._timers)
        self._active = 0
        self._unoffered = 0
        self._out: list[ev.SenderAction] = []

    # --- read-only views ---

    @property
    def active(self) -> int:
        """Transfers that are not over."""
        return self._active

    def is_open(self, transfer_id: TransferId) -> bool:
        """A Finished of this transfer will come: keep its grants and block ids. After a refused Granted it is False."""
        transfer = self._transfers.get(transfer_id)
        return transfer is not None and transfer.phase is not Phase.OVER

    def in_flight(self, transfer_id: TransferId) -> int:
        """Writes of this transfer without WriteDone: while not 0 its blocks are being read, even after Finished."""
        transfer = self._transfers.get(transfer_id)
        return len(transfer.flights) if transfer else 0

    def next_deadline_s(self) -> float | None:
        """Feed a Tick at this time (an earlier one does no harm)."""
        return self._timers.next_s()

    # --- the machine ---

    def handle(self, event: ev.SenderEvent, now_s: float) -> list[ev.SenderAction]:
        self._out = []
        match event:
            case ev.WriteDone():
                self._write_done(event, now_s)
            case ev.Computed():
                self._computed(event, now_s)
            case ev.Heard(peer):
                self._pump(self.lanes.renew(peer, now_s), now_s)
            case ev.Offer():
                self._offer(event, now_s)
            case ev.Granted():
                self._granted(event, now_s)
            case ev.Credited():
                self._credited(event, now_s)
            case ev.PromptDone(tid):
                self._prompt_done(tid, now_s)
            case ev.Withdraw(tid, reason):
                if transfer := self._live(tid):
                    self._end(transfer, ev.SendOutcome.WITHDRAWN, reason, now_s)
            case ev.Revoke(tid, reason):
                self._revoke(tid, reason, now_s)
            case ev.Yield(tid):
                self._give_way(tid, now_s)
            case ev.Preempted(tid):
                self._preempted(tid, now_s)
            case ev.NotNeededCame(tid, reason):
                self._not_needed(tid, reason, now_s)
            case ev.CancelCame():
                self._cancel_came(event, now_s)
            case ev.PeerGone(peer, dead, fenced):
                self._peer_gone(peer, dead, fenced, now_s)
            case ev.Tick():
                self._tick(now_s)
        out, self._out = self._out, []
        return out

    # --- the engine's events ---

    def _offer(self, event: ev.Offer, now_s: float) -> None:
        tid, request_id = event.transfer_id, event.request_id
        transfer = self._transfers.get(tid) or self._new(tid, now_s, Phase.LIVE)
        if transfer.request_id not in (None, request_id):
            reason = f"the transfer id is in use by request {transfer.request_id}"
            self._out.append(ev.Finished(tid, request_id, ev.SendOutcome.FAILED, reason))
        elif transfer.request_id is None:
            self._unoffered -= transfer.phase is not Phase.LIVE
            transfer.request_id, transfer.prompt = request_id, event.prompt
            if transfer.phase is Phase.OVER:
                assert transfer.outcome is not None, "what is over has an outcome"
                self._out.append(ev.Finished(tid, request_id, transfer.outcome, transfer.reason))
            else:
                transfer.phase = Phase.LIVE
                self._bind(transfer, now_s)

    def _computed(self, event: ev.Computed, now_s: float) -> None:
        if (transfer := self._live(event.transfer_id)) is None:
            return
        rect = event.rect
        if not 0 <= rect.group < len(self.limits.layers) or not is_proper(rect, self.limits.layers[rect.group]):
            self._end(transfer, ev.SendOutcome.FAILED, f"{rect} is not within layers {self.limits.layers}", now_s)
            return
        transfer.computed.add(rect)
        if transfer.grant is not None:
            self._pump(self.lanes.enqueue(transfer, transfer.grant, [rect]), now_s)

    def _prompt_done(self, transfer_id: TransferId, now_s: float) -> None:
        if transfer := self._live(transfer_id):
            transfer.prompt_done_s = now_s
            self._settle(transfer, now_s)

    def _preempted(self, transfer_id: TransferId, now_s: float) -> None:
        """Cells in the queue are no longer in memory: they are taken again when they come again."""
        if (transfer := self._live(transfer_id)) is None:
            return
        dropped = self.lanes.purge(transfer)
        transfer.begin_life()
        for item in dropped:
            transfer.give_back(item.rect, item.slot)
        if any(item.attempt for item in dropped):
            self._end(transfer, ev.SendOutcome.FAILED, "preempted before a failed write was repeated", now_s)

    def _revoke(self, transfer_id: TransferId, reason: str, now_s: float) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.phase is Phase.OVER:
            self.counters.stray += 1
        elif transfer.phase < Phase.ENDING or transfer.outcome is ev.SendOutcome.SENT:
            self._end(transfer, ev.SendOutcome.FAILED, reason, now_s)

    def _give_way(self, transfer_id: TransferId, now_s: float) -> None:
        """Ends only if a receiver holds blocks or slots for a prompt that is not computed: these come free after it."""
        transfer = self._live(transfer_id)
        ending = transfer.giving_way() if transfer is not None else None
        if transfer and ending and any(other.awaits_prompt for other in self._transfers.values()):
            self._end(transfer, *ending, now_s)

    # --- the peer's events ---

    def _granted(self, event: ev.Granted, now_s: float) -> None:
        """Renews the lease too; what waited for it is posted after this grant has replaced an older one."""
        lane = self.lanes.renew(event.peer, now_s)
        transfer = self._known(event.transfer_id, now_s)
        if transfer is None:
            pass
        elif transfer.phase >= Phase.ENDING:
            self._refuse(transfer, event, now_s)
        elif transfer.grant is not None and transfer.grant.peer != event.peer:
            reason = "already granted to another"
            self._out.append(ev.SendFailed(event.peer, event.transfer_id, event.epoch, reason, 0))
        elif transfer.grant is None or event.epoch > transfer.grant.epoch:
            self._serve(transfer, event, now_s)
        self._pump(lane, now_s)

    def _serve(self, transfer: Outgoing, grant: ev.Granted, now_s: float) -> None:
        """A first or newer grant: everything computed so far goes to it."""
        self.lanes.purge(transfer)
        transfer.begin_epoch(grant)
        if len(grant.blocks) != len(self.limits.layers):
            reason = f"the grant names {len(grant.blocks)} groups, this rank has {len(self.limits.layers)}"
            self._end(transfer, ev.SendOutcome.FAILED, reason, now_s)
        elif self.lanes.of(grant.peer).dead:
            self._end(transfer, ev.SendOutcome.PEER_LOST, "granted by a dead peer", now_s)
        else:
            if not transfer.foreign():
                self.lanes.enqueue(transfer, grant, transfer.computed.rects())
            self._bind(transfer, now_s)

    def _bind(self, transfer: Outgoing, now_s: float) -> None:
        """Offer and grant are compared as soon as both are there; KV of another prompt is never sent."""
        if foreign := transfer.foreign():
            self._end(transfer, ev.SendOutcome.FAILED, foreign, now_s)
        else:
            self._settle(transfer, now_s)

    def _credited(self, event: ev.Credited, now_s: float) -> None:
        """Slots of an older epoch, or for a transfer that is ending, are the receiver's again by the end of it."""
        lane, transfer = self.lanes.renew(event.peer, now_s), self._transfers.get(event.transfer_id)
        if transfer is None or not transfer.takes(event):
            self.counters.stray += 1
        else:
            transfer.slots.extend(event.slots)
            self.lanes.feed(transfer, lane)
        self._pump(lane, now_s)

    def _refuse(self, transfer: Outgoing, event: ev.Granted, now_s: float) -> None:
        """A grant that comes too late. What it repeats is answered as before; what is new, as the transfer ended."""
        debt = transfer.refusal(event)
        if debt is not None:
            transfer.debts[debt] = transfer.reason or f"already {transfer.outcome}"
        self._settle(transfer, now_s)

    def _not_needed(self, transfer_id: TransferId, reason: str, now_s: float) -> None:
        if (transfer := self._known(transfer_id, now_s)) and transfer.phase < Phase.ENDING:
            self._end(transfer, ev.SendOutcome.NOT_NEEDED, reason, now_s)

    def _cancel_came(self, event: ev.CancelCame, now_s: float) -> None:
        """Always answered, at the latest when the receiver repeats it (a full buffer of early ones stays silent)."""
        transfer = self._known(event.transfer_id, now_s)
        if transfer is None:
            return
        transfer.cancelled[event.peer] = max(event.epoch, transfer.cancelled.get(event.peer, event.epoch))
        transfer.debts[Debt(event.peer, event.epoch, True)] = ""
        grant = transfer.grant
        if grant is None or (grant.peer == event.peer and grant.epoch <= event.epoch):
            transfer.stuck_s = min(transfer.stuck_s, now_s + self.limits.lease_s + self.limits.hold_s)
            if transfer.phase < Phase.ENDING:
                self._end(transfer, ev.SendOutcome.CANCELLED, "cancelled by the receiver", now_s)
                return
        self._settle(transfer, now_s)

    def _peer_gone(self, peer: ev.Peer, dead: bool, fenced: bool, now_s: float) -> None:
        self.lanes.lapse(peer, dead, now_s)
        for transfer in list(self._transfers.values()):
            if transfer.grant is None or transfer.grant.peer != peer:
                continue
            if (dead or fenced) and transfer.phase < Phase.ENDING:
                why = "the peer died" if dead else "the connection to the peer is lost"
                self._end(transfer, ev.SendOutcome.PEER_LOST, why, now_s)
            else:
                self._settle(transfer, now_s)

    # --- writes ---

    def _pump(self, lane: Lane, now_s: float) -> None:
        """Post from the head of the peer's queue while its lease and its window allow."""
        while lane.queue and lane.may_post(now_s):
            size = self.limits.rect_bytes(lane.queue[0].rect)
            if not lane.fits(size, self.limits.max_inflight_bytes):
                return
            item = lane.queue.popleft()
            transfer = self._transfers[item.transfer_id]
            transfer.queued -= 1
            lane.inflight_bytes += size
            self.counters.add_post(size)
            self._out.append(transfer.post(item.rect, size, item.attempt, item.slot))
            if transfer.queued == 0:
                self._settle(transfer, now_s)

    def _write_done(self, event: ev.WriteDone, now_s: float) -> None:
        transfer = self._transfers.get(event.transfer_id)
        flight = transfer.flights.pop(event.seq, None) if transfer else None
        if transfer is None or flight is None:
            self.counters.stray += 1
            return
        lane = self.lanes.of(flight.peer)
        lane.inflight_bytes -= flight.bytes
        current = transfer.is_current(flight)
        if event.error:
            self.counters.write_errors += 1
            if current and transfer.phase is Phase.LIVE:
                self._repeat(transfer, lane, flight, event.error, now_s)
        elif current:
            transfer.landed_bytes += flight.bytes
        if transfer.phase is Phase.OVER:
            transfer.expires_s = now_s + self.limits.tombstone_s
        self._settle(transfer, now_s)
        self._pump(lane, now_s)

    def _repeat(self, transfer: Outgoing, lane: Lane, flight: Flight, error: str, now_s: float) -> None:
        """One retry of the same rectangle, ahead of everything queued; the second error ends the transfer."""
        if flight.attempt or flight.life != transfer.life:
            why = "twice" if flight.attempt else "and the request was preempted"
            self._end(transfer, ev.SendOutcome.FAILED, f"a write of {flight.rect} failed {why}: {error}", now_s)
            return
        self.counters.retries += 1
        transfer.queued += 1
        lane.queue.appendleft(Queued(transfer.transfer_id, flight.rect, 1, flight.slot))

    # --- ends ---

    def _end(self, transfer: Outgoing, outcome: ev.SendOutcome, reason: str, now_s: float) -> None:
        """The outcome is known: post nothing more, finish when nothing is in flight."""
        transfer.phase, transfer.outcome, transfer.reason = Phase.ENDING, outcome, reason
        self.lanes.purge(transfer)
        self._settle(transfer, now_s)

    def _settle(self, transfer: Outgoing, now_s: float) -> None:
        """Do what has become due after any change: seal, finish, pay debts, set the alarm."""
        if transfer.phase is Phase.LIVE:
            self._seal_or_fail(transfer, now_s)
        if transfer.phase is Phase.ENDING and not transfer.flights:
            self._finish(transfer, now_s)
        self._pay(transfer)
        self._timers.arm(transfer.transfer_id, self._deadline_s(transfer))

    def _seal_or_fail(self, transfer: Outgoing, now_s: float) -> None:
        verdict = transfer.verdict(self.limits)
        if verdict:
            self._end(transfer, ev.SendOutcome.FAILED, verdict, now_s)
        elif verdict == "" and transfer.may_seal:
            self._out += [] if transfer.sealed else [transfer.seal()]
            if not transfer.flights:
                transfer.phase, transfer.outcome = Phase.ENDING, ev.SendOutcome.SENT

    def _finish(self, transfer: Outgoing, now_s: float) -> None:
        """Say how it ended. Debts that writes in flight hold up are paid later (only after PEER_LOST)."""
        outcome, grant = transfer.outcome, transfer.grant
        if outcome is ev.SendOutcome.WITHDRAWN and transfer.sealed and transfer.landed_bytes == transfer.bytes:
            outcome = transfer.outcome = ev.SendOutcome.SENT
        assert outcome is not None, "an ending transfer has an outcome"
        if grant is not None and outcome not in (ev.SendOutcome.SENT, ev.SendOutcome.CANCELLED):
            transfer.debts[Debt(grant.peer, grant.epoch, False)] = transfer.reason
        self._pay(transfer)
        if transfer.request_id is not None or grant is not None:
            self._out.append(ev.Finished(transfer.transfer_id, transfer.request_id, outcome, transfer.reason))
        transfer.phase = Phase.OVER
        transfer.forget_cells()
        transfer.expires_s = now_s + self.limits.tombstone_s
        self._active -= 1

    def _pay(self, transfer: Outgoing) -> None:
        """Give the answers that have become true; the dead need none."""
        for debt in transfer.payable():
            answer = transfer.answer(debt)
            lane = self.lanes.find(debt.peer)
            if lane is None or not lane.dead:
                self._out.append(answer)

    # --- time ---

    def _deadline_s(self, transfer: Outgoing) -> float | None:
        lane = self.lanes.find(transfer.grant.peer) if transfer.grant else None
        return transfer.deadline_s(self.limits, lane.lease_end_s if lane else -inf)

    def _tick(self, now_s: float) -> None:
        for key in self._timers.due(now_s):
            if isinstance(key, ev.Peer):
                self.lanes.drop_idle(key, now_s)
            elif key in self._transfers:
                self._ring(self._transfers[key], now_s)

    def _ring(self, transfer: Outgoing, now_s: float) -> None:
        deadline = self._deadline_s(transfer)
        if deadline is not None and deadline <= now_s:
            self._expire(transfer, now_s)
        if transfer.transfer_id in self._transfers:
            self._timers.arm(transfer.transfer_id, self._deadline_s(transfer))

    def _expire(self, transfer: Outgoing, now_s: float) -> None:
        match transfer.phase:
            case Phase.OVER:
                del self._transfers[transfer.transfer_id]
                self._unoffered -= transfer.request_id is None
            case Phase.EARLY:
                self._end(transfer, ev.SendOutcome.EXPIRED, "granted, but the request did not come", now_s)
            case Phase.LIVE if transfer.grant is None:
                self._end(transfer, ev.SendOutcome.EXPIRED, "the prompt is computed, but no grant came", now_s)
            case _:
                self.lanes.purge(transfer)
                stuck = "cancelled, but its writes do not end" if transfer.stuck_s <= now_s else "the peer is silent"
                transfer.outcome, transfer.reason = ev.SendOutcome.PEER_LOST, transfer.reason or stuck
                self._finish(transfer, now_s)

    # --- records ---

    def _new(self, transfer_id: TransferId, now_s: float, phase: Phase) -> Outgoing:
        transfer = self._transfers[transfer_id] = Outgoing(transfer_id, now_s, phase)
        self._active += 1
        self._unoffered += phase is Phase.EARLY
        self._timers.arm(transfer_id, self._deadline_s(transfer))
        return transfer

    def _known(self, transfer_id: TransferId, now_s: float) -> Outgoing | None:
        """The record of a peer's message, new if the message came before its Offer; None when there are too many."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None and self._unoffered >= self.limits.max_early:
            self.counters.early_refused += 1
            return None
        return transfer or self._new(transfer_id, now_s, Phase.EARLY)

    def _live(self, transfer_id: TransferId) -> Outgoing | None:
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.phase is not Phase.LIVE:
            self.counters.stray += 1
            return None
        return transfer
