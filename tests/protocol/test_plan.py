"""Extents against a plain loop over layers and blocks, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.errors import TransferError
from lmkv.ids import Rank
from lmkv.transfer.events import Rect
from lmkv.transfer.plan import KvMap, extents_for, runs_for
from lmkv.transport import MemoryKind
from lmkv.wire import LayerCard, WorkerCard

GROUP_OF = (0, 1, 0, 0, 1)


def kv_map(base: int, stride: int = 64, num_blocks: int = 16, size: int = 64, kind: str = "DRAM") -> KvMap:
    layers = tuple(LayerCard(base + i * 4096, size, stride, num_blocks, g, i % 2) for i, g in enumerate(GROUP_OF))
    return KvMap.from_card(WorkerCard(Rank(0), "", "tcp", b"", kind, layers, 0, 0))


def by_hand(own: KvMap, rect: Rect, ids: list[int], nulls: list[int]) -> list[int]:
    """The address of every byte, in order."""
    rows = [i for i, g in enumerate(GROUP_OF) if g == rect.group][rect.layer_lo : rect.layer_hi]
    return [
        int(own.address[row]) + block * int(own.stride[row]) + byte
        for row in rows
        for block, target in zip(ids, nulls, strict=True)
        if target
        for byte in range(int(own.block_bytes[row]))
    ]


def spread(table: np.ndarray) -> list[int]:
    return [int(a) + i for a, n in table[:, :2] for i in range(int(n))]


IDS = st.lists(st.tuples(st.integers(1, 15), st.integers(0, 15)), min_size=1, max_size=8)


@settings(max_examples=150)
@given(IDS, st.integers(0, 2), st.integers(1, 3), st.sampled_from([64, 80]))
def test_extents_are_the_loop_over_layers_and_blocks(
    ids: list[tuple[int, int]], lo: int, count: int, stride: int
) -> None:
    source, target = kv_map(1 << 20), kv_map(1 << 30, stride)
    rect = Rect(0, lo, min(lo + count, 3), 5, 5 + len(ids))
    here, there = [a for a, _ in ids], [b for _, b in ids]
    local, remote = extents_for(source, target, rect, here, there)
    assert spread(local.table) == by_hand(source, rect, here, there)
    assert spread(remote.table) == by_hand(target, rect, there, there)
    assert np.array_equal(local.table[:, 1], remote.table[:, 1])
    assert spread(runs_for(source, rect, here, there)) == spread(local.table), "the checksum's order on either side"
    assert spread(runs_for(target, rect, there)) == spread(remote.table)


def test_neighbours_are_one_extent_a_layer() -> None:
    source, target = kv_map(1 << 20), kv_map(1 << 30)
    local, remote = extents_for(source, target, Rect(0, 0, 2, 0, 3), [3, 4, 5], [7, 8, 9])
    assert local.table[:, 1].tolist() == [192, 192] and len(remote) == 2
    assert remote.table[:, 2].tolist() == [0, 0] and extents_for(source, target, Rect(1, 0, 1, 0, 1), [1], [1])[
        0
    ].table[0].tolist() == [(1 << 20) + 4096 + 64, 64, 1]


def test_only_null_blocks_give_nothing() -> None:
    source, target = kv_map(1 << 20), kv_map(1 << 30, kind="VRAM")
    local, remote = extents_for(source, target, Rect(0, 0, 2, 0, 2), [1, 0], [0, 0])
    assert len(local) == len(remote) == 0 and remote.kind is MemoryKind.VRAM
    assert runs_for(target, Rect(0, 0, 2, 0, 2), [0, 0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("rect", "here", "there", "says"),
    [
        (Rect(0, 0, 1, 4, 6), [1, 0], [1, 2], "block 5 of group 0 is null at the source, 2 at the target"),
        (Rect(0, 0, 1, 0, 2), [1, 16], [1, 2], "source block id 16"),
        (Rect(0, 0, 1, 0, 2), [1, 2], [1, 99], "target block id 99"),
        (Rect(0, 0, 1, 0, 2), [1, -1], [1, 2], "source block id -1"),
        (Rect(0, 0, 1, 0, 2), [1], [1, 2], "needs 2 source block ids"),
        (Rect(0, 0, 4, 0, 1), [1], [1], "layers [0, 4) of group 0"),
        (Rect(2, 0, 1, 0, 1), [1], [1], "group 2"),
    ],
)
def test_refused(rect: Rect, here: list[int], there: list[int], says: str) -> None:
    with pytest.raises(TransferError) as caught:
        extents_for(kv_map(1 << 20), kv_map(1 << 30), rect, here, there)
    assert says in str(caught.value)


def test_direct_mode_needs_equal_blocks() -> None:
    with pytest.raises(TransferError, match="64 bytes here and 32"):
        extents_for(kv_map(1 << 20), kv_map(1 << 30, size=32), Rect(0, 0, 1, 0, 1), [1], [1])


def test_geometry_by_group() -> None:
    own = kv_map(1 << 20)
    assert own.layers() == (3, 2) and own.layer_block_bytes() == (64, 64)
    card = WorkerCard(Rank(0), "", "tcp", b"", "DRAM", tuple(LayerCard(0, size, 64, 4, 0) for size in (64, 32)), 0, 0)
    with pytest.raises(TransferError, match=r"\[32, 64\]"):
        KvMap.from_card(card).layer_block_bytes()
