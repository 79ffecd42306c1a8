"""A rank with synthetic caches and a real pool node: stores and loads without an engine."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import zmq

from lmkv import poolwire as pw
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.hashing import Chain, Manifest, page_key
from lmkv.ids import Incarnation, Rank, RequestId
from lmkv.pool.access import NodeAccess
from lmkv.pool.node import PoolNode
from lmkv.pool.settings import NodeSettings
from lmkv.transport import Completion, PeerLost, open_transport
from lmkv.vllm import memory
from lmkv.vllm.commands import BlockHold
from lmkv.vllm.geometry import Shard
from lmkv.vllm.pooled.rank import PoolRank, open_pool
from lmkv.vllm.specs import BlockRange, LoadReport, LoadSpec, PageSource, StoreSpec
from lmkv.wire import PoolName
from tests.pool.bed import NodeThread

LAYERS, HEADS, HEAD_SIZE, CHUNK = 3, 2, 32, 64
PAGE_BYTES = LAYERS * HEADS * CHUNK * 2 * HEAD_SIZE * 4
MANIFEST = Manifest({"test": "pool"}, CHUNK, ("pages",))
NAMESPACE = MANIFEST.namespace()
REQUEST = RequestId("r")
DEADLINE_S = 20.0


class FullAttentionSpec:
    head_size, head_size_v = HEAD_SIZE, HEAD_SIZE

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size


def caches_of(storage: torch.Tensor, block_tokens: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Views by layer of (layers, blocks, heads, tokens, elements), and what is read of vLLM's KV cache config."""
    views = {f"layer.{i}": layer for i, layer in enumerate(storage)}
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(block_tokens))
    config = SimpleNamespace(
        transfer_group_index_by_layer=dict.fromkeys(views, 0),
        transfer_groups=[group],
        kv_cache_groups=[group],
        num_blocks=storage.shape[1],
    )
    return views, config


@contextlib.contextmanager
def running_node(tmp_path: Path, tiers: Any = None, **more: object) -> Iterator[PoolNode]:
    """In a thread; its transport belongs to it. `tiers`: lmkv.pool.serve.open_tiers."""
    given = {"capacity": "16MiB", **more}
    opened = None if tiers is None else lambda evicted: tiers(NodeSettings(**given), evicted)
    thread = NodeThread(tmp_path, opened, **given)
    try:
        yield thread.node
    finally:
        thread.end()


