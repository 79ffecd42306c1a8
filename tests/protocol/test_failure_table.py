"""Every row of the failure table of the protocol, each with real machines on both sides and the world's checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lmkv.ids import Epoch, Incarnation, Rank, TransferId
from lmkv.transfer import events as ev

from .things import DECODE, LAYERS, plan, prefill_peer
from .world import World

T = TransferId("t")
E1 = Epoch(1)


def started(ranks: int = 1, steps: int = 3) -> World:
    """One transfer under way: granted, expected, and `steps` rectangles announced; nothing has landed."""
    world = World(ranks)
    region = world.grant(T, 1)
    world.expect(region)
    deliver_all(world)
    for rank in range(ranks):
        world.offer(rank, T)
        for _ in range(steps):
            world.compute(rank, T)
    return world


def deliver_all(world: World) -> None:
    while world.net:
        world.deliver(world.net[0])


def land_all(world: World) -> None:
    while world.flights:
        flight = world.flights[0]
        if flight.done is None:
            world.land(flight)
            flight.done = ""
        world.deliver_done(flight)


def finish(world: World) -> None:
    for side in world.prefill:
        while side.alive and not side.jobs[T].told_end:
            world.compute(side.rank, T)


def outcomes(world: World) -> tuple[str, ...]:
    return tuple(str(side.jobs[T].finished.outcome) for side in world.prefill if side.jobs[T].finished)


def report(world: World, epoch: int = 1) -> ev.Report:
    found = world.regions[T, Epoch(epoch)].report
    assert found is not None, "not reported"
    return found


def settle(world: World) -> None:
    world.heal()
    world.check_end()


def test_nothing_goes_wrong() -> None:
    world = started(ranks=2)
    assert world.flights, "the first write is posted before the prompt is computed"
    finish(world)
    deliver_all(world)  # the seals overtake every write
    assert world.regions[T, E1].report is None
    land_all(world)
    finish(world)
    deliver_all(world)
    land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded" and outcomes(world) == ("sent", "sent")
    settle(world)


def test_client_goes_away() -> None:
    world = started(ranks=2)
    world.to_receiver(ev.Abandon(T))
    deliver_all(world)
    assert world.regions[T, E1].report is None, "blocks stay held while writes may land"
    posted = len(world.flights)
    for rank in (0, 1):
        world.compute(rank, T)
    assert len(world.flights) == posted, "nothing is posted after the Cancel"
    land_all(world)
    deliver_all(world)
    assert (report(world).outcome, report(world).drained) == ("abandoned", True)
    assert outcomes(world) == ("cancelled", "cancelled")
    settle(world)


def test_client_goes_away_and_the_cancel_is_lost() -> None:
    world = started()
    world.to_receiver(ev.Abandon(T))
    world.net.clear()
    land_all(world)
    world.advance(1.0)
    deliver_all(world)
    assert report(world).outcome == "abandoned" and outcomes(world) == ("cancelled",)
    settle(world)


def test_prefill_aborts() -> None:
    world = started(ranks=2)
    world.withdraw(0, T)
    assert not outcomes(world), "its memory is still being read"
    land_all(world)
    deliver_all(world)
    assert outcomes(world)[0] == "withdrawn"
    deliver_all(world)
    assert (report(world).outcome, report(world).drained) == ("failed", True)
    assert "aborted" in report(world).reason
    settle(world)


def test_prefill_aborts_when_all_is_on_its_way() -> None:
    world = started()
    finish(world)
    while not world.prefill[0].jobs[T].told_end or world.prefill[0].machine.lanes.queued(DECODE):
        land_all(world)
    world.withdraw(0, T)
    land_all(world)
    deliver_all(world)
    assert outcomes(world) == ("sent",) and report(world).outcome == "loaded"
    settle(world)


def test_prefill_preempts_and_computes_again() -> None:
    world = started(steps=4)
    side = world.prefill[0]
    side.machine.handle(ev.PeerGone(DECODE, False), world.now)  # the queue has to wait
    world.compute(0, T)
    queued = side.machine.lanes.queued(DECODE)
    assert queued > 0
    world.preempt(0, T)
    assert side.machine.lanes.queued(DECODE) == 0, "what waits is no longer in memory"
    land_all(world)
    assert not side.jobs[T].fenced, "blocks may be overwritten once nothing is in flight"
    world.to_sender(0, ev.Heard(DECODE))
    finish(world)
    land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded" and outcomes(world) == ("sent",)
    assert max(side.posted.values()) == 1, "what was delivered before is not sent again"
    settle(world)


def test_preempted_before_the_grant_only_computed_cells_are_sent() -> None:
    world = World(1)
    world.offer(0, T)
    for _ in range(3):
        world.compute(0, T)
    world.preempt(0, T)
    world.expect(world.grant(T, 1))
    deliver_all(world)
    assert not world.flights, "the backlog was taken away"
    finish(world)
    land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded"
    settle(world)


def test_prefill_dies() -> None:
    world = started(ranks=2)
    world.kill_prefill(0)
    world.land(world.flights[0])  # posted before it died
    world.prove_prefill_dead(0)
    assert world.regions[T, E1].report is None, "rank 1 may still write"
    land_all(world)
    deliver_all(world)
    land_all(world)
    deliver_all(world)
    assert (report(world).outcome, report(world).drained) == ("failed", True)
    assert "dead" in report(world).reason
    settle(world)


def test_prefill_dies_unnoticed_then_proven() -> None:
    world = started()
    world.kill_prefill(0)
    world.deaf_to_prefill.add(0)
    world.advance(15.0)
    assert (report(world).outcome, report(world).drained) == ("failed", False)
    assert not world.regions[T, E1].closed
    world.prove_prefill_dead(0)
    assert world.regions[T, E1].closed, "Drained"
    settle(world)


def test_prefill_dies_after_it_has_delivered_everything() -> None:
    """What one rank has sealed and landed is used; only the other rank is waited for."""
    world = started(ranks=2, steps=0)
    for _ in range(len(plan()) + 1):
        world.compute(0, T)
        land_all(world)
    deliver_all(world)
    world.kill_prefill(0)
    world.prove_prefill_dead(0)
    for _ in range(len(plan()) + 1):
        world.compute(1, T)
        land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded"
    settle(world)


def test_decode_dies() -> None:
    world = started()
    world.kill_decode()
    world.prove_decode_dead()
    assert not outcomes(world), "its memory is read until every completion has come"
    for flight in list(world.flights):
        world.deliver_done(flight)
    assert outcomes(world) == ("peer_lost",)
    settle(world)


def test_a_write_errors_once() -> None:
    world = started()
    finish(world)
    seal_before = [m for m in world.net if isinstance(m.event, ev.Sealed)]
    victim = world.flights[0]
    world.land(victim, part=True)
    victim.done = "error"
    world.deliver_done(victim)
    retry = [f for f in world.flights if f.post.rect == victim.post.rect]
    assert len(retry) == 1 and retry[0].post.seq > victim.post.seq
    land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded" and outcomes(world) == ("sent",)
    assert len(seal_before) <= 1 and world.prefill[0].machine.counters.retries == 1
    settle(world)


def test_the_last_write_errors_after_the_seal() -> None:
    world = started(steps=len(plan()) - 1)
    land_all(world)
    world.compute(0, T)
    world.end_prompt(0, T)
    assert any(isinstance(m.event, ev.Sealed) for m in world.net) and world.flights
    deliver_all(world)
    world.flights[0].done = "error"
    world.deliver_done(world.flights[0])
    land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded", "the seal is right for the retry too"
    settle(world)


def test_a_write_errors_twice() -> None:
    world = started()
    for _ in range(2):
        victim = next(f for f in world.flights if f.post.rect.layer_lo == 0 and f.post.rect.group == 0)
        victim.done = "error"
        world.deliver_done(victim)
    assert not outcomes(world), "the rest is drained first"
    land_all(world)
    deliver_all(world)
    assert outcomes(world) == ("failed",) and "twice" in report(world).reason
    assert (report(world).outcome, report(world).drained) == ("failed", True)
    settle(world)


def test_partition_then_what_was_posted_lands_minutes_later() -> None:
    world = started(steps=2)
    world.deaf_to_decode.add(0)
    world.deaf_to_prefill.add(0)
    posted = len(world.flights)
    world.advance(11.0)
    world.compute(0, T)
    assert len(world.flights) == posted, "the lease is over: prefill fences itself"
    world.advance(4.0)
    assert (report(world).outcome, report(world).drained) == ("failed", False), "decode goes on in other blocks"
    world.advance(200.0)
    assert outcomes(world) == ("peer_lost",), "the engine gets its blocks back in bounded time"
    region = world.regions[T, E1]
    assert not region.closed, "never by a timer alone"
    world.deaf_to_decode.clear()
    world.deaf_to_prefill.clear()
    world.advance(2.0)
    deliver_all(world)
    assert not region.closed, "Cancelled only when nothing is in flight"
    land_all(world)
    deliver_all(world)
    assert region.closed
    settle(world)


def test_short_partition_is_survived() -> None:
    world = started(steps=2)
    world.deaf_to_decode.add(0)
    world.advance(11.0)
    finish(world)
    land_all(world)
    world.deaf_to_decode.clear()
    world.advance(1.0)
    finish(world)
    land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded" and outcomes(world) == ("sent",)
    settle(world)


@pytest.mark.parametrize(
    "message",
    [
        lambda peer: ev.FailedCame(peer, T, E1, "not mine"),
        lambda peer: ev.CancelledCame(peer, T, E1),
        lambda peer: ev.Landed(peer, T, E1, 0, ev.Rect(0, 0, LAYERS[0], 0, 4), 80),
        lambda peer: ev.Sealed(peer, T, E1, 0, 0),
        lambda peer: ev.PeerGone(peer, True),
    ],
)
def test_peer_restarts(message: Callable[[ev.Peer], ev.ReceiverEvent]) -> None:
    """What another incarnation says touches no transfer of the old one."""
    world = started()
    world.to_receiver(message(ev.Peer(Incarnation("prefill0 again"), Rank(0))))
    assert world.regions[T, E1].report is None and not world.net
    assert world.decode.awaited(T, E1) == [prefill_peer(0)]
    for _ in range(4):
        finish(world)
        land_all(world)
    deliver_all(world)
    assert report(world).outcome == "loaded"
    settle(world)


def test_deadline() -> None:
    world = started()
    world.advance(121.0)
    deliver_all(world)
    world.advance(2.0)
    assert (report(world).outcome, report(world).drained) == ("failed", False), "a write is stuck"
    assert "deadline" in report(world).reason
    land_all(world)
    deliver_all(world)
    assert world.regions[T, E1].closed and outcomes(world) == ("cancelled",)
    settle(world)


def test_a_checksum_is_wrong() -> None:
    world = started(ranks=2)
    victim = world.flights[0]
    victim.stamp = dict.fromkeys(victim.stamp, "other bytes")
    world.land(victim)
    deliver_all(world)
    assert world.decode.counters.checksum_failures == 1
    victim.done = ""
    land_all(world)
    deliver_all(world)
    land_all(world)
    deliver_all(world)
    assert (report(world).outcome, report(world).drained) == ("failed", True)
    assert report(world).reason.startswith("checksum") and "rank 0" in report(world).reason
    assert outcomes(world) == ("cancelled", "cancelled")
    settle(world)


def test_a_stuck_data_plane_of_a_live_peer_ends_too() -> None:
    """Beats go on, a write never completes: the Cancel of the deadline bounds the wait for it."""
    world = started()
    for _ in range(170):
        world.advance(1.0)
        deliver_all(world)
    assert outcomes(world) == ("peer_lost",)
    assert not world.regions[T, E1].closed, "quarantined until the writer answers"
    settle(world)
