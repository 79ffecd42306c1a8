"""The decode side: when is a granted range complete, and when can nothing land in it any more.

Invariants (tests/protocol checks each):

* exactly one Report per Expect, in bounded time but for ABANDONED, which waits until every writer has answered;
* LOADED means: every writer has sealed, and its distinct rectangles are exactly the granted cells, all valid;
* drained=True and Drained are true when they are said: each writer has answered Cancelled or Failed for this epoch, has
  delivered everything it has sealed, or is proven dead;
* whatever comes twice, late, too early, from a stranger or of another epoch changes nothing (bounded and counted).
"""

from __future__ import annotations

from math import inf

from lmkv.ids import Epoch, TransferId

from .events import (
    MOST_DEAD,
    Abandon,
    CancelledCame,
    Drained,
    Expect,
    FailedCame,
    Heard,
    Landed,
    Peer,
    PeerGone,
    ReceiveOutcome,
    ReceiverAction,
    ReceiverEvent,
    Report,
    Sealed,
    SendCancel,
    Tick,
)
from .incoming import Early, Incoming, Key, Note, Phase, ReceiverCounters, ReceiverLimits, Writer, WriterLife
from .prompt import PROMPT_FAULT
from .rects import Coverage
from .timers import Timers

__all__ = ["Receiver", "ReceiverCounters", "ReceiverLimits"]


