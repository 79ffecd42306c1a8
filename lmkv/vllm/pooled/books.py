"""What the engine thread of a worker keeps of the pool: specs under way, and what their reports mean to vLLM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lmkv.ids import RequestId

from ..commands import BlockHold, Results
from ..specs import LoadReport, LoadSpec, StoreSpec

if TYPE_CHECKING:
    from ..metadata import StepMeta


class PoolBooks:
    """`block_tokens`: by transfer group."""

    def __init__(self, block_tokens: tuple[int, ...]) -> None:
        self._block_tokens = block_tokens
        self.storing: set[RequestId] = set()
        """Requests with chunks that were stored: vLLM keeps their blocks until they are reported as sent."""
        self._packing: Counter[RequestId] = Counter()
        self._holds: dict[RequestId, list[BlockHold]] = {}
        """Stores under way; a request's entry goes when all of them have been packed."""
        self._stores: tuple[StoreSpec, ...] = ()
        self._loads: dict[RequestId, LoadSpec] = {}
        self._bad_blocks: set[int] = set()
        self._failed: set[RequestId] = set()

    def bind(self, meta: StepMeta) -> None:
        self._stores = tuple(meta.stores)
        self.storing.difference_update(meta.overwritten)
        for spec in meta.stores:
            self.storing.add(spec.request_id)
            self._packing[spec.request_id] += 1
        self._loads |= {spec.request_id: spec for spec in meta.loads}

    @property
    def loading(self) -> bool:
        return bool(self._loads)

    def take_stores(self) -> tuple[tuple[StoreSpec, ...], tuple[BlockHold, ...]]:
        """Stores of the step that ends now, and the hold of each one's blocks."""
        stores, self._stores = self._stores, ()
        holds = tuple(BlockHold() for _ in stores)
        for spec, hold in zip(stores, holds, strict=True):
            self._holds.setdefault(spec.request_id, []).append(hold)
        return stores, holds

    def revoke(self, request_ids: Iterable[RequestId]) -> None:
        """Blocks of these requests are overwritten now: what is read from them from here on must not be kept."""
        for request_id in request_ids:
            for hold in self._holds.pop(request_id, []):
                hold.revoked = True

    def is_packing(self, request_id: RequestId) -> bool:
        return self._packing[request_id] > 0

    def take(self, taken: Results) -> None:
        self._packing.subtract(taken.packed)
        for request_id in set(taken.packed):
            if self._packing[request_id] <= 0:
                del self._packing[request_id]
                self._holds.pop(request_id, None)
        for report in taken.loads:
            self._loaded(report)

    def _loaded(self, report: LoadReport) -> None:
        spec = self._loads.pop(report.request_id, None)
        if spec is None or report.good >= spec.tokens[1]:
            return
        if len(self._block_tokens) > 1:
            # Block ids are unique within a group only: vLLM can but forget the whole load.
            self._failed.add(report.request_id)
            return
        (blocks,) = spec.blocks
        first = report.good // self._block_tokens[0] - blocks.lo
        self._bad_blocks |= set(blocks.ids[max(0, first) :])

    def take_bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_failed(self) -> set[RequestId]:
        failed, self._failed = self._failed, set()
        return failed

    def give_up(self, taken: Results) -> None:
        """The loop has died: nothing is stored or loaded any more."""
        self._packing.clear()
        self._holds.clear()
        self._stores = ()
        told = {report.request_id for report in taken.loads}
        for request_id, spec in self._loads.items():
            if request_id not in told:
                taken.loads.append(LoadReport(request_id, spec.tokens[0], "the worker loop has died", 0, 0.0))
