"""What strangers can have a node remember of them has a bound, and so has what a client remembers of nodes."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from lmkv import poolwire as pw
from lmkv.control.mailbox import Inbox, make_context
from lmkv.ids import Incarnation, Rank, make_incarnation
from lmkv.pool import access, clients, copying, desk, directory, leases
from lmkv.pool.access import Me, NodeAccess
from lmkv.pool.arena import Arena
from lmkv.pool.directory import Directory
from lmkv.pool.index import PoolIndex
from lmkv.pool.leases import Leases
from lmkv.pool.policy import make_policy

from .bed import SPACE, NodeThread, User, key, until

US = Me(Incarnation("us"), Rank(0), "us")


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = make_context()
    yield made
    made.destroy(0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeThread]:
    made = NodeThread(tmp_path)
    yield made
    made.end()


class Controller:
    """Answers Members with what the test says."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *addresses: str) -> None:
        self._inbox = Inbox(context, "tcp://127.0.0.1:0")
        self.address = self._inbox.address
        self.addresses = addresses

    def close(self) -> None:
        self._inbox.close()

    def answer(self) -> None:
        """The next question."""
        assert self._inbox.socket.poll(5000)
        identity, payload = self._inbox.socket.recv_multipart()
        question = pw.decode(payload)
        assert isinstance(question, pw.Members)
        members = tuple(
            pw.Member(pw.NodeCard("n", Incarnation("i"), a, a, "", b"", 0, 0), "EXACT", 0.0, 0, 0, 0, False)
            for a in self.addresses
        )
        self._inbox.socket.send_multipart([identity, pw.encode(pw.MembersAre(question.token, "c", members))])


