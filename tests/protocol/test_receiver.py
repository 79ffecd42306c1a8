"""The decode side event by event: when a grant is complete, when it is drained, what is ignored."""

from __future__ import annotations

import pytest

from lmkv.errors import ConfigError
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer.events import (
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
    ReceiverAction,
    ReceiverEvent,
    Rect,
    Report,
    Sealed,
    SendCancel,
    Tick,
)
from lmkv.transfer.receiver import Receiver, ReceiverLimits

T = TransferId("t")
R = RequestId("r")
E1 = Epoch(1)
P = Peer(Incarnation("p"), Rank(0))
Q = Peer(Incarnation("p"), Rank(1))
STRANGER = Peer(Incarnation("s"), Rank(0))
ALL = Rect(0, 0, 4, 0, 4)
TOP, BOTTOM = Rect(0, 0, 2, 0, 4), Rect(0, 2, 4, 0, 4)


class Run:
    def __init__(self, limits: ReceiverLimits | None = None) -> None:
        self.machine = Receiver(limits or ReceiverLimits())
        self.now = 0.0

    def go(self, *events: ReceiverEvent, at: float | None = None) -> list[ReceiverAction]:
        self.now = self.now if at is None else at
        return [action for event in events for action in self.machine.handle(event, self.now)]

    def expecting(self, *writers: Peer) -> Run:
        assert self.go(expect(*writers)) == []
        return self


def expect(*writers: Peer, epoch: int = 1, rects: tuple[Rect, ...] = (ALL,), size: int = 160) -> Expect:
    return Expect(T, R, Epoch(epoch), writers or (P,), rects, size)


def landed(seq: int, rect: Rect, peer: Peer = P, epoch: int = 1, *, valid: bool = True) -> Landed:
    size = 10 * (rect.layer_hi - rect.layer_lo) * (rect.block_hi - rect.block_lo)
    return Landed(peer, T, Epoch(epoch), seq, rect, size, "" if valid else "is corrupt")


def sealed(writes: int = 2, size: int = 160, peer: Peer = P, epoch: int = 1) -> Sealed:
    return Sealed(peer, T, Epoch(epoch), writes, size)


def reports(actions: list[ReceiverAction]) -> list[tuple[str, bool]]:
    return [(str(a.outcome), a.drained) for a in actions if isinstance(a, Report)]


def reason(actions: list[ReceiverAction]) -> str:
    return next(a.reason for a in actions if isinstance(a, Report))


def cancels(actions: list[ReceiverAction]) -> list[Peer]:
    return [a.peer for a in actions if isinstance(a, SendCancel)]


GOOD = (landed(0, TOP), landed(1, BOTTOM), sealed())


# --- completeness ---


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_loaded_in_any_order(order: tuple[int, ...]) -> None:
    run = Run().expecting(P)
    assert run.go(*(GOOD[i] for i in order[:2])) == []
    assert reports(run.go(GOOD[order[2]])) == [("loaded", True)]
    assert run.machine.active == 0


def test_duplicates_count_once() -> None:
    run = Run().expecting(P)
    assert run.go(GOOD[0], GOOD[0], GOOD[2], GOOD[2]) == []
    assert reports(run.go(GOOD[1], GOOD[1])) == [("loaded", True)]
    assert run.go(*GOOD, expect(P), *GOOD) == []
    assert run.machine.counters.duplicates > 0 and run.machine.counters.late_writes == 0


def test_a_retry_of_the_same_rect_counts_once() -> None:
    run = Run().expecting(P)
    assert run.go(landed(0, TOP), landed(5, TOP), GOOD[2]) == []
    assert reports(run.go(GOOD[1])) == [("loaded", True)]


def test_every_writer_has_to_deliver() -> None:
    run = Run().expecting(P, Q)
    assert run.go(*GOOD) == []
    assert run.machine.awaited(T, E1) == [Q]
    mine = (landed(0, TOP, Q), landed(1, BOTTOM, Q), sealed(peer=Q))
    assert reports(run.go(*mine)) == [("loaded", True)]


