"""Fake engines: real HTTP servers that answer as vLLM's API server does, and real ZeroMQ control endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio
from aiohttp import web
from multidict import CIMultiDictProxy

from lmkv import wire
from lmkv.ids import EngineName, Incarnation

WAIT_S = 10.0
"""Deadline of everything a test waits for."""


@dataclass(eq=False)
class Seen:
    """One request as the engine saw it. `done` is set when its handler has ended, however it ended."""

    path: str
    headers: CIMultiDictProxy[str]
    raw: bytes
    arrived_s: float
    aborted: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.raw)

    @property
    def lmkv(self) -> dict[str, Any]:
        return self.body["kv_transfer_params"]["lmkv"]


Behaviour = Callable[[web.Request, Seen], Awaitable[web.StreamResponse]]


def role_chunk(index: int = 0) -> bytes:
    choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def chat_chunk(text: str, index: int = 0, finish: str | None = None) -> bytes:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]})


def text_chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return event({"id": "cmpl-1", "object": "text_completion", "choices": [choice]})


def error_chunk(message: str = "Internal server error", code: int = 500) -> bytes:
    return event({"error": {"message": message, "type": "InternalServerError", "param": None, "code": code}})


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chat_stream(words: list[str], n: int = 1) -> list[bytes]:
    chunks = [role_chunk(i) for i in range(n)]
    chunks += [chat_chunk(word, i) for word in words for i in range(n)]
    return [*chunks, *(chat_chunk("", i, "stop") for i in range(n)), DONE]


async def start_stream(request: web.Request) -> web.StreamResponse:
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Engine": "fake"})
    await reply.prepare(request)
    return reply


def streams(chunks: list[bytes], pause_s: float = 0.0) -> Behaviour:
    """Sends the chunks, each in a write of its own."""

    async def behave(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = await start_stream(request)
        for chunk in chunks:
            await reply.write(chunk)
            if pause_s:
                await asyncio.sleep(pause_s)
        return reply

    return behave


def streams_then_hangs(chunks: list[bytes]) -> Behaviour:
    async def behave(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = await start_stream(request)
        for chunk in chunks:
            await reply.write(chunk)
        await asyncio.Event().wait()
        return reply

    return behave


def streams_then_dies(chunks: list[bytes]) -> Behaviour:
    async def behave(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = await start_stream(request)
        for chunk in chunks:
            await reply.write(chunk)
        await drop(request, seen)
        return reply

    return behave


async def drop(request: web.Request, seen: Seen) -> web.StreamResponse:
    """The connection breaks."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def hang(request: web.Request, seen: Seen) -> web.StreamResponse:
    await asyncio.Event().wait()
    return web.Response()


def answers(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Behaviour:
    async def behave(request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return behave


async def like_vllm(request: web.Request, seen: Seen) -> web.StreamResponse:
    """A stream or a JSON answer, as the body asks for."""
    body = seen.body
    chat = "chat" in request.path
    if body.get("stream"):
        chunks = chat_stream(["He", "llo"], body.get("n") or 1) if chat else [text_chunk("Hello"), DONE]
        return await streams(chunks)(request, seen)
    message = {"message": {"role": "assistant", "content": "Hello"}} if chat else {"text": "Hello"}
    return web.json_response({"id": "1", "choices": [{"index": 0, **message, "finish_reason": "stop"}]})


def after_arrival_at(others: list[FakeEngine], behaviour: Behaviour) -> Behaviour:
    """Behaves once the same transfer has arrived at one of `others`: a failure must not come before that."""

    async def behave(request: web.Request, seen: Seen) -> web.StreamResponse:
        mine = seen.lmkv["transfer_id"]
        await until(lambda: any(mine == other.lmkv["transfer_id"] for e in others for other in e.seen), "arrival")
        return await behaviour(request, seen)

    return behave


class FakeControl:
    """An engine's control endpoint. `refusal` and `peers` are the test's to set; `silent` swallows questions."""

    def __init__(self, name: str, incarnation: str) -> None:
        self.name = name
        self.incarnation = incarnation
        self.refusal = ""
        self.silent = False
        self.met: list[str] = []
        self.peers: dict[str, str] = {}
        self.ledgers: dict[str, bytes] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.resolve: dict[str, FakeControl] = {}
        """Other endpoints by address, for Met to tell their names."""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            identity, payload = await self._socket.recv_multipart()
            message = wire.decode_control(payload)
            if not self.silent:
                await self._socket.send_multipart([identity, wire.encode(self._answer(message))])

    def _answer(self, message: wire.Control) -> wire.Control:
        match message:
            case wire.Meet(address, token):
                self.met.append(address)
                peer = self.resolve[address]
                if not self.refusal:
                    self.peers[peer.name] = peer.incarnation
                return wire.Met(token, peer.name, peer.incarnation, self.refusal)
            case wire.Describe(token):
                peers = tuple(self.peers.items())
                return wire.Description(
                    token, EngineName(self.name), Incarnation(self.incarnation), "both", peers, {"transfers": 1}
                )
            case wire.Explain(token, transfer_id):
                return wire.Explained(token, self.ledgers.get(transfer_id, b""))
        raise AssertionError(f"an engine is not asked {message}")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()


class FakeEngine:
    """`behaviour` answers generation requests, `health` is /health's status. `stop()` frees the port, `start()` takes
    the same one again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.behaviour: Behaviour = like_vllm
        self.script: list[Behaviour] = []
        """Behaviours of the next requests, before `behaviour`."""
        self.health = 200
        self.health_body = b""
        self.seen: list[Seen] = []
        self.port = 0
        self.arrival = asyncio.Event()
        self.control = FakeControl(name, f"{name:0>16}")
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spec(self) -> str:
        return f"{self.url}={self.control.address}"

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close(self) -> None:
        await self.stop()
        await self.control.close()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        seen = Seen(request.path, request.headers, await request.read(), time.monotonic())
        self.seen.append(seen)
        self.arrival.set()
        behaviour = self.script.pop(0) if self.script else self.behaviour
        try:
            return await behaviour(request, seen)
        except (asyncio.CancelledError, ConnectionResetError):
            seen.aborted = True
            raise
        finally:
            seen.done.set()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health, body=self.health_body)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "engine": self.name}]})


async def until(condition: Callable[[], Any], what: str) -> None:
    """Poll `condition`; fails the test after WAIT_S."""
    end_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end_s:
            raise AssertionError(f"after {WAIT_S:g} s still not: {what}")
        await asyncio.sleep(0.005)


async def within(awaitable: Awaitable[Any]) -> Any:
    async with asyncio.timeout(WAIT_S):
        return await awaitable
