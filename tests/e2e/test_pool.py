"""Engines that share KV through a pool node: other processes, other block sizes; nothing wrong is ever used."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from lmkv import poolwire as pw
from lmkv.control.host import ThisHost
from lmkv.hashing import Chain, page_key
from lmkv.ids import Incarnation, Rank
from lmkv.pool.memory import attach

from .bed import PROSE, Client, Engine, Node, Reply, counters, eventually, stopping
from .conftest import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHUNK = 128


@dataclass(frozen=True, slots=True)
class Pool:
    node: Node
    a: Engine
    b: Engine
    share: Path


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Engine a has blocks of 128 tokens, engine b of 32. float32: see conftest."""
    run = tmp_path_factory.mktemp("pool")
    node = Node.start("node", run)
    node.wait_ready()
    common = ("--dtype", "float32", "--max-num-batched-tokens", "512", "--pool", node.address)
    env = {"LMKV_LOOKUP_MS": "200"}  # two engines, a node and the test share two cores here
    a = Engine.start("a", "engine", run, *common, model=MODEL, core="0", env=env)
    b = Engine.start("b", "engine", run, *common, "--block-size", "32", model=MODEL, core="1", env=env)
    with stopping(a, b, node):
        a.wait_ready()
        b.wait_ready()
        yield Pool(node, a, b, run / "node.sock")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=180)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Client(session, MODEL)


async def prompt_of(client: Client, engine: Engine, title: str, tokens: int) -> list[int]:
    """Natural text that begins with `title`, so that no two tests share a chunk."""
    return (await client.tokens(engine, f"{title}. {PROSE * 4}"))[:tokens]


async def stored(pool: Pool, pages: int) -> None:
    """Wait until the node has that many pages."""

    async def there() -> bool:
        return bool(pool.node.stats()["pages"] >= pages)

    await eventually(there, f"{pages} pages in the pool")


