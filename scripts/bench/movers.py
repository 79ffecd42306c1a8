"""One process of bench_transport: moves extents from its arena to its peer's, by lmkv or by what it is compared with.

`python movers.py FD KIND ROLE ARENA_BYTES`, driven over a pipe. The initiator answers when the bytes are in place at
the target. A target works between `serve` and the next command, and sleeps otherwise, so that pairs that are not being
measured cost nothing.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
import socket
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmkv.transport import Completion, Extents, Region, Transport, open_transport

Table = NDArray[np.uint64]
NOTE = b"n" * 64
IOV_MAX = 1024
IDLE_POLL_S = 1e-3
"""How often an idle agent without descriptors to wait on is polled."""


class Mover:
    """Base: an arena, and what every kind answers."""

    def __init__(self, role: str, arena_bytes: int) -> None:
        self.role = role
        # Written to once, so that no page is missing when it is measured.
        self.arena = np.full(arena_bytes, 1 if role == "initiator" else 0, dtype=np.uint8)
        self.address = self.arena.ctypes.data

    def hello(self) -> Any:
        """What the peer needs for `meet`."""
        return None

    def meet(self, hello: Any) -> None:
        """Both sides, in the order initiator, target."""

    def expect(self, remote: Table) -> None:
        """The target learns where the next operations go."""

    def move(self, local: Table, remote: Table) -> None:
        """Returns when the bytes are in place."""
        raise NotImplementedError

    def turn(self, pipe: Connection) -> None:
        """A piece of the target's work; may wait for `pipe` to become readable when it has none."""
        pipe.poll(None)

    def idle(self, until_s: float) -> None:
        """Do what an owner with nothing to move does."""
        time.sleep(max(0.0, until_s - time.monotonic()))


class LmkvMover(Mover):
    def __init__(self, role: str, arena_bytes: int, url: str) -> None:
        super().__init__(role, arena_bytes)
        self.transport: Transport = open_transport(url, f"bench-{role}-{secrets.token_hex(4)}")
        self.transport.register(Region(self.address, arena_bytes, owner=self.arena))
        self.peer: Any = None

    def hello(self) -> Any:
        return self.transport.export()

    def meet(self, hello: Any) -> None:
        self.peer = self.transport.connect(hello)

    def move(self, local: Table, remote: Table) -> None:
        transport = self.transport
        op = transport.write(self.peer, Extents(local), Extents(remote), NOTE)
        fds = transport.fds()
        while True:
            if fds:
                select.select(fds, [], [])
            for event in transport.poll():
                if isinstance(event, Completion) and event.op == op:
                    if event.error:
                        raise event.error
                    transport.release(op)
                    return

    def turn(self, pipe: Connection) -> None:
        # With descriptors an owner waits on them, as raw_socket does; without, it has to spin.
        if fds := self.transport.fds():
            select.select([*fds, pipe], [], [])
        self.transport.poll()

    def idle(self, until_s: float) -> None:
        fds = self.transport.fds()
        while (left_s := until_s - time.monotonic()) > 0:
            if fds:
                select.select(fds, [], [], left_s)
            else:
                time.sleep(min(IDLE_POLL_S, left_s))
            self.transport.poll()


class RawNixlMover(Mover):
    """NIXL's Python API as its examples use it: nothing is checked, nothing kept."""

    def __init__(self, role: str, arena_bytes: int, progress: str) -> None:
        super().__init__(role, arena_bytes)
        from lmkv.transport import nixl as ours

        # The same library in the same environment, and the same agent: only what is done with it differs.
        api, open_agent = ours._api, ours._open_agent  # noqa: SLF001
        if progress == "event":
            self.agent, _ = open_agent(f"raw-{role}-{secrets.token_hex(4)}", "event")
            self.agent.create_backend("UCX", {"num_threads": "2", "split_batch_size": "64"})
        else:
            config = api.nixl_agent_config(enable_prog_thread=progress == "shipped", backends=["UCX"])
            self.agent = api.nixl_agent(f"raw-{role}-{secrets.token_hex(4)}", config)
        self.agent.register_memory([(self.address, arena_bytes, 0, "")], "DRAM")
        self.peer = ""

    def hello(self) -> Any:
        return self.agent.get_agent_metadata()

    def meet(self, hello: Any) -> None:
        added = self.agent.add_remote_agent(hello)
        self.peer = added.decode() if isinstance(added, bytes) else added

    def move(self, local: Table, remote: Table) -> None:
        agent = self.agent
        handle = agent.initialize_xfer(
            "WRITE", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), self.peer, NOTE
        )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL says {state}")
        agent.release_xfer_handle(handle)

    def turn(self, pipe: Connection) -> None:
        self.agent.get_new_notifs()


class RawSocketMover(Mover):
    """A plain TCP connection, gathered from and received straight into place; the target answers one byte."""

    def __init__(self, role: str, arena_bytes: int) -> None:
        super().__init__(role, arena_bytes)
        self.listener = socket.create_server(("127.0.0.1", 0)) if role == "target" else None
        self.socket: socket.socket | None = None
        self.views: list[memoryview] = []

    def hello(self) -> Any:
        return self.listener.getsockname() if self.listener else None

    def meet(self, hello: Any) -> None:
        self.socket = self.listener.accept()[0] if self.listener else socket.create_connection(hello)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _views(self, table: Table) -> list[memoryview]:
        whole = memoryview(self.arena)
        return [whole[a - self.address : a - self.address + n] for a, n, _ in table.tolist()]

    def expect(self, remote: Table) -> None:
        self.views = self._views(remote)

    def move(self, local: Table, remote: Table) -> None:
        assert self.socket is not None
        _all(self._views(local), self.socket.sendmsg)
        if self.socket.recv(1) != b"k":
            raise RuntimeError("the target did not answer")

    def turn(self, pipe: Connection) -> None:
        assert self.socket is not None
        if self.socket in select.select([self.socket, pipe], [], [])[0]:
            _all(self.views, lambda views: self.socket.recvmsg_into(views)[0])
            self.socket.sendall(b"k")