def test_nodes_that_no_controller_lists_are_left(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Of one controller or of several: an engine that lives for weeks meets many nodes."""
    first, second = Controller(context, "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"), Controller(context)
    fixed = "tcp://127.0.0.1:9"
    found = Directory(context, US, [fixed], [first.address, second.address], use_arenas=False)
    now_s = 100.0

    def ask_all() -> set[str]:
        """What is used after every controller has answered once more."""
        nonlocal now_s
        now_s += directory.ASK_EVERY_S
        found.tick(now_s)
        for controller in (first, second):
            controller.answer()
        until(lambda: found.tick(now_s) or not any(link._open for link in found.controllers))
        return set(found._accesses)

    assert ask_all() == {fixed, "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"}
    first.addresses, second.addresses = ("tcp://127.0.0.1:3",), ("tcp://127.0.0.1:2",)
    assert ask_all() == {fixed, "tcp://127.0.0.1:2", "tcp://127.0.0.1:3"}
    first.addresses, second.addresses = (), ()
    assert ask_all() == {fixed}
    for thing in (found, first, second):
        thing.close()


def test_a_client_uses_so_many_nodes(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory, "MOST_NODES", 5)
    controller = Controller(context, *(f"tcp://127.0.0.1:{port}" for port in range(1, 10)))
    found = Directory(context, US, [], [controller.address], use_arenas=False)
    found.tick(100.0)
    controller.answer()
    until(lambda: found.tick(100.0) or found._accesses)
    assert len(found._accesses) == 5 and "more than 5 pool nodes" in caplog.text
    found.close()
    controller.close()


def test_a_client_remembers_the_latest_namespaces(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reset of the cache gives the engine's KV another name."""
    monkeypatch.setattr(access, "MOST_NAMESPACES", 3)
    monkeypatch.setattr(directory, "MOST_NAMESPACES", 3)
    found = Directory(context, US, ["tcp://127.0.0.1:1"], [], use_arenas=False)
    for number in range(10):
        found.declare(bytes((number,)) * 16, "{}")
    (node,) = found._accesses.values()
    assert list(found._namespaces) == list(node._namespaces) == [bytes((n,)) * 16 for n in (7, 8, 9)]
    found.close()


def test_a_node_has_so_many_clients(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MOST_CLIENTS", 3)
    user = User(node.address)
    try:
        hello = [
            user.get(lambda t: pw.PoolHello(t, make_incarnation(bytes((n,)) * 8), Rank(0), "x"), pw.PoolWelcome)  # noqa: B023
            for n in range(5)
        ]
        assert [bool(answer.refused) for answer in hello] == [False, False, True, True, True]
        assert "3 clients already" in hello[-1].refused
    finally:
        user.close()


def test_a_node_copies_from_so_many_others(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "MOST_SOURCES", 4)
    user = User(node.address)
    try:
        for number in range(10):
            address = f"tcp://127.0.0.1:{number + 1}"
            source = pw.NodeCard("gone", Incarnation("i"), address, address, "", b"", 0, 0)
            user.link.tell(pw.Replicate(source, SPACE, key(number)))
        user.until_stats(lambda stats: stats["counters"].get("copy:refused", 0) == 6)
        until(lambda: len(node.node._copying._accesses) == 4)
    finally:
        user.close()


def test_a_node_without_sockets_copies_nothing_and_lives(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "NodeAccess", no_socket)
    user = User(node.address)
    try:
        source = pw.NodeCard("n", Incarnation("i"), "tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "", b"", 0, 0)
        answer = user.get(lambda t: pw.Replicate(source, SPACE, key(1), t), pw.Replicated)
        assert answer.pages == 0 and user.counters()["copy:unreachable"] == 1
    finally:
        user.close()


def test_a_client_without_sockets_goes_on(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(directory, "NodeAccess", no_socket)
    found = Directory(context, US, ["tcp://127.0.0.1:1"], [], use_arenas=False)
    assert not found._accesses and "tcp://127.0.0.1:1 is not used" in caplog.text
    monkeypatch.undo()
    found.tick(100.0)
    assert list(found._accesses) == ["tcp://127.0.0.1:1"]
    found.close()


def no_socket(*rest: object, **more: object) -> NodeAccess:
    raise zmq.ZMQError(errno.EMFILE)


def test_so_many_questions_wait(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that waits for a promise for ever, and more of them than a node keeps."""
    monkeypatch.setattr(desk, "MOST_WAITING", 2)
    monkeypatch.setattr(desk, "MOST_WAIT_S", 1.0)
    monkeypatch.setattr(node.node._desk, "_copy_out", lambda *rest: None)  # copies that never come
    user = User(node.address)
    try:
        done: list[pw.Committed | None] = []
        for number in range(4):
            (slot,) = user.reserve([number])
            commit = pw.Commit, (user.incarnation, user.rank, SPACE, key(number), (slot.generation,), 0, ((1,),))
            user.link.ask(
                lambda t, rest=commit[1]: pw.Commit(t, *rest, pw.Ack.REPLICATED, 1e300),
                pw.Committed,
                done.append,
                time.monotonic() + 30,
            )
        user.pump(lambda: len(done) == 2)  # the third and the fourth, at once
        assert user.stats()["waiting"] == 2
        user.pump(lambda: len(done) == 4)
        assert [answer.reached for answer in done if answer is not None] == [pw.Ack.VOLATILE] * 4
    finally:
        user.close()


def test_so_many_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one page, too, which they all pin and which counts once."""
    monkeypatch.setattr(leases, "MOST_LEASES", 3)
    index = PoolIndex(Arena(1 << 20), lambda: make_policy("lru"), 30.0, 1)
    writer = (Incarnation("i"), Rank(0))
    (slot,) = index.reserve(writer, [SPACE + key(1)], 4096, 1, 0, 0.0)
    index.commit(writer, SPACE + key(1), slot.generation, 0, (1,), 0.0)
    entry = index.find(SPACE + key(1))
    assert entry is not None
    held = Leases(index, Counter(), 1 << 20)
    numbers = [held.pin(writer, [entry], 10.0, 0.0) for _ in range(3) if held.fits([entry])]
    assert len(numbers) == 3 and held.fits([entry]) == 0
    held.unpin(numbers[0])
    assert held.fits([entry]) == 1


def test_an_access_to_nobody_is_closed(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Its questions end with it."""
    found = NodeAccess(context, "tcp://127.0.0.1:1", US)
    found.tick(100.0)
    assert found.link._open
    found.close()
    assert not found.link._open
