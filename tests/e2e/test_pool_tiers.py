"""Nodes that die and come back, lower tiers, nodes of other hosts, controllers.

Two engines stay all the time, and know a controller only. Each test starts the nodes that it needs and ends them.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from moto.server import ThreadedMotoServer

from lmkv.control.admin import Admin
from tests.ports import free_port

from .bed import PROSE, ROOT, Client, Engine, Node, Proc, Reply, counters, eventually, spawn, stopping

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TINY = "tiny-llama"
CHUNK = 128


@dataclass(slots=True)
class World:
    run: Path
    controller: str
    controller_proc: Proc
    a: Engine
    b: Engine
    nodes: int = 0
    salts: int = 0

    def start_controller(self) -> None:
        self.controller_proc = start_controller(self.run, self.controller)

    @contextlib.contextmanager
    def node(self, *args: str, env: dict[str, str] | None = None) -> Iterator[Node]:
        self.nodes += 1
        node = Node.start(f"node-{self.nodes}", self.run, *args, "--controller", self.controller, env=env)
        with stopping(node):
            node.wait_ready()
            yield node


def start_controller(run: Path, address: str) -> Proc:
    command = [str(ROOT / ".venv/bin/python"), "-c", "from lmkv.cli import main; main()", "controller"]
    return spawn("controller", [*command, "--listen", address], run)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    run = tmp_path_factory.mktemp("pool-tiers")
    address = f"tcp://127.0.0.1:{free_port()}"
    controller = start_controller(run, address)
    env = {"LMKV_LOOKUP_MS": "500", "LMKV_PROMOTE_S": "5"}
    common = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--controller", address)
    a = Engine.start("a", "engine", run, *common, model=TINY, core="0", env=env)
    b = Engine.start("b", "engine", run, *common, "--block-size", "32", model=TINY, core="1", env=env)
    world = World(run, address, controller, a, b)
    try:
        with stopping(a, b):
            a.wait_ready()
            b.wait_ready()
            yield world
    finally:
        world.controller_proc.stop()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        yield Client(session, TINY)


async def prompt_of(client: Client, engine: Engine, title: str, tokens: int = 700) -> list[int]:
    return (await client.tokens(engine, f"{title}. {PROSE * 4}"))[:tokens]


async def attached(world: World, client: Client, node: Node) -> None:
    """Both engines use this node (and no other): lookups reach it, and what each stores arrives there."""
    for engine in (world.a, world.b):

        async def arrives(engine: Engine = engine) -> bool:
            pages, misses = node.stats()["pages"], (await counters(engine)).get("pool:lookup:miss", 0)
            world.salts += 1
            reply = await client.complete(
                engine.url, list(range(100, 230)), max_tokens=1, cache_salt=f"salt{world.salts}"
            )
            assert reply.status == 200, reply.body
            looked = (await counters(engine)).get("pool:lookup:miss", 0) > misses
            return looked and bool(node.stats()["pages"] > pages)

        await eventually(arrives, f"{engine.proc.name} to use {node.address}")


async def ask_stored(client: Client, engine: Engine, node: Node, prompt: list[int]) -> Reply:
    before = node.stats()["pages"]
    reply = await client.complete(engine.url, prompt)

    async def there() -> bool:
        return bool(node.stats()["pages"] >= before + len(prompt) // CHUNK)

    await eventually(there, "the prompt's pages in the pool")
    return reply


async def loads(client: Client, engine: Engine, prompt: list[int], tokens: int, text: str) -> None:
    """The engine loads that many tokens of the prompt, and answers as it was answered before."""
    await client.reset_cache(engine)
    before = await counters(engine)
    reply = await client.complete(engine.url, prompt)
    after = await counters(engine)
    gained = {k: v - before.get(k, 0) for k, v in after.items() if k.startswith("pool:") and v != before.get(k, 0)}
    assert gained.get("pool:loaded_tokens", 0) == tokens, gained
    assert reply.text == text


def tier(node: Node, name: str) -> dict[str, int]:
    counts: dict[str, int] = node.stats()["counters"]
    return {key: value for key, value in counts.items() if name in key}


async def test_pages_on_disk_come_back_with_their_node(world: World, client: Client, tmp_path: Path) -> None:
    """Killed without a warning, once all is written; and with one."""
    disk = ("--disk", str(tmp_path / "disk"), "--disk-capacity", "512MiB")
    with world.node(*disk) as node:
        await attached(world, client, node)
        prompt = await prompt_of(client, world.a, "On disk")
        own = await ask_stored(client, world.a, node, prompt)

        async def written() -> bool:
            stats = node.stats()
            return bool(tier(node, "spill:DISK").get("spill:DISK", 0) >= stats["pages"])

        await eventually(written, "all pages on disk")
        pages = node.stats()["pages"]
        node.proc.process.send_signal(signal.SIGKILL)
        node.proc.process.wait(10)
    with world.node(*disk) as node:
        assert node.stats()["pages"] == pages
        await attached(world, client, node)
        await loads(client, world.b, prompt, 5 * CHUNK, own.text)
        assert tier(node, "promote:DISK")["promote:DISK"] >= 5
        later = await prompt_of(client, world.b, "In memory when the node is told to end")
        answer = await client.complete(world.b.url, later)
    with world.node(*disk) as node:
        await attached(world, client, node)
        await loads(client, world.a, later, 5 * CHUNK, answer.text)


async def test_damaged_pages_on_disk_are_misses(world: World, client: Client, tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    disk = ("--disk", str(directory), "--disk-capacity", "512MiB")
    with world.node(*disk) as node:
        await attached(world, client, node)
        prompt = await prompt_of(client, world.a, "To be damaged")
        own = await ask_stored(client, world.a, node, prompt)
    segment = max(directory.glob("**/*.seg*"), key=lambda path: path.stat().st_size)
    data = bytearray(segment.read_bytes())
    for at in range(8192, len(data), 1 << 16):  # some bit of every page
        data[at] ^= 1
    segment.write_bytes(data)
    with world.node(*disk) as node:
        await attached(world, client, node)
        await loads(client, world.b, prompt, 0, own.text)
        counts = node.stats()["tiers"]["DISK"]["counters"]
        assert counts["corrupt"] + counts["torn"] >= 1, counts
    segment.write_bytes(data[: len(data) // 3])
    with world.node(*disk) as node:  # it starts, whatever is left
        await attached(world, client, node)
        await loads(client, world.a, await prompt_of(client, world.a, "New"), 0, (await new_text(client, world.b)))


async def new_text(client: Client, engine: Engine) -> str:
    mark = {"lmkv": {"approximate": True}}
    prompt = await prompt_of(client, engine, "New")
    return (await client.complete(engine.url, prompt, kv_transfer_params=mark)).text


async def test_an_object_store_serves_a_node_with_nothing_else(world: World, client: Client, tmp_path: Path) -> None:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        async with client.session.put(f"{endpoint}/pages") as response:
            assert response.status == 200
        env = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        url = ("--object", "s3://pages/cluster", "--object-endpoint", endpoint, "--object-allow-http")
        with world.node(*url, env=env) as node:
            await attached(world, client, node)
            prompt = await prompt_of(client, world.a, "In the object store")
            own = await ask_stored(client, world.a, node, prompt)
        with world.node(*url, env=env) as other:
            await attached(world, client, other)
            await loads(client, world.b, prompt, 5 * CHUNK, own.text)
            assert tier(other, "promote:OBJECT")["promote:OBJECT"] >= 5
    finally:
        server.stop()


async def test_a_node_of_another_host_is_read_over_the_data_plane(world: World, client: Client) -> None:
    """Two of them: what one has only in part comes from the other."""
    with world.node("--share", "none") as one:
        await attached(world, client, one)
        prompt = await prompt_of(client, world.a, "Far away", 1000)
        own = await ask_stored(client, world.a, one, prompt)
        assert set(one.stats()["clients"].values()) >= {"data plane"}
        await loads(client, world.b, prompt, 7 * CHUNK, own.text)
        assert one.stats()["leases"] == 0


async def test_a_lease_that_is_over_gives_no_data(world: World, client: Client) -> None:
    """The node's leases are shorter than a load may take: nothing read under them counts."""
    with world.node("--share", "none", env={"LMKV_POOL_MOST_LEASE_S": "0.0001"}) as node:
        await attached(world, client, node)
        prompt = await prompt_of(client, world.a, "Expired")
        own = await ask_stored(client, world.a, node, prompt)
        before = await counters(world.b)
        await loads(client, world.b, prompt, 0, own.text)
        after = await counters(world.b)
        names = ("pool:load:lease_expired", "pool:lookup:expired")
        assert any(after.get(name, 0) > before.get(name, 0) for name in names)


