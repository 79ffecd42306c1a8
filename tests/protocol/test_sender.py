"""The prefill side event by event: what is posted, in which pieces, what is answered, how each transfer ends."""

from __future__ import annotations

import pytest

from lmkv.errors import ConfigError
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer.events import (
    CancelCame,
    Computed,
    Finished,
    Granted,
    Heard,
    NotNeededCame,
    Offer,
    Peer,
    PeerGone,
    PostWrite,
    PromptDone,
    Rect,
    SendCancelled,
    SenderAction,
    SenderEvent,
    SendFailed,
    SendSeal,
    Tick,
    Withdraw,
    WriteDone,
)
from lmkv.transfer.sender import Sender, SenderLimits

T, U = TransferId("t"), TransferId("u")
R = RequestId("r")
D = Peer(Incarnation("d"), Rank(0))
OTHER = Peer(Incarnation("e"), Rank(0))
LIMITS = SenderLimits((10,), (4,), max_post_bytes=80, max_inflight_bytes=160)
ALL = Rect(0, 0, 4, 0, 4)


class Run:
    """A sender and its clock. `go` feeds events and returns all actions."""

    def __init__(self, limits: SenderLimits = LIMITS) -> None:
        self.machine = Sender(limits)
        self.now = 0.0

    def go(self, *events: SenderEvent, at: float | None = None) -> list[SenderAction]:
        self.now = self.now if at is None else at
        return [action for event in events for action in self.machine.handle(event, self.now)]

    def live(self, *rects: Rect, done: bool = True) -> list[SenderAction]:
        computed = [Computed(T, rect) for rect in rects]
        return self.go(Offer(T, R), grant(1), *computed, *([PromptDone(T)] if done else []))

    def land(self, *seqs: int, error: str = "") -> list[SenderAction]:
        return self.go(*(WriteDone(T, seq, error) for seq in seqs))


def grant(epoch: int, blocks: tuple[int, int] = (0, 4), peer: Peer = D, tid: TransferId = T) -> Granted:
    return Granted(peer, tid, Epoch(epoch), (blocks,))


def cancel(epoch: int, peer: Peer = D, tid: TransferId = T) -> CancelCame:
    return CancelCame(peer, tid, Epoch(epoch))


def posts(actions: list[SenderAction]) -> list[tuple[int, Rect]]:
    return [(a.seq, a.rect) for a in actions if isinstance(a, PostWrite)]


def ends(actions: list[SenderAction]) -> list[str]:
    return [str(a.outcome) for a in actions if isinstance(a, Finished)]


def of(kind: type, actions: list[SenderAction]) -> list[SenderAction]:
    return [a for a in actions if isinstance(a, kind)]


# --- posting ---


def test_posts_are_cut_by_layers_then_by_blocks() -> None:
    run = Run(SenderLimits((10,), (4,), max_post_bytes=80))
    assert posts(run.live(ALL)) == [(0, Rect(0, 0, 2, 0, 4)), (1, Rect(0, 2, 4, 0, 4))]
    run = Run(SenderLimits((10,), (4,), max_post_bytes=30))
    assert posts(run.live(Rect(0, 0, 1, 0, 4))) == [(0, Rect(0, 0, 1, 0, 3)), (1, Rect(0, 0, 1, 3, 4))]


def test_a_cell_larger_than_a_post_and_a_window_goes_alone() -> None:
    run = Run(SenderLimits((10,), (1,), max_post_bytes=5, max_inflight_bytes=6))
    assert len(posts(run.live(Rect(0, 0, 1, 0, 4)))) == 1
    assert len(posts(run.land(0))) == 1


def test_the_window_holds_back_and_keeps_order() -> None:
    run = Run()
    first = [Computed(T, Rect(0, layer, layer + 1, 0, 4)) for layer in range(4)]
    actions = run.go(Offer(T, R), grant(1), Offer(U, RequestId("s")), grant(1, tid=U), *first)
    assert len(posts(actions)) == 4 and run.machine.in_flight_bytes(D) == 160
    assert run.go(Computed(U, Rect(0, 0, 1, 0, 2)), Computed(U, Rect(0, 1, 2, 0, 4))) == []
    assert run.machine.queued(D) == 2
    assert [a.rect for a in run.land(1) if isinstance(a, PostWrite)] == [Rect(0, 0, 1, 0, 2)]
    assert [a.rect for a in run.land(0) if isinstance(a, PostWrite)] == [Rect(0, 1, 2, 0, 4)]


