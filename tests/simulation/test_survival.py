"""Bugs on purpose, in one message, command or event: the loop lives on, and nobody waits for what the bug met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lmkv import wire
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.control.pairing import PairState
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, make_transfer_id
from lmkv.transfer.prompt import Prompt
from lmkv.vllm.commands import (
    Abandoned,
    BlockHold,
    Expected,
    LayersDone,
    Loading,
    Offered,
    Overwritten,
    Preempted,
    Stored,
)
from lmkv.vllm.specs import BlockRange, ExpectSpec, LoadReport, LoadSpec, OfferSpec, Push, StoreSpec
from tests.simulation.builders import REQUEST, Engine, start_node
from tests.simulation.virtual import SteppedRuntime
from tests.vllm.pool_bed import CHUNK, NAMESPACE

TID = make_transfer_id(1, bytes(10))


def bug(*_: Any, **__: Any) -> None:
    raise RuntimeError("a bug")


@pytest.fixture
def world() -> Iterator[SteppedRuntime]:
    with SteppedRuntime(1, raises=False) as made:
        yield made


@pytest.fixture
def engine(world: SteppedRuntime) -> Engine:
    made = Engine(world, "engine", start_node(world).card.address)
    assert world.run_until(lambda: made.nodes, 10.0)
    return made


def settled(world: SteppedRuntime, engine: Engine) -> None:
    """The loop has taken what it was given, and lives."""
    world.run_for(0.5)
    assert engine.loop.alive and world.caught


def works(engine: Engine) -> bool:
    """Pages are stored and loaded."""
    engine.store((3, 1))
    report = engine.load((5, 6))
    return report.good == 2 * CHUNK and torch.equal(engine.storage[:, [5, 6]], engine.storage[:, [3, 1]])


# --- the worker loop: commands ---


def test_a_store_that_cannot_be_packed_fails_alone(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop._pool._shares, "pack", bug)  # as ops do that get tensors of two devices
        spec = StoreSpec(REQUEST, NAMESPACE, 0, tuple(engine.keys(1)), (BlockRange(0, 0, (3,)),))
        engine.loop.submit(Stored((spec,), (BlockHold(),), None))
        assert engine.take("packed") == [REQUEST]
        settled(world, engine)
    assert works(engine)


@pytest.mark.parametrize("host", ["a", "b"])
def test_a_load_that_cannot_be_unpacked_fails_alone(
    world: SteppedRuntime, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    engine = Engine(world, "engine", start_node(world).card.address, host)
    assert world.run_until(lambda: engine.nodes, 10.0)
    engine.store((3, 1))
    with monkeypatch.context() as patch:
        patch.setattr(engine.loop._pool._shares, "unpack", bug)
        report = engine.load((5, 6))
        assert (report.good, report.reason) == (0, "failed")
        settled(world, engine)
    assert works(engine)


def test_a_store_that_cannot_be_taken_is_told_as_packed(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = tuple(
        StoreSpec(RequestId(name), NAMESPACE, 0, tuple(engine.keys(1)), (BlockRange(0, 0, (3,)),)) for name in "rs"
    )
    real = engine.loop._pool.store
    monkeypatch.setattr(
        engine.loop._pool,
        "store",
        lambda some, holds, now_s: bug() if some[0].request_id == "r" else real(some, holds, now_s),
    )
    engine.loop.submit(Stored(specs, tuple(BlockHold() for _ in specs), None))
    packed = engine.take("packed")
    packed += [] if len(packed) == 2 else engine.take("packed")
    assert sorted(packed) == ["r", "s"]
    settled(world, engine)


def test_a_load_that_cannot_be_taken_is_reported(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop._pool, "load", bug)
    engine.loop.submit(Loading((LoadSpec(REQUEST, NAMESPACE, (16, 64), (), (), world.clock() + 1),), None))
    (report,) = engine.take("loads")
    assert isinstance(report, LoadReport) and report.good == 16 and "bug" in report.reason
    settled(world, engine)


@pytest.mark.parametrize("broken", ["_expectation", "handle"])
def test_an_expectation_that_cannot_be_taken_is_reported_once(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Its blocks stay in quarantine: its grant is on its way."""
    monkeypatch.setattr(engine.loop._receiving, broken, bug)
    other = make_transfer_id(2, bytes(10))
    specs = tuple(
        ExpectSpec(tid, RequestId(tid), Epoch(1), Incarnation("x"), 0, (BlockRange(0, 0, (2,)),))
        for tid in (TID, other)
    )
    engine.loop.submit(Expected(specs))
    reports = engine.take("reports")
    assert [(r.transfer_id, r.outcome, r.drained) for r in reports] == [(t, "failed", False) for t in (TID, other)]
    engine.loop.submit(Abandoned((TID, other)))
    settled(world, engine)
    assert not [r for r in engine.loop.take().reports if r.outcome != "drained"]


