"""Engines with other numbers of ranks, and prefill and decode engines, on one pool. Tiny random weights."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from lmkv import LmkvClient

from .bed import PROSE, Client, Engine, Node, Router, counters, eventually, stopping

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TINY = "tiny-llama"
CHUNK = 128


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        yield Client(session, TINY)


async def prompt_of(client: Client, engine: Engine, title: str, tokens: int) -> list[int]:
    return (await client.tokens(engine, f"{title}. {PROSE * 4}"))[:tokens]


async def stored(node: Node, pages: int) -> None:
    async def there() -> bool:
        return bool(node.stats()["pages"] >= pages)

    await eventually(there, f"{pages} pages in the pool")


@dataclass(frozen=True, slots=True)
class Pair:
    node: Node
    one: Engine
    two: Engine


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """An engine of one rank and one of two; four KV heads."""
    run = tmp_path_factory.mktemp("pool-ranks")
    node = Node.start("node", run)
    node.wait_ready()
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "LMKV_LOOKUP_MS": "500"}
    common = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--pool", node.address)
    one = Engine.start("one", "engine", run, *common, model=TINY, env=env)
    two = Engine.start(
        "two", "engine", run, *common, "--tensor-parallel-size", "2", "--block-size", "32", model=TINY, env=env
    )
    with stopping(one, two, node):
        one.wait_ready()
        two.wait_ready()
        yield Pair(node, one, two)


@pytest.mark.parametrize("first", ["one", "two"])
async def test_other_ranks_load_what_one_engine_has_stored(ranks: Pair, client: Client, first: str) -> None:
    a, b = (ranks.one, ranks.two) if first == "one" else (ranks.two, ranks.one)
    prompt = await prompt_of(client, a, f"Stored by {first}", 700)
    pages = ranks.node.stats()["pages"]
    own = await client.complete(a.url, prompt)
    await stored(ranks.node, pages + 5)
    before = await counters(b)
    assert (await client.complete(b.url, prompt)).text == own.text
    after = await counters(b)
    assert after.get("pool:loaded_tokens", 0) - before.get("pool:loaded_tokens", 0) == 5 * CHUNK
    assert after.get("pool:load:corrupt", 0) == 0


async def test_nothing_is_held_afterwards(ranks: Pair, client: Client) -> None:
    await client.all_blocks_free(ranks.one, ranks.two)
    stats = ranks.node.stats()
    assert (stats["reserved"], stats["quarantined_bytes"], stats["leases"]) == (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Handover:
    node: Node
    prefill: Engine
    decode: Engine
    router: Router


@pytest.fixture(scope="module")
def handover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Handover]:
    run = tmp_path_factory.mktemp("pool-handover")
    node = Node.start("node", run)
    node.wait_ready()
    env = {"LMKV_LOOKUP_MS": "500", "LMKV_HOLD_S": "3"}
    common = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--pool", node.address)
    prefill = Engine.start("prefill", "prefill", run, *common, model=TINY, core="0", env=env)
    decode = Engine.start("decode", "decode", run, *common, model=TINY, core="1", env=env)
    with stopping(prefill, decode, node):
        prefill.wait_ready()
        decode.wait_ready()
        router = Router.start("router", run, [prefill], [decode])
        with stopping(router):
            router.wait_ready()
            yield Handover(node, prefill, decode, router)


async def test_one_push_has_two_landings(handover: Handover, client: Client) -> None:
    """Prefill's chunks go to decode and to the pool; decode stores its answer; a second time both load."""
    prompt = await prompt_of(client, handover.prefill, "Handed over", 700)
    before = handover.node.stats()["pages"]
    sent = (await counters(handover.decode)).get("receive:loaded", 0)
    first = await client.complete(handover.router.url, prompt, max_tokens=80, ignore_eos=True)
    assert (await counters(handover.decode))["receive:loaded"] == sent + 1
    await stored(handover.node, before + (700 + 79) // CHUNK)
    await client.reset_cache(handover.prefill, handover.decode)
    marks = [await counters(engine) for engine in (handover.prefill, handover.decode)]
    again = await client.complete(handover.router.url, prompt, max_tokens=80, ignore_eos=True)
    assert again.text == first.text
    for engine, mark in zip((handover.prefill, handover.decode), marks, strict=True):
        now = await counters(engine)
        # Decode wants 60 tokens more than the pool has; that is less than a chunk, so it loads and computes.
        assert now.get("pool:loaded_tokens", 0) - mark.get("pool:loaded_tokens", 0) == 5 * CHUNK


async def test_decode_waits_for_prefill_when_the_pool_has_too_little(handover: Handover, client: Client) -> None:
    prompt = await prompt_of(client, handover.prefill, "Half of it", 700)
    before = handover.node.stats()["pages"]
    await client.complete(handover.prefill.url, prompt[:300], max_tokens=1)
    await stored(handover.node, before + 2)
    await client.reset_cache(handover.prefill)
    mark = await counters(handover.decode)
    reply = await client.complete(handover.router.url, prompt)
    now = await counters(handover.decode)
    assert now["receive:loaded"] == mark.get("receive:loaded", 0) + 1
    assert now.get("pool:loaded_tokens", 0) == mark.get("pool:loaded_tokens", 0)
    await client.reset_cache(handover.decode)
    assert (await client.complete(handover.decode.url, prompt)).text == reply.text


async def test_parked_kv_is_loaded_from_the_pool(handover: Handover, client: Client) -> None:
    """Decode does not come in time; prefill parks what it has computed, and tells decode, which looks there."""
    prompt = await prompt_of(client, handover.prefill, "Nobody comes for it", 600)
    before = handover.node.stats()["pages"]
    params = {"transfer_id": "0123456789abcdef" * 2}
    prefill = {"lmkv": {**params, "role": "prefill", "peer": {"address": handover.decode.control}}}
    decode = {"lmkv": {**params, "role": "decode", "peer": {"address": handover.prefill.control}}}
    own = await client.complete(handover.prefill.url, prompt, max_tokens=1, kv_transfer_params=prefill)

    async def parked() -> bool:
        return (await counters(handover.prefill)).get("send:parked", 0) == 1

    await eventually(parked, "prefill to park the transfer")
    await stored(handover.node, before + 4)
    mark = await counters(handover.decode)
    reply = await client.complete(handover.decode.url, prompt, max_tokens=1, kv_transfer_params=decode)
    assert reply.text == own.text
    now = await counters(handover.decode)
    assert now.get("miss:parked", 0) == mark.get("miss:parked", 0) + 1
    assert now.get("pool:loaded_tokens", 0) - mark.get("pool:loaded_tokens", 0) == 4 * CHUNK


# --- shadow checks ---


async def shadow_of(client: Client, router: Router, request_id: str) -> dict[str, Any]:
    """What the check of this request has shown, once it has ended."""

    async def ended() -> dict[str, Any] | None:
        async with client.session.get(f"{router.url}/explain/{request_id}") as response:
            shadow: dict[str, Any] | None = (await response.json())["shadow"]
        return shadow if shadow and shadow["result"] != "running" else None

    found: dict[str, Any] = await eventually(ended, f"the shadow check of {request_id}")
    return found


def checking_router(run: Path, prefill: list[Engine], decode: Engine) -> Router:
    return Router.start("checking", run, prefill, [decode], "--shadow-share", "1")


async def test_right_kv_passes_the_shadow_check(handover: Handover, client: Client, tmp_path: Path) -> None:
    """Chat and completions, streamed and not: pushed KV leads to the first token that computing leads to."""
    router = checking_router(tmp_path, [handover.prefill], handover.decode)
    with stopping(router):
        router.wait_ready()
        for ask, stream in (
            (client.complete, False),
            (client.complete, True),
            (client.chat, False),
            (client.chat, True),
        ):
            reply = await ask(router.url, f"Shadow of {ask.__name__}, stream {stream}. {PROSE[:3000]}", stream=stream)
            shadow = await shadow_of(client, router, reply.request_id)
            assert shadow["result"] == "equal", shadow
            assert shadow["tolerance"] == 0.01 and shadow["compared_tokens"] >= 3 * CHUNK
    await client.all_blocks_free(handover.prefill, handover.decode)


async def test_wrong_pages_fail_the_shadow_check(handover: Handover, client: Client, tmp_path: Path) -> None:
    """KV of a prompt's first chunks, right by its checksums and wrong by its content, is in the pool under their names:
    nothing saves the answer, but the check names the node and the pages. Right pages pass."""
    node, engine = handover.node, handover.decode
    (space,) = node.stats()["namespaces"]
    bad, good = [await prompt_of(client, engine, title, 600) for title in ("Poisoned", "Sound")]
    with LmkvClient(node.address, layers=4, heads=4, head_dim=32, dtype="float32") as writer:
        writer.namespace = bytes.fromhex(space)
        kv = torch.randn((4, 2, 4, 3 * CHUNK, 32), generator=torch.Generator().manual_seed(1))
        assert writer.store(bad[: 3 * CHUNK], kv).stored == 3
    pages = node.stats()["pages"]
    await client.complete(handover.prefill.url, good, max_tokens=1)
    await stored(node, pages + 4)
    router = checking_router(tmp_path, [], engine)
    with stopping(router):
        router.wait_ready()
        poisoned = await client.complete(router.url, bad)
        told = await shadow_of(client, router, poisoned.request_id)
        assert told["result"] == "different", told
        assert told["sources"]["pool"]["namespace"] == space
        (found,) = told["sources"]["pool"]["nodes"].values()
        assert found["pages"] == 3
        log = router.proc.log.read_text()
        assert "WRONG KV SUSPECTED" in log and found["last_key"] in log and poisoned.request_id in log
        sound = await client.complete(router.url, good)
        assert (await shadow_of(client, router, sound.request_id))["result"] == "equal"
        async with client.session.get(f"{router.url}/metrics") as response:
            assert 'lmkv_router_shadow_total{result="different"} 1.0' in await response.text()
    await client.reset_cache(engine)
