"""The pool as one worker rank uses it: nodes, stores and loads, driven by the worker's loop. Loop thread only."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import zmq

from lmkv.config import ConnectorSettings
from lmkv.control.guard import Guard
from lmkv.control.mailbox import Outbox
from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import LayoutError, TransportError
from lmkv.hashing import namespace_of
from lmkv.ids import Incarnation, Rank, RequestId
from lmkv.pool.access import Me, NodeAccess, Reach
from lmkv.pool.directory import Directory
from lmkv.transport import Extents, OpId, PeerId, Region, Transport
from lmkv.wire import PoolName, PoolNodes

from ..commands import BlockHold
from ..memory import KvMemory
from ..specs import LoadReport, LoadSpec, StoreSpec
from .loads import Loads
from .shares import Shares
from .staging import Staging
from .stores import Stores

logger = logging.getLogger(__name__)


_POOLED_SPECS = ("FullAttentionSpec", "MLAAttentionSpec")
"""KV that is there for every token of a request as long as it lives."""


def open_pool(
    settings: ConnectorSettings,
    rank: Rank,
    ranks: int,
    found: KvMemory,
    kv_cache_config: Any,
    runtime: Runtime = THREADS,
) -> tuple[PoolRank | None, str]:
    """The pool's part of this rank, or why there is none."""
    if not settings.pool and not settings.controller:
        return None, "no pool is set"
    if not found.geometries:
        return None, "the layout of this engine's KV cache is not one that lmkv can convert to pages"
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache_config.transfer_groups}
    if not kinds <= set(_POOLED_SPECS):
        return None, f"the pool does not take KV of {', '.join(sorted(kinds - set(_POOLED_SPECS)))} layers"
    if len(kv_cache_config.transfer_groups) != len(kv_cache_config.kv_cache_groups):
        return None, "the model has caches that cannot be transferred"
    try:
        shares = Shares(found, settings.chunk_tokens, rank, ranks)
    except LayoutError as error:
        return None, error.message
    staging = Staging(settings.staging_bytes, shares.largest_bytes, found.storages[0].device)
    if staging.count < len(shares.groups):
        return None, f"staging_bytes {settings.staging_bytes} hold no page of {shares.largest_bytes} bytes"
    return PoolRank(settings, rank, shares, staging, runtime), ""


