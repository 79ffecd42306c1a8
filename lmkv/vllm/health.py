"""Middleware of vLLM's API server: `GET /health` fails once lmkv is dead in the engine behind it.

vLLM's own check fails for a dead engine only. An engine whose worker loop, lookup thread or control endpoint has died
goes on as a plain one; this says so to whoever watches `/health`. Started as `--middleware lmkv.vllm.health.Health`.

Imports neither vLLM nor torch. Belongs to the event loop of the API server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from lmkv.addresses import WILDCARDS, checked, join_address, split_address
from lmkv.control.client import ControlClient, ControlError
from lmkv.settings import split_list

logger = logging.getLogger(__name__)

VARIABLE = "LMKV_HEALTH"
"""Where this engine listens for control messages, tcp://HOST:PORT; one for each data-parallel rank, by commas."""
PATH = "/health"
ASK_S = 1.0
LISTENS_S = 0.5
FRESH_S = 1.0
"""An answer is good for so long."""
MISSES = 3
"""A busy engine may be late once or twice. One that nobody listens for any more is dead at once."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Health:
    """Everything but `GET /health` goes straight on to `app`. Raises ConfigError for an address that is none."""

    def __init__(self, app: App, environ: Mapping[str, str] = os.environ) -> None:
        self._app = app
        self._endpoints = tuple(Endpoint(address) for address in addresses(environ))
        self._client: ControlClient | None = None
        self._asking: asyncio.Task[str] | None = None
        self._told_s = 0.0
        """When the last question was answered, or given up."""
        self._trouble = ""
        if not self._endpoints:
            logger.warning("%s is not set: %s does not tell whether lmkv lives in this engine", VARIABLE, PATH)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                await self.close()
        elif self._endpoints and _is_probe(scope) and (trouble := await self._ask()):
            await self._answer(scope, receive, send, trouble)
        else:
            await self._app(scope, receive, send)

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        self._asking = self._client = None

    async def _answer(self, scope: Message, receive: Receive, send: Send, trouble: str) -> None:
        """vLLM's own words if it finds fault as well, else ours: so ours mean that the engine serves requests."""
        kept: list[Message] = []

        async def keep(message: Message) -> None:
            kept.append(message)

        await self._app(scope, receive, keep)
        if kept and kept[0].get("status") == 200:
            body = json.dumps({"trouble": trouble}, ensure_ascii=False).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            kept = [
                {"type": "http.response.start", "status": 503, "headers": headers},
                {"type": "http.response.body", "body": body},
            ]
        for message in kept:
            await send(message)

    async def _ask(self) -> str:
        """What is wrong, or "". Probes that come together, or soon after another, share one question."""
        now_s = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now_s >= self._told_s + FRESH_S):
            self._asking = asyncio.create_task(self._question(), name="lmkv health")
        return await asyncio.shield(self._asking)  # a probe that goes away takes the question from nobody

    async def _question(self) -> str:
        self._client = client = self._client or ControlClient()
        try:
            told = await asyncio.gather(*(endpoint.ask(client) for endpoint in self._endpoints))
        finally:
            self._told_s = asyncio.get_running_loop().time()
        trouble = "; ".join(dict.fromkeys(filter(None, told)))
        if trouble != self._trouble:
            if trouble:
                logger.error("%s fails, requests are served on: %s", PATH, trouble)
            else:
                logger.warning("%s is well again", PATH)
        self._trouble = trouble
        return trouble


class Endpoint:
    """The control endpoint of one engine, as its API server sees it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._has_answered = False
        self._missed = 0
        self._trouble = ""
        """As last told."""

    async def ask(self, client: ControlClient) -> str:
        """What is wrong, or "". Takes `ASK_S` + `LISTENS_S` at most."""
        try:
            self._trouble = (await client.describe(self._address, deadline_s=ASK_S)).trouble
        except ControlError as error:
            self._missed += 1
            if not await _listens(self._address):
                return f"nobody listens at this engine's control address {self._address}"
            # It listens from the engine's start, and answers once the weights have been read: that may take minutes.
            return str(error) if self._has_answered and self._missed >= MISSES else self._trouble
        self._has_answered, self._missed = True, 0
        return self._trouble


async def _listens(address: str) -> bool:
    """Somebody takes a connection. Who is too slow for that is taken to be there."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(LISTENS_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return True
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):  # (it may have closed the connection first)
        await writer.wait_closed()
    return True


def _is_probe(scope: Message) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) == PATH


def addresses(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What `VARIABLE` names, as this host connects to it. Raises ConfigError for what is no address."""
    found = []
    for listen in split_list(environ.get(VARIABLE, "")):
        host, port = split_address(checked(VARIABLE, listen, listen=True), listen=True)
        if host in {name for _, name in socket.if_nameindex()}:
            logger.warning("%s names the interface %s, to which nobody connects; it is not asked", VARIABLE, host)
            continue
        if host in WILDCARDS:
            host = "::1" if host == "::" else "127.0.0.1"
        found.append(checked(VARIABLE, join_address(host, port)))
    return tuple(found)