async def ask_stored(pool: Pool, client: Client, engine: Engine, prompt: list[int], **more: object) -> Reply:
    """Ask, and wait until all whole chunks of prompt and answer are in the pool."""
    before = pool.node.stats()["pages"]
    reply = await client.complete(engine.url, prompt, **more)
    computed = len(prompt) + reply.body["usage"]["completion_tokens"] - 1
    await stored(pool, before + computed // CHUNK)
    return reply


async def gained(engine: Engine, before: dict[str, int], name: str) -> int:
    """How much a counter of the connector has grown; counts of workers come within a second or two."""
    return (await counters(engine)).get(f"pool:{name}", 0) - before.get(f"pool:{name}", 0)


async def test_another_engine_loads_what_one_has_computed(pool: Pool, client: Client) -> None:
    prompt = await prompt_of(client, pool.a, "The first case", 700)
    own = await ask_stored(pool, client, pool.a, prompt)
    before = await counters(pool.b)
    loaded = await client.complete(pool.b.url, prompt)
    assert loaded.text == own.text
    assert await gained(pool.b, before, "loaded_tokens") == 5 * CHUNK
    assert await gained(pool.b, before, "lookup:hit") == 1


async def test_what_is_cached_here_already_is_not_loaded(pool: Pool, client: Client) -> None:
    """160 tokens are five blocks of b, and a chunk and a quarter."""
    prompt = await prompt_of(client, pool.a, "The second case", 600)
    own = await ask_stored(pool, client, pool.a, prompt)
    await client.complete(pool.b.url, prompt[:165], max_tokens=1)
    before = await counters(pool.b)
    assert (await client.complete(pool.b.url, prompt)).text == own.text
    assert await gained(pool.b, before, "loaded_tokens") == 4 * CHUNK - 160


async def test_the_next_turn_finds_prompt_and_answer(pool: Pool, client: Client) -> None:
    prompt = await prompt_of(client, pool.a, "The third case", 300)
    first = await ask_stored(pool, client, pool.a, prompt, max_tokens=150, ignore_eos=True)
    answer = await client.tokens(pool.a, first.text)
    turn = [*prompt, *answer, *(await client.tokens(pool.a, "\nAnd what did the miller say to that?"))]
    before = await counters(pool.b)
    second = await client.complete(pool.b.url, turn)
    assert await gained(pool.b, before, "loaded_tokens") >= (300 + 140) // CHUNK * CHUNK
    await client.reset_cache(pool.a)
    assert second.text == (await client.complete(pool.a.url, turn)).text


async def test_equal_chunks_are_stored_once(pool: Pool, client: Client) -> None:
    prompt = await prompt_of(client, pool.a, "The fourth case", 300)
    await ask_stored(pool, client, pool.a, prompt)
    pages = pool.node.stats()["pages"]
    before = await counters(pool.a)
    await client.reset_cache(pool.a)
    await client.complete(pool.a.url, prompt)
    assert await gained(pool.a, before, "loaded_tokens") == 2 * CHUNK
    assert pool.node.stats()["pages"] == pages


@pytest.mark.parametrize("page", [0, 2])
async def test_a_flipped_bit_is_a_miss(pool: Pool, client: Client, page: int) -> None:
    """Of one bit in the arena: what comes before the page is used, the rest is computed."""
    prompt = await prompt_of(client, pool.a, f"The fifth case, part {page}", 600)
    own = await ask_stored(pool, client, pool.a, prompt)
    counts = pool.node.stats()["counters"]
    flip(pool, prompt, page)
    before = await counters(pool.b)
    assert (await client.complete(pool.b.url, prompt)).text == own.text
    assert await gained(pool.b, before, "loaded_tokens") == page * CHUNK

    async def counted() -> bool:
        return await gained(pool.b, before, "load:corrupt") == 1

    await client.complete(pool.b.url, prompt[:20], max_tokens=4)
    await eventually(counted, "the corrupt page to be counted")
    assert pool.node.stats()["counters"].get("corrupt", 0) == counts.get("corrupt", 0) + 1
    assert (await client.complete(pool.b.url, prompt)).text == own.text


def flip(pool: Pool, prompt: list[int], chunk: int) -> None:
    """One bit in the middle of the page that holds this chunk of the prompt."""
    (space,) = pool.node.stats()["namespaces"]
    namespace = bytes.fromhex(space)
    key = page_key(Chain(namespace, CHUNK).extend(prompt)[chunk], 0)
    me, nobody = Incarnation("00000000000000ff"), Rank(9)
    pinned = pool.node.ask(lambda token: pw.Pin(token, me, nobody, namespace, key, 5.0), pw.Pinned)
    memory, connection = attach(ThisHost(), str(pool.share), json.dumps({"incarnation": me, "rank": nobody}).encode())
    try:
        page_bytes = CHUNK * 30 * 3 * 128 * 4
        memory.data[pinned.pages[0].offset + page_bytes // 2] ^= 0x10
    finally:
        connection.close()  # which also ends the pin: its reader is gone


async def test_an_approximate_request_leaves_nothing(pool: Pool, client: Client) -> None:
    prompt = await prompt_of(client, pool.a, "The sixth case", 300)
    pages = pool.node.stats()["pages"]
    mark = {"lmkv": {"approximate": True}}
    own = await client.complete(pool.a.url, prompt, kv_transfer_params=mark)
    before = await counters(pool.b)
    assert (await client.complete(pool.b.url, prompt)).text == own.text
    assert await gained(pool.b, before, "lookup:miss") == 1
    await stored(pool, pages + 2)  # by b
    assert (await counters(pool.a))["pool:not_pooled:approximate"] >= 1


async def test_another_salt_is_another_chain(pool: Pool, client: Client) -> None:
    prompt = await prompt_of(client, pool.a, "The seventh case", 300)
    own = await ask_stored(pool, client, pool.a, prompt, cache_salt="alice")
    before = await counters(pool.b)
    assert (await client.complete(pool.b.url, prompt, cache_salt="bob")).text == own.text
    assert await gained(pool.b, before, "lookup:miss") == 1
    assert (await client.complete(pool.b.url, prompt[:290], cache_salt="alice")).status == 200
    assert await gained(pool.b, before, "loaded_tokens") == 2 * CHUNK


async def test_all_blocks_come_back(pool: Pool, client: Client) -> None:
    await client.all_blocks_free(pool.a, pool.b)
    stats = pool.node.stats()
    assert stats["reserved"] == 0 and stats["quarantined_bytes"] == 0
    assert stats["leases"] == 0 and stats["pinned_bytes"] == 0


async def test_a_reset_of_the_external_cache_starts_an_epoch(pool: Pool, client: Client) -> None:
    """The weights may have been replaced: nothing of before is used by this engine, nothing of it by others. Last: it
    cuts engine b off."""
    prompt = await prompt_of(client, pool.a, "The eighth case", 300)
    own = await ask_stored(pool, client, pool.a, prompt)
    async with client.session.post(f"{pool.b.url}/reset_prefix_cache?reset_external=true") as response:
        assert response.status == 200
    before = await counters(pool.b)
    assert (await client.complete(pool.b.url, prompt)).text == own.text
    assert await gained(pool.b, before, "lookup:miss") == 1
    await eventually(lambda: namespaces(pool, 2), "the new epoch's namespace")


async def namespaces(pool: Pool, count: int) -> bool:
    return len(pool.node.stats()["namespaces"]) == count
