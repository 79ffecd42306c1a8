"""The processes that peers come to and vanish from: an engine, a pool node, a controller, a router.

Each target runs in a process of its own, so that what is measured is not the peers' memory. `run(count)` lets so many
peers come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import aiohttp
import zmq

from lmkv import poolwire as pw
from lmkv.control.mailbox import make_context
from lmkv.ids import make_incarnation
from tests.pool.bed import User
from tests.router.fakes import FakeEngine, chat_chunk, role_chunk, streams_then_hangs

from .scripted import ALIVE, ScriptedPeer, card_of, one_after_another

LMKV = (sys.executable, "-c", "from lmkv.cli import main; main()")
DESCRIPTORS = 1024
"""What a process may have unless somebody raises it, as in most containers."""
START_S = 240.0
PATIENCE_S = 30.0


class Child:
    """A process with few descriptors that prints a JSON line with `ready` once it serves."""

    def __init__(self, log: Path, *command: str, **environment: str) -> None:
        self.log = log
        with log.open("w") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env={**os.environ, **environment},
                preexec_fn=_few_descriptors,
            )
        self.address = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def wait_ready(self) -> None:
        """Raises AssertionError with the log if it does not come up."""
        found = select.select([self.out], [], [], START_S)[0]
        line = self.out.readline() if found else ""
        assert line, f"{self.log} does not come up: {self.log.read_text()[-2000:]}"
        self.address = json.loads(line)["ready"]

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()

    def check(self) -> None:
        assert self.process.poll() is None, f"it has ended: {self.log.read_text()[-2000:]}"

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _few_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


class EngineTarget:
    """Both halves of the connector (`tests.scale.engine`); its peers are engines."""

    def __init__(self, tmp: Path, scheme: str) -> None:
        self._scheme = scheme
        log = tmp / f"engine-{scheme.partition(':')[0]}.log"
        self.child = Child(log, sys.executable, "-m", "tests.scale.engine", "--transport", scheme)
        self._context = make_context()
        self._card: Any = None

    def run(self, count: int) -> None:
        if self._card is None:
            self._card = card_of(self.child.address, self._context)
        most = 1 if self._scheme.startswith("nixl") else ALIVE
        made = one_after_another(
            count, lambda: ScriptedPeer(self._context, self._card, self._scheme, self.child.tell), most
        )
        assert made == count

    def finish(self) -> dict[str, Any]:
        """What it has counted, once none of its requests is open."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            self.child.tell("count")
            assert select.select([self.child.out], [], [], PATIENCE_S)[0], "the engine does not step any more"
            counted: dict[str, Any] = json.loads(self.child.out.readline())
            if not counted["open"] and not counted["held"]:
                return counted
            assert time.monotonic() < end_s, f"requests do not end: {counted}"
            time.sleep(0.1)

    def close(self) -> None:
        self.child.close()
        self._context.destroy(0)


