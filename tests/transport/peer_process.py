"""One end of a transport under test, driven over a pipe: `python peer_process.py FD`, or `serve(pipe)` on a thread.

It polls all the time (unless told not to), keeps every event in order, and answers one command at a time. The arena is
registered; the guards on both sides of it are not, and must never change.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import xxhash

from lmkv.errors import LmkvError, PeerLostError, StateError
from lmkv.transport import Completion, Extents, Notification, PeerLost, Region, Transport, open_transport

GUARD_BYTES = 64 << 10
GUARD_VALUE = 0xA5


@dataclass
class Server:
    pipe: Connection
    transport: Transport | None = None
    pumping: bool = True
    running: bool = True
    events: list[tuple[Any, ...]] = field(default_factory=list)
    watched: dict[bytes, np.ndarray] = field(default_factory=dict)

    def run(self) -> None:
        while self.running:
            moved = self.pump() if self.pumping and self.transport is not None else False
            # Waiting for a command is what this process does when nothing moves.
            if self.pipe.poll(0 if moved else 100e-6):
                self.answer()

    def answer(self) -> None:
        command, arguments = self.pipe.recv()
        try:
            reply = ("ok", getattr(self, f"do_{command}")(**arguments))
        except LmkvError as error:
            reply = ("error", type(error).__name__, str(error))
        except Exception:  # noqa: BLE001 - the test process must see why this one failed
            reply = ("crash", traceback.format_exc(), "")
        self.pipe.send(reply)

    def pump(self) -> bool:
        events = self.transport.poll()
        for event in events:
            match event:
                case Completion(op, error):
                    self.events.append(("completion", op, type(error).__name__ if error else "", str(error or "")))
                case Notification(peer, payload):
                    # At once, before anything else can move: the note promises that the bytes are here.
                    rows = self.watched.get(payload)
                    digest = self.do_digest(rows) if rows is not None else ""
                    self.events.append(("note", peer, payload, digest))
                case PeerLost(peer, reason):
                    self.events.append(("lost", peer, reason))
        return bool(events) or self.transport.in_flight > 0

    # --- life ---

    def do_open(self, url: str, name: str, arena_bytes: int) -> dict[str, Any]:
        self.memory = np.full(arena_bytes + 2 * GUARD_BYTES, GUARD_VALUE, dtype=np.uint8)
        self.arena = self.memory[GUARD_BYTES : GUARD_BYTES + arena_bytes]
        self.arena[:] = 0
        self.address = self.arena.ctypes.data
        self.url = url
        self.transport = open_transport(url, name)
        self.transport.register(Region(self.address, arena_bytes, owner=self.memory))
        return self.do_describe()

    def do_describe(self) -> dict[str, Any]:
        caps = self.transport.capabilities
        return {
            "name": self.transport.name,
            "address": self.address,
            "arena_bytes": len(self.arena),
            "export": self.transport.export(),
            "pid": os.getpid(),
            "target_checks_bounds": caps.target_checks_bounds,
            "cross_process": caps.cross_process,
        }

    def do_stop_serving(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self.running = False

    def do_pumping(self, on: bool) -> None:
        self.pumping = on

    def do_poll_once(self) -> None:
        self.pump()

    def do_fault(self, name: str, value: object) -> None:
        setattr(self.transport.faults, name, value)

    # --- the contract ---

    def do_connect(self, export: bytes) -> str:
        return self.transport.connect(export)

    def do_disconnect(self, peer: str) -> None:
        self.transport.disconnect(peer)

    def do_write(self, peer: str, local: np.ndarray, remote: np.ndarray, note: bytes = b"") -> int:
        return self.transport.write(peer, Extents(local), Extents(remote), note)

    def do_read(self, peer: str, local: np.ndarray, remote: np.ndarray, note: bytes = b"") -> int:
        return self.transport.read(peer, Extents(local), Extents(remote), note)

    def do_write_until_lost(self, peer: str, local: np.ndarray, remote: np.ndarray, limit: int) -> list[int]:
        """Post write after write while the peer lives, `limit` at most; gives the operations that were accepted."""
        ops: list[int] = []
        for _ in range(limit):
            try:
                ops.append(self.transport.write(peer, Extents(local), Extents(remote), b"until lost"))
            except (PeerLostError, StateError):
                break
            self.pump()
        return ops

    def do_notify(self, peer: str, note: bytes) -> None:
        self.transport.notify(peer, note)

    def do_cancel(self, op: int) -> None:
        self.transport.cancel(op)

    def do_release(self, op: int) -> None:
        self.transport.release(op)

    def do_close(self) -> None:
        self.pumping = False
        self.transport.close()

    def do_abort(self) -> None:
        self.pumping = False
        self.transport.abort()

    def do_in_flight(self) -> int:
        return self.transport.in_flight

    def do_poll_error(self) -> None:
        self.transport.poll()

    def do_poll_on_other_thread(self) -> str:
        caught: list[str] = []

        def other() -> None:
            try:
                self.transport.poll()
            except LmkvError as error:
                caught.append(type(error).__name__)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return caught[0] if caught else ""

    # --- memory and events ---

    def do_fill(self, rows: np.ndarray, seed: int) -> None:
        """Random bytes into `rows`."""
        block = np.random.default_rng(seed).integers(0, 256, (4 << 20) + 4099, dtype=np.uint8)
        at = 0
        for address, size, _ in rows.tolist():
            start = address - self.address
            # A block that is longer than any stretch and no power of two: equal bytes at other places are unlikely.
            while size:
                piece = min(size, len(block) - at)
                self.arena[start : start + piece] = block[at : at + piece]
                start, size, at = start + piece, size - piece, (at + piece) % len(block)

    def do_poison(self, rows: np.ndarray, value: int) -> None:
        for address, size, _ in rows.tolist():
            start = address - self.address
            self.arena[start : start + size] = value

    def do_digest(self, rows: np.ndarray) -> str:
        digest = xxhash.xxh3_128()
        for address, size, _ in rows.tolist():
            start = address - self.address
            digest.update(self.arena[start : start + size])
        return digest.hexdigest()

    def do_guards_intact(self) -> bool:
        ends = self.memory[:GUARD_BYTES], self.memory[-GUARD_BYTES:]
        return all(bool((end == GUARD_VALUE).all()) for end in ends)

    def do_watch(self, note: bytes, rows: np.ndarray) -> None:
        self.watched[note] = rows

    def do_events(self, since: int) -> list[tuple[Any, ...]]:
        return self.events[since:]

    # --- leaks ---

    def do_leaks(self, cycles: int) -> dict[str, int]:
        """Open, use and end two transports here again and again; what grows from the second cycle on is a leak."""
        self._cycle(0)
        before = _held()
        for number in range(1, cycles + 1):
            self._cycle(number)
        after = _held()
        return {what: after[what] - before[what] for what in before}

    def _cycle(self, number: int) -> None:
        memory = np.zeros(8192, dtype=np.uint8)
        ends = [open_transport(self.url, f"leak-{side}-{number}") for side in "ab"]
        for end in ends:
            end.register(Region(memory.ctypes.data, memory.nbytes, owner=memory))
        peer = ends[0].connect(ends[1].export())
        ends[1].connect(ends[0].export())
        base = memory.ctypes.data
        op = ends[0].write(peer, Extents.of((base, 4096)), Extents.of((base + 4096, 4096)), b"leak")
        seen: list[object] = []
        for _ in range(1_000_000):
            seen += [*ends[0].poll(), *ends[1].poll()]
            if len(seen) >= 2:
                break
        assert {type(event) for event in seen} == {Completion, Notification}, seen
        ends[0].release(op)
        ends[0].close() if number % 2 else ends[0].abort()
        ends[1].close()
        del ends
        gc.collect()


def _held() -> dict[str, int]:
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}


def enlarged(export: bytes, arena_bytes: int, by: int) -> bytes:
    """The export as a liar would have it: the region of `arena_bytes` bytes claims `by` more."""

    def lie(value: object) -> object:
        if isinstance(value, list):
            return [lie(item) for item in value]
        if isinstance(value, dict):
            return {key: lie(item) for key, item in value.items()}
        return value + by if value == arena_bytes and not isinstance(value, bool) else value

    return msgspec.msgpack.encode(lie(msgspec.msgpack.decode(export)))


def serve(pipe: Connection) -> None:
    Server(pipe).run()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
