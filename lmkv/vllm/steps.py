"""What vLLM's scheduler output says of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from lmkv.ids import RequestId

from .specs import BlockRange


def scheduled(output: Any) -> Iterator[tuple[RequestId, int]]:
    """(request, tokens computed before this step) of all requests of the step, new ones first."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)


class StepWrites:
    """The blocks that one step's forward writes, whichever request they were scheduled for.

    vLLM counts a block as cached when it *schedules* the step that computes it, so a request of the same step may hit
    blocks that another one is only about to compute. `split` tells the two kinds of hits apart. `select` picks the
    transfer groups out of a block table; `block_tokens` are tokens a block, by transfer group. Engine thread; made for
    one step.
    """

    def __init__(self, output: Any, select: Callable[[Any], Sequence[list[int]]], block_tokens: Sequence[int]) -> None:
        self._output = output
        self._select = select
        self._block_tokens = block_tokens
        self._written: list[set[int]] | None = None

    def table(self, request_id: RequestId) -> Sequence[list[int]]:
        """Block ids of a request of this step, by transfer group."""
        tables = self._output.kv_connector_block_state.get_block_ids(request_id)
        assert tables is not None, f"{request_id} is scheduled but has no block table"
        return self._select(tables)

    def split(self, blocks: BlockRange) -> tuple[list[BlockRange], list[BlockRange]]:
        """(complete before this step, complete when this step's layers are), each in runs of consecutive blocks."""
        written = self._found()[blocks.group]
        runs: tuple[list[BlockRange], list[BlockRange]] = ([], [])
        lo = blocks.lo
        for now, ids in groupby(blocks.ids, written.__contains__):
            run = BlockRange(blocks.group, lo, tuple(ids))
            runs[now].append(run)
            lo = run.hi
        return runs

    def _found(self) -> list[set[int]]:
        if self._written is None:
            self._written = [set() for _ in self._block_tokens]
            for request_id, before in scheduled(self._output):
                after = before + self._output.num_scheduled_tokens[request_id]
                for group, (table, n) in enumerate(zip(self.table(request_id), self._block_tokens, strict=True)):
                    self._written[group].update(table[before // n : -(-after // n)])
        return self._written
