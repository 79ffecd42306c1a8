"""Two beds of real engines: this one with real weights; test_ranks has one with a tiny model on two ranks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from .bed import Client, Engine, Router, stopping

MODEL = "SmolLM2-135M-Instruct"
DECODE_BLOCKS = 40


@dataclass(frozen=True, slots=True)
class Bed:
    prefill: Engine
    decode: Engine
    plain: Engine
    router: Router
    dumps: Path


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """Chunked prefill (512 tokens a step), a decode engine with few blocks, a plain engine to compare with.

    float32: greedy answers of bfloat16 flip on rounding noise between batch shapes, without any transfer.
    """
    run = tmp_path_factory.mktemp("e2e")
    dumps = run / "dumps"
    common = ("--dtype", "float32", "--max-num-batched-tokens", "512")
    env = {"LMKV_DEBUG_DUMP_DIR": str(dumps)}
    prefill = Engine.start("prefill", "prefill", run, *common, model=MODEL, core="0", env=env)
    few = ("--num-gpu-blocks-override", str(DECODE_BLOCKS))
    decode = Engine.start("decode", "decode", run, *common, *few, model=MODEL, core="1", env=env)
    plain = Engine.start("plain", "plain", run, *common, model=MODEL, core="0")
    with stopping(prefill, decode, plain):
        for engine in (prefill, decode, plain):
            engine.wait_ready()
        router = Router.start("router", run, [prefill], [decode])
        with stopping(router):
            router.wait_ready()
            yield Bed(prefill, decode, plain, router, dumps)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, MODEL)
