"""`lmkv status --engine`: an engine says what it is, and whether its KV is its own alone."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import zmq

from lmkv import wire
from lmkv.control.mailbox import Inbox
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.obs.ledger import LedgerBook
from lmkv.vllm.endpoint import EngineEndpoint
from tests.control.processes import lmkv


@pytest.fixture
def endpoint() -> Iterator[EngineEndpoint]:
    endpoint = EngineEndpoint("tcp://127.0.0.1:0", "", LedgerBook())
    yield endpoint
    endpoint.close()


def start(endpoint: EngineEndpoint, private: str) -> wire.EngineCard:
    card = wire.EngineCard(
        EngineName("e0"), Incarnation("aa" * 8), endpoint.address, "both", {"weights": "w"}, {}, (16,), ()
    )
    endpoint.start(card, (), private)
    return card


def test_a_private_engine_says_why(endpoint: EngineEndpoint) -> None:
    start(endpoint, "load_format 'dummy' makes the weights up")
    said = lmkv("status", "--engine", endpoint.address)
    assert said.exit_code == 0, said.stderr
    assert f"engine e0 ({'aa' * 8}) at {endpoint.address}: both" in said.stdout
    assert "private, exchanges KV with no other engine: load_format 'dummy' makes the weights up" in said.stdout


def test_it_is_told_as_json_and_follows_a_reset(endpoint: EngineEndpoint) -> None:
    card = start(endpoint, "")
    (found,) = json.loads(lmkv("status", "--engine", endpoint.address, "--json").stdout)["engines"]
    assert (found["name"], found["role"], found["private"], found["peers"]) == ("e0", "both", "", [])
    assert "private" not in lmkv("status", "--engine", endpoint.address).stdout
    endpoint.renew(card, "it was reset")
    (found,) = json.loads(lmkv("status", "--engine", endpoint.address, "--json").stdout)["engines"]
    assert found["private"] == "it was reset"


def test_an_engine_in_which_lmkv_is_dead_says_why(endpoint: EngineEndpoint) -> None:
    start(endpoint, "")
    assert "trouble" not in lmkv("status", "--engine", endpoint.address).stdout
    endpoint.refuse_all("its loop is dead")
    assert (
        "in trouble, restart it when it suits you: its loop is dead"
        in lmkv("status", "--engine", endpoint.address).stdout
    )
    (found,) = json.loads(lmkv("status", "--engine", endpoint.address, "--json").stdout)["engines"]
    assert found["trouble"] == "its loop is dead"


def test_an_engine_that_does_not_answer_is_an_error(endpoint: EngineEndpoint) -> None:
    silent = lmkv("status", "--engine", endpoint.address)
    assert silent.exit_code == 1 and endpoint.address in silent.stderr and "LMKV-N701" in silent.stderr
    assert "Traceback" not in silent.stderr
    bad = lmkv("status", "--engine", "nonsense")
    assert bad.exit_code == 2 and "'nonsense'" in bad.stderr and len(bad.stderr.splitlines()) == 1


def test_workers_are_told_of_a_peer_whose_machine_is_off(endpoint: EngineEndpoint) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    worker = Inbox(context, "tcp://127.0.0.1:0")
    rank = wire.WorkerCard(Rank(0), worker.address, "inproc", b"", "DRAM", (), 1, 64)
    card = wire.EngineCard(EngineName("e0"), Incarnation("aa" * 8), endpoint.address, "both", {}, {}, (16,), (rank,))
    endpoint.start(card, ())
    said = lmkv("bury", "bb" * 8, "--engine", endpoint.address)
    assert said.exit_code == 0 and f"{'bb' * 8} is taken for gone" in said.stdout
    assert worker.socket.poll(2000)
    assert [letter.message for letter in worker.receive()] == [wire.Dismiss(Incarnation("bb" * 8), dead=True)]
    worker.close()
    context.term()


def test_a_peer_that_is_heard_is_not_buried(endpoint: EngineEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    card = start(endpoint, "")
    monkeypatch.setattr(endpoint._pairing, "knows", lambda incarnation: incarnation == card.incarnation)
    said = lmkv("bury", card.incarnation, "--engine", endpoint.address)
    assert said.exit_code == 1 and "is paired and heard" in said.stderr
