"""Two ranks on each side, a refused engine, and a prefill engine that is killed; tiny random weights."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lmkv.control.client import ControlClient

from .bed import PROSE, Client, Engine, Router, eventually, stopping

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TINY = "tiny-llama"


@dataclass(frozen=True, slots=True)
class Tiny:
    prefill: Engine
    decode: Engine
    dumps: Path
    run: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    run = tmp_path_factory.mktemp("tiny")
    dumps = run / "dumps"
    env = {"LMKV_DEBUG_DUMP_DIR": str(dumps), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    common = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--tensor-parallel-size", "2")
    names = ("--served-model-name", TINY)
    prefill = Engine.start("tiny-prefill", "prefill", run, *common, *names, model=TINY, env=env)
    decode = Engine.start("tiny-decode", "decode", run, *common, *names, model=TINY, env=env)
    with stopping(prefill, decode):
        prefill.wait_ready()
        decode.wait_ready()
        yield Tiny(prefill, decode, dumps, run)


@pytest.fixture
def other(tiny: Tiny) -> Iterator[Engine]:
    """A prefill engine of the same geometry with other weights."""
    args = ("--dtype", "float32", "--served-model-name", TINY)
    engine = Engine.start("tiny-other", "prefill", tiny.run, *args, model="tiny-other", core="0")
    with stopping(engine):
        engine.wait_ready()
        yield engine


@pytest.fixture
async def client() -> Any:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        yield Client(session, TINY)


async def test_two_ranks_each_push_their_heads(tiny: Tiny, client: Client) -> None:
    router = Router.start("tiny-router", tiny.run, [tiny.prefill], [tiny.decode])
    with stopping(router):
        router.wait_ready()
        ids = (await client.tokens(tiny.decode, PROSE))[:1000]
        reply = await client.complete(router.url, ids)
        attempt = await client.explain(router, reply.request_id, ranks=(2, 2))
        for side in ("prefill", "decode"):
            ranks = attempt["engines"][side]["ranks"]
            assert sorted(ranks) == ["0", "1"]
            assert {rank["outcome"] for rank in ranks.values()} == {"sent" if side == "prefill" else "loaded"}
        for rank in (0, 1):
            ours, theirs = (
                tiny.dumps / f"{attempt['transfer_id']}-{side}-{rank}-0.kv" for side in ("prefill", "decode")
            )
            assert ours.read_bytes() == theirs.read_bytes()
        await client.reset_cache(tiny.decode)
        alone = await client.complete(tiny.decode.url, ids)
        assert reply.text == alone.text
        await client.all_blocks_free(tiny.prefill, tiny.decode)


async def test_prefill_killed_in_mid_push(tiny: Tiny, client: Client) -> None:
    """Decode notices, computes the prompt itself, answers the same, loses no block. No prefill is left then."""
    ids = (await client.tokens(tiny.decode, PROSE + PROSE))[:3800]
    expected = await client.complete(tiny.decode.url, ids)
    await client.reset_cache(tiny.decode)
    tid = "2" * 32

    def params(role: str, peer: Engine) -> dict[str, Any]:
        return {"lmkv": {"transfer_id": tid, "role": role, "peer": {"address": peer.control}}}

    sending = asyncio.create_task(
        client.complete(tiny.prefill.url, ids, max_tokens=1, kv_transfer_params=params("prefill", tiny.decode))
    )
    receiving = asyncio.create_task(
        client.complete(tiny.decode.url, ids, kv_transfer_params=params("decode", tiny.prefill))
    )

    async def pushing() -> bool:
        assert not sending.done(), "prefill was faster than the test"
        return await client.metric(tiny.prefill, "vllm:num_requests_running") > 0

    await eventually(pushing, "prefill to run")
    for pid in tiny.prefill.pids():
        os.kill(pid, signal.SIGKILL)
    reply = await asyncio.wait_for(receiving, 120)
    await asyncio.gather(sending, return_exceptions=True)
    assert reply.status == 200 and reply.text == expected.text
    await client.all_blocks_free(tiny.decode)


async def test_wrong_weights_are_refused_by_name(tiny: Tiny, other: Engine, client: Client) -> None:
    """The pair is refused, the message names the field, and a request that asks for it is computed by decode."""
    control = ControlClient()
    try:
        met = await control.meet(tiny.decode.control, other.control, deadline_s=60)
    finally:
        await control.close()
    assert "'weights'" in met.refused and "same weight files" in met.refused
    params = {"transfer_id": "1" * 32, "role": "decode", "peer": {"address": other.control}}
    ids = await client.tokens(tiny.decode, PROSE)
    reply = await client.complete(tiny.decode.url, ids[:300], kv_transfer_params={"lmkv": params})
    alone = await client.complete(tiny.decode.url, ids[:300])
    assert reply.status == 200 and reply.text == alone.text