def test_only_granted_blocks_are_sent() -> None:
    run = Run()
    actions = run.go(Offer(T, R), grant(1, (1, 3)), Computed(T, ALL), PromptDone(T))
    assert posts(actions) == [(0, Rect(0, 0, 4, 1, 3))]
    assert of(SendSeal, actions) == [SendSeal(D, T, Epoch(1), 1, 80)]


def test_the_backlog_before_the_grant_is_merged() -> None:
    run = Run(SenderLimits((10,), (4,)))
    rects = [Rect(0, layer, layer + 1, lo, lo + 2) for lo in (0, 2) for layer in range(4)]
    run.go(Offer(T, R), *(Computed(T, rect) for rect in rects))
    assert posts(run.go(grant(1))) == [(0, ALL)]


def test_what_was_posted_is_not_posted_again() -> None:
    run = Run()
    run.live(Rect(0, 0, 2, 0, 2), done=False)
    assert posts(run.go(Computed(T, Rect(0, 0, 2, 0, 3)))) == [(1, Rect(0, 0, 2, 2, 3))]
    assert run.go(Computed(T, Rect(0, 0, 2, 0, 3)), grant(1), grant(0)) == []


def test_a_newer_grant_starts_over_from_the_backlog() -> None:
    run = Run()
    run.live(ALL)
    actions = run.go(grant(2, (0, 2)))
    assert posts(actions) == [] and run.machine.queued(D) > 0, "the old epoch still fills the window"
    actions = run.land(0, 1)
    assert posts(actions) == [(2, Rect(0, 0, 4, 0, 2))]
    assert of(SendSeal, actions) == [SendSeal(D, T, Epoch(2), 1, 80)]
    assert ends(run.land(2)) == ["sent"]


def test_an_old_write_that_fails_is_not_repeated() -> None:
    run = Run()
    run.live(ALL)
    run.go(grant(2))
    assert posts(run.land(0, error="x")) == [(2, Rect(0, 0, 2, 0, 4))], "the new epoch's, not the old one again"
    assert run.machine.counters.retries == 0


def test_the_lease_fences_and_a_beat_opens() -> None:
    run = Run()
    run.live(done=False)
    run.go(at=9.9)
    assert len(posts(run.go(Computed(T, Rect(0, 0, 1, 0, 1))))) == 1
    run.go(at=10.0)
    assert run.go(Computed(T, Rect(0, 1, 2, 0, 1))) == []
    assert len(posts(run.go(Heard(D)))) == 1


def test_a_suspected_peer_gets_nothing_until_it_is_heard() -> None:
    run = Run()
    run.live(done=False)
    run.go(PeerGone(D, False))
    assert run.go(Computed(T, Rect(0, 1, 2, 0, 1))) == []
    assert len(posts(run.go(Heard(D)))) == 1


# --- sealing and retries ---


def test_the_seal_comes_with_the_last_post() -> None:
    run = Run()
    actions = run.live(ALL)
    assert [type(a) for a in actions] == [PostWrite, PostWrite, SendSeal]
    assert actions[-1] == SendSeal(D, T, Epoch(1), 2, 160)
    assert run.land(0) == [] and ends(run.land(1)) == ["sent"]
    assert run.machine.active == 0


def test_an_empty_grant_is_sealed_at_once() -> None:
    run = Run()
    actions = run.go(Offer(T, R), grant(1, (4, 4)), PromptDone(T))
    assert of(SendSeal, actions) == [SendSeal(D, T, Epoch(1), 0, 0)] and ends(actions) == ["sent"]


def test_one_retry_under_a_new_seq_and_the_seal_stays() -> None:
    run = Run()
    run.live(ALL)
    assert posts(run.land(0, error="x")) == [(2, Rect(0, 0, 2, 0, 4))]
    actions = run.land(1, 2)
    assert ends(actions) == ["sent"] and of(SendSeal, actions) == []


def test_the_second_error_of_a_rect_fails_after_drain() -> None:
    run = Run()
    run.live(ALL)
    run.land(0, error="x")
    assert run.land(2, error="y") == []
    actions = run.land(1)
    assert [type(a) for a in actions] == [SendFailed, Finished] and ends(actions) == ["failed"]
    assert "y" in actions[0].reason and actions[0].landed_bytes == 80  # type: ignore[union-attr]


def test_incomplete() -> None:
    run = Run()
    actions = run.live(Rect(0, 0, 3, 0, 4))
    assert ends(actions) == [] and of(SendSeal, actions) == []
    actions = run.land(*range(run.machine.in_flight(T)))
    assert ends(actions) == ["failed"]
    assert "incomplete: 12 of 16" in of(SendFailed, actions)[0].reason  # type: ignore[union-attr]


