"""The connector's half in the scheduler process: dispatches vLLM's hooks to the prefill and decode sides."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import vllm
import zmq

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Outbox, split_address
from lmkv.errors import ConfigError
from lmkv.hashing import Manifest
from lmkv.ids import EngineName, make_incarnation
from lmkv.obs.ledger import LedgerBook
from lmkv.transfer import events as ev
from lmkv.weights import default_cache, newest_s, process_start_s, weights_digest

from .decode import DecodeSide
from .endpoint import EngineEndpoint
from .fingerprint import must_match
from .metadata import HandshakeMeta, StepMeta, WorkerMeta
from .params import is_approximate, request_params
from .pooled.shares import shapes
from .pooled.side import PoolSide
from .pooled.sources import Sources
from .prefill import PrefillSide
from .shadow import Probes

logger = logging.getLogger(__name__)

ROLES = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


class SchedulerSide:
    """Engine thread only, but for the endpoint's own thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> None:
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise ConfigError(
                f"pipeline_parallel_size={parallel.pipeline_parallel_size} is not supported by lmkv",
                hint="use tensor parallelism",
            )
        self._settings = settings
        self._kv_cache_config = kv_cache_config
        self._role = ROLES[vllm_config.kv_transfer_config.kv_role]
        self._incarnation = make_incarnation(os.urandom(8))
        self._must = must_match(vllm_config, vllm.__version__)
        self._model = str(vllm_config.model_config.model)
        self._block_tokens = tuple(g.kv_cache_spec.block_size for g in kv_cache_config.transfer_groups)
        self._meta = StepMeta()
        self.book = LedgerBook()
        self.probes = Probes(self._must["dtype"], self._must["kv_dtype"])
        self._endpoint = EngineEndpoint(self._listen_of(parallel), settings.advertise, self.book)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._outbox = Outbox(self._context)
        self._prefill = PrefillSide(kv_cache_config, self._block_tokens, self.book)
        self._decode = DecodeSide(
            settings,
            self._incarnation,
            self._block_tokens,
            kv_cache_config.select_transfer_block_ids,
            self._endpoint,
            self._outbox,
            self.book,
            parallel.tensor_parallel_size,
        )
        self._sides: dict[str, PrefillSide | DecodeSide] = {}
        self._pool: PoolSide | None = None
        self._sources = Sources(self._decode, None)

    def _listen_of(self, parallel: Any) -> str:
        """Each data-parallel engine listens on its own port."""
        host, port = split_address(self._settings.listen)
        return f"tcp://{host}:{port + parallel.data_parallel_rank if port else 0}"

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
        unpooled = next((meta.unpooled for meta in ordered if meta.unpooled), "")
        if not unpooled:
            self._pool = PoolSide(
                self._settings,
                self._block_tokens,
                self._kv_cache_config.select_transfer_block_ids,
                self.book,
                len(ordered),
            )
            self._sources = Sources(self._decode, self._pool)
            self._endpoint.on_pool(self._hear_pool)
        elif self._settings.pool or self._settings.controller:
            logger.error("this engine does not use the pool: %s", unpooled)
        threading.Thread(
            target=self._open, args=(tuple(meta.card for meta in ordered), layout), name="lmkv-weights", daemon=True
        ).start()

    def _open(self, workers: tuple[wire.WorkerCard, ...], layout: dict[str, str]) -> None:
        """On a thread of its own: reads the weights once, then lets the endpoint speak for this engine."""
        started_s = time.monotonic()
        try:
            weights = weights_digest(self._model, default_cache(os.environ))
        except ConfigError as error:
            logger.error("this engine exchanges no KV: %s", error)
            self._endpoint.refuse_all(str(error))
            return
        logger.info("weights are %s, known after %.1f s", weights, time.monotonic() - started_s)
        _, port = split_address(self._endpoint.address)
        name = self._settings.name or f"{self._role}-{socket.gethostname()}-{port}"
        must = self._must | {"weights": weights}
        card = wire.EngineCard(
            EngineName(name),
            self._incarnation,
            self._endpoint.address,
            self._role,
            must,
            layout,
            self._block_tokens,
            workers,
            convert_dtype=self._settings.convert_dtype,
        )
        self._endpoint.start(card, self._settings.peers)
        if self._pool is not None:
            self._name_pool(self._pool, card, must)
        logger.info("engine %r (%s, incarnation %s) listens on %s", name, self._role, self._incarnation, card.address)

    def _name_pool(self, pool: PoolSide, card: wire.EngineCard, must: dict[str, str]) -> None:
        """KV has a name from now on. Weights that are newer than this process may not be those that it has loaded."""
        chunk_tokens = self._settings.chunk_tokens
        groups = shapes(card.workers[0].geometries, chunk_tokens)
        path, epoch = Path(self._model), ""
        if path.exists() and newest_s(path) >= process_start_s():
            epoch = self._incarnation
            logger.warning("the weights in %s have changed since this engine started; its KV is not shared", path)
        manifest = Manifest(must, chunk_tokens, groups, self._settings.tenant, epoch)

        def tell(description: str) -> None:
            for worker in card.workers:
                self._endpoint.tell(worker.address, wire.PoolName(card.incarnation, card.address, description))

        pool.named(self._incarnation, manifest, tell)

    def _hear_pool(self, message: wire.PoolNodes | wire.Parked) -> None:
        if isinstance(message, wire.Parked):
            self._decode.parked(message.transfer_id)
        elif self._pool is not None:
            self._pool.nodes(message)

    # --- vLLM's hooks ---

    def bind_block_pool(self, pool: Any) -> None:
        self._decode.bind_block_pool(pool)

    def new_request(self, request: Any) -> None:
        if self._pool is not None:
            self._pool.new_request(request, is_approximate(request.kv_transfer_params))
        params = request_params(request.kv_transfer_params)
        if params is None:
            return
        if self._role not in (params.role, "both"):
            logger.warning("request %s asks a %s engine for role %r", request.request_id, self._role, params.role)
            return
        side = self._prefill if params.role == "prefill" else self._decode
        self._sides[request.request_id] = side
        side.new_request(request, params)
        if side is self._prefill:
            self._endpoint.pair(params.peer_address)

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        self.probes.scheduled(request, computed_tokens)
        return self._sources.matched_tokens(
            request, computed_tokens, self._sides.get(request.request_id) is self._decode
        )

    def allocated(self, request: Any, blocks: Any, external_tokens: int) -> None:
        self._sources.allocated(request, blocks, external_tokens, self._sides.get(request.request_id) is self._decode)

    def build_meta(self, output: Any) -> StepMeta:
        self._prefill.fill(self._meta, output)
        self._decode.fill(self._meta)
        if self._pool is not None:
            self._pool.fill(self._meta, output)
        meta, self._meta = self._meta, StepMeta()
        meta.idle = output.total_num_scheduled_tokens == 0
        return meta

    def take_output(self, output: Any) -> None:
        meta = output.kv_connector_worker_meta
        if not isinstance(meta, WorkerMeta):
            return
        for ledger in meta.ledgers:
            tid = ledger.pop("transfer_id")
            self.book.add_rank(tid, ledger)
            if ledger.get("outcome") == ev.SendOutcome.EXPIRED.value and self._pool is not None:
                self._prefill.park(tid, self._endpoint.tell, self._incarnation)
        if self._pool is not None:
            self._pool.take(meta.loads, meta.counted)
        for report in meta.reports:
            self._decode.reported(report)

    def finished(self, request: Any) -> bool:
        """True: vLLM keeps the blocks until finished_sending."""
        side = self._sides.pop(request.request_id, None)
        pooled = self._pool.finished(request) if self._pool is not None else False
        if side is self._prefill:
            return self._prefill.finished(request, self._meta) or pooled
        if side is self._decode:
            self._decode.finished(request)
        return pooled

    def reset_cache(self) -> bool:
        """The external cache is to be reset: perhaps the weights have been replaced."""
        if self._pool is not None:
            self._pool.new_epoch()
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
