"""The prefill side event by event: what is posted, in which pieces, how it is sealed and repeated."""

from __future__ import annotations

import pytest

from lmkv.ids import Epoch, RequestId
from lmkv.transfer.events import (
    Computed,
    Finished,
    Granted,
    Heard,
    Offer,
    PeerGone,
    PostWrite,
    Prompt,
    PromptDone,
    Rect,
    SendFailed,
    SendSeal,
)
from lmkv.transfer.sender import SenderLimits

from .driving import ALL, D, P, R, Run, T, U, ends, grant, of, posts

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
    actions = run.go(Offer(T, R, P), grant(1), Offer(U, RequestId("s"), P), grant(1, tid=U), *first)
    assert len(posts(actions)) == 4 and run.machine.lanes.in_flight_bytes(D) == 160
    assert run.go(Computed(U, Rect(0, 0, 1, 0, 2)), Computed(U, Rect(0, 1, 2, 0, 4))) == []
    assert run.machine.lanes.queued(D) == 2
    assert [a.rect for a in run.land(1) if isinstance(a, PostWrite)] == [Rect(0, 0, 1, 0, 2)]
    assert [a.rect for a in run.land(0) if isinstance(a, PostWrite)] == [Rect(0, 1, 2, 0, 4)]


def test_only_granted_blocks_are_sent() -> None:
    run = Run()
    actions = run.go(Offer(T, R, P), grant(1, (1, 3)), Computed(T, ALL), PromptDone(T))
    assert posts(actions) == [(0, Rect(0, 0, 4, 1, 3))]
    assert of(SendSeal, actions) == [SendSeal(D, T, Epoch(1), 1, 80)]


@pytest.mark.parametrize("mine", [Prompt(b"q" * 16, 64), Prompt(P.digest, 63), Prompt(b"", 64)])
def test_kv_of_another_prompt_is_not_sent(mine: Prompt) -> None:
    run = Run()
    actions = run.go(Offer(T, R, mine), Computed(T, ALL), grant(1), PromptDone(T))
    assert posts(actions) == [] and ends(actions) == ["failed"]
    assert of(SendFailed, actions)[0].reason.startswith("prompt: ")  # type: ignore[union-attr]
    late = run.go(grant(2))
    assert posts(late) == [] and [type(a) for a in late] == [SendFailed]


def test_two_unknown_prompts_are_not_equal() -> None:
    unknown = Prompt(b"", 64)
    assert "adapter" in unknown.differs(unknown) and P.differs(P) == ""


def test_a_newer_grant_is_compared_again() -> None:
    run = Run()
    run.live(Rect(0, 0, 1, 0, 4), done=False)
    other = Granted(D, T, Epoch(2), ((0, 4),), Prompt(b"q" * 16, 64))
    assert posts(run.go(other, Computed(T, ALL))) == []
    assert ends(run.land(0)) == ["failed"]


def test_the_backlog_before_the_grant_is_merged() -> None:
    run = Run(SenderLimits((10,), (4,)))
    rects = [Rect(0, layer, layer + 1, lo, lo + 2) for lo in (0, 2) for layer in range(4)]
    run.go(Offer(T, R, P), *(Computed(T, rect) for rect in rects))
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
    assert posts(actions) == [] and run.machine.lanes.queued(D) > 0, "the old epoch still fills the window"
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
    actions = run.go(Offer(T, R, P), grant(1, (4, 4)), PromptDone(T))
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
    actions = run.go(Offer(T, R, P), Granted(D, T, Epoch(1), ((0, 1), (0, 1)), P))
    assert ends(actions) == ["failed"] and len(of(SendFailed, actions)) == 1
