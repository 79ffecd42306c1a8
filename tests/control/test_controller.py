"""The controller over real sockets, with nodes that speak the real protocol."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from lmkv import poolwire as pw
from lmkv.control.admin import Admin, AdminError
from lmkv.control.controller import Controller, ControllerSettings
from lmkv.control.follow import CATCHING_UP, DEGRADED, EXACT, ViewSettings
from lmkv.control.replication import ReplicationSettings
from lmkv.errors import ConfigError

from .fake_node import FakeNode

NAMESPACE = b"n" * 16
QUICK = ViewSettings(lease_s=0.8, forget_s=2.0, lag_s=0.3, part_s=1.0)


def keys(first: int, count: int) -> list[bytes]:
    return [i.to_bytes(16, "big") + b"\0" for i in range(first, first + count)]


def pages(first: int, count: int, tiers: int = 1) -> dict[bytes, int]:
    return {NAMESPACE + key: tiers for key in keys(first, count)}


def until(what: Callable[[], object], why: str, deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end_s, f"not within {deadline_s} s: {why}"
        time.sleep(0.01)


class Running:
    """A controller in a thread, and a client of it."""

    def __init__(self, settings: ControllerSettings) -> None:
        self.controller = Controller(settings)
        self.thread = threading.Thread(target=self.controller.run, daemon=True)
        self.thread.start()
        self.address = self.controller.address
        self.admin = Admin(self.address)

    def states(self) -> dict[str, str]:
        return {member.card.incarnation: member.state for member in self.admin.members().nodes}

    def holders(self, wanted: list[bytes]) -> dict[str, bytes]:
        return {h.incarnation: h.tiers for h in self.admin.lookup(NAMESPACE, b"".join(wanted)).holders}

    def close(self) -> None:
        self.admin.close()
        self.controller.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.controller.close()


@pytest.fixture
def controller(request: pytest.FixtureRequest) -> Iterator[Running]:
    replication = getattr(request, "param", ReplicationSettings())
    running = Running(ControllerSettings("tcp://127.0.0.1:0", "c0", QUICK, replication))
    yield running
    running.close()


@pytest.fixture
def start() -> Iterator[Callable[..., FakeNode]]:
    nodes: list[FakeNode] = []

    def make(*arguments: object, **options: object) -> FakeNode:
        nodes.append(FakeNode(*arguments, **options))  # type: ignore[arg-type]
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


Start = Callable[..., FakeNode]


def test_snapshot_then_events(controller: Running, start: Start) -> None:
    node = start([controller.address], pages=pages(0, 100), part_records=30)
    until(lambda: controller.states() == {node.incarnation: EXACT}, "exact")
    assert controller.holders(keys(90, 20)) == {node.incarnation: b"\1" * 10 + b"\0" * 10}
    node.put(pages(100, 5, tiers=3) | pages(91, 1, tiers=0))
    until(lambda: controller.holders(keys(100, 1)), "the events arrive")
    assert controller.holders(keys(90, 20)) == {node.incarnation: b"\1\0" + b"\1" * 8 + b"\3" * 5 + b"\0" * 5}
    assert node.snapshots == 1
    member = controller.admin.members().nodes[0]
    assert (member.card, member.pages, member.capacity_bytes) == (node.card, 104, 1 << 30)
    assert controller.admin.lookup(NAMESPACE, b"".join(keys(0, 1))).exact
    node.put(pages(7, 1), clear=True)
    until(lambda: controller.holders(keys(7, 1)) and not controller.holders(keys(8, 1)), "cleared")


def test_the_longest_run_comes_first(controller: Running, start: Start) -> None:
    short, long, other = (start([controller.address], pages=pages(*p)) for p in ((0, 3), (0, 9), (1, 9)))
    until(lambda: list(controller.states().values()) == [EXACT] * 3, "exact")

    def found(**options: int) -> list[str]:
        return [h.incarnation for h in controller.admin.lookup(NAMESPACE, b"".join(keys(0, 10)), **options).holders]

    assert found() == [long.incarnation, short.incarnation]
    assert found(least=4) == [long.incarnation] and found(least=10) == []
    assert found(most=1) == [long.incarnation]
    assert set(found(least=0)) == {short.incarnation, long.incarnation, other.incarnation}


def test_lost_events_are_noticed(controller: Running, start: Start) -> None:
    node = start([controller.address], pages=pages(0, 10))
    until(lambda: controller.states() == {node.incarnation: EXACT}, "exact")
    node.muted = True
    node.put(pages(10, 10))
    until(lambda: controller.states() == {node.incarnation: CATCHING_UP}, "the beat tells of events that did not come")
    node.muted = False
    until(lambda: controller.states() == {node.incarnation: EXACT}, "exact again")
    assert controller.holders(keys(0, 20)) == {node.incarnation: b"\1" * 20}
    assert node.snapshots >= 2


def test_silence_then_a_return_then_silence_for_good(controller: Running, start: Start) -> None:
    node = start([controller.address], pages=pages(0, 10))
    other = start([controller.address], pages=pages(0, 2))
    until(lambda: list(controller.states().values()) == [EXACT] * 2, "exact")
    node.silent = True
    until(lambda: controller.states()[node.incarnation] == DEGRADED, "degraded")
    found = controller.admin.lookup(NAMESPACE, b"".join(keys(0, 10)))
    assert not found.exact and len(found.holders) == 2
    node.silent = False
    until(lambda: controller.states()[node.incarnation] == EXACT, "back")
    assert node.snapshots == 1
    node.silent = True
    until(lambda: controller.states() == {other.incarnation: EXACT}, "forgotten")
    assert controller.holders(keys(0, 10)) == {other.incarnation: b"\1" * 2 + b"\0" * 8}


def test_another_incarnation_replaces_the_one_before(controller: Running, start: Start) -> None:
    first = start([controller.address], pages=pages(0, 10))
    until(lambda: controller.states() == {first.incarnation: EXACT}, "exact")
    port = first.port
    first.close()
    second = start([controller.address], pages=pages(5, 10), port=port)
    until(lambda: controller.states() == {second.incarnation: EXACT}, "the new one, and it alone")
    assert controller.holders(keys(0, 1)) == {}
    assert controller.holders(keys(5, 10)) == {second.incarnation: b"\1" * 10}


def test_an_orderly_end(controller: Running, start: Start) -> None:
    node = start([controller.address], pages=pages(0, 10))
    until(lambda: controller.states() == {node.incarnation: EXACT}, "exact")
    node.close(leave=True)
    until(lambda: controller.states() == {}, "gone at once", 0.7)
    assert controller.holders(keys(0, 1)) == {}


def test_two_controllers_see_the_same(start: Start) -> None:
    both = [Running(ControllerSettings("tcp://127.0.0.1:0", name, QUICK)) for name in ("c0", "c1")]
    try:
        node = start([running.address for running in both], pages=pages(0, 10))
        for running in both:
            until(lambda running=running: running.states() == {node.incarnation: EXACT}, "exact")  # type: ignore[misc]
            assert running.holders(keys(0, 10)) == {node.incarnation: b"\1" * 10}
    finally:
        for running in both:
            running.close()


def test_what_it_does_not_take(controller: Running) -> None:
    with pytest.raises(AdminError, match="does not take ListKeys") as caught:
        controller.admin.list_keys(b"", b"", 10)
    assert controller.address in str(caught.value)
    with pytest.raises(AdminError, match="multiple of 17"):
        controller.admin.lookup(NAMESPACE, b"x" * 18)
    with pytest.raises(AdminError, match="more than 65536 keys"):
        controller.admin.lookup(NAMESPACE, bytes(17 * 65537))
    socket = controller.admin._socket
    socket.send(b"\xc1 nonsense")
    socket.send_multipart([b"two", b"frames"])
    socket.send(pw.encode(pw.Declare(b"", "one-way, and not for a controller")))
    stats = controller.controller.stats(time.monotonic())
    until(lambda: controller.controller.counters["unexpected"] == 1, "counted")
    assert controller.controller.counters["unreadable"] == 2
    assert stats["kind"] == "controller"
    told = controller.admin.stats()
    assert (told.card.name, told.card.address) == ("c0", controller.address) and b'"nodes": 0' in told.stats


def test_cards_that_cannot_be_followed(controller: Running) -> None:
    """One with an address that is none cannot even be read; one without a PUB is read, and not followed."""
    for events, counter in (("ipc:///no", "unreadable"), ("", "bad_cards")):
        bad = pw.NodeCard("bad", pw.Incarnation("bad"), "tcp://127.0.0.1:1", events, "tcp", b"", 0, 0)
        controller.admin._socket.send(pw.encode(pw.NodeBeat(bad, 0, 0, 0, 0)))
        until(lambda counter=counter: controller.controller.counters[counter] == 1, "counted")
    assert controller.states() == {}


@pytest.mark.parametrize("controller", [ReplicationSettings(copies=2, heat=5)], indirect=True)
def test_hot_pages_are_copied(controller: Running, start: Start) -> None:
    hot = start([controller.address], pages=pages(0, 10))
    cold = start([controller.address], pages={})
    until(lambda: list(controller.states().values()) == [EXACT] * 2, "exact")
    for _ in range(20):
        controller.holders(keys(0, 10))
    until(lambda: cold.replicates, "an order")
    assert not hot.replicates
    assert cold.replicates == [pw.Replicate(hot.card, NAMESPACE, b"".join(keys(0, 8)))]
    cold.put(pages(0, 8))
    until(lambda: len(controller.holders(keys(0, 8))) == 2, "the copy is listed")


def test_a_taken_port() -> None:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ConfigError, match=str(port)):
        Controller(ControllerSettings(f"tcp://127.0.0.1:{port}"))
    socket.close(0)
    context.term()


def test_nobody_there() -> None:
    with Admin("tcp://127.0.0.1:1", deadline_s=0.1) as admin, pytest.raises(AdminError) as caught:
        admin.members()
    assert caught.value.code == "LMKV-P843" and "tcp://127.0.0.1:1" in str(caught.value)


def test_no_descriptors_are_left(start: Start) -> None:
    def once() -> None:
        running = Running(ControllerSettings("tcp://127.0.0.1:0", "c", QUICK))
        node = FakeNode([running.address], pages=pages(0, 10))
        until(lambda: running.states() == {node.incarnation: EXACT}, "exact")
        node.close(leave=True)
        until(lambda: running.states() == {}, "gone")
        running.close()

    once()
    before = len(os.listdir("/proc/self/fd"))
    once()
    assert len(os.listdir("/proc/self/fd")) <= before