def test_an_offer_that_cannot_be_taken_is_told_as_sent(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop._sending, "offered", bug)
    engine.loop.submit(Offered((OfferSpec(TID, REQUEST, Prompt(b"p" * 16, 64)),)))
    assert engine.take("sent") == [REQUEST]
    settled(world, engine)


def test_a_push_that_cannot_be_taken_is_withdrawn(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop._sending, "layers_done", bug)
    engine.loop.submit(Offered((OfferSpec(TID, REQUEST, Prompt(b"p" * 16, 64)),)))
    push = Push(TID, (), (BlockRange(0, 0, (1,)),), False)
    engine.loop.submit(LayersDone((push,), 0, 0, 3, None, world.clock()))
    assert engine.take("sent") == [REQUEST]
    settled(world, engine)


def test_a_preemption_that_cannot_be_taken_is_waited_for_all_the_same(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop._sending, "preempted", bug)
    command = Preempted((TID,))
    engine.loop.submit(command)
    assert engine.process.runtime.wait(command.drained, 1.0)
    settled(world, engine)


def test_failures_are_told_to_the_scheduler(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop._sending, "withdrawn", bug)
    monkeypatch.setattr(engine.loop._sending, "offered", bug)
    engine.loop.submit(Offered((OfferSpec(TID, REQUEST, Prompt(b"p" * 16, 64)),)))
    world.run_for(0.1)
    assert engine.loop.take().failures == {"Offered": 1, "Offered:dismissal": 1}


# --- the worker loop: peers ---


@pytest.fixture
def pair(world: SteppedRuntime) -> tuple[Engine, Engine]:
    address = start_node(world).card.address
    one, other = Engine(world, "one", address), Engine(world, "other", address)
    other.endpoint.pair(one.endpoint.address)
    assert world.run_until(lambda: is_pair(one, other) and is_pair(other, one), 10.0)
    return one, other


def is_pair(one: Engine, other: Engine) -> bool:
    return one.endpoint.pair(other.endpoint.address)[0] is PairState.READY