def _all(views: list[memoryview], call: Any) -> None:
    """Call with up to IOV_MAX buffers at a time until all bytes have gone through."""
    left = list(reversed(views))
    while left:
        batch = left[: -IOV_MAX - 1 : -1]
        moved = call(batch)
        if not moved:
            raise RuntimeError("the connection was closed")
        for view in batch:
            left.pop()
            if len(view) > moved:
                left.append(view[moved:])
                break
            moved -= len(view)
            if not moved:
                break


class ProcessVmMover(Mover):
    """process_vm_writev: what UCX uses between processes of one host."""

    def hello(self) -> Any:
        return os.getpid()

    def meet(self, hello: Any) -> None:
        self.pid = hello
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.process_vm_writev.restype = ctypes.c_ssize_t

    def move(self, local: Table, remote: Table) -> None:
        # An iovec is (address, bytes): the first two columns.
        here, there = np.ascontiguousarray(local[:, :2]), np.ascontiguousarray(remote[:, :2])
        for at in range(0, len(here), IOV_MAX):
            count = min(IOV_MAX, len(here) - at)
            iov = [ctypes.c_void_p(table[at:].ctypes.data) for table in (here, there)]
            wanted = int(here[at : at + count, 1].sum())
            n = ctypes.c_ulong(count)
            got = self.libc.process_vm_writev(self.pid, iov[0], n, iov[1], n, ctypes.c_ulong(0))
            if got != wanted:
                raise OSError(ctypes.get_errno(), f"process_vm_writev moved {got} of {wanted} bytes")


class MemcpyMover(Mover):
    """memmove within the initiator: the target is a second arena there."""

    def __init__(self, role: str, arena_bytes: int) -> None:
        super().__init__(role, arena_bytes)
        self.other = np.zeros(arena_bytes, dtype=np.uint8) if role == "initiator" else self.arena
        self.other[:] = 0
        self.shift = 0

    def hello(self) -> Any:
        return self.address

    def meet(self, hello: Any) -> None:
        self.shift = self.other.ctypes.data - hello

    def move(self, local: Table, remote: Table) -> None:
        shift, memmove = self.shift, ctypes.memmove
        for (here, size, _), there in zip(local.tolist(), remote[:, 0].tolist(), strict=True):
            memmove(there + shift, here, size)


def make(kind: str, role: str, arena_bytes: int) -> Mover:
    family, _, detail = kind.partition("=")
    if family == "lmkv":
        return LmkvMover(role, arena_bytes, detail)
    if family == "nixl":
        return RawNixlMover(role, arena_bytes, detail)
    plain = {"socket": RawSocketMover, "process_vm": ProcessVmMover, "memcpy": MemcpyMover}
    return plain[family](role, arena_bytes)


class Worker:
    """The command loop."""

    def __init__(self, pipe: Connection, mover: Mover) -> None:
        self.pipe = pipe
        self.mover = mover

    def run(self) -> None:
        while True:
            command, arguments = self.pipe.recv()
            if command == "end":
                # Not by the interpreter's own end: a peer of an aborted run may still be writing here.
                os._exit(0)
            try:
                self.pipe.send(("ok", getattr(self, f"do_{command}")(**arguments)))
            except Exception:  # noqa: BLE001 - told to the parent, which ends the run
                self.pipe.send(("failed", traceback.format_exc()))
            if command == "serve":
                while not self.pipe.poll(0):
                    self.mover.turn(self.pipe)

    def do_describe(self) -> dict[str, Any]:
        return {"hello": self.mover.hello(), "address": self.mover.address}

    def do_meet(self, hello: Any) -> None:
        self.mover.meet(hello)

    def do_expect(self, remote: Table) -> None:
        self.mover.expect(remote)

    def do_serve(self) -> None:
        """The loop does it, until the next command."""

    def do_move(self, local: Table, remote: Table, times: int) -> list[float]:
        """Seconds of each."""
        out = []
        for _ in range(times):
            started = time.perf_counter()
            self.mover.move(local, remote)
            out.append(time.perf_counter() - started)
        return out

    def do_check(self, rows: Table) -> bool:
        """Whether the initiator's bytes are in `rows`."""
        arena = getattr(self.mover, "other", self.mover.arena)
        base = self.mover.address
        return all(bool(arena[a - base : a - base + n].all()) for a, n, _ in rows.tolist())

    def do_idle(self, seconds: float) -> float:
        """Cores used while idle."""
        cpu, started = time.process_time(), time.monotonic()
        self.mover.idle(started + seconds)
        return (time.process_time() - cpu) / (time.monotonic() - started)


if __name__ == "__main__":
    Worker(Connection(int(sys.argv[1])), make(sys.argv[2], sys.argv[3], int(sys.argv[4]))).run()
