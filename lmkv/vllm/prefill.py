"""Prefill's scheduler half: which blocks each step completes, and when a request's blocks may go.

Runs on the engine thread. vLLM asks it every step; it keeps one small record a request.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmkv import wire
from lmkv.control.runtime import THREADS, Runtime
from lmkv.ids import Incarnation, RequestId, TransferId
from lmkv.obs.ledger import LedgerBook

from .metadata import StepMeta
from .params import RequestParams
from .pooled.adapters import Adapters
from .prompt import prompt_of
from .specs import BlockRange, OfferSpec, Push
from .steps import StepWrites, scheduled
from .yielding import Yielding

logger = logging.getLogger(__name__)

_REMEMBERED = 4096


@dataclass(slots=True)
class _Prefill:
    transfer_id: TransferId
    request_id: RequestId
    request: Any
    prompt_tokens: int
    announced: bool = False
    done: bool = False
    next_block: tuple[int, ...] = ()
    """By transfer group: first block not yet given to the workers."""


class PrefillSide:
    """`block_tokens`: tokens a block, by transfer group. `select` picks the transfer groups out of a block table."""

    def __init__(
        self,
        kv_cache_config: Any,
        block_tokens: tuple[int, ...],
        book: LedgerBook,
        adapters: Adapters,
        runtime: Runtime = THREADS,
    ) -> None:
        self._runtime = runtime
        self._select = kv_cache_config.select_transfer_block_ids
        self._block_tokens = block_tokens
        self._book = book
        self._adapters = adapters
        self._requests: dict[RequestId, _Prefill] = {}
        self._owners: dict[TransferId, RequestId] = {}
        """Whose blocks a transfer sends, until they are freed."""
        self._orphans: list[_Prefill] = []
        self._peers: OrderedDict[TransferId, str] = OrderedDict()
        """The decode engines' addresses."""
        self.yielding = Yielding()

    def new_request(self, request: Any, params: RequestParams) -> bool:
        """False: another request has this transfer, and its blocks are not given up yet. This one is not sent."""
        owner = self._owners.setdefault(params.transfer_id, request.request_id)
        if owner != request.request_id:
            logger.warning("request %s is not sent: its transfer id is that of %s", request.request_id, owner)
            self._book.count("transfer:in_use")
            return False
        self._requests[request.request_id] = _Prefill(
            params.transfer_id,
            request.request_id,
            request,
            request.num_prompt_tokens,
            next_block=(0,) * len(self._block_tokens),
        )
        self._peers[params.transfer_id] = params.peer_address
        while len(self._peers) > _REMEMBERED:
            self._peers.popitem(last=False)
        self._book.update(
            params.transfer_id, role="prefill", prompt_tokens=request.num_prompt_tokens, arrived_s=self._runtime.clock()
        )
        return True

    @property
    def has_news(self) -> bool:
        """A step is needed to tell the workers something."""
        return bool(self._orphans)

    def fill(self, meta: StepMeta, output: Any) -> None:
        """Add this step's offers, pushes, preemptions and withdrawals to `meta`."""
        for prefill in self._orphans:
            prompt = prompt_of(prefill.request, self._adapters)
            meta.offers.append(OfferSpec(prefill.transfer_id, prefill.request_id, prompt, report=False))
            meta.withdrawals.append((prefill.transfer_id, "aborted before it was scheduled"))
        self._orphans.clear()
        preempted_ids = output.preempted_req_ids or ()
        giving_way = self.yielding.chosen(output.num_scheduled_tokens, preempted_ids, self._runtime.clock())
        if giving_way is not None:
            meta.yields.append(giving_way)
        if not self._requests:
            return
        for request_id in preempted_ids:
            preempted = self._requests.get(request_id)
            if preempted is not None and preempted.announced:
                # Also one whose prompt is done: with async scheduling it stays schedulable until its end is known.
                meta.preempted.append(preempted.transfer_id)
                preempted.next_block = (0,) * len(self._block_tokens)
                preempted.done = False
        writes = StepWrites(output, self._select, self._block_tokens)
        for request_id, computed in scheduled(output):
            self._advance(meta, output, writes, request_id, computed)

    def _advance(self, meta: StepMeta, output: Any, writes: StepWrites, request_id: RequestId, before: int) -> None:
        prefill = self._requests.get(request_id)
        if prefill is None or prefill.done:
            return
        if not prefill.announced:
            prefill.announced = True
            meta.offers.append(OfferSpec(prefill.transfer_id, request_id, prompt_of(prefill.request, self._adapters)))
            self._book.update(prefill.transfer_id, cached_tokens=before, scheduled_s=self._runtime.clock())
        after = before + output.num_scheduled_tokens[request_id]
        prefill.done = after >= prefill.prompt_tokens
        cached: list[BlockRange] = []
        computed: list[BlockRange] = []
        following = []
        for group, (table, n) in enumerate(zip(writes.table(request_id), self._block_tokens, strict=True)):
            total = -(-prefill.prompt_tokens // n)
            start = prefill.next_block[group]
            stop = max(start, total if prefill.done else min(after // n, total))
            earlier, now = writes.split(BlockRange(group, start, tuple(table[start:stop])))
            cached += earlier
            computed += now
            following.append(stop)
        prefill.next_block = tuple(following)
        if cached or computed or prefill.done:
            meta.pushes.append(Push(prefill.transfer_id, tuple(cached), tuple(computed), prefill.done))

    def park(self, tid: TransferId, tell: Callable[[str, wire.Control], None], incarnation: Incarnation) -> None:
        """Nobody asked for it in time: decode is told, so that it does not ask later and wait in vain. Where there is a
        pool, whole chunks are stored like any others, and decode looks there."""
        address = self._peers.pop(tid, "")
        if address:
            self._book.update(tid, parked=True)
            self._book.count("send:parked")
            tell(address, wire.Parked(incarnation, tid))

    def give_up(self, meta: StepMeta, reason: str) -> None:
        """This engine sends nothing any more: what was announced is taken back."""
        for prefill in self._requests.values():
            if prefill.announced and not prefill.done:
                meta.withdrawals.append((prefill.transfer_id, reason))
            prefill.done = True

    def freed(self, request_ids: set[str]) -> None:
        """The workers read the blocks of these ended requests no more."""
        for tid in self.yielding.freed(request_ids):
            self._owners.pop(tid, None)

    def finished(self, request: Any, meta: StepMeta, loading: bool = False) -> bool:
        """The request has ended; True: keep its blocks until the workers report finished_sending. `loading`: its prompt
        was being loaded, so that nothing of it is being sent."""
        prefill = self._requests.pop(request.request_id)
        self._book.update(prefill.transfer_id, finished_s=self._runtime.clock())
        if not prefill.announced:
            self._owners.pop(prefill.transfer_id, None)
            self._orphans.append(prefill)
            return False
        if not prefill.done:
            meta.withdrawals.append((prefill.transfer_id, f"prefill ended as {request.status.name}"))
        if loading:
            self._owners.pop(prefill.transfer_id, None)
            return False
        self.yielding.held(prefill.request_id, prefill.transfer_id)
        return True
