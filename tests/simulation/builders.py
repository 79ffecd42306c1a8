"""A pool node and small engines in a stepped world, without vLLM."""

from __future__ import annotations

from typing import Any

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

REQUEST = RequestId("r")
BLOCKS = 8


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
        self.book = LedgerBook()
        self.storage = (values % 65521).to(torch.float32).reshape(LAYERS, BLOCKS, HEADS, CHUNK, 2 * HEAD_SIZE)
        views, self.cache_config = caches_of(self.storage, CHUNK)
        own = self.settings = ConnectorSettings(
            pool=(node,), chunk_tokens=CHUNK, staging_bytes=1 << 20, name=name, lookup_ms=100.0
        )
        found = memory.describe(views, self.cache_config, "FLASH_ATTN", Shard(0, 1, HEADS))
        pool, why = open_pool(own, Rank(0), 1, found, self.cache_config, runtime)
        assert pool is not None, why
        found = found.with_region(pool.region)
        transport: Transport = runtime.transport("inproc://", f"{name}-{runtime.entropy(8).hex()}")
        self.loop = WorkerLoop(own, Rank(0), transport, found, "tcp://127.0.0.1:0", pool, runtime)
        self.loop.start()
        self.endpoint = EngineEndpoint("tcp://127.0.0.1:0", "", self.book, runtime)
        self.lookups = Lookups(own, 1, name, runtime)
        self.nodes: dict[Incarnation, bool] = {}
        self.endpoint.on_pool(self._hear)
        incarnation = self.incarnation = Incarnation(runtime.entropy(8).hex())
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
