"""The pool in the scheduler process: what a request can load, and which of its chunks are to be stored. Engine thread.

A request's life here: its lookup begins when it arrives; once blocks are allocated for what was found, it is loaded;
each step tells the workers which chunks it completes. Whatever goes wrong is a miss with a counter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.runtime import THREADS, Runtime
from lmkv.hashing import Chain, Manifest
from lmkv.ids import Incarnation, Rank, RequestId
from lmkv.obs.ledger import LedgerBook

from ..params import ledger_id
from ..shadow import pool_source
from ..specs import BlockRange, LoadReport, LoadSpec, StoreSpec
from ..steps import scheduled
from .adapters import Adapters
from .cost import Costs
from .lookup import Lease, Lookup, Lookups
from .naming import exclusion, request_extras

if TYPE_CHECKING:
    from ..metadata import StepMeta

logger = logging.getLogger(__name__)

LEAST_LEASE_S = 0.5
"""What is pinned for less than this is not loaded."""
WAIT_S = 0.0005
"""The engine waits this long at a time for a lookup, before it looks after its other requests."""


@dataclass(slots=True)
class _Pooled:
    """A request that has a name in the pool."""

    request: Any
    chain: Chain
    lookup: Lookup | None = None
    promoting: bool = False
    renewed: bool = False
    decided: bool = False
    """No more is asked of the pool for it (until it is preempted)."""
    preemptions: int = 0
    loading: LoadSpec | None = None
    leases: list[Lease] = field(default_factory=list)
    mapped: bool = True
    reports: list[LoadReport] = field(default_factory=list)
    known: int = 0
    """Chunks that are in the pool already, or have been given to the workers."""
    stored: bool = False
    storable: bool = True


class PoolSide:
    """`world`: ranks. `select` picks the transfer groups out of a block table. `adapters` is the engine's."""

    def __init__(
        self,
        settings: ConnectorSettings,
        block_tokens: tuple[int, ...],
        select: Callable[[Any], tuple[list[int], ...]],
        book: LedgerBook,
        world: int,
        adapters: Adapters,
        runtime: Runtime = THREADS,
    ) -> None:
        self._runtime = runtime
        self._settings = settings
        self._block_tokens = block_tokens
        self._select = select
        self._book = book
        self._world = world
        self._tell_name: Callable[[str], None] = lambda description: None
        self._namespace = b""
        self._lookups = Lookups(settings, len(block_tokens), settings.name or "engine", runtime)
        self._adapters = adapters
        self._costs = Costs()
        self._requests: dict[RequestId, _Pooled] = {}
        self._ended: list[RequestId] = []
        self._loads: list[LoadSpec] = []
        self._rank_nodes: dict[Rank, dict[Incarnation, bool]] = {}

    @property
    def chunk_tokens(self) -> int:
        return self._settings.chunk_tokens

    @property
    def trouble(self) -> str:
        """Why the pool can't be used any more, or ""."""
        return self._lookups.trouble

    # --- what the engine's KV is called ---

    def named(self, incarnation: Incarnation, manifest: Manifest, tell: Callable[[str], None]) -> None:
        """From another thread, once the weights are known: from now on requests have names. `tell` gives the workers
        the description of the namespace."""
        self._tell_name = tell
        self._lookups.start(incarnation)
        self._rename(manifest)

    def _rename(self, manifest: Manifest) -> None:
        namespace, description = manifest.namespace(), manifest.description()
        self._lookups.declare(namespace, description)
        self._tell_name(description)
        self._namespace = namespace
        logger.info("KV of this engine is namespace %s in the pool: %s", namespace.hex(), description)

    def renamed(self, manifest: Manifest) -> None:
        """After `named`: the weights may be others. What is computed from now on has this name; what is under way was
        computed with both, and gets none."""
        self._rename(manifest)
        for pooled in self._requests.values():
            self._let_go(pooled)
            pooled.decided, pooled.storable = True, False

    def nodes(self, message: wire.PoolNodes) -> None:
        """From the endpoint's thread: a rank tells which nodes it can load from."""
        if not 0 <= message.rank < self._world:
            logger.warning("rank %d of this engine tells of pool nodes; it has %d", message.rank, self._world)
            return
        self._rank_nodes[message.rank] = dict(message.nodes)
        if len(self._rank_nodes) == self._world:
            ranks = list(self._rank_nodes.values())
            common = set.intersection(*(set(rank) for rank in ranks))
            self._lookups.usable({node: all(rank[node] for rank in ranks) for node in common})

    # --- a request's way in ---

    def new_request(self, request: Any, approximate: bool) -> None:
        why = "unnamed" if not self._namespace else exclusion(request, approximate)
        extras = None if why else request_extras(request, self._adapters)
        if extras is None:
            self._count(f"not_pooled:{why or 'adapter_unknown'}")
            return
        salt = (request.cache_salt or "").encode()
        pooled = _Pooled(request, Chain(self._namespace, self._settings.chunk_tokens, salt, extras))
        self._requests[request.request_id] = pooled
        self._seek(pooled)

    def _seek(self, pooled: _Pooled, first: int = 0, wait_s: float = 0.0) -> None:
        request = pooled.request
        if not self._settings.pool_load or request.skip_reading_prefix_cache:
            pooled.decided = True
            return
        keys = pooled.chain.extend(request.all_token_ids)[: request.num_tokens // self._settings.chunk_tokens]
        if not keys or not self._lookups.reachable:
            self._count("lookup:no_node" if keys else "lookup:short")
            pooled.decided = True
            return
        pooled.lookup = self._lookups.seek(pooled.chain.namespace, list(keys), first, wait_s)

    def found(self, request: Any, computed_tokens: int) -> int | None:
        """Tokens from the start that the pool has (0: nothing worth it); None: not known yet."""
        pooled = self._requests.get(request.request_id)
        if pooled is None:
            return 0
        if request.num_preemptions > pooled.preemptions:  # its KV is lost, some of it is in the pool
            pooled.preemptions, pooled.decided, pooled.promoting = request.num_preemptions, False, False
            self._seek(pooled)
        lookup = pooled.lookup
        if pooled.decided or lookup is None:
            return 0
        if not self._runtime.wait(lookup.done, 0 if pooled.promoting else WAIT_S):
            if self._runtime.clock() < lookup.until_s + 0.001:
                return None
            self._count("lookup:late")
            self._let_go(pooled)
            return 0
        if self._promote(pooled, lookup, computed_tokens):
            return None
        tokens: int = min(lookup.chunks * self._settings.chunk_tokens, request.num_tokens)
        if tokens - computed_tokens < self._settings.min_pool_tokens:
            self._count("lookup:miss" if not lookup.why else f"lookup:{lookup.why}")
            pooled.known = max(pooled.known, lookup.chunks)
            self._let_go(pooled)
            return 0
        mapped = self._lookups.is_mapped(lookup)
        if not self._costs.worth(tokens - computed_tokens, mapped):
            self._costs.forgive(mapped)
            self._count("lookup:too_slow")
            self._let_go(pooled)
            return 0
        if min(page.until_s for page in lookup.pages) < self._runtime.clock() + LEAST_LEASE_S:
            return self._renew(pooled)
        return tokens

    def _renew(self, pooled: _Pooled) -> int | None:
        """It has waited for blocks so long that its leases run out (or they are too short): ask again, once."""
        self._let_go(pooled)
        if pooled.renewed:
            self._count("lookup:expired")
            return 0
        pooled.renewed, pooled.decided = True, False
        self._seek(pooled)
        return None

    def _promote(self, pooled: _Pooled, lookup: Lookup, computed_tokens: int) -> bool:
        """Wait for pages that lie in lower tiers, once, if they come up soon."""
        if pooled.promoting or not lookup.below:
            return False
        if lookup.below_s > self._settings.promote_s:
            self._count("lookup:promotion_too_slow")
            return False
        tokens = (lookup.chunks + lookup.below) * self._settings.chunk_tokens
        if tokens - computed_tokens < self._settings.min_pool_tokens or not self._settings.promote_s:
            return False
        self._lookups.release(lookup.leases)
        self._count("lookup:promote")
        pooled.promoting = True
        pooled.lookup = self._lookups.seek(lookup.namespace, lookup.keys, 0, self._settings.promote_s)
        return True

    def retry(self, request: Any) -> None:
        """Its KV did not come from where it was to come from: look again what the pool has by now."""
        pooled = self._requests.get(request.request_id)
        if pooled is not None and pooled.loading is None:
            self._let_go(pooled)
            pooled.decided = pooled.promoting = False
            self._seek(pooled)

    def allocated(self, request: Any, blocks: Any, tokens: tuple[int, int]) -> None:
        """vLLM has allocated blocks for tokens [lo, hi), which are to come from the pool."""
        pooled = self._requests[request.request_id]
        lookup = pooled.lookup
        assert lookup is not None and lookup.done.is_set(), "vLLM loads only what `found` has told"
        chunk = self._settings.chunk_tokens
        pages = tuple(page for page in lookup.pages if (page.chunk + 1) * chunk > tokens[0])
        tables = self._select(blocks.get_block_ids())
        ranges = []
        for group, (table, n) in enumerate(zip(tables, self._block_tokens, strict=True)):
            # Of a chunk that is cached in part, the rest is written; what is cached has no block here.
            lo, hi = pages[0].chunk * chunk // n, -(-tokens[1] // n)
            cached = tokens[0] // n
            ids = tuple(0 if i < cached else table[i] for i in range(lo, hi))
            ranges.append(BlockRange(group, lo, ids))
        until_s = min(self._runtime.clock() + self._settings.load_s, *(page.until_s for page in pages))
        spec = LoadSpec(request.request_id, lookup.namespace, tokens, tuple(ranges), pages, until_s)
        self._loads.append(spec)
        pooled.mapped = self._lookups.is_mapped(lookup)
        pooled.loading, pooled.leases, pooled.lookup = spec, lookup.leases, None
        pooled.known = max(pooled.known, lookup.chunks)
        pooled.decided, pooled.renewed, pooled.reports = True, False, []
        self._count("lookup:hit")
        self._count("hit_tokens", tokens[1] - tokens[0])

    def not_loaded(self, request: Any) -> None:
        """vLLM has allocated blocks and loads nothing from the pool."""
        pooled = self._requests.get(request.request_id)
        if pooled is not None and pooled.loading is None:
            self._let_go(pooled)

    # --- the steps ---

    @property
    def has_news(self) -> bool:
        return bool(self._loads or self._ended)

    def fill(self, meta: StepMeta, output: Any) -> None:
        meta.loads += self._loads
        meta.ended += self._ended
        self._loads, self._ended = [], []
        self._costs.step(self._runtime.clock(), output.total_num_scheduled_tokens)
        if not self._requests:
            return
        for request_id in output.preempted_req_ids or ():
            pooled = self._requests.get(request_id)
            if pooled is not None and pooled.stored:
                meta.overwritten.append(request_id)
                pooled.stored = False  # nothing is read from its new blocks until it stores again
        for request_id, computed in scheduled(output):
            self._advance(meta, output, request_id, computed)

    def _advance(self, meta: StepMeta, output: Any, request_id: RequestId, before: int) -> None:
        pooled = self._requests.get(request_id)
        if pooled is None or not pooled.storable or not self._settings.pool_store:
            return
        chunk = self._settings.chunk_tokens
        # With async scheduling a step may compute tokens whose ids are not known yet: they are named one step later.
        after = min(before + output.num_scheduled_tokens[request_id], pooled.request.num_tokens)
        complete = after // chunk
        if complete <= pooled.known:
            return
        keys = pooled.chain.extend(pooled.request.all_token_ids)[pooled.known : complete]
        tables = output.kv_connector_block_state.get_block_ids(request_id)
        assert tables is not None, f"{request_id} is scheduled but has no block table"
        ranges = []
        for group, (table, n) in enumerate(zip(self._select(tables), self._block_tokens, strict=True)):
            lo, hi = pooled.known * chunk // n, -(-complete * chunk // n)
            ranges.append(BlockRange(group, lo, tuple(table[lo:hi])))
        meta.stores.append(StoreSpec(request_id, pooled.chain.namespace, pooled.known, tuple(keys), tuple(ranges)))
        pooled.known, pooled.stored = complete, True

    def take(self, reports: Sequence[LoadReport], counted: Counter[str]) -> None:
        """What the ranks tell, before vLLM acts on the same step's finished sets."""
        for name, n in counted.items():
            self._count(name, n)
        for report in reports:
            pooled = self._requests.get(report.request_id)
            if pooled is None:
                continue  # it ended meanwhile, its leases were given back then
            pooled.reports.append(report)
            if len(pooled.reports) == self._world:
                self._loaded(pooled)

    def _loaded(self, pooled: _Pooled) -> None:
        spec = pooled.loading
        assert spec is not None
        good = min(report.good for report in pooled.reports)
        reason = next((report.reason for report in pooled.reports if report.reason), "")
        self._count("loaded_tokens", good - spec.tokens[0])
        seconds = max(report.seconds for report in pooled.reports)
        self._costs.loaded(good - spec.tokens[0], seconds, pooled.mapped)
        if reason:
            logger.warning("of %d tokens from the pool %d are used: %s", spec.tokens[1], good, reason)
            pooled.known = min(pooled.known, good // self._settings.chunk_tokens)
        if good > spec.tokens[0] and (name := ledger_id(pooled.request.kv_transfer_params)) is not None:
            self._book.update(name, pool=pool_source(spec, good))
        corrupt = {page.key: page for report in pooled.reports for page in report.corrupt}
        self._lookups.corrupt(spec.namespace, list(corrupt.values()))
        pooled.loading = None
        self._lookups.release(pooled.leases)
        pooled.leases = []

    def give_up(self) -> None:
        """This engine loads and stores nothing any more."""
        for pooled in self._requests.values():
            pooled.storable = False
            if pooled.loading is None:
                self._let_go(pooled)

    def is_loading(self, request_id: RequestId) -> bool:
        """vLLM waits for its finished_recving."""
        pooled = self._requests.get(request_id)
        return pooled is not None and pooled.loading is not None

    def finished(self, request: Any) -> bool:
        """The request has ended. True: its blocks stay until the workers report it as sent."""
        pooled = self._requests.pop(request.request_id, None)
        if pooled is None:
            return False
        if pooled.loading is not None:
            self._ended.append(request.request_id)
        self._let_go(pooled)
        return pooled.stored

    def inexact(self, request_id: RequestId) -> None:
        """Its KV is not what this engine would compute: it gets no name."""
        pooled = self._requests.get(request_id)
        if pooled is not None:
            pooled.storable = False
            self._count("not_pooled:inexact")

    # --- inside ---

    def _let_go(self, pooled: _Pooled) -> None:
        """Nothing (more) is loaded for it."""
        pooled.decided = True
        if pooled.lookup is not None:
            self._lookups.abandon(pooled.lookup)
            pooled.lookup = None
        self._lookups.release(pooled.leases)
        pooled.leases = []

    def _count(self, name: str, n: int = 1) -> None:
        self._book.count(f"pool:{name}", n)

    def close(self) -> None:
        self._lookups.close()
