"""Which layers of a step go into one write."""

from __future__ import annotations

import pytest

from lmkv.ids import TransferId
from lmkv.vllm.grouping import StepLayers
from lmkv.vllm.specs import BlockRange, Push

MIB = 1 << 20


def spans(layers: int, layer_mib: float, post_mib: float = 4) -> list[int]:
    """How many layers each write has, where a layer of the step has `layer_mib`."""
    push = Push(TransferId("t"), (), (BlockRange(0, 0, tuple(range(1, 5))),), last=True)
    step = StepLayers((push,), (int(layer_mib * MIB / 4),), (layers,), int(post_mib * MIB))
    found = []
    for done in range(1, layers + 1):
        step.done[0] = done
        if step.is_due(0):
            lo, hi = step.tell(0)
            assert hi == done
            found.append(hi - lo)
        assert step.all_told == (done == layers)
    return found


@pytest.mark.parametrize(
    ("layers", "layer_mib", "expected"),
    [
        (30, 1.5, [3] * 9 + [2, 1]),
        (30, 0.75, [6, 6, 6, 6, 3, 2, 1]),
        (30, 8.0, [1] * 30),
        (30, 0.01, [30]),
        (32, 0.125, [16, 8, 8]),
        (2, 3.0, [1, 1]),
        (1, 0.5, [1]),
    ],
)
def test_few_large_writes_and_small_ones_at_the_end(layers: int, layer_mib: float, expected: list[int]) -> None:
    assert spans(layers, layer_mib) == expected


def test_each_group_is_counted_for_itself() -> None:
    push = Push(TransferId("t"), (), (BlockRange(0, 0, (1,)), BlockRange(1, 0, (1, 2))), last=False)
    step = StepLayers((push,), (MIB, MIB), (8, 8), 2 * MIB)
    step.done = [1, 1]
    assert [step.is_due(0), step.is_due(1)] == [False, True]
    step.tell(1)
    step.done = [2, 1]
    assert [step.is_due(0), step.is_due(1)] == [True, False]
    assert step.tell(0) == (0, 2) and not step.all_told
