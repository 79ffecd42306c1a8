"""Rows of the failure table about what a transfer is bound to: its prompt, its blocks, its pair."""

from __future__ import annotations

import pytest

from lmkv.ids import TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.prompt import PROMPT_FAULT, Prompt
from lmkv.transfer.receiver import ReceiverLimits

from .driving import P
from .test_failure_table import E1, T, deliver_all, finish, land_all, outcomes, report, settle, started
from .things import plan, prefill_peer
from .world import World

OTHER_PROMPTS = {
    "digest": Prompt(b"q" * 16, P.tokens),
    "length": Prompt(P.digest, P.tokens + 1),
    "unknown": Prompt(b"", P.tokens),
}


@pytest.mark.parametrize("other", OTHER_PROMPTS.values(), ids=OTHER_PROMPTS)
@pytest.mark.parametrize("grant_first", [False, True])
def test_the_engines_tokenized_it_differently(other: Prompt, grant_first: bool) -> None:
    world = World(2)
    world.prompts[T] = other
    if grant_first:
        world.expect(world.grant(T, 1))
        deliver_all(world)
    for rank in (0, 1):
        world.offer(rank, T)
        for _ in range(3):
            world.compute(rank, T)
    if not grant_first:
        world.expect(world.grant(T, 1))
        deliver_all(world)
    finish(world)
    assert not world.flights, "nothing of another prompt is ever posted"
    deliver_all(world)
    assert outcomes(world) == ("failed", "failed")
    assert (report(world).outcome, report(world).drained) == ("failed", True)
    assert report(world).reason.startswith(PROMPT_FAULT)
    settle(world)


@pytest.mark.parametrize("checked", [True, False])
def test_a_preemption_cannot_wait_any_longer(checked: bool) -> None:
    """The fence timed out: blocks are overwritten under writes in flight, which land late and never count."""
    world = World(1, checked=checked)
    world.expect(world.grant(T, 1))
    deliver_all(world)
    world.offer(0, T)
    world.compute(0, T)
    while not world.prefill[0].jobs[T].told_end:
        if len(world.flights) > 1:
            world.flights[-1].done = ""
            world.land(world.flights[-1])
            world.deliver_done(world.flights[-1])
        world.compute(0, T)
    assert len(world.flights) >= 1, "the first write is stuck"
    world.revoke(0, T)
    land_all(world)
    deliver_all(world)
    assert outcomes(world) == ("failed",)
    assert report(world).outcome == "failed"
    settle(world)


def test_unchecked_writes_are_sealed_when_they_are_done() -> None:
    world = World(1, checked=False)
    world.expect(world.grant(T, 1))
    deliver_all(world)
    world.offer(0, T)
    for _ in range(len(plan()) + 1):
        world.compute(0, T)
        for flight in list(world.flights)[1:]:
            world.land(flight)
            flight.done = ""
            world.deliver_done(flight)
    assert len(world.flights) == 1 and not any(isinstance(m.event, ev.Sealed) for m in world.net)
    land_all(world)
    assert any(isinstance(m.event, ev.Sealed) for m in world.net)
    deliver_all(world)
    assert report(world).outcome == "loaded" and outcomes(world) == ("sent",)
    settle(world)


def test_an_unchecked_write_that_outlives_its_transfer_never_counts() -> None:
    """Prefill gives up a silent decode and frees the blocks; the write lands later, with other bytes."""
    world = World(1, receiver=ReceiverLimits(deadline_s=1000, lease_s=900), checked=False)
    world.expect(world.grant(T, 1))
    deliver_all(world)
    world.offer(0, T)
    for _ in range(len(plan()) + 1):
        world.compute(0, T)
        for flight in list(world.flights)[1:]:
            world.land(flight)
            flight.done = ""
            world.deliver_done(flight)
    world.deaf_to_decode.add(0)
    world.advance(60.0)
    assert outcomes(world) == ("peer_lost",), "its blocks hold other KV now"
    land_all(world)
    deliver_all(world)
    world.deaf_to_decode.clear()
    assert world.regions[T, E1].report is None or report(world).outcome == "failed"
    settle(world)


def test_a_peer_that_was_cut_off_is_served_again() -> None:
    world = started()
    world.cut(0)
    assert (report(world).outcome, report(world).drained) == ("failed", True), "nothing lands through a closed channel"
    for flight in list(world.flights):
        world.deliver_done(flight)
    assert outcomes(world) == ("peer_lost",)
    world.advance(1.0)
    again = TransferId("again")
    world.expect(world.grant(again, 1))
    world.offer(0, again)
    deliver_all(world)
    for _ in range(len(plan()) + 1):
        world.compute(0, again)
        land_all(world)
    deliver_all(world)
    found = world.regions[again, E1].report
    assert found is not None and found.outcome == "loaded"
    settle(world)


def test_a_proven_death_is_for_ever() -> None:
    world = started()
    world.kill_prefill(0)
    world.prove_prefill_dead(0)
    world.to_receiver(ev.Heard(prefill_peer(0)))
    world.expect(world.grant(TransferId("late"), 1))
    late = world.regions[TransferId("late"), E1].report
    assert late is not None and (late.outcome, late.drained) == ("failed", True)
