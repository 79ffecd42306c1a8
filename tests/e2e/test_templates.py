"""A prefill and a decode engine whose chat templates print different dates: they get different prompts for one request.

Nothing wrong is answered, nothing wrong is left in the pool, and the ledger says why the KV was not used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from .bed import MODELS, PROSE, Client, Engine, Node, Router, counters, eventually, stopping

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TINY = "tiny-llama"
CHUNK = 128
QUESTIONS = 6
DATES = {"prefill": "2026-07-01", "decode": "2026-07-02"}
"""Of as many tokens: only content tells the prompts apart."""


@dataclass(frozen=True, slots=True)
class Dated:
    """`third` and `plain` have decode's template; `third` uses the pool, `plain` has no connector."""

    node: Node
    prefill: Engine
    decode: Engine
    third: Engine
    plain: Engine
    router: Router


def template(run: Path, side: str) -> str:
    """A chat template that says which day it is, as those of several models do."""
    path = run / f"{side}.jinja"
    path.write_text(f"Today is {DATES[side]}.\n" + (MODELS / TINY / "chat_template.jinja").read_text())
    return str(path)


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dated]:
    run = tmp_path_factory.mktemp("templates")
    node = Node.start("node", run)
    node.wait_ready()
    common = ("--dtype", "float32", "--block-size", "32")
    env = {"LMKV_LOOKUP_MS": "500"}  # four engines, a node and the test share few cores
    ours, theirs = (("--chat-template", template(run, side)) for side in ("decode", "prefill"))
    pool = ("--pool", node.address)
    prefill = Engine.start("prefill", "prefill", run, *common, *theirs, *pool, model=TINY, core="0", env=env)
    decode = Engine.start("decode", "decode", run, *common, *ours, *pool, model=TINY, core="1", env=env)
    third = Engine.start("third", "engine", run, *common, *ours, *pool, model=TINY, env=env)
    plain = Engine.start("plain", "plain", run, *common, *ours, model=TINY)
    with stopping(prefill, decode, third, plain, node):
        for engine in (prefill, decode, third, plain):
            engine.wait_ready()
        router = Router.start("router", run, [prefill], [decode])
        with stopping(router):
            router.wait_ready()
            yield Dated(node, prefill, decode, third, plain, router)


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        yield Client(session, TINY)


def question(i: int) -> str:
    return f"Question {i}. {PROSE[300 * i : 300 * i + 3000]} What does it say about the mill?"


async def rendered(client: Client, engine: Engine, content: str) -> list[int]:
    """The tokens that the engine makes of a chat message."""
    body = {"model": TINY, "messages": [{"role": "user", "content": content}]}
    async with client.session.post(f"{engine.url}/tokenize", json=body) as response:
        return list((await response.json())["tokens"])


async def test_the_two_engines_make_other_prompts_of_as_many_tokens(dated: Dated, client: Client) -> None:
    """Otherwise the tests below show nothing."""
    theirs, ours = [await rendered(client, engine, question(0)) for engine in (dated.prefill, dated.decode)]
    assert len(theirs) == len(ours) > 4 * CHUNK
    assert sum(a != b for a, b in zip(theirs, ours, strict=True)) == 1


async def test_no_answer_is_wrong_and_the_ledger_says_why_it_was_a_miss(dated: Dated, client: Client) -> None:
    asked = range(QUESTIONS)
    expected = [await client.chat(dated.plain.url, question(i), max_tokens=24) for i in asked]
    replies = [await client.chat(dated.router.url, question(i), max_tokens=24) for i in asked]
    assert [reply.text for reply in replies] == [reply.text for reply in expected]
    for reply in replies:
        attempt = await client.explain(dated.router, reply.request_id)
        assert "prompt" in attempt["engines"]["decode"]["miss"], attempt["engines"]["decode"]


async def test_the_pool_holds_nothing_wrong(dated: Dated, client: Client) -> None:
    """A third engine loads what both engines have stored of their prompts, and answers both prompts as plain vLLM."""
    pages, asked = dated.node.stats()["pages"], range(QUESTIONS, 2 * QUESTIONS)
    for i in asked:
        await client.chat(dated.router.url, question(i), max_tokens=24)
    await eventually(lambda: has_pages(dated, pages + 2 * QUESTIONS * 4), "both engines' chunks to be in the pool")
    before = await counters(dated.third)
    for i in asked:
        for engine in (dated.decode, dated.prefill):
            prompt = await rendered(client, engine, question(i))
            from_pool = await client.complete(dated.third.url, prompt, max_tokens=24)
            assert from_pool.text == (await client.complete(dated.plain.url, prompt, max_tokens=24)).text, engine.role
    after = await counters(dated.third)
    loaded = after.get("pool:loaded_tokens", 0) - before.get("pool:loaded_tokens", 0)
    assert loaded >= 2 * QUESTIONS * 4 * CHUNK, "the third engine loaded what the two had stored"


async def has_pages(dated: Dated, count: int) -> bool:
    return bool(dated.node.stats()["pages"] >= count)


async def test_blocks_come_back(dated: Dated, client: Client) -> None:
    await client.all_blocks_free(dated.prefill, dated.decode, dated.third)
