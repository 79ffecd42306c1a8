"""What strangers can have an engine remember of them has a bound."""

from __future__ import annotations

import pytest

from lmkv import wire
from lmkv.control import pairing
from lmkv.control.pairing import Pairing, PairState, ToEngine, ToWorkers
from lmkv.ids import EngineName, Incarnation, Rank


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MOST_PEERS", 10)
    monkeypatch.setattr(pairing, "MOST_ADDRESSES", 20)


def card(number: int, port: int = 0) -> wire.EngineCard:
    address = f"tcp://127.0.0.1:{port or 1000 + number}"
    workers = (wire.WorkerCard(Rank(0), address, "tcp", b"", "DRAM", (), 0, 0),)
    return wire.EngineCard(EngineName("e"), Incarnation(f"i{number}"), address, "both", {}, {}, (16,), workers)


def make() -> Pairing:
    return Pairing(card(0), lambda ours, theirs: None)


def test_addresses_without_a_peer_are_forgotten() -> None:
    machine = make()
    kept = card(1)
    machine.hello(kept)
    machine.introduced(wire.Introduced(Rank(0), kept.incarnation, ours=machine.number(kept.address)), 0.0)
    for number in range(1000):
        machine.want(f"tcp://127.0.0.1:{2000 + number}", 0.0, (b"who", "token"))
        machine.refuse(f"tcp://127.0.0.1:{4000 + number}", "no")
        machine.prune()
        assert len(machine._addresses) <= 20
    assert machine.state(kept.address) == (PairState.READY, "")


def test_an_engine_with_many_peers_refuses_more() -> None:
    machine = make()
    for number in range(1, 11):
        assert any(isinstance(action, ToWorkers) for action in machine.hello(card(number)))
    (action,) = machine.hello(card(11))
    assert isinstance(action, ToEngine) and isinstance(action.message, wire.Refuse)
    assert "10 peers already" in action.message.reason
    (action,) = machine.welcome(card(12))
    assert isinstance(action, ToEngine) and isinstance(action.message, wire.Refuse)
    # One that has restarted takes its own place, and one that is lost makes room.
    assert any(isinstance(action, ToWorkers) for action in machine.hello(card(99, port=1001)))
    lost = machine._peers[Incarnation("i2")].card.address
    machine.introduced(wire.Introduced(Rank(0), Incarnation("i2"), "silent", ours=machine.number(lost)), 1.0)
    assert any(isinstance(action, ToWorkers) for action in machine.hello(card(11)))
    assert len(machine._peers) == 10