async def test_no_request_fails_while_the_controller_is_gone(world: World, client: Client) -> None:
    with world.node() as node:
        await attached(world, client, node)
        prompt = await prompt_of(client, world.a, "Without a controller")
        own = await ask_stored(client, world.a, node, prompt)
        world.controller_proc.process.send_signal(signal.SIGKILL)
        world.controller_proc.process.wait(10)
        await loads(client, world.b, prompt, 5 * CHUNK, own.text)
        other = await prompt_of(client, world.a, "Still without")
        await ask_stored(client, world.a, node, other)
        world.start_controller()

        async def exact() -> bool:
            with Admin(world.controller) as admin:
                members = admin.members().nodes
            return [m.state for m in members if m.card.address == node.address] == ["EXACT"]

        await eventually(exact, "the controller to know the node again", 30)


async def test_no_request_fails_while_the_node_is_gone(world: World, client: Client) -> None:
    with world.node() as node:
        await attached(world, client, node)
        prompt = await prompt_of(client, world.a, "Then it is gone")
        own = await ask_stored(client, world.a, node, prompt)
        node.proc.process.send_signal(signal.SIGKILL)
        node.proc.process.wait(10)
    await loads(client, world.b, prompt, 0, own.text)
    await client.all_blocks_free(world.a, world.b)
