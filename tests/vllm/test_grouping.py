"""StepLayers decides which layers of a step go into one write."""

from __future__ import annotations

import pytest

from lmkv.ids import TransferId
from lmkv.vllm.grouping import StepLayers
from lmkv.vllm.specs import BlockRange, Push

MIB = 1 << 20


def spans(layers: int, layer_mib: float, last: bool = True) -> list[int]:
    """How many layers each write has, where a layer of the step has `layer_mib`."""
    push = Push(TransferId("t"), (), (BlockRange(0, 0, tuple(range(1, 5))),), last=last)
    step = StepLayers((push,), (int(layer_mib * MIB / 4),), (layers,), 4 * MIB)
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
        (30, 1.5, [1, *[3] * 9, 1, 1]),
        (30, 0.75, [2, 6, 6, 6, 5, 3, 2]),
        (30, 8.0, [1] * 30),
        (30, 0.01, [30]),
        (32, 0.125, [8, 12, 8, 4]),
        (2, 3.0, [1, 1]),
        (1, 0.5, [1]),
    ],
)
def test_few_large_writes_and_smaller_ones_first_and_last(layers: int, layer_mib: float, expected: list[int]) -> None:
    assert spans(layers, layer_mib) == expected


def test_writes_become_smaller_only_towards_the_end_of_a_prompt() -> None:
    """The next chunk of the prompt hides the last write of this one."""
    assert spans(30, 0.75, last=False) == [2, 6, 6, 6, 6, 4]


def test_each_group_is_counted_for_itself() -> None:
    push = Push(TransferId("t"), (), (BlockRange(0, 0, (1,)), BlockRange(1, 0, (1, 2))), last=False)
    step = StepLayers((push,), (MIB, MIB), (8, 8), 8 * MIB)
    step.done = [1, 1]
    assert [step.is_due(0), step.is_due(1)] == [False, True]
    step.tell(1)
    step.done = [2, 1]
    assert [step.is_due(0), step.is_due(1)] == [True, False]
    assert step.tell(0) == (0, 2) and not step.all_told