class RankBed:
    """One rank with `blocks` blocks of `block_tokens`, filled with what follows from `seed`."""

    def __init__(
        self,
        node: PoolNode,
        *,
        block_tokens: int = 32,
        blocks: int = 24,
        seed: int = 1,
        heads: tuple[int, int] = (0, HEADS),
        incarnation: str = "",
        transport: str = "",
        **settings: object,
    ) -> None:
        rank, count = heads[0] // (heads[1] - heads[0]), HEADS // (heads[1] - heads[0])
        values = torch.arange(LAYERS * blocks * (heads[1] - heads[0]) * block_tokens * 2 * HEAD_SIZE)
        shape = (LAYERS, blocks, heads[1] - heads[0], block_tokens, 2 * HEAD_SIZE)
        self.storage = ((values * 7 + seed * 1000) % 65521).to(torch.float32).reshape(shape)
        views, config = caches_of(self.storage, block_tokens)
        self.block_tokens = block_tokens
        own = ConnectorSettings(
            pool=(node.card.address,), chunk_tokens=CHUNK, staging_bytes=4 << 20, name="rank", **settings
        )
        found = memory.describe(views, config, "FLASH_ATTN", Shard(rank, count, HEADS))
        pool, why = open_pool(own, Rank(rank), count, found, config)
        assert pool is not None, why
        self.pool: PoolRank = pool
        self.transport = open_transport(transport or "inproc://", f"rank-{secrets.token_hex(8)}")
        for region in (*found.regions, pool.region):
            self.transport.register(region)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox, self.outbox = Inbox(self.context, "tcp://127.0.0.1:0"), Outbox(self.context)
        self.incarnation = Incarnation(incarnation or secrets.token_hex(8))
        pool.open(self.context, self.transport, found.scratch_extents, self.outbox)
        pool.named(PoolName(self.incarnation, self.inbox.address, MANIFEST.description()))
        self.packed: list[RequestId] = []
        self.until(lambda: bool(pool.nodes()))

    def close(self) -> None:
        self.pool.close()
        self.transport.abort()
        self.outbox.close()
        self.inbox.close()
        self.context.term()

    def __enter__(self) -> RankBed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the loop's work ---

    def step(self) -> None:
        now_s = time.monotonic()
        for event in self.transport.poll():
            if isinstance(event, Completion):
                self.transport.release(event.op)
                self.pool.completed(event.op, event.error, now_s)
            elif isinstance(event, PeerLost):
                self.pool.peer_lost(event.peer, event.reason)
        self.pool.tick(now_s)
        self.packed += self.pool.take_packed()

    def until(self, condition: Callable[[], bool]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            self.step()
            assert time.monotonic() < end_s, f"waited {DEADLINE_S} s; counted {self.pool.take_counters(end_s)}"
            time.sleep(0.0005)

    @property
    def access(self) -> NodeAccess:
        return self.pool.nodes()[0]

    def counters(self) -> dict[str, int]:
        return dict(self.pool.take_counters(float("inf")) or {})

    def ask(self, question: Callable[[int], pw.PoolMessage], kind: type[Any]) -> Any:
        answers: list[Any] = []
        self.access.link.ask(question, kind, answers.append, time.monotonic() + 10)
        self.until(lambda: bool(answers))
        assert answers[0] is not None
        return answers[0]

    # --- stores and loads ---

    def keys(self, name: int, chunks: int) -> list[bytes]:
        return Chain(NAMESPACE, CHUNK).extend([name, *range(chunks * CHUNK)])[:chunks]

    def blocks_for(self, ids: Sequence[int], first: int = 0) -> tuple[BlockRange, ...]:
        return (BlockRange(0, first, tuple(ids)),)

    def submit(self, keys: Sequence[bytes], ids: Sequence[int], first_chunk: int = 0) -> BlockHold:
        lo = first_chunk * CHUNK // self.block_tokens
        spec = StoreSpec(REQUEST, NAMESPACE, first_chunk, tuple(keys), self.blocks_for(ids, lo))
        hold = BlockHold()
        self.pool.store([spec], [hold], time.monotonic())
        return hold

    def store(self, keys: Sequence[bytes], ids: Sequence[int]) -> None:
        self.submit(keys, ids)
        self.until(lambda: self.pool.idle)

    def pin(self, keys: Sequence[bytes], lease_s: float = 10.0) -> pw.Pinned:
        joined = b"".join(page_key(key, 0) for key in keys)
        pinned: pw.Pinned = self.ask(
            lambda t: pw.Pin(t, self.incarnation, Rank(0), NAMESPACE, joined, lease_s), pw.Pinned
        )
        return pinned

    def pages(self, keys: Sequence[bytes], pinned: pw.Pinned, lease_s: float = 10.0) -> tuple[PageSource, ...]:
        until_s = time.monotonic() + lease_s
        node = self.access.incarnation
        return tuple(
            PageSource(i, key, node, pinned.lease, until_s, (page.offset,), (page.checksums,))
            for i, (key, page) in enumerate(zip(keys, pinned.pages, strict=False))
        )

    def begin_load(
        self, pages: Sequence[PageSource], ids: Sequence[int], tokens: tuple[int, int], within_s: float = 10.0
    ) -> None:
        spec = LoadSpec(REQUEST, NAMESPACE, tokens, self.blocks_for(ids), tuple(pages), time.monotonic() + within_s)
        self.pool.load([spec], time.monotonic())

    def report(self) -> LoadReport:
        reports: list[LoadReport] = []
        self.until(lambda: bool(reports.extend(self.pool.take_reports()) or reports))
        (report,) = reports
        return report

    def load(self, keys: Sequence[bytes], ids: Sequence[int]) -> LoadReport:
        pinned = self.pin(keys)
        self.begin_load(self.pages(keys, pinned), ids, (0, len(pinned.pages) * CHUNK))
        report = self.report()
        self.access.link.tell(pw.Unpin(pinned.lease))
        return report

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """[layers, heads, tokens, content] of these blocks, in order."""
        picked = self.storage[:, list(ids)]
        return picked.permute(0, 2, 1, 3, 4).reshape(LAYERS, picked.shape[2], -1, 2 * HEAD_SIZE)