class NodeTarget:
    """`lmkv pool`; its peers are ranks that map the arena or reach it over the data plane, and reserve, store and pin
    there; and controllers that order copies from nodes that are no more."""

    def __init__(self, tmp: Path, scheme: str) -> None:
        self._scheme = scheme
        options = ("--listen", "tcp://127.0.0.1:0", "--capacity", "8MiB", "--transport", scheme, "--beat-s", "0.2")
        share = ("--share", str(tmp / "node.sock"))
        self.child = Child(tmp / "node.log", *LMKV, "pool", "--json", *options, *share)
        self._numbers = itertools.count()

    def run(self, count: int) -> None:
        for _ in range(count):
            number = next(self._numbers)
            user = User(self.child.address, url=self._scheme if number % 2 else "")
            try:
                user.reserve([3 * number, 3 * number + 1])
                user.store(3 * number + 2)
                user.link.tell(pw.Replicate(self._source(number), b"n" * 16, (3 * number).to_bytes(16, "big") + b"\0"))
                user.get(
                    lambda token, user=user, number=number: pw.Pin(
                        token, user.incarnation, user.rank, b"n" * 16, (3 * number + 2).to_bytes(16, "big") + b"\0", 9.0
                    ),
                    pw.Pinned,
                )
            finally:
                vanish(user)

    @staticmethod
    def _source(number: int) -> pw.NodeCard:
        address = f"tcp://127.1.{number >> 8}.{number & 255}:9"
        return pw.NodeCard("gone", make_incarnation(os.urandom(8)), address, address, "", b"", 0, 0)

    def finish(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.child.close()


def vanish(user: User) -> None:
    """As a process does that is killed: its connections end, and it says nothing."""
    user.access._detach()
    if user.transport is not None:
        user.transport.abort()
    user.context.destroy(0)


class ControllerTarget:
    """`lmkv controller`; its peers are nodes that beat, publish and give their snapshot."""

    def __init__(self, tmp: Path) -> None:
        options = ("--listen", "tcp://127.0.0.1:0", "--lease-s", "0.5", "--forget-s", "1.0")
        self.child = Child(tmp / "controller.log", *LMKV, "controller", "--json", *options)
        self._context = make_context()
        self._numbers = itertools.count()

    def run(self, count: int) -> None:
        for _ in range(count):
            NodePeer(self._context, self.child.address, next(self._numbers)).live()

    def finish(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.child.close()
        self._context.destroy(0)


class NodePeer:
    """A node with `PAGES` pages, which lives until the controller has read its snapshot."""

    PAGES = 20

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], controller: str, number: int) -> None:
        self._router, self._pub = (context.socket(kind) for kind in (zmq.ROUTER, zmq.PUB))
        self._beats = context.socket(zmq.DEALER)
        for socket in (self._router, self._pub, self._beats):
            socket.setsockopt(zmq.LINGER, 0)
        for socket in (self._router, self._pub):
            socket.bind("tcp://127.0.0.1:*")
        self._beats.connect(controller)
        address, events = (s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (self._router, self._pub))
        self._incarnation = make_incarnation(os.urandom(8))
        self._card = pw.NodeCard(f"n{number}", self._incarnation, address, events, "tcp", b"", 0, 1 << 30)
        keys = (b"n" * 16 + (number * self.PAGES + i).to_bytes(16, "big") + b"\0" for i in range(self.PAGES))
        self._records = b"".join(key + b"\1" for key in keys)

    def live(self) -> None:
        """The whole of it. Raises AssertionError if the controller does not ask."""
        try:
            end_s = time.monotonic() + PATIENCE_S
            while not self._router.poll(50):
                assert time.monotonic() < end_s, "the controller does not ask for a snapshot"
                self._beats.send(pw.encode(pw.NodeBeat(self._card, self.PAGES, self.PAGES, 100, 1 << 30)), zmq.NOBLOCK)
                self._pub.send(pw.encode(pw.Events(self._incarnation, self.PAGES + 1, b"")))
            identity, payload = self._router.recv_multipart()
            question = pw.decode(payload)
            assert isinstance(question, pw.Snapshot)
            part = pw.SnapshotPart(question.token, self._incarnation, self.PAGES, self._records, b"")
            self._router.send_multipart([identity, pw.encode(part)])
        finally:
            for socket in (self._router, self._pub, self._beats):
                socket.close(20)


class RouterTarget:
    """`lmkv router` before one prefill and one decode engine, which are other incarnations for every peer; the peer
    itself is a client that hangs up in the middle of its stream."""

    def __init__(self, tmp: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._engines = self._loop.run_until_complete(self._start_engines())
        options = ("--port", "0", "--control-interval-s", "0.02", "--ledger-requests", "256")
        engines = ("--prefill", self._engines[0].spec, "--decode", self._engines[1].spec)
        self.child = Child(tmp / "router.log", *LMKV, "router", "--json", *options, *engines)

    async def _start_engines(self) -> list[FakeEngine]:
        made = [FakeEngine("p"), FakeEngine("d")]
        for engine in made:
            await engine.start()
            for other in made:
                engine.control.resolve[other.control.address] = other.control
        made[1].behaviour = streams_then_hangs([role_chunk(), chat_chunk("He")])
        return made

    def run(self, count: int) -> None:
        self._loop.run_until_complete(self._run(count))

    async def _run(self, count: int) -> None:
        decode = self._engines[1]
        for _ in range(count):
            for engine in self._engines:
                engine.control.incarnation = make_incarnation(os.urandom(8))
                engine.control.peers.clear()
                engine.seen.clear()
            decode.control.met.clear()
            await self._ask()
            end_s = time.monotonic() + PATIENCE_S
            while not decode.control.met:
                assert time.monotonic() < end_s, "the router does not introduce the new incarnations"
                await asyncio.sleep(0.002)

    async def _ask(self) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        url = self.child.address + "/v1/chat/completions"
        async with aiohttp.ClientSession(timeout=timeout) as client, client.post(url, json=body) as reply:
            assert await reply.content.readline(), "no token came"

    def finish(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.child.close()
        with contextlib.suppress(RuntimeError):
            self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        for engine in self._engines:
            await engine.close()
