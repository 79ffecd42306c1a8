"""Framed transports in this process, and a hand-made peer that says whatever a test wants it to."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import msgspec
import numpy as np

from lmkv.transport import Completion, Event, Extents, Notification, PeerId, PeerLost, Region, open_transport
from lmkv.transport.common import decode_export
from lmkv.transport.framed import FramedTransport, Location, frames

DEADLINE_S = 20.0


class Node:
    """A transport with an arena, and every event it has given."""

    def __init__(self, name: str, url: str = "tcp://", arena_bytes: int = 1 << 20) -> None:
        transport = open_transport(url, name)
        assert isinstance(transport, FramedTransport)
        self.transport = transport
        self.arena = np.zeros(arena_bytes, dtype=np.uint8)
        self.address = self.arena.ctypes.data
        self.transport.register(Region(self.address, arena_bytes, owner=self.arena))
        self.events: list[Event] = []

    def at(self, *offsets_sizes: tuple[int, int]) -> Extents:
        return Extents.of(*((self.address + offset, size) for offset, size in offsets_sizes))

    def connect(self, other: Node) -> PeerId:
        return self.transport.connect(other.transport.export())

    def poll(self) -> None:
        self.events += self.transport.poll()

    @property
    def notes(self) -> list[bytes]:
        return [e.payload for e in self.events if isinstance(e, Notification)]

    @property
    def lost(self) -> list[str]:
        return [e.peer for e in self.events if isinstance(e, PeerLost)]

    def completion(self, op: int) -> Completion | None:
        return next((e for e in self.events if isinstance(e, Completion) and e.op == op), None)


def pump(until: Callable[[], object], *nodes: Node, deadline_s: float = DEADLINE_S) -> None:
    """Poll all until the condition holds."""
    deadline = time.monotonic() + deadline_s
    while not until():
        assert time.monotonic() < deadline, [node.events[-5:] for node in nodes]
        for node in nodes:
            node.poll()


def works(writer: Node, target: Node) -> None:
    """A write with a note gets through, and completes without an error."""
    note = b"works %d" % len(target.notes)
    op = writer.transport.write(target.transport.name, writer.at((0, 4096)), target.at((0, 4096)), note)
    pump(lambda: writer.completion(op) and note in target.notes, writer, target)
    completion = writer.completion(op)
    assert completion is not None
    assert completion.error is None
    writer.transport.release(op)


def check_disconnects(a: Node, b: Node) -> None:
    """Each forgets the other and comes back; the direction that was not given up goes on, and nothing piles up."""
    a.connect(b)
    b.connect(a)
    works(a, b)
    works(b, a)
    b.transport.disconnect(a.transport.name)
    works(a, b)
    b.connect(a)
    works(b, a)
    works(a, b)
    a.transport.disconnect(b.transport.name)
    works(b, a)
    for _ in range(10):
        a.connect(b)
        works(a, b)
        a.transport.disconnect(b.transport.name)
    pump(lambda: not b.transport._targets, a, b)
    works(b, a)
    assert a.lost == b.lost == []


def location(node: Node) -> Location:
    card = decode_export(node.transport.scheme, node.transport.export())
    return msgspec.msgpack.decode(card.data, type=Location)


class RawPeer:
    """A TCP client that speaks the protocol by hand."""

    def __init__(self, node: Node, name: str = "raw", *, hello: bool = True) -> None:
        where = location(node)
        host, _, port = where.address.decode().rpartition(":")
        self.node = node
        self.token = where.token
        self.socket = socket.create_connection((host.strip("[]"), int(port)), timeout=DEADLINE_S)
        self.socket.setblocking(False)
        self.received = b""
        self.ended = False
        if hello:
            self.send(frames.pack_hello(name, self.token))

    def send(self, data: bytes) -> None:
        """All of it, with the node polling so that it can go."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                self.node.poll()

    def write(self, op: int, *offsets_sizes: tuple[int, int], fill: int) -> bytes:
        """A WRITE frame with its payload, for any addresses whatever."""
        rows = np.array([(self.node.address + at, size) for at, size in offsets_sizes], dtype=np.uint64)
        head = frames.pack_frame(frames.Frame(frames.Kind.WRITE, rows=len(rows), op=op))
        return head + frames.pack_rows(rows) + bytes([fill]) * sum(size for _, size in offsets_sizes)

    @staticmethod
    def end(op: int, note: bytes = b"") -> bytes:
        return frames.pack_frame(frames.Frame(frames.Kind.END, note_bytes=len(note), op=op)) + note

    @staticmethod
    def note(note: bytes) -> bytes:
        return frames.pack_frame(frames.Frame(frames.Kind.NOTE, note_bytes=len(note))) + note

    def take(self) -> bool:
        """Receive what has come; True at the end of the connection."""
        try:
            data = self.socket.recv(1 << 16)
            self.ended = self.ended or not data
            self.received += data
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.ended = True
        return self.ended

    def answer(self, size_bytes: int) -> bytes:
        """The next so many bytes from the node."""
        pump(lambda: self.take() or len(self.received) >= size_bytes, self.node)
        answer, self.received = self.received[:size_bytes], self.received[size_bytes:]
        return answer

    def welcome(self) -> frames.Hello:
        hello = frames.unpack_hello(memoryview(self.answer(frames.HELLO_BYTES)))
        self.answer(hello.name_bytes)
        return hello

    def frame(self) -> frames.Frame:
        return frames.unpack_frame(memoryview(self.answer(frames.HEADER_BYTES)))

    def dropped(self) -> None:
        """Passes once the node has closed the connection."""
        pump(self.take, self.node)

    def close(self) -> None:
        self.socket.close()
