"""Two ranks with their engines' endpoints and lookups, and a pool node, in one thread: a page is stored and loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.hashing import Chain
from lmkv.ids import EngineName, Incarnation, Rank, RequestId
from lmkv.obs.ledger import LedgerBook
from lmkv.pool.node import PoolNode
from lmkv.pool.serve import open_tiers
from lmkv.pool.settings import NodeSettings
from lmkv.transport import Transport
from lmkv.vllm import memory
from lmkv.vllm.commands import BlockHold, Loading, Results, Stored
from lmkv.vllm.endpoint import EngineEndpoint
from lmkv.vllm.geometry import Shard
from lmkv.vllm.pooled.lookup import Lookup, Lookups
from lmkv.vllm.pooled.rank import open_pool
from lmkv.vllm.specs import BlockRange, LoadReport, LoadSpec, StoreSpec
from lmkv.vllm.writer import WorkerLoop
from tests.simulation.virtual import SteppedRuntime
from tests.vllm.pool_bed import CHUNK, HEAD_SIZE, HEADS, LAYERS, MANIFEST, NAMESPACE, caches_of

ROOT = Path(__file__).resolve().parents[2]
REQUEST = RequestId("r")
BLOCKS = 8
Trace = list[tuple[float, str, str]]


def start_node(world: SteppedRuntime, name: str = "node", host: str = "a", **settings: Any) -> PoolNode:
    given = {"listen": "tcp://127.0.0.1:0", "capacity": "4MiB", "transport": "inproc://", "huge": False, "name": name}
    given["share"] = f"/{name}.sock"
    own = NodeSettings(**{**given, **settings})
    node = PoolNode(own, lambda evicted: open_tiers(own, evicted), world.process(name, host).runtime)
    node.start()
    return node


class Engine:
    """The endpoint, the lookups and the one rank of an engine: a process of its own."""

    def __init__(self, world: SteppedRuntime, name: str, node: str, host: str = "a", seed: int = 1) -> None:
        self.world = world
        self.process = world.process(name, host)
        runtime = self.process.runtime
        values = torch.arange(LAYERS * BLOCKS * HEADS * CHUNK * 2 * HEAD_SIZE) * 7 + seed * 1000
        self.storage = (values % 65521).to(torch.float32).reshape(LAYERS, BLOCKS, HEADS, CHUNK, 2 * HEAD_SIZE)
        views, config = caches_of(self.storage, CHUNK)
        own = ConnectorSettings(pool=(node,), chunk_tokens=CHUNK, staging_bytes=1 << 20, name=name, lookup_ms=100.0)
        found = memory.describe(views, config, "FLASH_ATTN", Shard(0, 1, HEADS))
        pool, why = open_pool(own, Rank(0), 1, found, config, runtime)
        assert pool is not None, why
        found = found.with_region(pool.region)
        transport: Transport = runtime.transport("inproc://", f"{name}-{runtime.entropy(8).hex()}")
        self.loop = WorkerLoop(own, Rank(0), transport, found, "tcp://127.0.0.1:0", pool, runtime)
        self.loop.start()
        self.endpoint = EngineEndpoint("tcp://127.0.0.1:0", "", LedgerBook(), runtime)
        self.lookups = Lookups(own, 1, name, runtime)
        self.nodes: dict[Incarnation, bool] = {}
        self.endpoint.on_pool(self._hear)
        incarnation = Incarnation(runtime.entropy(8).hex())
        worker = found.card(Rank(0), self.loop.address, "inproc", self.loop.export)
        card = wire.EngineCard(
            EngineName(name), incarnation, self.endpoint.address, "both", {}, {}, (CHUNK,), (worker,)
        )
        self.endpoint.start(card, ())
        self.lookups.start(incarnation)
        self.lookups.declare(NAMESPACE, MANIFEST.description())
        self.endpoint.tell(self.loop.address, wire.PoolName(incarnation, self.endpoint.address, MANIFEST.description()))

    def _hear(self, message: wire.PoolNodes | wire.Parked) -> None:
        assert isinstance(message, wire.PoolNodes)
        self.nodes = dict(message.nodes)
        self.lookups.usable(self.nodes)

    def take(self, what: str) -> list[Any]:
        """The first results that have some of it."""
        for _ in range(1000):
            results: Results = self.loop.take(wait_s=0.01)
            if getattr(results, what):
                return list(getattr(results, what))
        raise AssertionError(f"no {what}")

    def keys(self, chunks: int) -> list[bytes]:
        return Chain(NAMESPACE, CHUNK).extend([7, *range(chunks * CHUNK)])[:chunks]

    def store(self, blocks: tuple[int, ...]) -> None:
        spec = StoreSpec(REQUEST, NAMESPACE, 0, tuple(self.keys(len(blocks))), (BlockRange(0, 0, blocks),))
        self.loop.submit(Stored((spec,), (BlockHold(),), None))
        assert self.loop.drain(10.0)

    def seek(self, chunks: int, wait_s: float = 0.0) -> Lookup:
        """Until all is found."""
        for _ in range(100):
            lookup = self.lookups.seek(NAMESPACE, self.keys(chunks), wait_s=wait_s)
            assert self.process.runtime.wait(lookup.done, 10.0)
            if lookup.chunks == chunks:
                return lookup
            self.lookups.abandon(lookup)
            self.world.run_for(0.05)
        raise AssertionError(lookup)

    def load(self, blocks: tuple[int, ...]) -> LoadReport:
        lookup = self.seek(len(blocks))
        until_s = self.world.clock() + 5.0
        tokens = (0, len(blocks) * CHUNK)
        spec = LoadSpec(REQUEST, NAMESPACE, tokens, (BlockRange(0, 0, blocks),), tuple(lookup.pages), until_s)
        self.loop.submit(Loading((spec,), None))
        (report,) = self.take("loads")
        self.lookups.release(lookup.leases)
        assert isinstance(report, LoadReport)
        return report

    def close(self) -> None:
        self.lookups.close()
        self.endpoint.close()
        self.loop.close()


def handed_on(seed: int, reader_host: str) -> Trace:
    """One engine stores, another one loads; returns the turns."""
    with SteppedRuntime(seed, traced=100_000) as world:
        node = start_node(world)
        writer = Engine(world, "writer", node.card.address)
        reader = Engine(world, "reader", node.card.address, reader_host, seed=2)
        assert world.run_until(lambda: writer.nodes and reader.nodes, 10.0)
        assert reader.nodes == {node.card.incarnation: reader_host == "a"}
        writer.store((3, 1))
        report = reader.load((5, 6))
        assert (report.good, report.reason) == (2 * CHUNK, "")
        assert torch.equal(reader.storage[:, [5, 6]], writer.storage[:, [3, 1]])
        for engine in (writer, reader):
            engine.close()
        node.stop()
        assert world.run_until(lambda: not world.runners, 60.0)
        assert world.network.open_sockets == []
        return list(world.trace)


@pytest.mark.parametrize("reader_host", ["a", "b"])
def test_a_page_is_stored_by_one_engine_and_loaded_by_another(reader_host: str) -> None:
    for seed in range(5):
        handed_on(seed, reader_host)


def test_a_seed_gives_the_same_turns_again() -> None:
    first = handed_on(7, "b")
    assert {part for _, _, part in first} >= {"lmkv-pool", "lmkv-writer-0", "lmkv-endpoint", "lmkv-lookups"}
    assert first == handed_on(7, "b")
    assert first != handed_on(8, "b")


def test_a_seed_gives_the_same_turns_in_another_process() -> None:
    code = "from tests.simulation.test_stepped import *; print(hash(tuple(handed_on(3, 'b'))))"
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": "1"},
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        for _ in range(2)
    ]
    assert told[0] == told[1] != b""


def test_the_death_of_a_node_is_noticed_and_its_successor_used() -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world, listen="tcp://127.0.0.1:18300")
        engine = Engine(world, "engine", node.card.address)
        assert world.run_until(lambda: engine.nodes, 10.0)
        world.processes["node"].kill()
        assert world.run_until(lambda: not engine.nodes, 20.0)
        second = start_node(world, listen="tcp://127.0.0.1:18300")
        assert world.run_until(lambda: engine.nodes == {second.card.incarnation: True}, 20.0)
        engine.store((3,))
        assert engine.load((5,)).good == CHUNK


def test_the_death_of_an_engine_frees_what_it_held() -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world)
        engine = Engine(world, "engine", node.card.address)
        assert world.run_until(lambda: engine.nodes, 10.0)
        engine.store((3,))
        engine.seek(1)
        assert len(node._leases) == 1
        engine.process.kill()
        assert world.run_until(lambda: len(node._leases) == 0, 60.0)


def test_a_cut_network_is_a_miss_and_no_hang() -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world)
        engine = Engine(world, "engine", node.card.address, host="b")
        assert world.run_until(lambda: engine.nodes, 10.0)
        engine.store((3,))
        engine.seek(1)
        world.network.cut("a", "b")
        lookup = engine.lookups.seek(NAMESPACE, engine.keys(1))
        began_s = world.clock()
        assert engine.process.runtime.wait(lookup.done, 10.0)
        assert lookup.chunks == 0 and world.clock() - began_s < 1.0
        world.network.heal("a", "b")
        assert engine.seek(1).chunks == 1


def test_a_page_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    with SteppedRuntime(1) as world:
        node = start_node(world, disk=str(tmp_path), disk_capacity="8MiB", disk_segment="1MiB")
        engine = Engine(world, "engine", node.card.address)
        assert world.run_until(lambda: engine.nodes, 10.0)
        engine.store((3, 1))
        assert world.run_until(lambda: node._index.counters["spill:DISK"] == 2, 10.0)
        node.stop()
        assert world.run_until(lambda: not node._runner.alive, 60.0)
        world.processes["node"].kill()
        second = start_node(world, listen=node.card.address, disk=str(tmp_path), disk_capacity="8MiB")
        assert world.run_until(lambda: engine.nodes == {second.card.incarnation: True}, 20.0)
        assert engine.seek(2, wait_s=5.0).chunks == 2
        assert engine.load((5, 6)).good == 2 * CHUNK
        assert torch.equal(engine.storage[:, [5, 6]], engine.storage[:, [3, 1]])
