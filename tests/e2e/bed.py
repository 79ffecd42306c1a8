"""Engines and routers as subprocesses, started by the scripts that users run, and a client for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import zmq

from lmkv import poolwire as pw
from lmkv.control.client import ControlClient
from lmkv.pool.link import Link
from tests.ports import free_port

from .hosts import Host

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("LMKV_MODELS", ROOT / "models"))
START_S = 600.0
PROSE = (ROOT / "scripts" / "demo_prompt.txt").read_text()


@dataclass(slots=True)
class Proc:
    """A process in a group of its own, with a log."""

    name: str
    log: Path
    process: subprocess.Popen[bytes]

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def check(self) -> None:
        assert self.process.poll() is None, f"{self.name} has ended:\n{self.tail()}"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)


def spawn(name: str, command: Sequence[str], run: Path, env: dict[str, str] | None = None) -> Proc:
    log = run / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    return Proc(name, log, process)


@dataclass(slots=True)
class Engine:
    """`role` is prefill, decode or plain. `ready` waits for the launch script's ready file."""

    role: str
    port: int
    proc: Proc
    ready_file: Path
    host: str = "127.0.0.1"

    @classmethod
    def start(
        cls,
        name: str,
        role: str,
        run: Path,
        *args: str,
        model: str,
        core: str = "",
        env: dict[str, str] | None = None,
        on: Host | None = None,
    ) -> Engine:
        """`on`: the host that it runs on, None for this one."""
        port = free_port(10_000)
        ready = run / f"{name}.ready"
        ready.unlink(missing_ok=True)
        variables = {
            "LMKV_READY_FILE": str(ready),
            "VLLM_SERVER_DEV_MODE": "1",
            # Tests empty the prefix cache to see what the pool has: the weights stay what they are.
            "LMKV_ON_RESET": "external",
            **({"LMKV_CORES": core} if core else {}),
            **(on.env() if on else {}),
            **(env or {}),
        }
        address, prefix = (on.address, on.prefix()) if on else ("127.0.0.1", [])
        script = [*prefix, str(ROOT / f"scripts/launch_{role}.sh"), "--host", address, "--port", str(port)]
        command = [*script, "--model", str(MODELS / model), *args]
        return cls(role, port, spawn(name, command, run, variables), ready, address)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def control(self) -> str:
        return f"tcp://{self.host}:{self.port + 10000}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.ready_file.exists():
            self.proc.check()
            assert time.monotonic() < deadline, f"{self.proc.name} is not ready:\n{self.proc.tail()}"
            time.sleep(0.2)

    def pids(self) -> list[int]:
        """The processes of the engine (it runs in a session of its own under the launch script)."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rsplit(")", 1)[1].split()
                found.append((int(stat.parent.name), int(fields[1]), int(fields[3])))
        sessions = {pid for pid, parent, _ in found if parent == self.proc.process.pid}
        return [pid for pid, _, session in found if session in sessions]


@dataclass(slots=True)
class Router:
    port: int
    proc: Proc

    @classmethod
    def start(cls, name: str, run: Path, prefill: Sequence[Engine], decode: Sequence[Engine], *args: str) -> Router:
        port = free_port(10_000)
        command = [sys.executable, str(ROOT / "scripts/router.py"), "--port", str(port), *args]
        for engine in prefill:
            command += ["--prefill", engine.url]
        for engine in decode:
            command += ["--decode", engine.url]
        return cls(port, spawn(name, command, run))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> None:
        """Until it has found its engines alive and their pairs ready."""
        deadline = time.monotonic() + 60
        while True:
            self.proc.check()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                return
            assert time.monotonic() < deadline, f"{self.proc.name} is not ready:\n{self.proc.tail()}"
            time.sleep(0.1)


@dataclass(slots=True)
class Node:
    """A pool node."""

    address: str
    proc: Proc

    @classmethod
    def start(cls, name: str, run: Path, *args: str, port: int = 0, env: dict[str, str] | None = None) -> Node:
        address = f"tcp://127.0.0.1:{port or free_port()}"
        share = run / f"{name}.sock"
        command = [str(ROOT / "scripts/launch_pool.sh"), "--listen", address, "--name", name, "--capacity", "512MiB"]
        return cls(address, spawn(name, [*command, "--share", str(share), *args], run, env))

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while "lmkv pool ready" not in self.proc.log.read_text():
            self.proc.check()
            assert time.monotonic() < deadline, f"{self.proc.name} is not ready:\n{self.proc.tail()}"
            time.sleep(0.05)

    def ask(self, question: Callable[[int], pw.PoolMessage], kind: type[Any]) -> Any:
        context = zmq.Context()
        link = Link(context, self.address)
        answers: list[Any] = []
        try:
            link.ask(question, kind, answers.append, time.monotonic() + 5)
            while not answers:
                link.receive(time.monotonic())
                time.sleep(0.001)
        finally:
            link.close()
            context.term()
        assert answers[0] is not None, f"{self.proc.name} does not answer:\n{self.proc.tail()}"
        return answers[0]

    def stats(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.ask(pw.Stats, pw.StatsAre).stats)
        return told


async def counters(engine: Engine) -> dict[str, int]:
    """What the engine's connector has counted."""
    client = ControlClient()
    try:
        return (await client.describe(engine.control, deadline_s=60)).counters
    finally:
        await client.close()


