"""`LmkvConnector` for vLLM 0.32: a thin class over the scheduler's and the worker's half.

    --kv-transfer-config '{"kv_connector": "LmkvConnector", "kv_connector_module_path": "lmkv.vllm.connector",
      "kv_role": "kv_producer" | "kv_consumer" | "kv_both", "kv_load_failure_policy": "recompute",
      "kv_connector_extra_config": {"listen": "tcp://127.0.0.1:18100"}}'

The API server imports this module too: it must start nothing and load no data plane.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmkv.config import connector_settings
from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import ConfigError

from . import compat
from .metadata import HandshakeMeta, StepMeta
from .unsupported import refuse_caches, refuse_settings

if TYPE_CHECKING:
    from .scheduler import SchedulerSide
    from .worker import WorkerSide

logger = logging.getLogger(__name__)


class LmkvConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefill pushes the KV of a request into decode while it computes; see ARCHITECTURE.md."""

    _cache_hit_source = CacheHitSource.P2P
    runtime: ClassVar[Runtime] = THREADS
    """Threads, sockets and time of both halves; the simulator's subclass has others."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.check_version()
        refuse_settings(vllm_config)
        refuse_caches(kv_cache_config)
        transfer_config = vllm_config.kv_transfer_config
        settings = connector_settings(transfer_config.kv_connector_extra_config, os.environ)
        compat.set_up_logging(settings.log_level)
        if transfer_config.kv_load_failure_policy != "recompute":
            raise ConfigError(
                f"kv_load_failure_policy is {transfer_config.kv_load_failure_policy!r}: lost KV would fail its request",
                hint='set "kv_load_failure_policy": "recompute" in --kv-transfer-config',
            )
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            from .scheduler import SchedulerSide  # noqa: PLC0415  (loads each half only where it is needed)

            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, settings, self.runtime)
        else:
            from .worker import WorkerSide  # noqa: PLC0415

            self._worker = WorkerSide(vllm_config, kv_cache_config, settings, compat.tensor_rank(), self.runtime)

    # --- class hooks ---

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return None if vllm_config.model_config.use_mla else "LBHNC"

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return False  # `wait_for_save` sweeps the layers whose hook a full graph skipped

    # --- scheduler process ---

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        assert self._scheduler is not None
        workers: dict[int, HandshakeMeta] = {}
        for (_, tensor_rank), meta in metadata.items():
            assert isinstance(meta, HandshakeMeta)
            workers[tensor_rank] = meta
        self._scheduler.start(workers)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        ids: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return ids

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        assert self._scheduler is not None
        return self._scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        self._scheduler.take_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request), self._scheduler.probes.reply(request)

    def reset_cache(self) -> bool | None:
        return self._scheduler.reset_cache() if self._scheduler is not None else None

    def has_pending_push_work(self) -> bool:
        assert self._scheduler is not None
        return self._scheduler.has_news

    def has_pending_block_frees(self) -> bool:
        assert self._scheduler is not None
        return self._scheduler.has_pending_frees

    # --- worker process ---

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        interior = compat.interior_of(self._vllm_config, kv_caches)
        self._worker.register(kv_caches, interior, compat.shard(self._vllm_config))

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        assert self._worker is not None
        return self._worker.handshake()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert self._worker is not None and isinstance(kv_connector_metadata, StepMeta)
        self._worker.before_forward(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._worker is not None and isinstance(connector_metadata, StepMeta)
        self._worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to start: prefill writes into our blocks."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: a request is scheduled only after all its KV has landed."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        assert self._worker is not None
        self._worker.sweep()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self._worker is not None
        sent, received, failed = self._worker.results(finished_req_ids)
        return KVConnectorTransferResults(sent, received, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        assert self._worker is not None
        return self._worker.load_errors()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending, results.finished_recving

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self._worker is not None
        return self._worker.worker_meta()

    # --- both ---

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
