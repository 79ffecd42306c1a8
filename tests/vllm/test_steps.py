"""Which blocks a step's forward writes, whichever request hits them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lmkv.ids import RequestId
from lmkv.vllm.specs import BlockRange
from lmkv.vllm.steps import StepWrites

BLOCK_TOKENS = 4


def step(tables: dict[str, list[int]], scheduled: dict[str, tuple[int, int]]) -> StepWrites:
    """`scheduled`: request → (tokens computed before, tokens of this step)."""
    new = [SimpleNamespace(req_id=r, num_computed_tokens=before) for r, (before, _) in scheduled.items()]
    output: Any = SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={r: n for r, (_, n) in scheduled.items()},
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda request: (tables[request],)),
    )
    return StepWrites(output, list, (BLOCK_TOKENS,))


def test_a_hit_on_blocks_of_the_same_step_is_complete_only_with_its_layers() -> None:
    # B hits the 3 blocks that A begins in this very step; 8 tokens of A were computed earlier.
    writes = step({"a": [5, 6, 7, 8, 9], "b": [5, 6, 7, 8, 20]}, {"a": (8, 12), "b": (16, 3)})
    earlier, now = writes.split(BlockRange(0, 0, (5, 6, 7, 8, 20)))
    assert earlier == [BlockRange(0, 0, (5, 6))]
    assert now == [BlockRange(0, 2, (7, 8, 20))]


def test_blocks_of_earlier_steps_are_complete() -> None:
    writes = step({"a": [5, 6, 7], "b": [5, 6, 9]}, {"b": (8, 4)})
    assert writes.split(BlockRange(0, 0, (5, 6, 9))) == ([BlockRange(0, 0, (5, 6))], [BlockRange(0, 2, (9,))])


def test_a_block_that_is_continued_is_written_again() -> None:
    writes = step({"a": [5, 6]}, {"a": (6, 2)})
    assert writes.split(BlockRange(0, 0, (5, 6))) == ([BlockRange(0, 0, (5,))], [BlockRange(0, 1, (6,))])


def test_nothing_is_nothing() -> None:
    assert step({"a": [5]}, {"a": (0, 4)}).split(BlockRange(0, 3, ())) == ([], [])


def test_the_table_of_a_request_comes_by_group() -> None:
    assert step({"a": [5, 6]}, {"a": (0, 8)}).table(RequestId("a")) == [[5, 6]]
