"""Extents: merging keeps every byte's place, and bounds agree with a plain loop over the regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmkv.errors import ConnectError, ExtentError, RegistrationError
from lmkv.transport import Extents, MemoryKind, Region, merge_runs
from lmkv.transport.common import RegionMap, check_region, decode_export, encode_export, merge_checked
from lmkv.transport.extents import Bounds, outside, sort_rows

Row = tuple[int, int, int]


def table(rows: list[Row]) -> np.ndarray:
    return np.array(rows, dtype=np.uint64).reshape(len(rows), 3)


# Small numbers on purpose: neighbours, overlaps and empty rows then come up all the time.
rows_pair = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 40), st.integers(0, 40), st.integers(0, 1), st.integers(0, 1)),
    min_size=1,
    max_size=30,
)
runs = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=8)
regions = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 2)), max_size=12)
queries = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 12), st.integers(0, 3)), max_size=20)


def mapping(local: Extents, remote: Extents) -> list[tuple[int, int, int, int]]:
    """Every byte's way, in order: (local device, address, remote device, address)."""
    out = []
    for (here, size, device), (there, _, there_device) in zip(local.table.tolist(), remote.table.tolist(), strict=True):
        out += [(device, here + i, there_device, there + i) for i in range(size)]
    return out


@given(rows_pair)
def test_merging_keeps_the_way_of_every_byte(pairs: list[tuple[int, int, int, int, int]]) -> None:
    local = Extents(table([(a, n, d) for n, a, _, d, _ in pairs]))
    remote = Extents(table([(b, n, e) for n, _, b, _, e in pairs]))
    merged = merge_runs(local, remote)
    assert mapping(*merged) == mapping(local, remote)
    assert len(merged[0]) == len(merged[1]) <= len(local)
    assert merged[0].total_bytes == local.total_bytes


@given(runs, st.randoms(use_true_random=False))
def test_runs_merge_into_one_row_each(lengths: list[tuple[int, int]], random: object) -> None:
    """Runs that are apart from each other become exactly one row each."""
    local, remote, at = [], [], 0
    for blocks, size in lengths:
        for i in range(blocks):
            local.append((at + i * size, size, 0))
            remote.append((10_000 - at + i * size, size, 0))
        at += blocks * size + 100
    merged = merge_runs(Extents(table(local)), Extents(table(remote)))
    assert len(merged[0]) == len(lengths)
    assert merged[0].table[:, 1].tolist() == [blocks * size for blocks, size in lengths]


@given(rows_pair)
def test_sorting_keeps_the_way_of_every_byte(pairs: list[tuple[int, int, int, int, int]]) -> None:
    local = Extents(table([(a, n, d) for n, a, _, d, _ in pairs]))
    remote = Extents(table([(b, n, e) for n, _, b, _, e in pairs]))
    ordered = sort_rows(local, remote)
    assert sorted(mapping(*ordered)) == sorted(mapping(local, remote))
    assert ordered[0].table[:, 0].tolist() == sorted(local.table[:, 0].tolist())


def test_blocks_in_descending_order_are_one_run() -> None:
    ours, theirs = RegionMap([Region(1000, 400)]), RegionMap([Region(5000, 400)])
    local = Extents.of(*((1300 - 100 * i, 100) for i in range(4)))
    remote = Extents.of(*((5300 - 100 * i, 100) for i in range(4)))
    merged = merge_checked(local, ours, remote, theirs)
    assert [extents.table.tolist() for extents in merged] == [[[1000, 400, 0]], [[5000, 400, 0]]]


def test_what_continues_on_one_side_only_stays_apart() -> None:
    local, remote = Extents.of((0, 8), (8, 8)), Extents.of((0, 8), (16, 8))
    assert merge_runs(local, remote) == (local, remote)


def naive_outside(rows: list[Row], of: list[Row]) -> int | None:
    for index, (address, size, device) in enumerate(rows):
        if not any(d == device and a <= address and address + size <= a + n for a, n, d in of):
            return index
    return None


