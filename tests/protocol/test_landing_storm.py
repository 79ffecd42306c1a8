"""Sender, Receiver and SlotRing together, with everything delivered in any order: no write ever lands in a slot that is
not its own, what is taken out is what was put in, and every slot comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.receiver import Receiver, ReceiverLimits
from lmkv.transfer.sender import Sender, SenderLimits
from lmkv.transfer.slots import Borrower, Loan, SlotRing

from .driving import P as PROMPT

LAYERS, BLOCKS, CELL_BYTES = 3, 4, 10
P, D = ev.Peer(Incarnation("p"), Rank(0)), ev.Peer(Incarnation("d"), Rank(1))
EPOCH = Epoch(1)
WHOLE = ev.Rect(0, 0, LAYERS, 0, BLOCKS)


@dataclass
class Storm:
    """Whoever acts puts messages into `net`; `step` delivers one of them, wherever it stands."""

    random: Random
    slots: int
    corrupt: float = 0.0
    """How often what landed is not what was sent."""
    now: float = 0.0
    sender: Sender = field(
        default_factory=lambda: Sender(SenderLimits((CELL_BYTES,), (LAYERS,), max_inflight_bytes=100))
    )
    receiver: Receiver = field(default_factory=lambda: Receiver(ReceiverLimits()))
    net: list[tuple[str, object]] = field(default_factory=list)
    memory: dict[int, tuple[TransferId, ev.Rect]] = field(default_factory=dict)
    loaded: dict[TransferId, set[tuple[int, int]]] = field(default_factory=dict)
    reports: dict[TransferId, ev.Report] = field(default_factory=dict)
    finished: list[ev.Finished] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ring = SlotRing(self.slots, 3)

    def begin(self, tid: TransferId) -> None:
        """Grant and credit travel on their own; prefill's engine announces the request when it likes."""
        self.loaded[tid] = set()
        grant = ev.Granted(D, tid, EPOCH, ((0, BLOCKS),), PROMPT, slot_bytes=30)
        expect = ev.Expect(tid, RequestId(tid), EPOCH, (P,), (WHOLE,), LAYERS * BLOCKS * CELL_BYTES)
        self.net += [("grant", (grant, expect)), ("sender", ev.Offer(tid, RequestId(tid), PROMPT))]

    def step(self) -> None:
        kind, what = self.net.pop(self.random.randrange(len(self.net)))
        match kind, what:
            case "grant", (ev.Granted() as grant, ev.Expect() as expect):
                self.to_receiver(expect)
                self.lend(self.ring.open(Borrower(P, expect.transfer_id, EPOCH)))
                self.to_sender(grant)
            case "sender", ev.Offer() as offer:
                self.to_sender(offer)
                rects = [ev.Rect(0, layer, layer + 1, 0, BLOCKS) for layer in range(LAYERS)]
                self.net += [
                    ("compute", [*(ev.Computed(offer.transfer_id, r) for r in rects), ev.PromptDone(offer.transfer_id)])
                ]
            case "compute", [first, *rest]:
                self.to_sender(first)
                self.net += [("compute", rest)] if rest else []
            case "sender", event:
                self.to_sender(event)  # type: ignore[arg-type]
            case "receiver", event:
                self.to_receiver(event)  # type: ignore[arg-type]
            case "write", ev.PostWrite() as post:
                self.land(post)
            case "note", ev.PostWrite() as post:
                self.take_out(post)
        self.now += self.random.choice((0.01, 0.01, 0.6))  # a cancelled grant is reported after a grace of 2 s
        for event in (ev.Heard(D), ev.Tick()):
            self.to_sender(event)
        for event in (ev.Heard(P), ev.Tick()):
            self.to_receiver(event)

    def land(self, post: ev.PostWrite) -> None:
        assert post.slot in self.ring.held(Borrower(P, post.transfer_id, EPOCH)), "a write landed in another's slot"
        self.memory[post.slot] = (post.transfer_id, post.rect)
        done = ev.WriteDone(post.transfer_id, post.seq, "lost" if self.random.random() < 0.05 else "")
        self.net += [("sender", done)] if done.error else [("sender", done), ("note", post)]

    def take_out(self, post: ev.PostWrite) -> None:
        tid, borrower = post.transfer_id, Borrower(P, post.transfer_id, EPOCH)
        if P in self.receiver.awaited(tid, EPOCH) and tid not in self.reports:
            assert self.memory[post.slot] == (tid, post.rect), "overwritten before it was taken out"
            self.loaded[tid] |= set(self.cells(post.rect))
            self.lend(self.ring.taken_out(borrower, post.slot))
        size = len(self.cells(post.rect)) * CELL_BYTES
        right = "" if self.random.random() >= self.corrupt else "is corrupt"
        self.to_receiver(ev.Landed(P, tid, EPOCH, post.seq, post.rect, size, right))

    @staticmethod
    def cells(rect: ev.Rect) -> list[tuple[int, int]]:
        return [(n, b) for n in range(rect.layer_lo, rect.layer_hi) for b in range(rect.block_lo, rect.block_hi)]

    def lend(self, loans: list[Loan]) -> None:
        for loan in loans:
            credited = ev.Credited(D, loan.borrower.transfer_id, EPOCH, loan.slots)
            # The shell keeps credits that overtake their grant; here they are sent after it.
            self.net.append(("sender", credited))

    def to_sender(self, event: ev.SenderEvent) -> None:
        for action in self.sender.handle(event, self.now):
            match action:
                case ev.PostWrite():
                    assert action.slot >= 0
                    self.net.append(("write", action))
                case ev.SendSeal(_, tid, epoch, writes, size):
                    self.net.append(("receiver", ev.Sealed(P, tid, epoch, writes, size)))
                case ev.SendCancelled(_, tid, epoch):
                    self.net.append(("receiver", ev.CancelledCame(P, tid, epoch)))
                case ev.SendFailed(_, tid, epoch, reason):
                    self.net.append(("receiver", ev.FailedCame(P, tid, epoch, reason)))
                case ev.Finished():
                    self.finished.append(action)

    def to_receiver(self, event: ev.ReceiverEvent) -> None:
        for action in self.receiver.handle(event, self.now):
            match action:
                case ev.SendCancel(_, tid, epoch):
                    self.net.append(("sender", ev.CancelCame(D, tid, epoch)))
                case ev.Report(tid):
                    assert tid not in self.reports
                    self.reports[tid] = action
                    borrower = Borrower(P, tid, EPOCH)
                    if action.drained:
                        self.lend(self.ring.close(borrower))
                    else:
                        self.ring.sated(borrower)
                case ev.Drained(tid):
                    self.lend(self.ring.close(Borrower(P, tid, EPOCH)))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    slots=st.integers(1, 6),
    transfers=st.integers(1, 4),
    abandons=st.floats(0, 0.03),
    corrupt=st.floats(0, 0.1),
)
@example(seed=1, slots=1, transfers=4, abandons=0.0, corrupt=0.0)
def test_slots_are_safe_and_come_back(seed: int, slots: int, transfers: int, abandons: float, corrupt: float) -> None:
    storm = Storm(Random(seed), slots, corrupt)
    tids = [TransferId(f"t{i}") for i in range(transfers)]
    for tid in tids:
        storm.begin(tid)
    for _ in range(5000):
        if not storm.net:
            break
        if storm.random.random() < abandons:
            storm.to_receiver(ev.Abandon(storm.random.choice(tids)))
        storm.step()
    assert not storm.net
    for _ in range(40):  # whatever still waits for time
        storm.now += 10
        storm.to_sender(ev.Tick())
        storm.to_receiver(ev.Tick())
        while storm.net:
            storm.step()
    offered = [end.request_id for end in storm.finished if end.request_id is not None]
    assert set(storm.reports) == set(tids) and sorted(offered) == tids
    assert storm.ring.free == slots, "every slot came back"
    for tid, report in storm.reports.items():
        if report.outcome is ev.ReceiveOutcome.LOADED:
            assert storm.loaded[tid] == set(storm.cells(WHOLE))
    if not abandons and not corrupt and not storm.sender.counters.write_errors:
        assert all(r.outcome is ev.ReceiveOutcome.LOADED for r in storm.reports.values())
