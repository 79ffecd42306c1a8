"""What only tcp:// has: strangers and liars on the port, slow readers, frames in pieces, IPv6."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from framed_nodes import Node, RawPeer, location, pump, works

from lmkv.errors import ConfigError, ConnectError, ExtentError, PeerLostError
from lmkv.transport import open_transport
from lmkv.transport.framed import frames
from lmkv.transport.framed.frames import Frame, Greeting, Kind, Status
from lmkv.transport.tcp import TcpTransport

MIB = 1 << 20


@pytest.fixture
def made() -> Iterator[list[Node | RawPeer]]:
    nodes: list[Node | RawPeer] = []
    yield nodes
    for node in nodes:
        node.close() if isinstance(node, RawPeer) else node.transport.abort()


@pytest.fixture
def make(made: list[Node | RawPeer]) -> Callable[..., Node]:
    def new(name: str, url: str = "tcp://", arena_bytes: int = MIB) -> Node:
        made.append(node := Node(name, url, arena_bytes))
        return node

    return new


@pytest.fixture
def raw(made: list[Node | RawPeer]) -> Callable[..., RawPeer]:
    def new(node: Node, name: str = "raw", *, hello: bool = True) -> RawPeer:
        made.append(peer := RawPeer(node, name, hello=hello))
        return peer

    return new


# --- hosts that are gone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "give_up_s"), [("tcp://", 20), ("tcp://?give_up_s=7", 7)])
def test_all_channels_give_up_a_host_that_does_not_answer(make: Callable[..., Node], url: str, give_up_s: int) -> None:
    one, other = make("one", url), make("other", url)
    one.connect(other)
    other.connect(one)
    works(one, other)
    works(other, one)
    for node in (one, other):
        transport = node.transport
        assert isinstance(transport, TcpTransport)
        sockets = [conduit.channel.socket for conduit, _ in transport._conduits.values()]  # type: ignore[attr-defined]
        assert len(sockets) == 2, "its own and the other's"
        for sock in sockets:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == give_up_s * 1000
            idle_s = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            assert idle_s + sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) < give_up_s


# --- strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01", b"\0" * 100, b"LMKVDATX", b"x" * 100_000], ids=repr
)
def test_garbage_is_dropped_with_a_log_line(
    make: Callable[..., Node], raw: Callable[..., RawPeer], caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    target, writer = make("target"), make("writer")
    stranger = raw(target, hello=False)
    try:
        stranger.send(garbage)
    except (BrokenPipeError, ConnectionResetError):
        stranger.ended = True  # dropped before it had said all of it
    with caplog.at_level(logging.WARNING, logger="lmkv"):
        stranger.dropped()
    assert "a stranger ended: protocol violation" in caplog.text
    writer.connect(target)
    works(writer, target)


@pytest.mark.parametrize(
    ("version", "token", "name", "status"),
    [
        (frames.VERSION + 1, None, "raw", Greeting.VERSION),
        (frames.VERSION, b"t" * 16, "raw", Greeting.TOKEN),
        (frames.VERSION, None, "target", Greeting.NAME),
    ],
    ids=["version", "token", "name"],
)
def test_a_hello_that_does_not_fit_is_told_so_and_dropped(
    make: Callable[..., Node],
    raw: Callable[..., RawPeer],
    version: int,
    token: bytes | None,
    name: str,
    status: Greeting,
) -> None:
    target = make("target")
    peer = raw(target, hello=False)
    peer.send(frames.pack_hello(name, token or peer.token, version=version))
    answer = peer.welcome()
    assert (answer.version, answer.status) == (frames.VERSION, status)
    peer.dropped()


def test_silence_is_dropped_after_a_while(
    make: Callable[..., Node], raw: Callable[..., RawPeer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv.transport.framed.transport._HELLO_TIMEOUT_S", 0.05)
    raw(make("target"), hello=False).dropped()


def test_many_strangers_push_each_other_out_and_nobody_else(
    make: Callable[..., Node], raw: Callable[..., RawPeer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv.transport.framed.transport._STRANGERS_LIMIT", 4)
    target, writer = make("target"), make("writer")
    writer.connect(target)
    works(writer, target)
    strangers = [raw(target, hello=False) for _ in range(8)]
    strangers[0].dropped()
    works(writer, target)
    assert writer.lost == []


def test_the_initiator_learns_why_it_was_refused(make: Callable[..., Node]) -> None:
    """The export is of a process that has been replaced by another one on the same port."""
    old = make("old")
    export = old.transport.export()
    port = location(old).address.decode().rpartition(":")[2]
    old.transport.close()
    new, writer = make("new", f"tcp://127.0.0.1:{port}"), make("writer")
    peer = writer.transport.connect(export)
    op = writer.transport.write(peer, writer.at((0, MIB)), old.at((0, MIB)))
    pump(lambda: writer.lost, writer, new)
    completion = writer.completion(op)
    assert completion is not None
    assert isinstance(completion.error, PeerLostError)
    assert "token" in str(completion.error)


# --- liars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.WRITE, rows=frames.FRAME_ROWS + 1),
        Frame(Kind.WRITE, rows=0),
        Frame(Kind.READ, rows=65535),
        Frame(Kind.NOTE, note_bytes=frames.NOTE_BYTES_LIMIT + 1),
        Frame(Kind.NOTE, note_bytes=0),
        Frame(Kind.END, note_bytes=2**32 - 1),
        Frame(Kind.DATA, value=10),
        Frame(Kind.DONE),
        Frame(99),
    ],
    ids=repr,
)
def test_oversize_and_senseless_frames_end_the_channel(
    make: Callable[..., Node], raw: Callable[..., RawPeer], frame: Frame
) -> None:
    peer = raw(make("target"))
    peer.welcome()
    peer.send(frames.pack_frame(frame))
    peer.dropped()


@pytest.mark.parametrize("sizes", [(frames.FRAME_BYTES + 1,), (2**64 - 1, 2**64 - 1), (0,), (1, 0)], ids=repr)
def test_rows_of_impossible_size_end_the_channel(
    make: Callable[..., Node], raw: Callable[..., RawPeer], sizes: tuple[int, ...]
) -> None:
    target = make("target", arena_bytes=8 * MIB)
    peer = raw(target)
    rows = np.array([(target.address, size) for size in sizes], dtype=np.uint64)
    peer.send(frames.pack_frame(Frame(Kind.WRITE, rows=len(rows), op=1)) + frames.pack_rows(rows))
    peer.dropped()


@pytest.mark.parametrize("outside", [-1, MIB, MIB - 99, 2**62])
def test_a_refused_payload_is_drained_and_the_channel_goes_on(
    make: Callable[..., Node], raw: Callable[..., RawPeer], outside: int
) -> None:
    target = make("target")
    peer = raw(target)
    peer.send(peer.write(1, (0, 50), (outside, 100), fill=7) + peer.write(1, (200, 50), fill=7) + peer.end(1, b"lie"))
    peer.send(peer.write(2, (100, 50), fill=9) + peer.end(2, b"truth"))
    peer.welcome()
    refusal = peer.frame()
    assert (refusal.kind, refusal.op, refusal.value) == (Kind.REFUSED, 1, target.address + outside)
    assert [(f.kind, f.op, f.status) for f in (peer.frame(), peer.frame())] == [
        (Kind.DONE, 1, Status.EXTENT),
        (Kind.DONE, 2, Status.OK),
    ]
    assert target.notes == [b"truth"]
    assert target.arena[100:150].tolist() == [9] * 50
    assert target.arena[:100].sum() + target.arena[150:].sum() == 0


def test_a_refused_read_leaves_the_others(make: Callable[..., Node], raw: Callable[..., RawPeer]) -> None:
    target = make("target")
    target.arena[:4] = (1, 2, 3, 4)
    peer = raw(target)
    for op, offset in ((1, MIB), (2, 0)):
        rows = np.array([(target.address + offset, 4)], dtype=np.uint64)
        peer.send(frames.pack_frame(Frame(Kind.READ, rows=1, op=op)) + frames.pack_rows(rows))
    peer.welcome()
    assert peer.frame()[:2] == (Kind.REFUSED, Status.EXTENT)
    assert peer.frame() == Frame(Kind.DATA, op=2, value=4)
    assert peer.answer(4) == bytes((1, 2, 3, 4))


def test_a_writer_with_a_stale_export_gets_the_error_and_goes_on(make: Callable[..., Node]) -> None:
    writer, target = make("writer", arena_bytes=16 * MIB), make("target", arena_bytes=16 * MIB)
    peer = writer.connect(target)
    found = writer.transport._peers[peer]
    found.regions = type("Any", (), {"outside": lambda self, extents: None})()
    rows = [(MIB * i, MIB) for i in range(15)]
    remote = target.at(*rows[:8], (64 * MIB, MIB), *rows[9:])
    for command in (writer.transport.write, writer.transport.read):
        op = command(peer, writer.at(*rows), remote, b"lie")
        pump(lambda op=op: writer.completion(op), writer, target)
        completion = writer.completion(op)
        assert completion is not None
        assert isinstance(completion.error, ExtentError)
    works(writer, target)
    assert b"lie" not in target.notes


def test_more_refused_operations_than_are_remembered_end_the_channel(
    make: Callable[..., Node], raw: Callable[..., RawPeer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmkv.transport.framed.target.REFUSED_OPS_LIMIT", 3)
    peer = raw(make("target"))
    for op in range(4):
        peer.send(peer.write(op, (2 * MIB, 1), fill=1))
    peer.dropped()


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_split_at_every_byte_boundary(make: Callable[..., Node], raw: Callable[..., RawPeer]) -> None:
    """Each byte alone, with polls between; every boundary of hello, header, rows, payload and note is one of them."""
    target = make("target")
    peer = raw(target, hello=False)
    stream = frames.pack_hello("raw", peer.token)
    stream += peer.write(5, (0, 3), (10, 2), fill=8) + peer.end(5, b"note") + peer.note(b"more")
    for byte in stream:
        peer.send(bytes([byte]))
        target.poll()
    pump(lambda: len(target.notes) == 2, target)
    assert target.notes == [b"note", b"more"]
    assert target.arena[:12].tolist() == [8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 8, 8]


def test_split_in_two_at_every_byte_boundary(make: Callable[..., Node], raw: Callable[..., RawPeer]) -> None:
    target = make("target")
    peer = raw(target)
    stream = peer.write(5, (0, 3), (10, 2), fill=8) + peer.end(5, b"note")
    for cut in range(1, len(stream)):
        target.arena[:] = 0
        target.events.clear()
        peer.send(stream[:cut])
        target.poll()
        target.poll()
        peer.send(stream[cut:])
        pump(lambda: target.notes, target)
        assert target.arena[:12].tolist() == [8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 8, 8]


# --- addresses and slow readers ---------------------------------------------------------------------------------------


def test_a_peer_that_takes_no_answers_is_read_no_further(
    make: Callable[..., Node], raw: Callable[..., RawPeer]
) -> None:
    """It asks for reads and never takes the data: what the target holds for it stays bounded, and others go on."""
    target, writer = make("target", arena_bytes=8 * MIB), make("writer")
    peer = raw(target)
    rows = np.array([(target.address, 4 * MIB)], dtype=np.uint64)
    request = frames.pack_frame(Frame(Kind.READ, rows=1, op=1)) + frames.pack_rows(rows)
    for _ in range(100):
        peer.send(request)
    for _ in range(200):
        target.poll()
    (served,) = target.transport._targets
    assert len(served._reads) <= frames.READ_WINDOW
    assert served._staged_bytes < 6 * MIB
    assert not served.wants_receive
    writer.connect(target)
    works(writer, target)
    for _ in range(100):
        if not peer.received.startswith(b"LMKV"):
            peer.frame()
        else:
            peer.welcome()
            peer.frame()
        peer.answer(4 * MIB)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 loopback here")
def test_ipv6(make: Callable[..., Node]) -> None:
    writer, target = make("writer", "tcp://[::1]"), make("target", "tcp://[::1]:0")
    assert location(target).address.startswith(b"[::1]:")
    writer.connect(target)
    works(writer, target)


def test_addresses_and_options() -> None:
    for url in ("tcp://0.0.0.0", "tcp://host:port", "tcp://?speed=high", "tcp://me@127.0.0.1"):
        with pytest.raises(ConfigError):
            open_transport(url, "x")
    with pytest.raises(ConnectError):
        open_transport("tcp://192.0.2.1", "x")
    with pytest.raises(ConfigError):
        open_transport("tcp://", "x" * 2000)
    everywhere = Node("x", "tcp://0.0.0.0?advertise=127.0.0.1")
    assert location(everywhere).address.startswith(b"127.0.0.1:")
    everywhere.transport.close()