@pytest.mark.parametrize("rect", [Rect(1, 0, 1, 0, 1), Rect(0, 0, 5, 0, 1), Rect(0, 1, 1, 0, 1), Rect(0, 0, 1, -1, 1)])
def test_an_impossible_rect_fails_the_transfer_only(rect: Rect) -> None:
    run = Run()
    assert ends(run.live(rect, done=False)) == ["failed"]


def test_a_grant_of_other_groups_fails() -> None:
    run = Run()
    actions = run.go(Offer(T, R), Granted(D, T, Epoch(1), ((0, 1), (0, 1))))
    assert ends(actions) == ["failed"] and len(of(SendFailed, actions)) == 1


# --- before the offer ---


def test_a_grant_may_come_first() -> None:
    run = Run()
    run.go(grant(1))
    assert len(posts(run.go(Offer(T, R), Computed(T, ALL)))) == 2


def test_an_early_grant_expires_and_the_late_offer_ends_too() -> None:
    run = Run()
    run.go(grant(1))
    actions = run.go(Tick(), at=60.0)
    assert [type(a) for a in actions] == [SendFailed, Finished] and ends(actions) == ["expired"]
    assert run.go(Offer(T, R)) == [Finished(T, R, actions[1].outcome, actions[1].reason)]  # type: ignore[union-attr]


def test_early_ones_are_bounded_and_what_is_refused_is_not_answered() -> None:
    run = Run(SenderLimits((10,), (4,), max_early=2))
    run.go(grant(1), cancel(1, tid=U))
    v = TransferId("v")
    assert run.go(grant(1, tid=v), cancel(1, tid=v)) == [], "an answer that is not remembered could become a lie"
    assert run.machine.counters.early_refused == 2
    run.go(Offer(T, R))
    assert of(SendCancelled, run.go(cancel(1, tid=v))) == [SendCancelled(D, v, Epoch(1))]


def test_not_needed_before_and_after_the_offer() -> None:
    run = Run()
    assert run.go(NotNeededCame(T, "hit")) == []
    assert ends(run.go(Offer(T, R))) == ["not_needed"]
    assert ends(run.go(Offer(U, R), NotNeededCame(U, "hit"))) == ["not_needed"]
    assert of(SendFailed, run.go(grant(1, tid=U))) != []


# --- cancel ---


def test_cancel_waits_for_what_is_in_flight() -> None:
    run = Run()
    run.live(ALL, done=False)
    assert run.go(cancel(1), cancel(1)) == []
    assert run.land(0) == []
    assert run.land(1, error="any")[0] == SendCancelled(D, T, Epoch(1))
    assert run.go(cancel(1)) == [SendCancelled(D, T, Epoch(1))], "a tombstone answers again"


def test_cancel_of_the_unknown_is_answered_and_remembered() -> None:
    run = Run()
    assert run.go(cancel(3)) == [SendCancelled(D, T, Epoch(3))]
    assert run.go(grant(2)) == [SendCancelled(D, T, Epoch(2))], "answered, not served"
    assert ends(run.go(Offer(T, R))) == ["cancelled"]
    assert run.go(Computed(T, ALL)) == []


def test_cancel_of_an_older_epoch_leaves_the_newer_one() -> None:
    run = Run()
    run.live(ALL)
    run.go(grant(2))
    assert run.go(cancel(1)) == [], "its writes are in flight"
    run.land(0)
    assert run.land(1)[0] == SendCancelled(D, T, Epoch(1))
    assert ends(run.land(2, 3)) == ["sent"]


def test_cancel_of_another_peer_is_answered_and_changes_nothing() -> None:
    run = Run()
    run.live(ALL)
    assert run.go(cancel(5, OTHER)) == [SendCancelled(OTHER, T, Epoch(5))]
    assert ends(run.land(0, 1)) == ["sent"]


def test_cancelled_while_being_computed() -> None:
    run = Run()
    run.go(Offer(T, R))
    actions = run.go(cancel(1))
    assert [type(a) for a in actions] == [SendCancelled, Finished] and ends(actions) == ["cancelled"]
    assert run.go(Computed(T, ALL), PromptDone(T), Withdraw(T, "late")) == []


# --- grants that cannot be served ---


def test_a_second_peer_is_refused() -> None:
    run = Run()
    run.live(ALL)
    assert run.go(grant(7, peer=OTHER)) == [SendFailed(OTHER, T, Epoch(7), "already granted to another", 0)]
    assert ends(run.land(0, 1)) == ["sent"]


