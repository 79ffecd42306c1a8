"""Addresses that are none, told to what is running: nothing ends, each is refused with its reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from lmkv import poolwire as pw
from lmkv import wire
from lmkv.control.controller import Controller, ControllerSettings
from lmkv.ids import EngineName, Incarnation, Rank, TransferId
from lmkv.obs.ledger import LedgerBook
from lmkv.vllm.endpoint import MOST_UNSENT, MOST_WANTED, EngineEndpoint
from lmkv.vllm.params import request_params
from tests.pool.bed import NodeThread

BAD = ["x", "tcp://tcp://10.0.0.5:18100", "tcp://h/x:5", "tcp://[::1:5"]
WAIT_MS = 10_000


class Asker:
    """A stranger's connection to one ROUTER."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(address)

    def control(self, message: wire.Control) -> None:
        self.socket.send(wire.encode(message))

    def answer(self) -> bytes:
        assert self.socket.poll(WAIT_MS), "nobody answers any more"
        return self.socket.recv()

    def close(self) -> None:
        self._context.destroy(0)


def card(address: str, worker: str, incarnation: str = "them") -> wire.EngineCard:
    workers = (wire.WorkerCard(Rank(0), worker, "tcp", b"", "DRAM", (), 0, 0),)
    return wire.EngineCard(EngineName("e"), Incarnation(incarnation), address, "both", {}, {}, (16,), workers)


@pytest.fixture
def endpoint() -> Iterator[EngineEndpoint]:
    made = EngineEndpoint("tcp://127.0.0.1:0", "", LedgerBook())
    made.start(card(made.address, "tcp://127.0.0.1:1", "us"), ())
    yield made
    made.close()


@pytest.fixture
def asker(endpoint: EngineEndpoint) -> Iterator[Asker]:
    made = Asker(endpoint.address)
    yield made
    made.close()


def describe(asker: Asker) -> wire.Description:
    asker.control(wire.Describe("alive?"))
    answer = wire.decode_control(asker.answer())
    assert isinstance(answer, wire.Description)
    return answer


@pytest.mark.parametrize("bad", BAD)
def test_meet_nobody(asker: Asker, bad: str) -> None:
    asker.control(wire.Meet(bad, "t"))
    met = wire.decode_control(asker.answer())
    assert isinstance(met, wire.Met) and met.token == "t" and bad in met.refused
    assert describe(asker).counters["meet:refused"] == 1


@pytest.mark.parametrize("bad", BAD)
def test_a_hello_from_nowhere(endpoint: EngineEndpoint, asker: Asker, bad: str) -> None:
    """As an engine sends it whose `advertise` is a URL."""
    for hello in (wire.Hello(card(bad, "tcp://h:1")), wire.Welcome(card("tcp://h:1", bad))):
        asker.control(hello)
    asker.control(wire.Refuse(Incarnation("i"), bad, "no"))
    describe(asker)
    assert endpoint.unreadable == 3


def test_a_request_whose_peer_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    for bad in [*BAD, None, 5, ["tcp://h:1"]]:
        ours = {"transfer_id": "0" * 32, "role": "decode", "peer": {"address": bad}}
        assert request_params({"lmkv": ours}) is None
    assert caplog.text.count("cannot be read") == len(BAD) + 3


@pytest.mark.parametrize("bad", BAD)
def test_a_node_told_to_copy_from_nowhere(tmp_path: Path, bad: str) -> None:
    node = NodeThread(tmp_path)
    asker = Asker(node.address)
    try:
        for address, events in ((bad, "tcp://h:1"), ("tcp://h:1", bad)):
            source = pw.NodeCard("n", Incarnation("i"), address, events, "", b"", 0, 0)
            asker.socket.send(pw.encode(pw.Replicate(source, b"n" * 16, b"k" * 17)))
        asker.socket.send(pw.encode(pw.Stats(7)))
        answer = pw.decode(asker.answer())
        assert isinstance(answer, pw.StatsAre) and b'"unreadable": 2' in answer.stats
    finally:
        asker.close()
        node.end()


@pytest.mark.parametrize("bad", BAD)
def test_a_controller_told_of_a_node_nowhere(bad: str) -> None:
    controller = Controller(ControllerSettings("tcp://127.0.0.1:0"))
    problems: list[Exception] = []
    thread = threading.Thread(target=_run, args=(controller, problems))
    thread.start()
    asker = Asker(controller.address)
    try:
        for address, events in ((bad, "tcp://h:1"), ("tcp://h:1", bad)):
            source = pw.NodeCard("n", Incarnation("i"), address, events, "", b"", 0, 0)
            asker.socket.send(pw.encode(pw.NodeBeat(source, 0, 0, 0, 0)))
        asker.socket.send(pw.encode(pw.Members(7)))
        assert pw.decode(asker.answer()) == pw.MembersAre(7, "controller", ())
        assert controller.counters["unreadable"] == 2
    finally:
        asker.close()
        controller.stop()
        thread.join(10)
        controller.close()
    assert not problems


def _run(controller: Controller, problems: list[Exception]) -> None:
    try:
        controller.run()
    except Exception as problem:  # noqa: BLE001  (looked at on the test's thread)
        problems.append(problem)


def test_an_address_that_is_sought_is_not_sought_without_bound(endpoint: EngineEndpoint, asker: Asker) -> None:
    """Whoever can reach the endpoint can have it seek; it takes so many."""
    answers: list[Any] = []
    for number in range(MOST_WANTED + 10):
        asker.control(wire.Meet(f"tcp://127.0.0.1:{20000 + number}", str(number)))
    while len(answers) < 10:
        answers.append(wire.decode_control(asker.answer()))
    assert all("already seeks" in met.refused for met in answers)


def test_what_nobody_sends_does_not_pile_up() -> None:
    """An engine that may not pair (its weights are not known) is asked for transfers all the same."""
    book = LedgerBook()
    made = EngineEndpoint("tcp://127.0.0.1:0", "", book)
    made.refuse_all("weights")
    for number in range(MOST_UNSENT + 7):
        made.tell("tcp://127.0.0.1:1", wire.NotNeeded(Incarnation("us"), TransferId(f"{number:032}"), "x"))
    assert len(made._to_send) == MOST_UNSENT and book.counts() == {"tell:dropped": 7}
    made.close()
