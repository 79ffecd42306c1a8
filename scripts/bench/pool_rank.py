"""One rank without an engine: how fast chunks go to a pool node and come back, beside raw NIXL moving the same bytes.

`python pool_rank.py NODE map|data-plane ROUNDS` prints one line of JSON. Synthetic caches in the layout of vLLM's CPU
engine for SmolLM2-135M; the stores and loads are those of the connector's worker loop.
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zmq

from lmkv import poolwire as pw
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.hashing import Chain, Manifest, page_key
from lmkv.ids import Incarnation, Rank, RequestId, make_incarnation
from lmkv.pool.access import Reach
from lmkv.poolwire import Refusal
from lmkv.transport import Completion, Extents, PeerLost, Transport, open_transport
from lmkv.vllm import memory
from lmkv.vllm.geometry import Shard
from lmkv.vllm.pooled.rank import PoolRank, open_pool
from lmkv.vllm.specs import BlockRange, LoadSpec, PageSource, StoreSpec
from lmkv.wire import PoolName

LAYERS, HEADS, HEAD_SIZE, BLOCK, CHUNKS = 30, 3, 64, 128, 28
DEADLINE_S = 60.0


class FullAttentionSpec:
    """As vLLM names it; what lmkv reads of it."""

    block_size, head_size, head_size_v = BLOCK, HEAD_SIZE, HEAD_SIZE


def caches(blocks: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Layer views of one storage, filled once, so that no memory page is missing when it is measured."""
    storage = torch.randint(0, 2**15, (LAYERS, blocks, HEADS, BLOCK, 2 * HEAD_SIZE), dtype=torch.int16)
    views = {f"layer.{i}": storage[i].view(torch.bfloat16) for i in range(LAYERS)}
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec())
    config = SimpleNamespace(
        transfer_group_index_by_layer=dict.fromkeys(views, 0),
        transfer_groups=[group],
        kv_cache_groups=[group],
        num_blocks=blocks,
    )
    return views, config


