"""A router on a free port in front of fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from lmkv.router.app import make_app
from lmkv.router.core import Router
from lmkv.router.pairs import PairState
from lmkv.router.settings import router_settings

from .fakes import FakeEngine, until

FAST = {"health_interval_s": 0.05, "control_interval_s": 0.1, "health_backoff_s": 0.1, "first_token_timeout_s": 8.0}


@dataclass
class System:
    """Router, engines and a client."""

    router: Router
    url: str
    prefill: list[FakeEngine]
    decode: list[FakeEngine]
    client: aiohttp.ClientSession

    async def chat(self, **members: Any) -> tuple[int, bytes]:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **members}
        async with self.client.post(self.url + "/v1/chat/completions", json=body) as reply:
            return reply.status, await reply.read()

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(self.url + path) as reply:
            return reply.status, await reply.json()

    @property
    def engines(self) -> list[FakeEngine]:
        return [*self.prefill, *self.decode]

    async def paired(self) -> None:
        await until(lambda: all(p.state is PairState.READY for p in self.router.pairs.pairs), "all pairs ready")


@dataclass
class Builder:
    systems: list[tuple[System, web.AppRunner]] = field(default_factory=list)

    async def __call__(
        self, prefill: int = 1, decode: int = 1, paired: bool = True, refusal: str = "", **settings: Any
    ) -> System:
        prefills = [FakeEngine(f"p{i}") for i in range(prefill)]
        decodes = [FakeEngine(f"d{i}") for i in range(decode)]
        for engine in [*prefills, *decodes]:
            await engine.start()
            for other in [*prefills, *decodes]:
                engine.control.resolve[other.control.address] = other.control
        decodes[0].control.refusal = refusal
        given = {**FAST, "prefill": [e.spec for e in prefills], "decode": [e.spec for e in decodes], **settings}
        router = Router(router_settings(given, {}))
        runner = web.AppRunner(make_app(router), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        client = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=20))
        system = System(router, url, prefills, decodes, client)
        self.systems.append((system, runner))
        if paired:
            await system.paired()
        return system

    async def close(self) -> None:
        for system, runner in self.systems:
            await system.client.close()
            await until(lambda router=system.router: not router.in_flight, "nothing in flight")
            await runner.cleanup()
            for engine in system.engines:
                await engine.close()
            assert all(e.requests == 0 and e.prompt_bytes == 0 for e in system.router.engines.all)


Build = Callable[..., Awaitable[System]]


@pytest.fixture
async def build() -> AsyncIterator[Build]:
    builder = Builder()
    yield builder
    await builder.close()
    left = [t.get_name() for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    assert not left, f"tasks left: {left}"
