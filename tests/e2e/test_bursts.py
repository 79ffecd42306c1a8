"""Simultaneous requests with a fresh common prefix: every answer is plain vLLM's, however KV is shared.

The engines that these bursts have warmed are also asked through a router that checks each loaded KV (shadow checks).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from lmkv import LmkvClient

from .bed import PROSE, Client, Engine, Node, Router, eventually, stopping
from .bursts import (
    PLAIN_SHAPE,
    TIGHT_SHAPE,
    Mode,
    Tally,
    bursts,
    idle,
    plain_engine,
    pooling_engines,
    pushing_engines,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TINY = "tiny-llama"
CHUNK = 128
REQUESTS = 24


@dataclass(frozen=True, slots=True)
class Beds:
    """Engines that are up together, and the ways of sharing KV among them."""

    modes: dict[str, Mode]
    run: Path
    node: Node | None = None


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with plain_engine(tmp_path_factory.mktemp("plain"), TINY) as engine:
        yield engine


@pytest.fixture(scope="module")
def beds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beds]:
    run = tmp_path_factory.mktemp(request.param)
    if request.param == "pushing":
        with pushing_engines(run, TINY) as modes:
            yield Beds(modes, run)
    else:
        with pooling_engines(run, TINY) as (modes, node):
            yield Beds(modes, run, node)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, TINY)


MODES = [("pushing", "direct"), ("pushing", "landing"), ("pooling", "pool"), ("pooling", "pool-pd")]
each_mode = pytest.mark.parametrize(("beds", "name"), MODES, indirect=["beds"], ids=[name for _, name in MODES])
pushing = pytest.mark.parametrize("beds", ["pushing"], indirect=True)
pooling = pytest.mark.parametrize("beds", ["pooling"], indirect=True)


def judge(tally: Tally) -> None:
    """Fails with the first wrong answer and its ledger."""
    assert len(tally.judged) >= REQUESTS
    wrong = tally.wrong
    if wrong:
        one = wrong[0]
        pytest.fail(
            f"{len(wrong)} of {len(tally.judged)} answers are wrong; the first, from {one.url}: {one.ours!r} instead "
            f"of {one.plain!r}, to a prompt that ends with {one.prompt[-200:]!r}; ledger {json.dumps(one.ledger)}"
        )


@each_mode
async def test_answers_are_plain_vllms(beds: Beds, name: str, plain: Engine, client: Client) -> None:
    mode = beds.modes[name]
    judge(await bursts(client, mode, plain, f"The burst of {name}", PLAIN_SHAPE, REQUESTS))
    await idle(client, mode)


@each_mode
async def test_answers_with_a_cache_that_preempts(beds: Beds, name: str, plain: Engine, client: Client) -> None:
    mode = beds.modes[name]
    tally = await bursts(client, mode, plain, f"The crowd of {name}", TIGHT_SHAPE, REQUESTS)
    judge(tally)
    assert tally.preemptions > 0, "the caches were not small enough"
    await idle(client, mode)


# --- shadow checks on real engines ---


async def shadow_of(client: Client, router: Router, request_id: str) -> dict[str, Any]:
    async def ended() -> dict[str, Any] | None:
        async with client.session.get(f"{router.url}/explain/{request_id}") as response:
            shadow: dict[str, Any] | None = (await response.json())["shadow"]
        return shadow if shadow and shadow["result"] != "running" else None

    found: dict[str, Any] = await eventually(ended, f"the shadow check of {request_id}")
    return found


def checking_router(beds: Beds, name: str, prefill: list[Engine], decode: Engine) -> Router:
    return Router.start(name, beds.run, prefill, [decode], "--shadow-share", "1")


@pytest.mark.parametrize("name", ["direct", "landing"])
@pushing
async def test_right_kv_passes_the_shadow_check(beds: Beds, name: str, client: Client) -> None:
    """Chat and completions, streamed and not: pushed KV leads to the first token that computing leads to."""
    prefill, decode = beds.modes[name].engines
    router = checking_router(beds, f"checking-{name}", [prefill], decode)
    with stopping(router):
        router.wait_ready()
        asked = [
            await client.complete(router.url, f"Shadow of {name}, one. {PROSE[:3000]}"),
            await client.complete(router.url, f"Shadow of {name}, two. {PROSE[:3000]}", stream=True),
            await client.chat(router.url, f"Shadow of {name}, three. {PROSE[:3000]}"),
        ]
        for reply in asked:
            shadow = await shadow_of(client, router, reply.request_id)
            assert shadow["result"] in ("equal", "skipped_limit"), shadow
        assert (await shadow_of(client, router, asked[-1].request_id))["result"] == "equal"
        assert shadow["tolerance"] == 0.01 and shadow["compared_tokens"] >= CHUNK
    await idle(client, beds.modes[name])


@pooling
async def test_wrong_pages_fail_the_shadow_check(beds: Beds, client: Client) -> None:
    """KV of a prompt's first chunks, right by its checksums and wrong by its content, is in the pool under their names:
    the answer can't be saved, but the check names the node and the pages. Right pages pass."""
    assert beds.node is not None
    other, engine = beds.modes["pool"].engines
    router = checking_router(beds, "checking-pool", [], engine)
    (space,) = beds.node.stats()["namespaces"]
    bad, good = [await client.tokens(engine, f"{title}. {PROSE}") for title in ("Poisoned", "Sound")]
    with LmkvClient(beds.node.address, layers=4, heads=4, head_dim=32, dtype="float32") as writer:
        writer.namespace = bytes.fromhex(space)
        kv = torch.randn((4, 2, 4, 3 * CHUNK, 32), generator=torch.Generator().manual_seed(1))
        assert writer.store(bad[: 3 * CHUNK], kv).stored == 3
    pages = beds.node.stats()["pages"]
    await client.complete(other.url, good[:600], max_tokens=1)
    await eventually(lambda: has_pages(beds, pages + 4), "the sound pages to be stored")
    with stopping(router):
        router.wait_ready()
        poisoned = await client.complete(router.url, bad[:600])
        told = await shadow_of(client, router, poisoned.request_id)
        assert told["result"] == "different", told
        (pages_of,) = told["sources"]["pool"]["nodes"].values()
        assert told["sources"]["pool"]["namespace"] == space and pages_of["pages"] == 3
        log = router.proc.log.read_text()
        assert "WRONG KV SUSPECTED" in log and pages_of["last_key"] in log and poisoned.request_id in log
        sound = await client.complete(router.url, good[:600])
        assert (await shadow_of(client, router, sound.request_id))["result"] == "equal"
        async with client.session.get(f"{router.url}/metrics") as response:
            assert 'lmkv_router_shadow_total{result="different"} 1.0' in await response.text()
    await idle(client, beds.modes["pool"])


async def has_pages(beds: Beds, count: int) -> bool:
    assert beds.node is not None
    return bool(beds.node.stats()["pages"] >= count)
