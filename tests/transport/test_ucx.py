"""What only ucx:// has. Runs where ucxx is importable: see test_ucx_process."""

from __future__ import annotations

import logging
import secrets
import select
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from framed_nodes import Node, check_disconnects, location, pump, works

from lmkv.errors import ConfigError, ConnectError, PeerLostError, StateError

pytestmark = pytest.mark.skipif(
    find_spec("ucxx") is None or find_spec("nixl") is not None or "nixl" in sys.modules,
    reason="needs an interpreter with ucxx and without NIXL",
)

MIB = 1 << 20


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def new(name: str, arena_bytes: int = MIB) -> Node:
        nodes.append(node := Node(name, "ucx://", arena_bytes))
        return node

    yield new
    for node in nodes:
        node.transport.abort()


@pytest.mark.parametrize("size_bytes", [0, 1, 20, 100, 5000, 100_000])
def test_knocks_that_are_none_are_dropped(
    make: Callable[..., Node], caplog: pytest.LogCaptureFixture, size_bytes: int
) -> None:
    from lmkv.transport import ucx

    target, writer = make("target"), make("writer")
    where = location(target)
    link = writer.transport._link(where.address)
    with caplog.at_level(logging.WARNING, logger="lmkv"):
        link.say(secrets.token_bytes(size_bytes), ucx._KNOCK_TAG)
        good_token = ucx._KNOCK.pack(ucx._KNOCK_MAGIC, where.token, 4)
        link.say(good_token + b"an address that is none, under a seal that is none", ucx._KNOCK_TAG)
        pump(lambda: "damaged" in caplog.text, writer, target)
    assert caplog.text.count("dropped a knock") == 2
    writer.connect(target)
    works(writer, target)


def test_a_damaged_export_does_not_reach_ucx(make: Callable[..., Node]) -> None:
    target, writer = make("target"), make("writer")
    export = target.transport.export()
    at = export.find(location(target).address) + 40
    with pytest.raises(ConnectError, match="damaged"):
        writer.transport.connect(export[:at] + bytes([export[at] ^ 1]) + export[at + 1 :])


def test_descriptors_tell_of_all_there_is_to_do(make: Callable[..., Node]) -> None:
    writer, target = make("writer", 8 * MIB), make("target", 8 * MIB)
    writer.arena[:] = np.random.default_rng(2).integers(0, 256, 8 * MIB)
    peer = writer.connect(target)
    op = writer.transport.write(peer, writer.at((0, 8 * MIB)), target.at((0, 8 * MIB)), b"by fds alone")
    nodes = {fd: node for node in (writer, target) for fd in node.transport.fds()}
    while not (writer.completion(op) and target.notes):
        ready, _, _ = select.select(list(nodes), [], [], 5.0)
        assert ready, "work to do and no descriptor tells of it"
        for fd in ready:
            nodes[fd].poll()
    assert np.array_equal(writer.arena, target.arena)
    for _ in range(100):
        ready, _, _ = select.select(list(nodes), [], [], 0.05)
        if not ready:
            return
        for fd in ready:
            nodes[fd].poll()
    raise AssertionError("idle, and the descriptors stay readable")


def test_each_direction_outlives_the_others_disconnect(make: Callable[..., Node]) -> None:
    check_disconnects(make("a"), make("b"))


def test_an_abort_in_mid_transfer_is_told_to_the_other_side(make: Callable[..., Node]) -> None:
    """UCX keeps half-received messages, and with them its connections, so silence alone would not tell it."""
    a, b = make("a", 32 * MIB), make("b", 32 * MIB)
    peer = a.connect(b)
    b.connect(a)
    works(a, b)
    op = a.transport.write(peer, a.at((0, 32 * MIB)), b.at((0, 32 * MIB)))
    for _ in range(5):
        a.poll()
        b.poll()
    with pytest.raises(StateError):
        a.transport.disconnect(peer)
    b.transport.abort()
    before = b.arena.copy()
    pump(lambda: a.lost, a)
    completion = a.completion(op)
    assert completion is not None
    assert isinstance(completion.error, PeerLostError)
    assert np.array_equal(b.arena, before)


def test_addresses() -> None:
    from lmkv.transport.interfaces import interface_of

    assert interface_of("127.0.0.1") == "lo"
    for host in ("192.0.2.1", "::2", "localhost"):
        with pytest.raises(ConfigError):
            interface_of(host)