def test_nothing_to_load() -> None:
    assert Run().expecting(P).go(sealed(0, 0))[-1:] != [], "a seal of nothing does not fit a grant"
    run = Run()
    assert reports(run.go(expect(P, rects=(), size=0), sealed(0, 0))) == [("loaded", True)]
    assert reports(Run().go(Expect(T, R, E1, (), (), 0))) == [("loaded", True)]
    assert reports(Run().go(Expect(T, R, E1, (), (ALL,), 160))) == [("failed", True)]


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ((landed(0, Rect(0, 0, 4, 3, 5)),), "outside grant"),
        ((landed(0, Rect(1, 0, 4, 0, 4)),), "outside grant"),
        ((landed(0, TOP), landed(1, Rect(0, 1, 3, 0, 4))), "overlap"),
        ((landed(0, TOP, valid=False),), "checksum"),
        ((sealed(size=150),), "seal"),
        ((sealed(), sealed(3)), "seal"),
        ((landed(0, ALL), sealed(2)), "count"),
        ((landed(0, TOP), landed(1, BOTTOM), sealed(1)), "count"),
        ((landed(0, TOP), sealed(1)), "count"),
    ],
)
def test_what_cannot_be_right_fails_and_cancels(events: tuple[ReceiverEvent, ...], why: str) -> None:
    run = Run().expecting(P, Q)
    actions = run.go(*events)
    assert cancels(actions) == [P, Q] and reports(actions) == []
    actions = run.go(CancelledCame(P, T, E1), CancelledCame(Q, T, E1))
    assert reports(actions) == [("failed", True)] and reason(actions).startswith(why)


# --- what came too early, too late, from elsewhere ---


def test_notes_before_the_expect_are_kept() -> None:
    run = Run()
    assert run.go(*GOOD) == []
    assert reports(run.go(expect(P))) == [("loaded", True)]


def test_a_failure_before_the_expect_is_kept() -> None:
    run = Run()
    run.go(FailedCame(P, T, E1, "cannot"))
    assert reports(run.go(expect(P))) == [("failed", True)]


def test_early_notes_are_bounded_in_number_and_time() -> None:
    run = Run(ReceiverLimits(max_early=2))
    run.go(*GOOD)
    assert run.machine.counters.early_dropped == 1 and run.machine._early_notes == 2
    run.go(Tick(), at=60.0)
    assert run.machine._early_notes == 0 and not run.machine._early
    assert run.go(expect(P)) == []


def test_other_epochs_and_strangers_change_nothing() -> None:
    run = Run()
    run.go(expect(P, epoch=2))
    run.go(*GOOD, CancelledCame(P, T, E1), landed(0, TOP, STRANGER, 2), FailedCame(STRANGER, T, Epoch(2), "x"))
    assert run.machine.counters.stray == 6 and run.machine.landed_bytes(T, Epoch(2)) == 0
    mine = (landed(0, TOP, epoch=2), landed(1, BOTTOM, epoch=2), sealed(epoch=2))
    assert reports(run.go(*mine)) == [("loaded", True)]


def test_late_writes_are_counted() -> None:
    run = Run().expecting(P)
    run.go(Abandon(T), landed(0, TOP))
    counters = run.machine.counters
    assert (counters.late_writes, counters.writes_after_cancelled) == (1, 0)
    run.go(CancelledCame(P, T, E1), landed(1, BOTTOM))
    assert (counters.late_writes, counters.writes_after_cancelled) == (2, 1)


def test_a_newer_epoch_replaces_the_older() -> None:
    run = Run().expecting(P)
    assert run.go(expect(P, epoch=2)) == [SendCancel(P, T, E1)]
    actions = run.go(CancelledCame(P, T, E1))
    assert reports(actions) == [("failed", True)] and "replaced" in reason(actions)
    mine = (landed(0, TOP, epoch=2), landed(1, BOTTOM, epoch=2), sealed(epoch=2))
    assert reports(run.go(*mine)) == [("loaded", True)]


# --- ends ---


def test_a_failed_writer_is_drained_the_others_are_cancelled() -> None:
    run = Run().expecting(P, Q)
    actions = run.go(FailedCame(P, T, E1, "no"))
    assert cancels(actions) == [Q] and reports(actions) == []
    assert reports(run.go(FailedCame(Q, T, E1, "cancelled too"))) == [("failed", True)]


def test_a_writer_that_delivered_all_is_not_cancelled() -> None:
    run = Run().expecting(P, Q)
    run.go(*GOOD)
    assert cancels(run.go(FailedCame(Q, T, E1, "no"))) == []


def test_deadline_grace_and_quarantine() -> None:
    run = Run(ReceiverLimits(lease_s=1000.0)).expecting(P)
    assert run.machine.next_deadline_s() == 120.0
    assert run.go(Tick(), at=119.0) == []
    assert run.go(Tick(), at=120.0) == [SendCancel(P, T, E1)]
    assert cancels(run.go(Tick(), at=121.0)) == [P], "repeated until answered"
    actions = run.go(Tick(), at=122.0)
    assert reports(actions) == [("failed", False)] and "deadline" in reason(actions) and cancels(actions) == [P]
    assert cancels(run.go(Tick(), at=500.0)) == [P] and run.go(Abandon(T)) == []
    assert run.go(CancelledCame(P, T, E1)) == [Drained(T, R, E1)]
    assert run.go(CancelledCame(P, T, E1), Tick(), at=501.0) == []


