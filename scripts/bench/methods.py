"""The ways to hand a prompt over from a prefill to a decode engine, and how each is asked to.

`plain` is one vLLM engine without a connector. The three pairs get their requests from here directly, without a router,
and all in the same way: over new connections, with the prompt as token ids.

    lmkv   both engines at the same moment, a transfer id and the other's control address in each request
    pull   NixlConnector, as upstream's toy proxy does it: prefill, then decode with the parameters prefill returned
    push   NixlPushConnector: serially as upstream's toy push proxy does it, or at the same moment ("concurrent")
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench import client
from bench.engines import Engine, EngineSpec
from bench.netns import DECODE_HOST, PREFILL_HOST, Host

PAIRS = ("lmkv", "pull", "push")
METHODS = ("plain", *PAIRS)
ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Place:
    """A "host" of the benchmark: one core, its addresses for HTTP and for KV, and a namespace if it has one."""

    core: int
    http_host: str = "127.0.0.1"
    kv_host: str = "127.0.0.1"
    namespace: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


LOCAL_PLACES = (Place(core=0), Place(core=1))


def linked_places() -> tuple[Place, Place]:
    """UCX may use the limited device only: within one machine it would otherwise copy past the link (CMA)."""

    def place(core: int, host: Host) -> Place:
        environment = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": host.link_device}
        return Place(core, host.http_address, host.link_address, host.namespace, environment)

    return place(0, PREFILL_HOST), place(1, DECODE_HOST)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all engines of a run share."""

    model: Path
    first_port: int
    lmkv_transport: str
    engine_arguments: tuple[str, ...]


def plain_spec(settings: Settings) -> EngineSpec:
    place = LOCAL_PLACES[0]
    return EngineSpec(
        "plain",
        settings.model,
        place.core,
        place.http_host,
        settings.first_port,
        extra_arguments=settings.engine_arguments,
    )


def pair_specs(method: str, places: tuple[Place, Place], settings: Settings) -> tuple[EngineSpec, EngineSpec]:
    """Ports: 10 for each method from the first one on; HTTP at +0 and +1, the connectors' own channels at +5 and +6."""
    base = settings.first_port + 10 * METHODS.index(method)

    def spec(index: int) -> EngineSpec:
        place, role = places[index], ROLES[index]
        name = f"{method}-{role}"
        channel = base + 5 + index
        environment = dict(place.environment)
        if method == "lmkv":
            transfer = _lmkv_config(role, name, f"tcp://{place.kv_host}:{channel}", settings.lmkv_transport)
        else:
            transfer = _nixl_config(method, role)
            environment |= {
                "VLLM_NIXL_SIDE_CHANNEL_HOST": place.kv_host,
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(channel),
            }
        return EngineSpec(
            name,
            settings.model,
            place.core,
            place.http_host,
            base + index,
            transfer,
            environment,
            place.namespace,
            settings.engine_arguments,
        )

    return spec(0), spec(1)


def _kv_role(role: str) -> str:
    return "kv_producer" if role == "prefill" else "kv_consumer"


def _lmkv_config(role: str, name: str, listen: str, transport: str) -> dict[str, Any]:
    return {
        "kv_connector": "LmkvConnector",
        "kv_connector_module_path": "lmkv.vllm.connector",
        "kv_role": _kv_role(role),
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"listen": listen, "name": name, "transport": transport},
    }


def _nixl_config(method: str, role: str) -> dict[str, Any]:
    return {
        "kv_connector": "NixlConnector" if method == "pull" else "NixlPushConnector",
        "kv_role": _kv_role(role),
        "engine_id": f"bench-{method}-{role}",
    }


@dataclass(frozen=True, slots=True)
class Handover:
    """One request through a pair: seconds from sending to the first token, and decode's answer."""

    ttft_s: float
    reply: client.Reply


@dataclass(slots=True)
class Pair:
    """A prefill and a decode engine that run, and the way to ask them; `dispatch` is "serial" or "concurrent"."""

    method: str
    prefill: Engine
    decode: Engine
    dispatch: str = "serial"

    @property
    def engines(self) -> tuple[Engine, Engine]:
        return self.prefill, self.decode

    async def hand_over(self, session: aiohttp.ClientSession, prompt: Sequence[int], max_tokens: int) -> Handover:
        for engine in self.engines:
            engine.check_alive()
        request = _Request(session, self, prompt, max_tokens)
        ways: dict[tuple[str, str], Callable[[_Request], Awaitable[client.Reply]]] = {
            ("lmkv", "concurrent"): _lmkv,
            ("pull", "serial"): _nixl_serial,
            ("push", "serial"): _nixl_serial,
            ("push", "concurrent"): _push_concurrent,
        }
        started_s = time.perf_counter()
        reply = await ways[self.method, self.dispatch](request)
        return Handover(reply.first_token_s - started_s, reply)


@dataclass(frozen=True, slots=True)
class _Request:
    session: aiohttp.ClientSession
    pair: Pair
    prompt: Sequence[int]
    max_tokens: int

    async def ask_prefill(self, parameters: dict[str, Any], request_id: str) -> dict[str, Any]:
        return await client.prefill(self.session, self.pair.prefill.spec.url, self.prompt, parameters, request_id)

    async def ask_decode(self, parameters: dict[str, Any], request_id: str) -> client.Reply:
        url = self.pair.decode.spec.url
        return await client.stream(self.session, url, self.prompt, self.max_tokens, parameters, request_id)

    async def ask_both(self, for_prefill: dict[str, Any], for_decode: dict[str, Any], request_id: str) -> client.Reply:
        """At the same moment; when one fails the other is given up as well."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.ask_prefill(for_prefill, request_id))
                decoding = group.create_task(self.ask_decode(for_decode, request_id))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return decoding.result()


def _uuid7_hex() -> str:
    """RFC 9562: 48 bits of milliseconds, version, variant, random elsewhere."""
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return f"{number:032x}"


async def _lmkv(request: _Request) -> client.Reply:
    transfer_id = _uuid7_hex()

    def parameters(role: str, peer: Engine) -> dict[str, Any]:
        transfer = peer.spec.kv_transfer
        address = transfer["kv_connector_extra_config"]["listen"] if transfer else ""
        return {"lmkv": {"transfer_id": transfer_id, "role": role, "peer": {"address": address}}}

    prefill, decode = request.pair.engines
    return await request.ask_both(parameters("prefill", decode), parameters("decode", prefill), transfer_id)


_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


async def _nixl_serial(request: _Request) -> client.Reply:
    request_id = str(uuid.uuid4())
    returned = await request.ask_prefill(_REMOTE_DECODE, request_id)
    returned.pop("remote_prefill_cached_tokens", None)  # decode would report this instead of what it got itself
    if request.pair.method == "push":
        returned.pop("remote_block_ids", None)  # decode registers its own blocks instead of reading these
    return await request.ask_decode(returned, request_id)


async def _push_concurrent(request: _Request) -> client.Reply:
    """Decode knows the prefill engine from its configuration, as in upstream's concurrent push proxy."""
    request_id = str(uuid.uuid4())
    spec = request.pair.prefill.spec
    remote = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_engine_id": (spec.kv_transfer or {})["engine_id"],
        "remote_request_id": request_id,
        "remote_host": spec.environment["VLLM_NIXL_SIDE_CHANNEL_HOST"],
        "remote_port": int(spec.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]),
        "tp_size": 1,
        "pp_size": 1,
        "transfer_id": request_id,
    }
    return await request.ask_both(_REMOTE_DECODE, remote, request_id)