@pytest.mark.parametrize("letter", ["Grant", "Cancel"])
def test_a_peer_whose_message_meets_a_bug_is_parted_from(
    world: SteppedRuntime, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    one, other = pair
    monkeypatch.setattr(one.loop._sending, "grant_came" if letter == "Grant" else "cancel_came", bug)
    message = (
        wire.Grant(other.incarnation, TID, Epoch(1), 0, 64, (0,), ((1,),), 0.0)
        if letter == "Grant"
        else wire.Cancel(other.incarnation, Rank(0), TID, Epoch(1))
    )
    other.endpoint.tell(one.loop.address, message)
    assert world.run_until(lambda: not is_pair(one, other), 5.0)
    settled(world, one)
    assert one.loop._guard.counts == {letter: 1}
    assert world.run_until(lambda: is_pair(one, other), 30.0), "the pair may be made anew"


def test_an_introduction_that_meets_a_bug_is_answered(world: SteppedRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    address = start_node(world).card.address
    one, other = Engine(world, "one", address), Engine(world, "other", address)
    monkeypatch.setattr(one.loop._peers, "introduce", bug)
    one.endpoint.pair(other.endpoint.address)
    assert world.run_until(lambda: one.endpoint.pair(other.endpoint.address)[0] is PairState.REFUSED, 10.0)
    assert "Introduce" in one.endpoint.pair(other.endpoint.address)[1]
    settled(world, one)


def test_an_event_that_meets_a_bug_does_not_end_the_loop(
    world: SteppedRuntime, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    with monkeypatch.context() as patch:
        patch.setattr(one.loop._peers, "completed", bug)
        patch.setattr(one.loop._peers, "transport_lost", bug)
        world.processes["other"].kill()
        world.run_for(5.0)
    settled(world, one)
    assert works(one)


def test_credits_before_their_grant_are_few(world: SteppedRuntime, engine: Engine) -> None:
    sending = engine.loop._sending
    for slots in (tuple(range(100)), ()):
        for _ in range(5000):
            sending.credit_came(wire.Credit(Incarnation("x"), Rank(0), TID, Epoch(1), slots), world.clock())
    held = sending._early._credits[TID]
    assert 0 < sum(1 + len(credit.slots) for credit in held) <= 1024


# --- the loop's death ---


@pytest.fixture
def dead(world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Its worker loop has met a bug outside of all guards."""
    monkeypatch.setattr(engine.loop, "_publish", bug)
    assert world.run_until(lambda: not engine.loop.alive, 5.0)
    return engine


def test_nobody_waits_for_a_dead_loop(world: SteppedRuntime, dead: Engine) -> None:
    began_s = world.clock()
    for command in (Preempted((TID,)), Overwritten((REQUEST,))):
        dead.loop.submit(command)
        assert dead.process.runtime.wait(command.drained, 5.0)
    assert dead.loop.drain(5.0)
    dead.loop.take(wait_s=5.0)
    dead.loop.take(wait_s=5.0)
    assert world.clock() == began_s
    for _ in range(100):
        dead.loop.submit(Offered((OfferSpec(TID, REQUEST, Prompt(b"p" * 16, 64)),)))
    assert not dead.loop._commands


def test_an_engine_that_takes_no_step_hears_of_a_dead_loop(
    world: SteppedRuntime, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    monkeypatch.setattr(one.loop, "_publish", bug)
    assert world.run_until(lambda: one.endpoint._is_refusing, 5.0)
    assert one.endpoint.pair("tcp://127.0.0.1:9")[1] == "the worker loop of rank 0 has failed; its log has more"


def test_a_loop_that_is_told_to_end_is_not_broken(world: SteppedRuntime, pair: tuple[Engine, Engine]) -> None:
    one, _ = pair
    one.loop.close()
    world.run_for(5.0)
    assert not one.endpoint._is_refusing


def test_who_waits_when_the_loop_dies_waits_no_longer(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.loop._sending, "in_flight", lambda tid: 1)
    command, began_s = Preempted((TID,)), world.clock()
    engine.loop.submit(command)
    world.run_for(0.1)
    assert not command.drained.is_set()
    monkeypatch.setattr(engine.loop, "_publish", bug)
    assert engine.process.runtime.wait(command.drained, 5.0)
    assert world.clock() - began_s < 1.0


# --- the endpoint ---


class Stranger:
    """Asks an engine, and answers to nobody."""

    def __init__(self, world: SteppedRuntime) -> None:
        self._world = world
        context = world.process("stranger", "z").runtime.context()
        self.inbox, self.outbox = Inbox(context, "tcp://127.0.0.1:0"), Outbox(context)
        self.context = context

    def describe(self, address: str) -> wire.Description:
        import zmq

        dealer = self.context.socket(zmq.DEALER)
        dealer.connect(address)
        dealer.send(wire.encode(wire.Describe("token")))
        assert self._world.run_until(lambda: int(dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN, 5.0)
        found = wire.decode_control(dealer.recv(zmq.NOBLOCK))
        dealer.close()
        assert isinstance(found, wire.Description)
        return found


def test_the_endpoint_survives_a_bug_and_counts_it(
    world: SteppedRuntime, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Stranger(world)
    with monkeypatch.context() as patch:
        patch.setattr(engine.endpoint._pairing, "hello", bug)
        stranger.outbox.send(engine.endpoint.address, wire.Hello(engine.endpoint._pairing.card))
        world.run_for(1.0)
    assert stranger.describe(engine.endpoint.address).counters["failure:Hello"] == 1


def test_an_engine_that_moves_nothing_says_so_and_refuses(world: SteppedRuntime, pair: tuple[Engine, Engine]) -> None:
    one, other = pair
    third = Engine(world, "third", one.settings.pool[0])
    one.endpoint.refuse_all("its loop is dead")
    assert one.endpoint.pair(other.endpoint.address)[:2] == (PairState.REFUSED, "its loop is dead")
    assert Stranger(world).describe(one.endpoint.address).trouble == "its loop is dead"
    third.endpoint.pair(one.endpoint.address)
    assert world.run_until(lambda: third.endpoint.pair(one.endpoint.address)[0] is PairState.REFUSED, 10.0)
    assert third.endpoint.pair(one.endpoint.address)[1] == "its loop is dead"


def test_a_dead_endpoint_pairs_with_nobody_and_keeps_nothing(
    world: SteppedRuntime, pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    monkeypatch.setattr(one.endpoint, "_seek", bug)
    assert world.run_until(lambda: not one.endpoint._runner.alive, 5.0)
    assert one.endpoint.pair(other.endpoint.address)[0] is PairState.REFUSED
    one.endpoint.tell(other.endpoint.address, wire.Describe("x"))
    assert not one.endpoint._to_send
    one.endpoint.close()
