"""The connector's half in a worker process: vLLM's layer hooks, turned into commands for the worker loop.

Everything here runs on the engine thread and does next to nothing: a hook costs a dictionary look-up and, once a group
of layers is worth a write, one append and one wake-up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from lmkv.addresses import join_address, split_address
from lmkv.config import ConnectorSettings
from lmkv.control.runtime import THREADS, Runtime
from lmkv.ids import Rank, RequestId, TransferId
from lmkv.transport import MemoryKind

from . import memory
from .cards import worker_card
from .commands import (
    Abandoned,
    Ended,
    Expected,
    Fence,
    LayersDone,
    Loading,
    Offered,
    Overwritten,
    Preempted,
    Ready,
    Results,
    StepDone,
    Stored,
    Withdrawn,
    Yielded,
)
from .geometry import Shard
from .grouping import StepLayers
from .letters import BROKEN
from .metadata import HandshakeMeta, StepMeta, WorkerMeta
from .pooled.books import PoolBooks
from .pooled.rank import open_pool
from .specs import RankReport
from .writer import WorkerLoop

logger = logging.getLogger(__name__)

_PREEMPTION_FENCE_S = 5.0
_IDLE_STEP_S = 0.005
"""A step that computes nothing, while something is loaded, takes so long or until news come. Without that vLLM makes
one every two milliseconds, and takes half of a core from the thread that loads. A new request waits for its end."""


class WorkerSide:
    """Created before the caches exist; `register` opens the data plane and starts the loop."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        settings: ConnectorSettings,
        rank: Rank,
        runtime: Runtime = THREADS,
    ) -> None:
        self._runtime = runtime
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._settings = settings
        self._rank = rank
        self._loop: WorkerLoop | None = None
        self._memory: memory.KvMemory | None = None
        self._layer: dict[str, tuple[int, int]] = {}
        self._sizes: tuple[int, ...] = ()
        self._step: StepLayers | None = None
        self._reportable: set[RequestId] = set()
        self._ended: set[RequestId] = set()
        self._sent: set[RequestId] = set()
        self._awaited: dict[RequestId, TransferId] = {}
        self._idle = False
        """This step computes nothing."""
        self._news = Results()
        self._pooled = PoolBooks(tuple(g.kv_cache_spec.block_size for g in kv_cache_config.transfer_groups))
        self._unpooled = ""
        self._fence: Callable[[], Fence | None] = lambda: None

    # --- life ---

    def register(self, kv_caches: dict[str, torch.Tensor], interior: str, shard: Shard) -> None:
        found = memory.describe(kv_caches, self._kv_cache_config, interior, shard, self._slots)
        self._memory = found
        for group, names in enumerate(found.layer_names):
            for index, name in enumerate(names):
                self._layer[name] = (group, index)
        self._sizes = found.map().layer_block_bytes()
        if found.kind is MemoryKind.VRAM:
            self._fence = found.device.fence
        host, _ = split_address(self._settings.listen, listen=True)
        port = self._settings.worker_port + self._rank if self._settings.worker_port else 0
        transport = self._runtime.transport(
            self._settings.transport, f"lmkv-{self._rank}-{self._runtime.entropy(8).hex()}"
        )
        pool, self._unpooled = open_pool(
            self._settings, self._rank, shard.ranks, found, self._kv_cache_config, self._runtime
        )
        if pool is not None:
            found = self._memory = found.with_region(pool.region)
        self._loop = WorkerLoop(
            self._settings, self._rank, transport, found, join_address(host, port), pool, self._runtime
        )
        self._loop.start()

    def _slots(self, device: torch.device) -> memory.SlotMemory | None:
        if self._vllm_config.kv_transfer_config.kv_role == "kv_producer":
            return None
        return memory.landing_slots(self._settings.landing_bytes, self._settings.landing_slot_bytes, device)

    def handshake(self) -> HandshakeMeta:
        assert self._loop is not None and self._memory is not None
        found = self._memory
        card = worker_card(found, self._settings, self._rank, self._loop.address, self._loop.export)
        return HandshakeMeta(card, found.layout, self._unpooled)

    def close(self) -> None:
        if self._loop is not None:
            if not self._loop.drain(self._settings.store_drain_s):
                logger.warning("ending with chunks that are not in the pool yet")
            self._loop.close()
            self._loop = None

    # --- a step's hooks, in vLLM's order ---

    def before_forward(self, meta: StepMeta) -> None:
        """Blocks of preempted requests may be overwritten by this step: stop reading them first."""
        loop = self._loop
        if loop is None or not (meta.overwritten or meta.preempted):
            return
        dropped, preempted = Overwritten(tuple(meta.overwritten)), Preempted(tuple(meta.preempted))
        if meta.overwritten:
            loop.submit(dropped)
        if meta.preempted:
            loop.submit(preempted)
        until_s = self._runtime.clock() + _PREEMPTION_FENCE_S
        if meta.overwritten and not self._runtime.wait(dropped.drained, _PREEMPTION_FENCE_S):
            self._pooled.revoke(meta.overwritten)
            logger.error("stores of preempted requests %s are given up: their blocks are wanted", meta.overwritten)
        left_s = max(0.0, until_s - self._runtime.clock())
        if meta.preempted and not self._runtime.wait(preempted.drained, left_s):
            loop.revoke(preempted.transfer_ids)
            logger.error("transfers of preempted requests %s are given up: their blocks are wanted", meta.preempted)

    def bind(self, meta: StepMeta) -> None:
        loop = self._loop
        if loop is None:
            return
        if meta.offers:
            self._reportable |= {offer.request_id for offer in meta.offers if offer.report}
            loop.submit(Offered(tuple(meta.offers)))
        if meta.expects:
            self._awaited |= {spec.request_id: spec.transfer_id for spec in meta.expects}
            loop.submit(Expected(tuple(meta.expects)))
        if meta.abandons:
            loop.submit(Abandoned(tuple(meta.abandons)))
        if meta.withdrawals:
            loop.submit(Withdrawn(tuple(meta.withdrawals)))
        for tid in meta.yields:
            loop.submit(Yielded(tid))
        self._idle = meta.idle
        self._pooled.bind(meta)
        if meta.loads:
            loop.submit(Loading(tuple(meta.loads), self._fence()))
        if meta.ended:
            # vLLM hears of them as received: to tell them as sent, too, would stop it (see SchedulerSide.finished).
            self._reportable.difference_update(meta.ended)
            self._sent.difference_update(meta.ended)
            loop.submit(Ended(tuple(meta.ended)))
        self._step = None
        if meta.pushes:
            pushes = tuple(meta.pushes)
            if any(push.cached for push in pushes):
                loop.submit(Ready(pushes, self._fence(), self._runtime.clock()))
            assert self._memory is not None
            layers = tuple(len(names) for names in self._memory.layer_names)
            self._step = StepLayers(pushes, self._sizes, layers, self._settings.min_post_bytes)

    def layer_done(self, layer_name: str) -> None:
        step = self._step
        if step is None:
            return
        place = self._layer.get(layer_name)
        if place is None:
            return
        group, index = place
        if index != step.done[group]:
            return  # out of order: wait_for_save sweeps it
        step.done[group] = index + 1
        if step.is_due(group):
            self._tell(step, group)

    def sweep(self) -> None:
        """End of the step: layers whose hook did not fire are complete as well."""
        stores, holds = self._pooled.take_stores()
        if stores and self._loop is not None:
            self._loop.submit(Stored(stores, holds, self._fence()))
        step, self._step = self._step, None
        if step is None:
            return
        for group, count in enumerate(step.layers):
            if step.told[group] < count:
                step.done[group] = count
                self._tell(step, group)

    def _tell(self, step: StepLayers, group: int) -> None:
        assert self._loop is not None
        lo, hi = step.tell(group)
        self._loop.submit(LayersDone(step.pushes, group, lo, hi, self._fence(), self._runtime.clock()))
        if step.all_told:
            # Not at the end of the step: what follows the last cache (MLP, logits, sampling) need not be waited for.
            self._loop.submit(StepDone(step.pushes))

    # --- results ---

    def results(self, finished_req_ids: set[str]) -> tuple[set[str], set[str], set[str]]:
        """(finished_sending, finished_recving, failed_recving). A request is reported as sent only after vLLM has
        finished it, exactly once."""
        loop = self._loop
        if loop is None:
            return set(), set(), set()
        waits = self._idle and (self._awaited or self._pooled.loading)
        taken = loop.take(_IDLE_STEP_S if waits else 0.0)
        if not loop.alive:
            self._give_up(taken)
        self._pooled.take(taken)
        ended = {RequestId(r) for r in finished_req_ids}
        self._ended |= ended & (self._reportable | self._pooled.storing)
        self._sent |= set(taken.sent) & self._reportable
        self._news.reports += taken.reports
        self._news.ledgers += taken.ledgers
        self._news.loads += taken.loads
        self._news.counted += taken.counted
        self._news.failures += taken.failures
        sent = {r for r in self._ended if r not in self._reportable - self._sent and not self._pooled.is_packing(r)}
        self._sent -= sent
        self._ended -= sent
        self._reportable -= sent
        self._pooled.storing -= sent
        received = {r.request_id for r in taken.reports if r.outcome != "drained"}
        for request_id in received:
            self._awaited.pop(request_id, None)
        received |= {report.request_id for report in taken.loads}
        failed = {r.request_id for r in taken.reports if r.outcome == "failed"}
        return set(sent), set(received), set(failed | self._pooled.take_failed())

    def load_errors(self) -> set[int]:
        """Blocks that a load from the pool has not filled (models with one KV group)."""
        return self._pooled.take_bad_blocks()

    def _give_up(self, taken: Results) -> None:
        """The loop has died (a bug of ours, logged there): no request may wait for it.

        Blocks that were granted stay in quarantine for good, since nobody can say that nothing lands in them.
        """
        taken.sent += self._reportable - self._sent
        self._pooled.give_up(taken)
        reported = {report.request_id for report in taken.reports}
        for request_id, tid in self._awaited.items():
            if request_id not in reported:
                taken.reports.append(RankReport(tid, request_id, "failed", False, "the worker loop has died"))

    def worker_meta(self) -> WorkerMeta | None:
        """Reports and ledgers collected by `results` in this step."""
        news, self._news = self._news, Results()
        is_broken = self._loop is not None and not self._loop.alive
        broken = BROKEN.format(self._rank) if is_broken else ""
        if not (news or broken):
            return None
        return WorkerMeta(news.reports, news.ledgers, news.loads, news.counted, news.failures, broken)
