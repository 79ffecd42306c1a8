"""The connector's half in the scheduler process: dispatches vLLM's hooks to the prefill and decode sides."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import Any

import msgspec
import vllm

from lmkv import wire
from lmkv.addresses import join_address, split_address
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox
from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import ConfigError
from lmkv.hashing import Manifest
from lmkv.ids import EngineName, make_incarnation
from lmkv.obs.ledger import LedgerBook
from lmkv.transfer import events as ev
from lmkv.weights import default_cache

from . import compat
from .cards import times
from .contents import lora_settings
from .decode import DecodeSide
from .endpoint import EngineEndpoint
from .fingerprint import PRIVATE_HINT, must_match
from .identity import WeightsName, identify, weight_sources
from .metadata import HandshakeMeta, StepMeta, WorkerMeta
from .params import is_approximate, request_params
from .pooled.adapters import Adapters
from .pooled.shares import shapes
from .pooled.side import PoolSide
from .pooled.sources import Sources
from .prefill import PrefillSide
from .shadow import Probes

logger = logging.getLogger(__name__)

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


class SchedulerSide:
    """Engine thread only, but for the endpoint's own thread."""

    def __init__(
        self, vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings, runtime: Runtime = THREADS
    ) -> None:
        parallel = vllm_config.parallel_config
        self._runtime = runtime
        self._settings = settings
        self._kv_cache_config = kv_cache_config
        self._role = ROLES[vllm_config.kv_transfer_config.kv_role]
        self._incarnation = make_incarnation(runtime.entropy(8))
        self._must = must_match(vllm_config, vllm.__version__)
        self._sources_of_weights = weight_sources(vllm_config)
        self._weights = WeightsName(self._incarnation, settings.on_reset)
        self._naming = threading.Lock()
        """Held while `_weights` and `_card` change: the weights become known on a thread of their own."""
        self._card: wire.EngineCard | None = None
        self._watch: compat.ResetWatch | None = None
        self._adapters = Adapters(lora_settings(vllm_config), runtime)
        self._block_tokens = tuple(g.kv_cache_spec.block_size for g in kv_cache_config.transfer_groups)
        self._meta = StepMeta()
        self.book = LedgerBook()
        self.probes = Probes(self._must["dtype"], self._must["kv_dtype"])
        self._endpoint = EngineEndpoint(self._listen_of(parallel), settings.advertise, self.book, runtime)
        self._context = runtime.context()
        self._outbox = Outbox(self._context, clock=runtime.clock)
        self._prefill = PrefillSide(kv_cache_config, self._block_tokens, self.book, self._adapters, runtime)
        self._decode = DecodeSide(
            settings,
            self._incarnation,
            self._block_tokens,
            kv_cache_config.select_transfer_block_ids,
            self._endpoint,
            self._outbox,
            self.book,
            parallel.tensor_parallel_size,
            self._adapters,
            runtime,
        )
        self._sides: dict[str, PrefillSide | DecodeSide] = {}
        self._pool: PoolSide | None = None
        self._sources = Sources(self._decode, None)
        self._broken = ""
        """Why this engine moves no KV any more."""

    def _listen_of(self, parallel: Any) -> str:
        """Each data-parallel engine listens on its own port."""
        host, port = split_address(self._settings.listen, listen=True)
        return join_address(host, port + parallel.data_parallel_rank if port else 0)

    def start(self, workers: dict[int, HandshakeMeta]) -> None:
        """All workers have registered their caches: peers may come as soon as the weights are known."""
        ordered = [workers[rank] for rank in sorted(workers)]
        layouts = [meta.layout for meta in ordered]
        if any(layout != layouts[0] for layout in layouts):
            raise ConfigError(f"ranks of this engine differ in their KV layout: {layouts}", hint="report this")
        layout = layouts[0] | {
            "block_tokens": ",".join(map(str, self._block_tokens)),
            "kv_layout": str(self._kv_cache_config.kv_cache_layout),
            "tp": str(len(ordered)),
        }
        self._endpoint.on_pool(self._hear_pool)
        self._endpoint.on_describe(lambda: self._pool.trouble if self._pool is not None else "")
        unpooled = next((meta.unpooled for meta in ordered if meta.unpooled), "")
        if not unpooled:
            self._pool = PoolSide(
                self._settings,
                self._block_tokens,
                self._kv_cache_config.select_transfer_block_ids,
                self.book,
                len(ordered),
                self._adapters,
                self._runtime,
            )
            self._sources = Sources(self._decode, self._pool)
        elif self._settings.pool or self._settings.controller:
            logger.error("this engine does not use the pool: %s", unpooled)
        cards, loaded_s = tuple(meta.card for meta in ordered), time.time()
        self._runtime.background("lmkv-weights", lambda: self._open(cards, layout, loaded_s))

    def _open(self, workers: tuple[wire.WorkerCard, ...], layout: dict[str, str], loaded_s: float) -> None:
        """In the background: reads the weights once, then lets the endpoint speak for this engine."""
        started_s = self._runtime.clock()
        try:
            weights = identify(self._sources_of_weights, os.environ, loaded_s, default_cache(os.environ))
        except ConfigError as error:
            logger.error("this engine exchanges no KV: %s", error)
            self._endpoint.refuse_all(str(error))
            return
        logger.info("weights are identified after %.1f s: %s", self._runtime.clock() - started_s, weights.digest or "-")
        _, port = split_address(self._endpoint.address)
        name = self._settings.name or f"{self._role}-{socket.gethostname()}-{port}"
        with self._naming:
            self._weights.known(weights)
            self._card = wire.EngineCard(
                EngineName(name),
                self._incarnation,
                self._endpoint.address,
                self._role,
                self._must | {"weights": self._weights.value},
                layout,
                self._block_tokens,
                workers,
                convert_dtype=self._settings.convert_dtype,
                times=times(self._settings),
            )
            self._tell_private()
            self._endpoint.start(self._card, self._settings.peers, self._weights.private)
            if self._pool is not None:
                self._pool.named(self._incarnation, self._manifest(self._card), self._tell_workers)
        logger.info("engine %r (%s, incarnation %s) listens on %s", name, self._role, self._incarnation, self.address)

    @property
    def address(self) -> str:
        return self._endpoint.address

    def _manifest(self, card: wire.EngineCard) -> Manifest:
        """What this engine's KV is called in the pool."""
        chunk_tokens = self._settings.chunk_tokens
        groups = shapes(card.workers[0].geometries, chunk_tokens)
        return Manifest(card.must, chunk_tokens, groups, self._settings.tenant, self._weights.epoch)

    def _tell_workers(self, description: str) -> None:
        assert self._card is not None
        for worker in self._card.workers:
            self._endpoint.tell(worker.address, wire.PoolName(self._incarnation, self._endpoint.address, description))

    def _tell_private(self) -> None:
        if self._weights.private:
            logger.warning(
                "this engine's KV is private, no other engine gets or gives any: %s · %s",
                self._weights.private,
                PRIVATE_HINT,
            )

    def _look_for_reset(self) -> None:
        """vLLM resets its prefix cache, without telling connectors, when weights are replaced (and in benchmarks)."""
        if self._watch is not None and self._watch.was_reset() and self._settings.on_reset != "external":
            self._renew()

    def _renew(self) -> None:
        """The weights may be others from now on: peers and the pool are told another name."""
        with self._naming:
            if not self._weights.reset():
                return
            self._adapters.forget(self._weights.since_reset)
            if self._card is None:
                return  # `_open` has not got that far, and will take the new name
            self._card = msgspec.structs.replace(self._card, must=self._must | {"weights": self._weights.value})
            self._endpoint.renew(self._card, self._weights.private)
            if self._pool is not None:
                self._pool.renamed(self._manifest(self._card))
        self._tell_private()

    def _hear_pool(self, message: wire.PoolNodes | wire.Parked) -> None:
        if isinstance(message, wire.Parked):
            self._decode.parked(message.transfer_id)
        elif self._pool is not None:
            self._pool.nodes(message)

    # --- vLLM's hooks ---

    def bind_block_pool(self, pool: Any) -> None:
        self._watch = compat.ResetWatch(pool)
        self._decode.bind_block_pool(pool)

    def new_request(self, request: Any) -> None:
        self._look_for_reset()
        if self._broken:
            return
        if self._pool is not None:
            self._pool.new_request(request, is_approximate(request.kv_transfer_params))
        params = request_params(request.kv_transfer_params)
        if params is None:
            return
        if self._role not in (params.role, "both"):
            logger.warning("request %s asks a %s engine for role %r", request.request_id, self._role, params.role)
            return
        if params.role == "decode":
            self._sides[request.request_id] = self._decode
            self._decode.new_request(request, params)
        elif self._prefill.new_request(request, params):
            self._sides[request.request_id] = self._prefill
            self._endpoint.pair(params.peer_address)

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        self.probes.scheduled(request, computed_tokens)
        if self._broken:
            return 0, False
        tokens, loads = self._sources.matched_tokens(
            request, computed_tokens, self._sides.get(request.request_id) is self._decode
        )
        if tokens is not None:
            self._prefill.yielding.asked(request.request_id)
        return tokens, loads

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        self._prefill.yielding.served()
        if external_tokens:
            self._prefill.yielding.loads(request.request_id)
        self._sources.allocated(request, blocks, external_tokens, self._sides.get(request.request_id) is self._decode)

    def build_meta(self, output: Any) -> StepMeta:
        self._look_for_reset()
        self._prefill.fill(self._meta, output)
        self._decode.fill(self._meta)
        if self._pool is not None:
            self._pool.fill(self._meta, output)
        meta, self._meta = self._meta, StepMeta()
        meta.idle = output.total_num_scheduled_tokens == 0
        return meta

    def take_output(self, output: Any) -> None:
        self._prefill.freed(output.finished_sending or set())
        self._prefill.yielding.loaded(output.finished_recving or ())
        meta = output.kv_connector_worker_meta
        if not isinstance(meta, WorkerMeta):
            return
        if meta.broken:
            self._break(meta.broken)
        for kind, count in meta.failures.items():
            self.book.count(f"failure:{kind}", count)
        for ledger in meta.ledgers:
            tid = ledger.pop("transfer_id")
            self.book.add_rank(tid, ledger)
            if ledger.get("outcome") == ev.SendOutcome.EXPIRED.value:
                self._prefill.park(tid, self._endpoint.tell, self._incarnation)
        if self._pool is not None:
            self._pool.take(meta.loads, meta.counted)
        for report in meta.reports:
            self._decode.reported(report)

    def _break(self, reason: str) -> None:
        """A rank can move nothing any more: this engine computes everything itself from now on."""
        if self._broken:
            return
        self._broken = reason
        logger.error("this engine moves no KV any more, and computes every prompt itself: %s", reason)
        self.book.count("broken")
        self._endpoint.refuse_all(reason)
        self._prefill.give_up(self._meta, reason)
        if self._pool is not None:
            self._pool.give_up()

    def finished(self, request: Any) -> bool:
        """True: vLLM keeps the blocks until finished_sending. It asserts that none is told as received as well: one
        that ends while it loads has nothing to send, as it was not computed, or has been preempted since."""
        side = self._sides.pop(request.request_id, None)
        self._prefill.yielding.ran((request.request_id,))
        loading = self._pool is not None and self._pool.is_loading(request.request_id)
        pooled = self._pool.finished(request) if self._pool is not None else False
        if side is self._prefill:
            return self._prefill.finished(request, self._meta, loading) or pooled
        if side is self._decode:
            self._decode.finished(request)
        return pooled

    def reset_cache(self) -> bool:
        """The external cache is to be reset: perhaps the weights have been replaced."""
        if self._watch is not None:
            self._watch.was_reset()  # vLLM has reset its own cache just before: that is one reset, not two
        self._renew()
        return True

    @property
    def has_news(self) -> bool:
        pooled = self._pool is not None and self._pool.has_news
        return self._prefill.has_news or self._decode.has_news or bool(self._meta.withdrawals) or pooled

    @property
    def has_pending_frees(self) -> bool:
        return self._decode.has_pending_frees

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._endpoint.close()
        self._outbox.close()
        self._context.term()