def test_a_silent_writer() -> None:
    run = Run().expecting(P, Q)
    for at in range(1, 10):
        assert run.go(Heard(P), Tick(), at=float(at)) == []
    assert cancels(run.go(Tick(), at=10.0)) == [P, Q]
    assert run.go(CancelledCame(P, T, E1)) == []
    actions = run.go(Tick(), at=12.0)
    assert reports(actions) == [("failed", False)] and "silent" in reason(actions)
    assert run.go(PeerGone(Q, False)) == []
    assert run.go(PeerGone(Q, True)) == [Drained(T, R, E1)]


def test_writes_are_a_sign_of_life() -> None:
    run = Run().expecting(P)
    run.go(landed(0, TOP), at=9.0)
    assert run.go(Tick(), at=18.0) == []


def test_a_dead_writer_is_drained_at_once_and_stays_dead() -> None:
    run = Run().expecting(P)
    assert reports(run.go(PeerGone(P, True))) == [("failed", True)]
    run.go(Tick(), at=500.0)
    assert reports(run.go(expect(P, epoch=2))) == [("failed", True)]


def test_abandon_waits_and_repeats() -> None:
    run = Run().expecting(P)
    assert run.go(Abandon(T)) == [SendCancel(P, T, E1)]
    for at in range(1, 300):
        assert run.go(Tick(), at=float(at)) == [SendCancel(P, T, E1)]
    assert reports(run.go(CancelledCame(P, T, E1))) == [("abandoned", True)]
    assert run.go(Abandon(T)) == []


def test_abandon_while_failing_waits_for_drain() -> None:
    run = Run().expecting(P)
    run.go(landed(0, TOP, valid=False), Abandon(T))
    assert reports(run.go(Tick(), at=100.0)) == []
    assert reports(run.go(CancelledCame(P, T, E1))) == [("abandoned", True)]


def test_abandon_after_the_report_is_nothing() -> None:
    run = Run().expecting(P)
    run.go(*GOOD)
    assert run.go(Abandon(T), Abandon(TransferId("unknown"))) == []


def test_everything_is_forgotten() -> None:
    run = Run().expecting(P)
    run.go(*GOOD)
    run.go(Tick(), at=120.0)
    run.go(Tick(), at=1000.0)
    assert not run.machine._grants and not run.machine._newest and not run.machine._peers
    assert run.machine.next_deadline_s() is None


def test_the_dead_are_remembered_up_to_a_number() -> None:
    run = Run()
    for i in range(MOST_DEAD + 50):
        run.go(PeerGone(Peer(Incarnation(f"dead {i}"), Rank(0)), True))
    run.go(Tick(), at=1000.0)
    assert len(run.machine._peers) == MOST_DEAD


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError):
        ReceiverLimits(deadline_s=0)


# --- a transfer id that is used again ---


def test_a_reused_id_fails_with_its_reason_and_frees_its_blocks() -> None:
    run = Run().expecting(P)
    assert reports(run.go(*GOOD)) == [("loaded", True)]
    again = Expect(T, RequestId("again"), E1, (P,), (ALL,), 160)
    assert cancels(run.go(again)) == [P], "nothing is known of what may land in the new blocks"
    actions = run.go(CancelledCame(P, T, E1))
    assert reports(actions) == [("failed", True)] and "used before, by request r" in reason(actions)
    assert run.machine.active == 0


def test_a_reused_id_can_be_abandoned_and_ends_without_an_answer() -> None:
    run = Run().expecting(P)
    run.go(*GOOD)
    run.go(Expect(T, RequestId("again"), E1, (P,), (ALL,), 160), Abandon(T))
    assert reports(run.go(CancelledCame(P, T, E1))) == [("abandoned", True)]
    run = Run().expecting(P)
    run.go(*GOOD)
    run.go(Expect(T, RequestId("again"), E1, (P,), (ALL,), 160))
    assert reports(run.go(Tick(), at=2.0)) == [("failed", False)], "by the grace, not by the deadline"


def test_an_id_in_use_fails_at_once_and_is_drained_with_the_first() -> None:
    run = Run().expecting(P)
    again = Expect(T, RequestId("again"), E1, (P,), (ALL,), 160)
    actions = run.go(again, again)
    assert reports(actions) == [("failed", False)] and "in use by request r" in reason(actions)
    assert run.machine.awaited(T, E1) == [P]
    actions = run.go(*GOOD)
    assert reports(actions) == [("loaded", True)]
    assert [a.request_id for a in actions if isinstance(a, Drained)] == ["again"]


# --- cut off, and back ---


def test_a_peer_that_was_cut_off_may_be_granted_again() -> None:
    run = Run().expecting(P)
    assert reports(run.go(PeerGone(P, False, fenced=True))) == [("failed", True)]
    run.go(Heard(P), expect(P, epoch=2))
    assert reports(run.go(landed(0, TOP, epoch=2), landed(1, BOTTOM, epoch=2), sealed(epoch=2))) == [("loaded", True)]
