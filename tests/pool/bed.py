"""Real pool nodes, and users of them that block; a tier in memory with faults to switch on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zmq

from lmkv import poolwire as pw
from lmkv.ids import Incarnation, Rank, make_incarnation
from lmkv.pool.access import Me, NodeAccess, Reach
from lmkv.pool.node import PoolNode
from lmkv.pool.settings import NodeSettings
from lmkv.poolwire import Ack, Refusal
from lmkv.transport import Completion, Extents, PeerLost, Region, open_transport

ROOT = Path(__file__).resolve().parents[2]
SPACE = b"n" * 16
PAGE = 4096
PAGES = 512
"""Of PAGE bytes in an arena of the size that nodes have here."""
BUFFER = 1 << 20
A = TypeVar("A", bound=pw.PoolMessage)
LMKV = (sys.executable, "-c", "from lmkv.cli import main; main()")


def key(number: int) -> bytes:
    return number.to_bytes(16, "big") + b"\0"


def content(number: int, size: int = PAGE) -> bytes:
    """Of the page under key(number); another for every key."""
    return np.random.default_rng(number).bytes(size)


def until(condition: Callable[[], Any], timeout_s: float = 10.0, what: str = "") -> Any:
    """Waits for a condition that something else brings about."""
    end_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.01)
    return found


# --- nodes ---


class NodeThread:
    """A node on a thread of this process. `tiers(evicted)` as PoolNode takes it."""

    def __init__(self, tmp: Path, tiers: Any = None, **settings: Any) -> None:
        given = {"listen": "tcp://127.0.0.1:0", "capacity": "2MiB", "transport": "none", "huge": False}
        given["share"] = str(tmp / f"{os.urandom(4).hex()}.sock")
        self.settings = NodeSettings(**{**given, **settings})
        self._tiers = tiers
        self._ready = threading.Event()
        self.problem: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert self._ready.wait(20)
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        try:
            self.node = PoolNode(self.settings, self._tiers) if self._tiers else PoolNode(self.settings)
            self.card = self.node.card
            self.node.run(self._ready.set)
        except Exception as problem:  # noqa: BLE001  (raised on the test's thread)
            self.problem = problem
            self._ready.set()

    @property
    def address(self) -> str:
        return self.card.address

    def end(self) -> None:
        if self.thread.is_alive():
            self.node.stop()
            self.thread.join(20)
        assert not self.thread.is_alive()
        if self.problem is not None:
            raise self.problem


class NodeProcess:
    """`lmkv pool` with these options."""

    def __init__(self, tmp: Path, *options: str, env: dict[str, str] | None = None, **settings: str) -> None:
        given = {"listen": "tcp://127.0.0.1:0", "capacity": "2MiB", "transport": "none", "beat-s": "0.2"}
        given["share"] = str(tmp / f"{os.urandom(4).hex()}.sock")
        given |= {name.replace("_", "-"): value for name, value in settings.items()}
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        self.log = tmp / f"node-{os.urandom(4).hex()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*LMKV, "pool", "--json", *words, *options],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert ready, self.log.read_text()
        self.address: str = json.loads(ready)["ready"]

    def end(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        status = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def kill(self) -> None:
        self.process.kill()
        self.wait()


# --- users ---


class User:
    """One rank; every call blocks, with a deadline. `url`: its data plane; without one it maps the arena."""

    def __init__(
        self,
        address: str,
        *,
        name: str = "user",
        rank: int = 0,
        incarnation: str = "",
        url: str = "",
        attach: bool = True,
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.incarnation = Incarnation(incarnation) if incarnation else make_incarnation(os.urandom(8))
        self.rank = Rank(rank)
        self.transport, scratch = None, None
        self.buffer = np.zeros(BUFFER + PAGE, dtype=np.uint8)
        if url:
            self.transport = open_transport(url, f"lmkv-user-{self.incarnation}-{rank}")
            self.transport.register(Region(self.buffer.ctypes.data, self.buffer.nbytes, owner=self.buffer))
            scratch = Extents.of((self.buffer.ctypes.data + BUFFER, PAGE))
        me = Me(self.incarnation, self.rank, name, self.transport, scratch)
        self.access = NodeAccess(self.context, address, me, map_arena=not url)
        self.done: dict[int, Any] = {}
        if attach:
            self.attach()

    @property
    def link(self) -> Any:
        return self.access.link

    def attach(self, timeout_s: float = 15.0) -> None:
        self.pump(lambda: self.access.ready, timeout_s)

    def pump(self, condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
        end_s = time.monotonic() + timeout_s
        poller = select.poll()
        fds = [*self.access.fds, *(self.transport.fds() if self.transport is not None else [])]
        for fd in fds:
            poller.register(fd, select.POLLIN)
        most_s = 0.001 if self.transport is not None and not self.transport.fds() else 0.1
        while True:
            now_s = time.monotonic()
            self.access.tick(now_s)
            self.take_events()
            if condition():
                return
            assert now_s < end_s, f"not within {timeout_s} s"
            poller.poll(max(0.0, min(self.access.next_s(now_s), most_s)) * 1000)

    def take_events(self) -> None:
        if self.transport is None:
            return
        for event in self.transport.poll():
            match event:
                case Completion(op, error):
                    self.transport.release(op)
                    if not self.access.completed(op, error):
                        self.done[op] = error
                case PeerLost(peer, reason):
                    self.access.peer_lost(peer, reason)

    def ask(self, question: Callable[[int], pw.PoolMessage], kind: type[A], wait_s: float = 5.0) -> A | None:
        got: list[A | None] = []
        self.link.ask(question, kind, got.append, time.monotonic() + wait_s)
        self.pump(lambda: got, wait_s + 5.0)
        return got[0]

    def get(self, question: Callable[[int], pw.PoolMessage], kind: type[A], wait_s: float = 5.0) -> A:
        answer = self.ask(question, kind, wait_s)
        assert answer is not None
        return answer

    # --- the pool ---

    def reserve(
        self, numbers: Sequence[int], size: int = PAGE, shards: int = 1, shard: int = 0, space: bytes = SPACE
    ) -> tuple[pw.Slot, ...]:
        keys = b"".join(map(key, numbers))
        who = (self.incarnation, self.rank, space, keys, size, shards, shard)
        return self.get(lambda token: pw.Reserve(token, *who), pw.Reserved).slots

    def commit(
        self,
        numbers: Sequence[int],
        slots: Sequence[pw.Slot],
        shard: int = 0,
        ack: Ack = Ack.VOLATILE,
        wait_s: float = 0.0,
        sums: Sequence[int] = (),
        space: bytes = SPACE,
    ) -> pw.Committed:
        keys = b"".join(map(key, numbers))
        checksums = tuple((number, *sums) for number in numbers)
        generations = tuple(slot.generation for slot in slots)
        who = (self.incarnation, self.rank, space, keys, generations, shard, checksums, ack, wait_s)
        return self.get(lambda token: pw.Commit(token, *who), pw.Committed, wait_s + 5.0)

    def commit_later(self, numbers: Sequence[int], slots: Sequence[pw.Slot]) -> None:
        """Without waiting for the answer."""
        keys = b"".join(map(key, numbers))
        generations = tuple(slot.generation for slot in slots)
        sums = tuple((number,) for number in numbers)
        self.link.tell(pw.Commit(1, self.incarnation, self.rank, SPACE, keys, generations, 0, sums))

    def pin(
        self, numbers: Sequence[int], lease_s: float = 10.0, wait_s: float = 0.0, space: bytes = SPACE
    ) -> pw.Pinned:
        keys = b"".join(map(key, numbers))
        who = (self.incarnation, self.rank, space, keys, lease_s, wait_s)
        return self.get(lambda token: pw.Pin(token, *who), pw.Pinned, wait_s + 5.0)

    def unpin(self, pinned: pw.Pinned, corrupt: Sequence[int] = ()) -> None:
        self.link.tell(pw.Unpin(pinned.lease, SPACE, b"".join(map(key, corrupt))))

    def abandon(self, numbers: Sequence[int], slots: Sequence[pw.Slot], drained: bool) -> None:
        keys = b"".join(map(key, numbers))
        generations = tuple(slot.generation for slot in slots)
        self.link.tell(pw.Abandon(self.incarnation, self.rank, SPACE, keys, generations, drained))

    def drop(self, numbers: Sequence[int] = (), space: bytes = SPACE) -> int:
        keys = b"".join(map(key, numbers))
        return self.get(lambda token: pw.Drop(token, space, keys), pw.Dropped).pages

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get(pw.Stats, pw.StatsAre).stats)
        return found

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.stats()["counters"]
        return found

    def until_stats(self, condition: Callable[[dict[str, Any]], Any], timeout_s: float = 10.0) -> dict[str, Any]:
        end_s = time.monotonic() + timeout_s
        while not condition(stats := self.stats()):
            assert time.monotonic() < end_s, stats
            self.pump_for(0.02)
        return stats

    def pump_for(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        self.pump(lambda: time.monotonic() >= end_s, seconds + 5.0)

    # --- bytes ---

    def write(self, offset: int, data: bytes) -> None:
        if self.access.reach is Reach.LOCAL:
            self.access.view(offset, len(data))[:] = np.frombuffer(data, np.uint8)
            return
        self.buffer[: len(data)] = np.frombuffer(data, np.uint8)
        here = Extents.of((self.buffer.ctypes.data, len(data)))
        self.finish(self.access.write(here, [(offset, len(data))]))

    def read(self, offset: int, size: int) -> bytes:
        if self.access.reach is Reach.LOCAL:
            return self.access.view(offset, size).tobytes()
        here = Extents.of((self.buffer.ctypes.data, size))
        self.finish(self.access.read(here, [(offset, size)]))
        return self.buffer[:size].tobytes()

    def finish(self, op: int) -> None:
        self.pump(lambda: op in self.done)
        error = self.done.pop(op)
        if error is not None:
            raise error

    def store(self, *numbers: int, size: int = PAGE, ack: Ack = Ack.VOLATILE, wait_s: float = 0.0) -> pw.Committed:
        """All of them, or an assertion fails."""
        slots = self.reserve(numbers, size)
        assert {slot.refusal for slot in slots} == {Refusal.NONE}, slots
        for number, slot in zip(numbers, slots, strict=True):
            self.write(slot.offset, content(number, size))
        done = self.commit(numbers, slots, ack=ack, wait_s=wait_s)
        assert set(done.refusals) == {Refusal.NONE}
        return done

    def load(self, *numbers: int, wait_s: float = 0.0) -> int:
        """How many are there; their bytes are right."""
        pinned = self.pin(numbers, wait_s=wait_s)
        for number, page in zip(numbers, pinned.pages, strict=False):
            assert self.read(page.offset, pinned.page_bytes) == content(number, pinned.page_bytes)
        self.unpin(pinned)
        return len(pinned.pages)

    def close(self) -> None:
        self.access.close()
        if self.transport is not None:
            self.transport.abort()
        self.context.destroy(linger=100)


@contextlib.contextmanager
def using(*things: Any) -> Iterator[None]:
    """Users are closed, nodes ended, the last first."""
    with contextlib.ExitStack() as stack:
        for thing in things:
            stack.callback(thing.close if hasattr(thing, "close") else thing.end)
        yield
