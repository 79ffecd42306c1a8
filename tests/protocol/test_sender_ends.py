"""The prefill side event by event: what comes early or late, what is answered, how every transfer ends."""

from __future__ import annotations

import pytest

from lmkv.errors import ConfigError
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer.events import (
    MOST_DEAD,
    Computed,
    Finished,
    Heard,
    NotNeededCame,
    Offer,
    Peer,
    PeerGone,
    Preempted,
    PromptDone,
    SendCancelled,
    SenderEvent,
    SendFailed,
    Tick,
    Withdraw,
    Yield,
)
from lmkv.transfer.sender import SenderLimits

from .driving import ALL, OTHER, D, P, R, Run, T, U, cancel, ends, grant, of, posts

# --- before the offer ---


def test_a_grant_may_come_first() -> None:
    run = Run()
    run.go(grant(1))
    assert len(posts(run.go(Offer(T, R, P), Computed(T, ALL)))) == 2


def test_an_early_grant_expires_and_the_late_offer_ends_too() -> None:
    run = Run()
    run.go(grant(1))
    actions = run.go(Tick(), at=60.0)
    assert [type(a) for a in actions] == [SendFailed, Finished] and ends(actions) == ["expired"]
    assert run.go(Offer(T, R, P)) == [Finished(T, R, actions[1].outcome, actions[1].reason)]  # type: ignore[union-attr]


def test_early_ones_are_bounded_and_what_is_refused_is_not_answered() -> None:
    run = Run(SenderLimits((10,), (4,), max_early=2))
    run.go(grant(1), cancel(1, tid=U))
    v = TransferId("v")
    assert run.go(grant(1, tid=v), cancel(1, tid=v)) == [], "an answer that is not remembered could become a lie"
    assert run.machine.counters.early_refused == 2
    run.go(Offer(T, R, P))
    assert of(SendCancelled, run.go(cancel(1, tid=v))) == [SendCancelled(D, v, Epoch(1))]


def test_not_needed_before_and_after_the_offer() -> None:
    run = Run()
    assert run.go(NotNeededCame(T, "hit")) == []
    assert ends(run.go(Offer(T, R, P))) == ["not_needed"]
    assert ends(run.go(Offer(U, R, P), NotNeededCame(U, "hit"))) == ["not_needed"]
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
    assert ends(run.go(Offer(T, R, P))) == ["cancelled"]
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
    run.go(Offer(T, R, P))
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
    run.go(Offer(T, R, P), Withdraw(T, "aborted"))
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
    run.go(Offer(T, R, P), Computed(T, ALL))
    assert run.machine.next_deadline_s() is None, "the engine is still computing"
    run.go(PromptDone(T), at=5.0)
    assert run.machine.next_deadline_s() == 35.0
    assert run.go(Tick(), at=34.9) == [] and ends(run.go(Tick(), at=35.0)) == ["expired"]


def test_a_finished_prompt_gives_way_only_to_one_that_its_receiver_waits_for() -> None:
    run = Run()
    run.go(Offer(T, R, P), Computed(T, ALL))
    assert run.go(Yield(T)) == [], "it is still being computed"
    assert run.go(PromptDone(T), Yield(T)) == [], "nobody waits for another prompt"
    run.go(grant(1, tid=U))  # early: its blocks are wanted
    (finished,) = of(Finished, run.go(Yield(T)))
    assert finished.outcome == "expired" and "its blocks were wanted" in finished.reason
    assert of(SendFailed, run.go(grant(2))) != [], "the late grant is told"
    assert run.go(Yield(T), Yield(TransferId("unknown"))) == []


def test_a_granted_prompt_does_not_give_way() -> None:
    run = Run()
    run.go(Offer(T, R, P), grant(1), Computed(T, ALL), PromptDone(T), grant(1, tid=U))
    assert run.go(Yield(T)) == []


def test_a_preempted_prompt_is_waited_for() -> None:
    run = Run()
    run.go(Offer(T, R, P), Computed(T, ALL), PromptDone(T))
    run.go(Offer(U, R, P), grant(1, tid=U), Computed(U, ALL))
    run.go(Preempted(U))
    assert ends(run.go(Yield(T))) == ["expired"]


def test_a_silent_peer_is_given_up_and_answered_when_its_writes_are_done() -> None:
    run = Run()
    run.live(ALL)
    assert run.go(Tick(), at=39.9) == []
    actions = run.go(Tick(), at=40.0)
    assert ends(actions) == ["peer_lost"] and len(actions) == 1, "no promise while writes may land"
    assert run.go(cancel(1)) == [] and run.land(0) == []
    assert {type(a) for a in run.land(1)} == {SendCancelled, SendFailed}
    assert run.machine.lanes.in_flight_bytes(D) == 0


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
    run.go(Offer(U, R, P), grant(1, tid=U))
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


@pytest.mark.parametrize("end", [Withdraw(T, "x"), cancel(1), NotNeededCame(T, "x")])
def test_what_waits_in_the_queue_is_not_posted_after_the_end(end: SenderEvent) -> None:
    run = Run(SenderLimits((10,), (4,), max_post_bytes=80, max_inflight_bytes=80))
    run.live(ALL)
    assert run.machine.lanes.queued(D) == 1
    assert run.go(end) == [] and run.machine.lanes.queued(D) == 0
    actions = run.land(0)
    assert posts(actions) == [] and len(ends(actions)) == 1


def test_a_failed_write_of_blocks_that_were_taken_away_is_not_repeated() -> None:
    run = Run()
    run.live(ALL)
    run.go(Preempted(T))
    assert posts(run.land(0, error="x")) == []
    assert ends(run.land(1)) == ["failed"]


def test_a_transfer_is_open_until_its_finished() -> None:
    run = Run()
    assert not run.machine.is_open(T)
    run.go(grant(1))
    assert run.machine.is_open(T)
    run.go(cancel(1), grant(1))
    assert not run.machine.is_open(T)


def test_every_offer_is_finished_once() -> None:
    run = Run()
    run.live(ALL)
    assert run.go(Offer(T, R, P)) == []
    assert ends(run.go(Offer(T, RequestId("another"), P))) == ["failed"], "one transfer id, one request"
    assert ends(run.land(0, 1)) == ["sent"]
    assert run.go(Offer(T, R, P)) == [] and run.land(0, 1) == []


def test_everything_is_forgotten() -> None:
    run = Run()
    run.live(ALL)
    run.land(0, 1)
    run.go(cancel(1, tid=U))
    run.go(Tick(), at=120.0)
    assert not run.machine._transfers
    run.go(Tick(), at=1000.0)
    assert run.machine.next_deadline_s() is None and run.machine._unoffered == 0


def test_the_dead_are_remembered_up_to_a_number() -> None:
    run = Run()
    for i in range(MOST_DEAD + 50):
        run.go(PeerGone(Peer(Incarnation(f"dead {i}"), Rank(0)), True))
    run.go(Tick(), at=1000.0)
    assert len(run.machine.lanes._lanes) == MOST_DEAD


def test_limits_are_checked() -> None:
    for bad in (
        {"layers": (1, 2)},
        {"layer_block_bytes": (0,)},
        {"lease_s": 0.0},
        {"max_post_bytes": 0},
    ):
        with pytest.raises(ConfigError):
            SenderLimits(**{"layer_block_bytes": (10,), "layers": (4,), **bad})  # type: ignore[arg-type]