class Receiver:
    """All grants of one decode rank. Not thread-safe; `now_s` never runs backwards."""

    def __init__(self, limits: ReceiverLimits) -> None:
        self.limits = limits
        self.counters = ReceiverCounters()
        self._grants: dict[Key, Incoming] = {}
        self._newest: dict[TransferId, Epoch] = {}
        self._early: dict[Key, Early] = {}
        self._early_notes = 0
        self._peers: dict[Peer, WriterLife] = {}
        self._timers: Timers[Key | Peer] = Timers()
        self._active = 0
        self._out: list[ReceiverAction] = []

    # --- read-only views ---

    @property
    def active(self) -> int:
        """Grants into which something may still land."""
        return self._active

    def awaited(self, transfer_id: TransferId, epoch: Epoch) -> list[Peer]:
        """The writers of a grant that may still write to it."""
        grant = self._grants.get((transfer_id, epoch))
        return [writer.peer for writer in grant.undrained] if grant else []

    def holds(self, peer: Peer) -> bool:
        """Something of ours may still be written by this peer."""
        open_ = [grant.writers.get(peer) for grant in self._grants.values() if grant.phase is not Phase.OVER]
        return any(writer is not None and not writer.drained for writer in open_)

    def landed_bytes(self, transfer_id: TransferId, epoch: Epoch) -> int:
        grant = self._grants.get((transfer_id, epoch))
        return sum(writer.bytes for writer in grant.writers.values()) if grant else 0

    def next_deadline_s(self) -> float | None:
        """Feed a Tick at this time (an earlier one does no harm)."""
        return self._timers.next_s()

    # --- the machine ---

    def handle(self, event: ReceiverEvent, now_s: float) -> list[ReceiverAction]:
        self._out = []
        match event:
            case Landed() | Sealed() | FailedCame() | CancelledCame():
                self._renew(event.peer, now_s)
                self._note(event, now_s)
            case Heard(peer):
                self._renew(peer, now_s)
            case Expect():
                self._expect(event, now_s)
            case Abandon(tid):
                self._abandon(tid, now_s)
            case PeerGone(peer, dead, fenced):
                self._peer_gone(peer, dead, fenced, now_s)
            case Tick():
                self._tick(now_s)
        out, self._out = self._out, []
        return out

    # --- the engine's events ---

    def _expect(self, event: Expect, now_s: float) -> None:
        key = (event.transfer_id, event.epoch)
        known = self._grants.get(key)
        if known is not None and not self._reused(known, event):
            return
        expected = Coverage()
        for rect in event.rects:
            expected.add(rect)
        grant = Incoming(event, expected, {p: Writer(p) for p in event.writers}, now_s + self.limits.deadline_s)
        self._grants[key] = grant
        self._active += 1
        for peer in event.writers:
            if peer not in self._peers:
                self._renew(peer, now_s)
            if self._peers[peer].dead:
                grant.writers[peer].drained = True
        self._supersede(event, now_s)
        early = self._early.pop(key, Early(now_s))
        self._early_notes -= len(early.notes)
        if known is not None:
            reason = f"the transfer id was used before, by request {known.expect.request_id}"
            self._fail(grant, reason, now_s)
        elif not event.writers and expected.cells:
            self._fail(grant, "nobody was asked to write", now_s)
        elif any(writer.drained for writer in grant.writers.values()):
            self._fail(grant, "peer lost: a writer is dead", now_s)
        else:
            self._check(grant, now_s)
        for note in early.notes:
            self._note(note, now_s)
        self._arm(grant)

    def _reused(self, known: Incoming, event: Expect) -> bool:
        """A second Expect of one grant. True: it comes from another request after the first is over; its writers are
        cancelled like any others'. While the first is not over, the second shares its end."""
        if known.expect == event or event.request_id in known.also:
            self.counters.duplicates += 1
            return False
        if known.phase is Phase.OVER:
            return True
        known.also.append(event.request_id)
        reason = f"the transfer id is in use by request {known.expect.request_id}"
        failed = ReceiveOutcome.FAILED
        self._out.append(Report(event.transfer_id, event.request_id, failed, False, reason, event.epoch))
        return False

    def _supersede(self, event: Expect, now_s: float) -> None:
        """A newer epoch: the older ones of this transfer will not be loaded any more."""
        newest = self._newest.get(event.transfer_id)
        self._newest[event.transfer_id] = event.epoch if newest is None else max(newest, event.epoch)
        if newest is None or newest >= event.epoch:
            return
        for other in [
            g for (tid, epoch), g in self._grants.items() if tid == event.transfer_id and epoch < event.epoch
        ]:
            if other.phase is Phase.LOADING:
                self._fail(other, f"replaced by epoch {event.epoch}", now_s)

    def _abandon(self, transfer_id: TransferId, now_s: float) -> None:
        for grant in [g for (tid, _), g in self._grants.items() if tid == transfer_id]:
            if grant.phase is Phase.LOADING:
                self._fail(grant, "abandoned", now_s, ReceiveOutcome.ABANDONED)
            elif grant.phase is Phase.CANCELLING:
                grant.outcome, grant.grace_end_s = ReceiveOutcome.ABANDONED, inf

    # --- the writers' events ---

    def _note(self, event: Note, now_s: float) -> None:
        key = (event.transfer_id, event.epoch)
        grant = self._grants.get(key)
        if grant is None:
            self._keep_early(key, event, now_s)
            return
        writer = grant.writers.get(event.peer)
        if writer is None:
            self.counters.stray += 1
            return
        match event:
            case Landed():
                self._landed(grant, writer, event, now_s)
            case Sealed():
                self._sealed(grant, writer, event, now_s)
            case FailedCame():
                why = event.reason
                if not why.startswith(PROMPT_FAULT):
                    why = f"rank {writer.peer.rank} failed: {why}"
                self._answered(grant, writer, why, now_s)
            case CancelledCame():
                self._answered(grant, writer, f"rank {writer.peer.rank} says it was cancelled", now_s)

    def _keep_early(self, key: Key, event: Note, now_s: float) -> None:
        if key[1] < self._newest.get(key[0], key[1]):
            self.counters.stray += 1
        elif self._early_notes >= self.limits.max_early:
            self.counters.early_dropped += 1
        else:
            early = self._early.get(key)
            if early is None:
                early = self._early[key] = Early(now_s + self.limits.early_s)
                self._timers.arm(key, early.expires_s)
            early.notes.append(event)
            self._early_notes += 1

    def _landed(self, grant: Incoming, writer: Writer, event: Landed, now_s: float) -> None:
        if event.seq in writer.seqs:
            self.counters.duplicates += 1
            return
        writer.seqs.add(event.seq)
        if grant.phase is not Phase.LOADING:
            self.counters.late_writes += 1
            self.counters.writes_after_cancelled += writer.answered
            return
        if event.fault:
            self.counters.checksum_failures += 1
            why = f"checksum: {event.rect} of rank {writer.peer.rank} {event.fault}"
        else:
            why = writer.land(event.rect, event.payload_bytes, grant.expected)
        if why:
            self._fail(grant, why, now_s)
        else:
            self._check(grant, now_s)

    def _sealed(self, grant: Incoming, writer: Writer, event: Sealed, now_s: float) -> None:
        seal = (event.writes, event.payload_bytes)
        if grant.phase is not Phase.LOADING or writer.seal == seal:
            self.counters.duplicates += 1
        elif writer.seal is not None:
            self._fail(grant, f"seal: {seal} after {writer.seal}", now_s)
        else:
            writer.seal = seal
            self._check(grant, now_s)

    def _answered(self, grant: Incoming, writer: Writer, reason: str, now_s: float) -> None:
        """The writer says that nothing of this epoch will land any more."""
        writer.drained = writer.answered = True
        if grant.phase is Phase.LOADING:
            self._fail(grant, reason, now_s)
        else:
            self._settle(grant, now_s)

    def _check(self, grant: Incoming, now_s: float) -> None:
        """Complete? A writer that has delivered all it has sealed is drained by that."""
        for writer in grant.undrained:
            verdict = writer.verdict(grant.expected, grant.expect.payload_bytes)
            if verdict:
                self._fail(grant, verdict, now_s)
                return
            writer.drained = verdict == ""
        if not grant.undrained:
            self._report(grant, now_s)

    # --- peers ---

    def _renew(self, peer: Peer, now_s: float) -> None:
        """Any sign of life renews the lease."""
        life = self._peers.setdefault(peer, WriterLife())
        if not life.dead:
            life.lease_end_s = now_s + self.limits.lease_s
        self._timers.arm(peer, life.lease_end_s + self.limits.tombstone_s)

    def _peer_gone(self, peer: Peer, dead: bool, fenced: bool, now_s: float) -> None:
        life = self._peers.setdefault(peer, WriterLife())
        life.dead |= dead
        life.lease_end_s = now_s
        self._timers.arm(peer, now_s + self.limits.tombstone_s)
        for grant in [g for g in self._grants.values() if g.phase is not Phase.OVER and peer in g.writers]:
            writer = grant.writers[peer]
            if writer.drained:
                continue
            writer.drained = dead or fenced
            if grant.phase is Phase.LOADING:
                what = "dead" if dead else "cut off" if fenced else "silent"
                self._fail(grant, f"peer lost: rank {peer.rank} is {what}", now_s)
            else:
                self._settle(grant, now_s)

    # --- ends ---

    def _fail(
        self, grant: Incoming, reason: str, now_s: float, outcome: ReceiveOutcome = ReceiveOutcome.FAILED
    ) -> None:
        grant.phase, grant.outcome, grant.reason = Phase.CANCELLING, outcome, reason
        if outcome is ReceiveOutcome.FAILED:
            grant.grace_end_s = now_s + self.limits.cancel_grace_s
        self._cancel(grant, now_s)
        self._settle(grant, now_s)

    def _cancel(self, grant: Incoming, now_s: float) -> None:
        for writer in grant.undrained:
            self._out.append(SendCancel(writer.peer, grant.expect.transfer_id, grant.expect.epoch))
            self.counters.cancels_sent += 1
        grant.resend_s = now_s + self.limits.cancel_resend_s

    def _settle(self, grant: Incoming, now_s: float) -> None:
        """After a change of a failed grant: report or say Drained if nothing can land any more; set the alarm."""
        if not grant.undrained and grant.phase is Phase.CANCELLING:
            self._report(grant, now_s)
        elif not grant.undrained and grant.phase is Phase.QUARANTINED:
            self._out.append(Drained(grant.expect.transfer_id, grant.expect.request_id, grant.expect.epoch))
            self._close(grant, now_s)
        self._arm(grant)

    def _report(self, grant: Incoming, now_s: float) -> None:
        drained = not grant.undrained
        expect = grant.expect
        self._out.append(
            Report(expect.transfer_id, expect.request_id, grant.outcome, drained, grant.reason, expect.epoch)
        )
        if drained:
            self._close(grant, now_s)
        else:
            grant.phase, grant.grace_end_s = Phase.QUARANTINED, inf

    def _close(self, grant: Incoming, now_s: float) -> None:
        for request_id in grant.also:
            self._out.append(Drained(grant.expect.transfer_id, request_id, grant.expect.epoch))
        grant.phase = Phase.OVER
        grant.expires_s = now_s + self.limits.tombstone_s
        grant.expected = Coverage()
        self._active -= 1
        self._arm(grant)

    # --- time ---

    def _arm(self, grant: Incoming) -> None:
        self._timers.arm(grant.key, self._deadline_s(grant))

    def _deadline_s(self, grant: Incoming) -> float:
        match grant.phase:
            case Phase.LOADING:
                return min([grant.deadline_s, *(self._peers[w.peer].lease_end_s for w in grant.undrained)])
            case Phase.OVER:
                return grant.expires_s
        return min(grant.resend_s, grant.grace_end_s)

    def _tick(self, now_s: float) -> None:
        for key in self._timers.due(now_s):
            if isinstance(key, Peer):
                self._drop_silent(key, now_s)
                continue
            early = self._early.get(key)
            if early is not None:
                self._drop_early(key, early, now_s)
            grant = self._grants.get(key)
            if grant is not None:
                self._expire(grant, now_s)

    def _expire(self, grant: Incoming, now_s: float) -> None:
        if grant.phase is Phase.LOADING:
            silent = [w.peer.rank for w in grant.undrained if self._peers[w.peer].lease_end_s <= now_s]
            if silent:
                self._fail(grant, f"peer lost: ranks {silent} are silent", now_s)
            elif grant.deadline_s <= now_s:
                self._fail(grant, f"deadline of {self.limits.deadline_s:g} s", now_s)
        elif grant.phase is Phase.OVER and grant.expires_s <= now_s:
            self._forget(grant)
            return
        elif grant.phase is not Phase.OVER:
            if grant.grace_end_s <= now_s:
                self._report(grant, now_s)
            if grant.resend_s <= now_s:
                self._cancel(grant, now_s)
        self._arm(grant)

    def _forget(self, grant: Incoming) -> None:
        tid, epoch = grant.key
        del self._grants[grant.key]
        if self._newest.get(tid) == epoch:
            del self._newest[tid]

    def _drop_early(self, key: Key, early: Early, now_s: float) -> None:
        if early.expires_s <= now_s:
            del self._early[key]
            self._early_notes -= len(early.notes)
        else:
            self._timers.arm(key, early.expires_s)

    def _drop_silent(self, peer: Peer, now_s: float) -> None:
        """Forget a peer that has been silent for long and that no open grant names; `MOST_DEAD` dead are remembered."""
        life = self._peers[peer]
        idle_s = life.lease_end_s + self.limits.tombstone_s
        if life.dead and sum(other.dead for other in self._peers.values()) <= MOST_DEAD:
            return
        if idle_s > now_s:
            self._timers.arm(peer, idle_s)
        elif any(peer in g.writers for g in self._grants.values() if g.phase is not Phase.OVER):
            self._timers.arm(peer, now_s + self.limits.tombstone_s)
        else:
            del self._peers[peer]
