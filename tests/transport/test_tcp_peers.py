"""tcp:// among its own kind: slow targets, many peers, taking turns, ends in every order."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from framed_nodes import Node, check_disconnects, pump, works

from lmkv.errors import ConnectError, StateError

MIB = 1 << 20


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def new(name: str, url: str = "tcp://", arena_bytes: int = MIB) -> Node:
        nodes.append(node := Node(name, url, arena_bytes))
        return node

    yield new
    for node in nodes:
        node.transport.abort()


def test_a_slow_target_holds_nobody_up_and_gets_it_all(make: Callable[..., Node]) -> None:
    writer, slow, quick = make("writer", arena_bytes=32 * MIB), make("slow", arena_bytes=32 * MIB), make("quick")
    writer.arena[:] = np.random.default_rng(1).integers(0, 256, 32 * MIB, dtype=np.uint8)
    to_slow = writer.connect(slow)
    writer.connect(quick)
    op = writer.transport.write(to_slow, writer.at((0, 32 * MIB)), slow.at((0, 32 * MIB)), b"late")
    later = writer.transport.write(to_slow, writer.at((0, 64)), slow.at((0, 64)))
    for _ in range(3):
        works(writer, quick)
    assert writer.completion(op) is None
    assert writer.transport._peers[to_slow].initiator._staged_bytes < 6 * MIB
    writer.transport.cancel(op)
    writer.transport.cancel(later)
    pump(lambda: writer.completion(op) and writer.completion(later), writer, slow)
    assert slow.notes == []
    writer.transport.release(op)
    op = writer.transport.write(to_slow, writer.at((0, 32 * MIB)), slow.at((0, 32 * MIB)), b"whole")
    pump(lambda: writer.completion(op), writer, slow)
    assert slow.notes == [b"whole"]
    assert np.array_equal(slow.arena, writer.arena)


def test_an_operation_not_begun_is_dropped_at_once(make: Callable[..., Node]) -> None:
    writer, target = make("writer", arena_bytes=32 * MIB), make("target", arena_bytes=32 * MIB)
    peer = writer.connect(target)
    first = writer.transport.write(peer, writer.at((0, 32 * MIB)), target.at((0, 32 * MIB)))
    second = writer.transport.write(peer, writer.at((0, MIB)), target.at((0, MIB)), b"second")
    writer.transport.cancel(second)
    pump(lambda: writer.completion(second), writer)
    completion = writer.completion(second)
    assert completion is not None
    assert "cancelled" in str(completion.error)
    pump(lambda: writer.completion(first), writer, target)
    assert target.notes == []


def test_operations_take_turns(make: Callable[..., Node]) -> None:
    """A small write is not behind the whole of a large one that began earlier."""
    writer, target = make("writer", arena_bytes=64 * MIB), make("target", arena_bytes=64 * MIB)
    peer = writer.connect(target)
    large = writer.transport.write(peer, writer.at((0, 64 * MIB)), target.at((0, 64 * MIB)))
    small = writer.transport.write(peer, writer.at((0, 64)), target.at((0, 64)))
    pump(lambda: writer.completion(small), writer, target)
    assert writer.completion(large) is None
    pump(lambda: writer.completion(large), writer, target)


def test_notes_for_a_peer_that_does_not_read_are_bounded(make: Callable[..., Node]) -> None:
    writer, target = make("writer"), make("target")
    peer = writer.connect(target)
    with pytest.raises(StateError, match="does not poll"):
        for _ in range(100):
            writer.transport.notify(peer, b"n" * MIB)
    with pytest.raises(StateError):
        writer.transport.notify(peer, b"n" * (MIB + 1))
    pump(lambda: writer.transport._peers[peer].initiator.idle, writer, target)
    writer.transport.notify(peer, b"room again")
    pump(lambda: b"room again" in target.notes, writer, target)


def test_many_peers(make: Callable[..., Node]) -> None:
    target = make("target")
    writers = [make(f"writer-{i}") for i in range(40)]
    ops = []
    for i, writer in enumerate(writers):
        writer.arena[:] = i + 1
        ops.append(
            writer.transport.write(writer.connect(target), writer.at((0, 4096)), target.at((i * 4096, 4096)), b"%d" % i)
        )
    pump(lambda: all(w.completion(op) for w, op in zip(writers, ops, strict=True)), target, *writers)
    assert sorted(target.notes, key=int) == [b"%d" % i for i in range(40)]
    assert target.arena[: 40 * 4096].reshape(40, 4096).tolist() == [[i + 1] * 4096 for i in range(40)]


# --- ends -------------------------------------------------------------------------------------------------------------


def test_each_direction_outlives_the_others_disconnect(make: Callable[..., Node]) -> None:
    check_disconnects(make("a"), make("b"))


def test_a_dead_peers_last_channel_may_not_come_in_late(make: Callable[..., Node]) -> None:
    """B writes to A and dies. A learns of the death first, from its own channel: then B's bytes must not land."""
    a, b = make("a"), make("b")
    a.connect(b)
    pump(lambda: len(b.transport._targets) == 1, a, b)
    b.arena[:] = 1
    export = b.transport.export()
    b.transport.write(b.connect(a), b.at((0, 4096)), a.at((0, 4096)), b"too late")
    b.transport.abort()
    a.transport._epoll.modify(a.transport._listener.fileno(), 0)  # type: ignore[attr-defined]
    pump(lambda: a.lost, a)
    a.transport._epoll.modify(a.transport._listener.fileno(), select.EPOLLIN)  # type: ignore[attr-defined]
    for _ in range(50):
        a.poll()
    assert a.notes == []
    assert a.arena.sum() == 0
    with pytest.raises(ConnectError, match="cannot be reached"):
        a.transport.connect(export)


def test_descriptors_are_readable_exactly_while_there_is_something_to_do(make: Callable[..., Node]) -> None:
    writer, target = make("writer", arena_bytes=8 * MIB), make("target", arena_bytes=8 * MIB)
    peer = writer.connect(target)
    op = writer.transport.write(peer, writer.at((0, 8 * MIB)), target.at((0, 8 * MIB)), b"by fds alone")
    nodes = {fd: node for node in (writer, target) for fd in node.transport.fds()}
    while not (writer.completion(op) and target.notes):
        ready, _, _ = select.select(list(nodes), [], [], 5.0)
        assert ready, "work to do and no descriptor tells of it"
        for fd in ready:
            nodes[fd].poll()
    for _ in range(3):
        writer.poll()
        target.poll()
    assert select.select(list(nodes), [], [], 0.05)[0] == []