class PoolRank:
    """Made with the loop; `open` once the loop's thread runs and its transport is registered."""

    def __init__(
        self, settings: ConnectorSettings, rank: Rank, shares: Shares, staging: Staging, runtime: Runtime = THREADS
    ) -> None:
        self._runtime = runtime
        self.guard = Guard(f"pool of rank {rank}", runtime.caught)
        self._settings = settings
        self._rank = rank
        self._shares = shares
        self._staging = staging
        self._counters: Counter[str] = Counter()
        self._arenas: dict[int, torch.Tensor] = {}
        self._told: tuple[tuple[Incarnation, bool], ...] = ()
        self._counted_s = 0.0
        self._unstored: list[RequestId] = []
        self._engine = ""
        """Control address of our own engine."""
        self._directory: Directory | None = None
        self._stores: Stores | None = None
        self._loads: Loads | None = None

    def open(
        self, context: zmq.Context[zmq.Socket[bytes]], transport: Transport, scratch: Extents, outbox: Outbox
    ) -> None:
        """Nothing is done before the engine has a name (`named`)."""
        self._context, self._transport, self._scratch, self._outbox = context, transport, scratch, outbox

    def named(self, message: PoolName) -> None:
        """The engine knows what its KV is called: nodes are sought from now on."""
        settings = self._settings
        if self._directory is None:
            name = settings.name or "engine"
            me = Me(message.incarnation, self._rank, name, self._transport, self._scratch, self._runtime)
            self._engine = message.address
            # Arenas are host memory: ops that pack blocks of a device cannot write there, so pages go by staging.
            maps = self._staging.in_host_memory
            self._directory = Directory(self._context, me, settings.pool, settings.controller, map_arenas=maps)
            self._stores = Stores(
                message.incarnation, self._rank, self._shares, self._staging, self._arena, self._counters, self.guard
            )
            fetch = settings.remote_load == "push"
            self._loads = Loads(
                self._shares,
                self._staging,
                self._directory.find,
                self._arena,
                self._counters,
                self._runtime.clock,
                self.guard,
                fetch,
            )
        self._directory.declare(namespace_of(message.description), message.description)

    @property
    def region(self) -> Region:
        """To be registered with the data plane."""
        return self._staging.region()

    # --- what comes in ---

    def store(self, specs: Sequence[StoreSpec], holds: Sequence[BlockHold], now_s: float) -> None:
        if self._stores is None:
            self._counters["store:unnamed"] += sum(len(spec.keys) for spec in specs)
            self._unstored += [spec.request_id for spec in specs]
            return
        for spec, hold in zip(specs, holds, strict=True):
            self._stores.submit(spec, hold, self._target(), now_s)

    def load(self, specs: Sequence[LoadSpec], now_s: float) -> None:
        assert self._loads is not None, "the scheduler loads only from nodes that all ranks have told it of"
        for spec in specs:
            self._loads.submit(spec, now_s)

    def cancel(self, request_id: RequestId) -> None:
        if self._loads is not None:
            self._loads.cancel(request_id)

    def drop(self, request_ids: tuple[RequestId, ...], now_s: float) -> None:
        """Nothing more is read from the blocks of these requests."""
        if self._stores is not None:
            self._stores.drop(request_ids, now_s)

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> bool:
        """True: the operation was the pool's."""
        if self._directory is None or self._stores is None or self._loads is None:
            return False
        return (
            self._loads.completed(op, error)
            or self._stores.completed(op, error, now_s)
            or self._directory.completed(op, error)
        )

    def peer_lost(self, peer: PeerId, reason: str) -> bool:
        return self._directory is not None and self._directory.peer_lost(peer, reason)

    # --- a new data plane (lmkv.control.replacing) ---

    def overdue(self, now_s: float) -> list[str]:
        return self._directory.overdue(now_s, self._settings.quarantine_s) if self._directory is not None else []

    def is_probe(self, op: OpId) -> bool:
        return False

    def replaced(self, export: bytes) -> None:
        if self._directory is not None:
            self._directory.replaced()

    # --- questions ---

    @property
    def fds(self) -> list[int]:
        return self._directory.fds if self._directory is not None else []

    def fds_changed(self) -> bool:
        if self._directory is None:
            return False
        changed, self._directory.fds_changed = self._directory.fds_changed, False
        return changed

    @property
    def waiting(self) -> bool:
        """Something of ours is in flight, or to be expected at once."""
        return self._loads is not None and self._loads.active

    def hurries(self, now_s: float) -> bool:
        """Bytes of a load are arriving, and should be taken at once."""
        return self._loads is not None and self._loads.hurries(now_s)

    def take_packed(self) -> list[RequestId]:
        """One entry for each stored spec whose blocks are read no more."""
        unstored, self._unstored = self._unstored, []
        return unstored + (self._stores.take_packed() if self._stores is not None else [])

    @property
    def idle(self) -> bool:
        """Nothing of ours is on its way to a node."""
        return self._stores is None or self._stores.idle

    @property
    def has_work(self) -> bool:
        return self._loads is not None and self._stores is not None and (self._loads.has_work or self._stores.has_work)

    def next_s(self, now_s: float) -> float:
        if self._directory is None or self._loads is None:
            return 3600.0
        if self.has_work:
            return 0.0
        deadline_s = self._loads.deadline_s()
        wait_s = self._directory.next_s(now_s)
        return wait_s if deadline_s is None else max(0.0, min(wait_s, deadline_s - now_s))

    # --- work ---

    def tick(self, now_s: float) -> None:
        """Loads before stores."""
        if self._directory is None or self._stores is None or self._loads is None:
            return
        self._directory.tick(now_s)
        self._tell_nodes(self._directory)
        for op, error in self._directory.take_fetched():
            self._loads.completed(op, error)
        for op in self._directory.take_lost():
            self._loads.lost(op)
        if self._loads.active:
            self._loads.work(now_s)
        if not self._loads.has_work:
            self._stores.work(now_s)

    def _tell_nodes(self, directory: Directory) -> None:
        nodes = tuple((access.incarnation, access.reach is Reach.LOCAL) for access in directory.ready())
        if nodes != self._told:
            self._told = nodes
            self._outbox.send(self._engine, PoolNodes(self._rank, nodes))

    def nodes(self) -> list[NodeAccess]:
        """Those that are ready."""
        return list(self._directory.ready()) if self._directory is not None else []

    def take_reports(self) -> list[LoadReport]:
        return self._loads.take() if self._loads is not None else []

    def take_counters(self, now_s: float) -> Counter[str] | None:
        """Since the last time; once a second."""
        if not self._counters or now_s - self._counted_s < 1.0:
            return None
        counted, self._counted_s = Counter(self._counters), now_s
        self._counters.clear()
        return counted

    def close(self) -> None:
        if self._directory is not None:
            self._directory.close()

    # --- inside ---

    def _target(self) -> NodeAccess | None:
        """The host's own node, else the first that is ready."""
        assert self._directory is not None
        ready = list(self._directory.ready())
        return next((access for access in ready if access.reach is Reach.LOCAL), ready[0] if ready else None)

    def _arena(self, access: NodeAccess) -> torch.Tensor:
        """The mapped arena as a tensor; it lives as long as the node is attached."""
        assert access.memory is not None
        key = access.memory.address
        arena = self._arenas.get(key)
        if arena is None:
            self._arenas.clear()  # of a node that is gone, its memory must not be kept
            arena = self._arenas[key] = torch.from_numpy(access.memory.data)
        return arena