def test_grants_after_the_end() -> None:
    run = Run()
    run.live(ALL)
    run.land(0, 1)
    assert run.go(grant(1)) == [], "it has everything"
    assert len(of(SendFailed, run.go(grant(2)))) == 1
    run = Run()
    run.go(Offer(T, R), Withdraw(T, "aborted"))
    assert run.go(grant(1)) == [SendFailed(D, T, Epoch(1), "aborted", 0)] == run.go(grant(1))


def test_a_grant_while_ending_is_answered_after_drain() -> None:
    run = Run()
    run.live(ALL)
    run.go(cancel(1))
    assert run.go(grant(1), grant(2)) == []
    actions = run.land(0, 1)
    assert len(of(SendCancelled, actions)) == 1
    assert [a.epoch for a in actions if isinstance(a, SendFailed)] == [2]


# --- ends in bounded time ---


def test_no_grant_expires() -> None:
    run = Run()
    run.go(Offer(T, R), Computed(T, ALL))
    assert run.machine.next_deadline_s() is None, "the engine is still computing"
    run.go(PromptDone(T), at=5.0)
    assert run.machine.next_deadline_s() == 35.0
    assert run.go(Tick(), at=34.9) == [] and ends(run.go(Tick(), at=35.0)) == ["expired"]


def test_a_silent_peer_is_given_up_and_answered_when_its_writes_are_done() -> None:
    run = Run()
    run.live(ALL)
    assert run.go(Tick(), at=39.9) == []
    actions = run.go(Tick(), at=40.0)
    assert ends(actions) == ["peer_lost"] and len(actions) == 1, "no promise while writes may land"
    assert run.go(cancel(1)) == [] and run.land(0) == []
    assert {type(a) for a in run.land(1)} == {SendCancelled, SendFailed}
    assert run.machine.in_flight_bytes(D) == 0


def test_a_record_with_writes_in_flight_outlives_its_tombstone() -> None:
    run = Run()
    run.live(ALL)
    run.go(Tick(), at=40.0)
    for at in range(41, 1000, 30):
        run.go(Tick(), at=float(at))
    assert run.go(cancel(1)) == [] and run.machine.in_flight(T) == 2


def test_a_live_peer_that_cancelled_bounds_the_wait() -> None:
    run = Run()
    run.live(ALL)
    run.go(cancel(1))
    for at in range(1, 40):
        assert run.go(Heard(D), Tick(), at=float(at)) == []
    assert ends(run.go(Heard(D), Tick(), at=40.0)) == ["peer_lost"]


def test_a_dead_peer_ends_all_its_transfers() -> None:
    run = Run()
    run.live(ALL)
    run.go(Offer(U, R), grant(1, tid=U))
    assert ends(run.go(PeerGone(D, True))) == ["peer_lost"], "the one without writes"
    run.land(0, error="lost")
    actions = run.land(1, error="lost")
    assert ends(actions) == ["peer_lost"] and len(actions) == 1, "nobody is told"
    assert run.machine.counters.retries == 0
    assert ends(run.go(Heard(D), grant(1, tid=TransferId("v")))) == ["peer_lost"], "the dead grant nothing"


def test_withdrawn() -> None:
    run = Run()
    run.live(ALL, done=False)
    assert run.go(Withdraw(T, "aborted")) == []
    actions = run.land(0, 1)
    assert [type(a) for a in actions] == [SendFailed, Finished] and ends(actions) == ["withdrawn"]
    assert of(SendFailed, actions) == [SendFailed(D, T, Epoch(1), "aborted", 160)]


def test_every_offer_is_finished_once() -> None:
    run = Run()
    run.live(ALL)
    assert run.go(Offer(T, R)) == []
    assert ends(run.go(Offer(T, RequestId("another")))) == ["failed"], "one transfer id, one request"
    assert ends(run.land(0, 1)) == ["sent"]
    assert run.go(Offer(T, R)) == [] and run.land(0, 1) == []


def test_everything_is_forgotten() -> None:
    run = Run()
    run.live(ALL)
    run.land(0, 1)
    run.go(cancel(1, tid=U))
    run.go(Tick(), at=120.0)
    assert not run.machine._transfers
    run.go(Tick(), at=1000.0)
    assert run.machine.next_deadline_s() is None and run.machine._unoffered == 0


def test_limits_are_checked() -> None:
    for bad in (
        {"layers": (1, 2)},
        {"layer_block_bytes": (0,)},
        {"lease_s": 0.0},
        {"max_post_bytes": 0},
    ):
        with pytest.raises(ConfigError):
            SenderLimits(**{"layer_block_bytes": (10,), "layers": (4,), **bad})  # type: ignore[arg-type]