@dataclass(slots=True)
class Reply:
    """One answer of a completions or chat request."""

    status: int
    texts: list[str]
    body: Any
    request_id: str = ""
    chunks: int = 0
    finish: list[str | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.texts[0]


class Client:
    """Requests to a router or straight to an engine."""

    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self.session = session
        self.model = model

    async def tokens(self, engine: Engine, text: str) -> list[int]:
        async with self.session.post(f"{engine.url}/tokenize", json={"model": self.model, "prompt": text}) as response:
            return list((await response.json())["tokens"])

    async def complete(self, url: str, prompt: Any, *, max_tokens: int = 8, **more: Any) -> Reply:
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        return await self._send(f"{url}/v1/completions", body)

    async def chat(self, url: str, content: str, *, max_tokens: int = 8, **more: Any) -> Reply:
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}
        return await self._send(f"{url}/v1/chat/completions", body)

    async def _send(self, url: str, body: dict[str, Any]) -> Reply:
        async with self.session.post(url, json=body) as response:
            request_id = response.headers.get("x-request-id", "")
            if not body.get("stream") or response.status != 200:
                told = await response.json(content_type=None)
                choices = sorted(told.get("choices", []), key=lambda c: c["index"])
                texts = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
                return Reply(response.status, texts, told, request_id, 1, [c["finish_reason"] for c in choices])
            return await self._read_stream(response, request_id)

    async def _read_stream(self, response: aiohttp.ClientResponse, request_id: str) -> Reply:
        texts: dict[int, str] = {}
        reply = Reply(response.status, [], [], request_id)
        async for raw in response.content:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            reply.body.append(event)
            reply.chunks += 1
            for choice in event.get("choices", []):
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + piece
        reply.texts = [texts[i] for i in sorted(texts)]
        return reply

    async def explain(self, router: Router, request_id: str, *, ranks: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """The last attempt's ledger, once both engines and `ranks` ranks of prefill and of decode have closed theirs.

        Each rank tells its engine by itself, some a moment after the answer.
        """

        async def closed() -> dict[str, Any] | None:
            async with self.session.get(f"{router.url}/explain/{request_id}") as response:
                told = await response.json()
            attempt: dict[str, Any] = told["attempts"][-1]
            sides = attempt["engines"]
            if sides and all(side and "finished_s" in side for side in sides.values()):
                prefill, decode = (len(sides.get(side, {}).get("ranks", {})) for side in ("prefill", "decode"))
                return attempt if prefill >= ranks[0] and decode >= ranks[1] else None
            return None

        found: dict[str, Any] = await eventually(closed, f"the ledger of {request_id} to be closed")
        return found

    async def metric(self, engine: Engine, name: str) -> float:
        async with self.session.get(f"{engine.url}/metrics") as response:
            text = await response.text()
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.M)
        assert values, f"{name} is not among the metrics of {engine.url}"
        return sum(float(value) for value in values)

    async def all_blocks_free(self, *engines: Engine) -> None:
        """Wait until no block of these engines is in use."""
        for engine in engines:

            async def idle(engine: Engine = engine) -> bool:
                used = await self.metric(engine, "vllm:kv_cache_usage_perc")
                running = await self.metric(engine, "vllm:num_requests_running")
                return used == 0 and running == 0

            await eventually(idle, f"all blocks of {engine.proc.name} to be free")

    async def reset_cache(self, *engines: Engine) -> None:
        for engine in engines:
            async with self.session.post(f"{engine.url}/reset_prefix_cache") as response:
                assert response.status == 200


async def eventually(probe: Callable[[], Awaitable[Any]], what: str, deadline_s: float = 90.0) -> Any:
    """The first truthy answer of `probe`; fails after the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        answer = await probe()
        if answer:
            return answer
        assert time.monotonic() < until, f"waited {deadline_s} s for {what}"
        await asyncio.sleep(0.1)


@contextlib.contextmanager
def stopping(*things: Engine | Router | Node) -> Iterator[None]:
    """Stop them all on the way out, and check that no process of theirs is left."""
    try:
        yield
    finally:
        left: list[int] = []
        pids = [pid for thing in things if isinstance(thing, Engine) for pid in thing.pids()]
        for thing in things:
            thing.proc.stop()
        for pid in pids:
            with contextlib.suppress(OSError):
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                left += [pid] if state not in "ZX" else []
        assert not left, f"processes {left} are left"