@given(queries, regions)
def test_bounds_agree_with_a_plain_loop(rows: list[Row], of: list[Row]) -> None:
    """Regions may touch, overlap and nest. The rows are repeated so that the vectorised way is tested as well."""
    expected = naive_outside(rows, of)
    assert outside(Extents(table(rows)), table(of)) == expected
    if rows:
        assert Bounds(table(of)).outside(Extents(table(rows * 10))) == expected


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1), st.integers(1, 20))
def test_bounds_do_not_wrap(address: int, size: int, repeat: int) -> None:
    top = (1 << 64) - 4097
    region = [(top, 4096, 0)]
    rows = [(address, size, 0)] * repeat
    assert Bounds(table(region)).outside(Extents(table(rows))) == naive_outside(rows, region)


def test_rows_in_two_regions_that_touch_are_not_merged_across_the_seam() -> None:
    ours = RegionMap([Region(1000, 100), Region(1100, 100)])
    theirs = RegionMap([Region(5000, 200)])
    local, remote = Extents.of((1000, 100), (1100, 100)), Extents.of((5000, 100), (5100, 100))
    assert merge_checked(local, ours, remote, theirs) == (local, remote)
    assert len(merge_checked(Extents.of((1000, 50), (1050, 50)), ours, remote_half(), theirs)[0]) == 1
    with pytest.raises(ExtentError, match="local extent 1"):
        merge_checked(Extents.of((1000, 100), (1101, 100)), ours, remote, theirs)
    with pytest.raises(ExtentError, match="remote extent 1"):
        merge_checked(local, ours, Extents.of((5000, 100), (5101, 100)), theirs)


def remote_half() -> Extents:
    return Extents.of((5000, 50), (5050, 50))


def test_kinds_and_devices_are_kept_apart() -> None:
    held = RegionMap([Region(1000, 100), Region(1000, 100, MemoryKind.VRAM, device=1)])
    assert held.outside(Extents.of((1000, 100))) is None
    assert held.outside(Extents.of((1000, 100), device=1)) == 0
    assert held.outside(Extents.of((1000, 100), device=1, kind=MemoryKind.VRAM)) is None
    assert held.outside(Extents.of((1000, 100), device=0, kind=MemoryKind.VRAM)) == 0
    held.add(Region(2000, 10))
    assert held.outside(Extents.of((2000, 10))) is None


def test_a_table_of_another_shape_is_refused() -> None:
    good = np.zeros((4, 3), dtype=np.uint64)
    for bad in (good[:, :2], good.astype(np.int64), np.asfortranarray(good), good[::2], good[0]):
        with pytest.raises(ExtentError):
            Extents(bad)


def test_exports_survive_the_way_and_lies_do_not() -> None:
    held = [Region(4096, 100), Region((1 << 64) - 101, 100, MemoryKind.VRAM, device=3)]
    card = decode_export("nixl", encode_export("nixl", "p-1", held, b"data"))
    assert (card.name, card.data) == ("p-1", b"data")
    assert [(r.kind, r.address, r.bytes, r.device) for r in card.regions] == [
        (r.kind, r.address, r.bytes, r.device) for r in held
    ]
    for scheme, name, region in (
        ("tcp", "p", Region(1, 1)),
        ("nixl", "", Region(1, 1)),
        ("nixl", "p", Region((1 << 64) - 1, 1)),
        ("nixl", "p", Region(1, -1)),
        ("nixl", "p", Region(-1, 10)),
        ("nixl", "p", Region(1, 1, device=-1)),
    ):
        with pytest.raises(ConnectError):
            decode_export("nixl", encode_export(scheme, name, [region], b""))


@pytest.mark.parametrize(
    "region",
    [
        Region(0, 1),
        Region(1, 0),
        Region(1, -1),
        Region((1 << 64) - 1, 1),
        Region(1, 1, device=-1),
        Region(1, 1, MemoryKind.VRAM),
    ],
)
def test_impossible_regions_are_not_registered(region: Region) -> None:
    with pytest.raises(RegistrationError):
        check_region(region, frozenset({MemoryKind.DRAM}))