class Bench:
    """Owns everything; one thread."""

    def __init__(self, node: str, kind: str) -> None:
        self.kind = kind
        settings = ConnectorSettings(pool=(node,), name="bench", staging_bytes=256 << 20)
        views, config = caches(CHUNKS + 1)
        found = memory.describe(views, config, "CPU_ATTN/amx", Shard(0, 1, HEADS))
        pool, why = open_pool(settings, Rank(0), 1, found, config)
        if pool is None:
            raise SystemExit(why)
        self.pool: PoolRank = pool
        self.transport: Transport = open_transport("nixl://", f"bench-{secrets.token_hex(8)}")
        for region in (*found.regions, pool.region):
            self.transport.register(region)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox, self.outbox = Inbox(self.context, "tcp://127.0.0.1:0"), Outbox(self.context)
        self.manifest = Manifest({"bench": "pool"}, BLOCK, ("pages",))
        self.incarnation: Incarnation = make_incarnation(os.urandom(8))
        pool.open(self.context, self.transport, found.scratch_extents, self.outbox)
        pool.named(PoolName(self.incarnation, self.inbox.address, self.manifest.description()))
        self.done: dict[int, bool] = {}

    def until(self, condition: Callable[[], bool]) -> None:
        """The worker loop's work, as fast as it goes."""
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            now_s = time.monotonic()
            for event in self.transport.poll():
                if isinstance(event, Completion):
                    self.transport.release(event.op)
                    if not self.pool.completed(event.op, event.error, now_s):
                        self.done[event.op] = event.error is None
                elif isinstance(event, PeerLost):
                    raise SystemExit(f"the node is gone: {event.reason}")
            self.pool.tick(now_s)
            if now_s > end_s:
                raise SystemExit("it took too long")

    def node(self) -> Any:
        """The one access, once it is ready."""
        accesses = [a for a in self.pool.nodes() if a.ready]
        return accesses[0] if accesses else None

    def attach(self) -> None:
        self.until(lambda: self.node() is not None)
        wanted = Reach.LOCAL if self.kind == "map" else Reach.REMOTE
        if self.node().reach is not wanted:
            raise SystemExit(f"the node is reached as {self.node().reach}, not {wanted}")

    def ask(self, question: Callable[[int], pw.PoolMessage], kind: type[pw.PoolMessage]) -> Any:
        answers: list[Any] = []
        self.node().link.ask(question, kind, answers.append, time.monotonic() + 10)
        self.until(lambda: bool(answers))
        if answers[0] is None:
            raise SystemExit("the node does not answer")
        return answers[0]

    # --- one round ---

    def round(self, number: int) -> dict[str, float]:
        namespace = self.manifest.namespace()
        keys = Chain(namespace, BLOCK).extend(list(range(number * 10_000, number * 10_000 + CHUNKS * BLOCK)))
        blocks = (BlockRange(0, 0, tuple(range(1, CHUNKS + 1))),)
        joined = b"".join(page_key(key, 0) for key in keys)
        times = {}
        start_s = time.perf_counter()
        self.pool.store([StoreSpec(RequestId("r"), namespace, 0, tuple(keys), blocks)], time.monotonic())
        self.until(lambda: self.pool.idle)
        times["store_s"] = time.perf_counter() - start_s
        self.pool.take_packed()
        start_s = time.perf_counter()
        pinned = self.ask(lambda t: pw.Pin(t, self.incarnation, Rank(0), namespace, joined, 30.0), pw.Pinned)
        times["pin_s"] = time.perf_counter() - start_s
        if len(pinned.pages) != CHUNKS:
            raise SystemExit(f"{len(pinned.pages)} of {CHUNKS} chunks are in the pool")
        until_s = time.monotonic() + 30
        pages = tuple(
            PageSource(i, key, self.node().incarnation, pinned.lease, until_s, (page.offset,), (page.checksums,))
            for i, (key, page) in enumerate(zip(keys, pinned.pages, strict=True))
        )
        spec = LoadSpec(RequestId("r"), namespace, (0, CHUNKS * BLOCK), blocks, pages, until_s)
        reports: list[Any] = []
        start_s = time.perf_counter()
        self.pool.load([spec], time.monotonic())
        self.until(lambda: bool(reports.extend(self.pool.take_reports()) or reports))
        times["load_s"] = time.perf_counter() - start_s
        if reports[0].good != CHUNKS * BLOCK:
            raise SystemExit(f"not all was loaded: {reports[0]}")
        self.node().link.tell(pw.Unpin(pinned.lease))
        self.ask(lambda t: pw.Drop(t, namespace, joined), pw.Dropped)
        if self.kind != "map":
            times |= self.raw(namespace, joined)
        return times

    def raw(self, namespace: bytes, keys: bytes) -> dict[str, float]:
        """The same bytes between staging and slots of the node's arena, with one NIXL operation each way."""
        size = pinned_bytes()
        reserved = self.ask(
            lambda t: pw.Reserve(t, self.incarnation, Rank(0), namespace, keys, size, 1, 0), pw.Reserved
        )
        slots = [slot for slot in reserved.slots if slot.refusal is Refusal.NONE]
        rows = [(slot.offset, size) for slot in slots]
        base = self.pool.region.address
        here = Extents.of(*((base + i * size, size) for i in range(len(slots))))
        found = {}
        for name, post in (("raw_write_s", self.node().write), ("raw_read_s", self.node().read)):
            start_s = time.perf_counter()
            op = post(here, rows)
            self.until(lambda op=op: op in self.done)  # type: ignore[misc]
            found[name] = time.perf_counter() - start_s
        generations = tuple(slot.generation for slot in slots)
        self.node().link.tell(pw.Abandon(self.incarnation, Rank(0), namespace, keys, generations, True))
        return found


def pinned_bytes() -> int:
    return LAYERS * HEADS * BLOCK * 2 * HEAD_SIZE * 2


def main() -> None:
    node, kind, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    bench = Bench(node, kind)
    bench.attach()
    gc.freeze()  # as vLLM does once an engine is warm
    samples = [bench.round(number) for number in range(rounds + 1)][1:]
    times = {name: float(np.median([sample[name] for sample in samples])) for name in samples[0]}
    print(json.dumps({"bytes": CHUNKS * pinned_bytes(), "median_s": times, "samples": samples}))
    bench.pool.close()
    bench.transport.abort()


if __name__ == "__main__":
    main()
