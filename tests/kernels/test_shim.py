"""The bodies of the GPU kernels, run on the CPU, against the oracle: bit for bit, guard bytes included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkv import layout, oracle
from lmkv.errors import KernelError
from lmkv.kernels import convert_blocks, ops, pack_pages, unpack_pages
from lmkv.layout import Geometry, canonical_pages, segments, vllm_cache

from . import places, shim
from .places import Pair, Shift

pytestmark = pytest.mark.usefixtures("shim_library")

WIDE = settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
grids = st.sampled_from((1, 2, 5, 64, 1000))
packets = st.sampled_from(shim.PACKETS)
ALIGNED = Shift()
seeds = st.integers(0, 2**32 - 1)


def convert_and_compare(pair: Pair, seed: int, *, warps: int, widest: int) -> None:
    source = places.random(pair.source, pair.shifts[0], seed, quiet=pair.converts)
    got = places.empty(pair.target, pair.shifts[1])
    wanted = places.copy(got)
    oracle.convert(source, wanted, pair.segments)
    with shim.running(warps=warps, widest_packet=widest):
        convert_blocks(places.cache(source), places.cache(got), pair.segments, convert_dtype=True)
    np.testing.assert_array_equal(got.data, wanted.data)


def pack_and_compare(pair: Pair, seed: int, *, warps: int, widest: int) -> None:
    """Into pages and out again."""
    source = places.random(pair.source, pair.shifts[0], seed, quiet=pair.converts)
    got = places.empty(pair.target, pair.shifts[1])
    wanted = places.copy(got)
    oracle.convert(source, wanted, pair.segments)
    back_table = np.ascontiguousarray(pair.segments[:, [2, 3, 0, 1, 4]])
    back = places.empty(pair.source, pair.shifts[0])
    back_wanted = places.copy(back)
    oracle.convert(wanted, back_wanted, back_table)
    window = layout.window(pair.source, pair.target)
    sums_wanted = page_sums(wanted, pair, window)
    with shim.running(warps=warps, widest_packet=widest):
        sums = pack_pages(places.cache(source), places.cache(got), pair.segments, convert_dtype=True)
        np.testing.assert_array_equal(got.data, wanted.data)
        np.testing.assert_array_equal(sums.numpy().view(np.uint64), sums_wanted)
        sums = unpack_pages(places.cache(wanted), places.cache(back), back_table, convert_dtype=True)
    np.testing.assert_array_equal(back.data, back_wanted.data)
    np.testing.assert_array_equal(sums.numpy().view(np.uint64), sums_wanted)


def page_sums(page: oracle.Place, pair: Pair, w: layout.Window) -> np.ndarray:
    """Of the heads and layers that were converted only, as a page of its own within the same memory."""
    g = page.geometry
    share = Geometry(
        layers=w.layers,
        blocks=g.blocks,
        heads=w.heads,
        block_tokens=g.block_tokens,
        parts=g.parts,
        strides=g.strides,
        interior=g.interior,
        dtype=g.dtype,
        first_layer=g.first_layer + w.target_layer,
        first_head=g.first_head + w.target_head,
        total_layers=g.model_layers,
        total_heads=g.model_heads,
    )
    head_bytes = g.strides[2] * g.width * w.target_head
    offsets = page.layers[w.target_layer : w.target_layer + w.layers] + head_bytes
    return oracle.page_sums(oracle.Place(page.data, offsets, share), pair.segments)


@WIDE
@given(pair=places.pairs(), seed=seeds, warps=grids, widest=packets)
def test_converts_as_the_oracle(pair: Pair, seed: int, warps: int, widest: int) -> None:
    convert_and_compare(pair, seed, warps=warps, widest=widest)


@WIDE
@given(pair=places.pairs(to_page=True), seed=seeds, warps=grids, widest=packets)
def test_packs_and_unpacks_as_the_oracle(pair: Pair, seed: int, warps: int, widest: int) -> None:
    pack_and_compare(pair, seed, warps=warps, widest=widest)


def cache_of(**changes: object) -> Geometry:
    order = str(changes.pop("order", "LBHNC"))
    fields = {"layers": 5, "blocks": 9, "heads": 3, "block_tokens": 16, "parts": (32, 32), **changes}
    return vllm_cache(order, **fields)  # type: ignore[arg-type]


def whole(source: Geometry, target: Geometry, shift: Shift = ALIGNED) -> Pair:
    tokens = 131
    table = segments(source, target, np.arange(source.blocks), np.arange(target.blocks), (3, tokens))
    return Pair(source, target, table, (shift, shift))


FLOAT_PAIRS = [(a, b) for a in layout.FLOATS for b in layout.FLOATS if a != b]


@pytest.mark.parametrize("warps", [1, 3, 500])
@pytest.mark.parametrize("widest", shim.PACKETS)
def test_every_packet(widest: int, warps: int) -> None:
    """Five layers and over a dozen segments are several launches of the shim's small batches."""
    pair = whole(cache_of(order="LBNHC"), cache_of(block_tokens=48, blocks=3))
    convert_and_compare(pair, 1, warps=warps, widest=widest)
    source = cache_of(order="LBNHC")
    pack_and_compare(whole(source, canonical_pages(source, page_tokens=64, pages=3)), 2, warps=warps, widest=widest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("interior", ["vec", "amx"])
def test_every_width_of_elements(interior: str, dtype: str) -> None:
    if interior == "amx" and dtype != "bfloat16":
        interior = "vec16"
    source, target = cache_of(dtype=dtype), cache_of(dtype=dtype, interior=interior, blocks=5, block_tokens=32)
    convert_and_compare(whole(source, target), 3, warps=7, widest=16)
    convert_and_compare(whole(target, source), 4, warps=7, widest=16)
    pages = canonical_pages(target, page_tokens=64, pages=3)
    pack_and_compare(whole(target, pages), 5, warps=7, widest=16)


@pytest.mark.parametrize(("source_type", "target_type"), FLOAT_PAIRS)
def test_every_conversion_of_types(source_type: str, target_type: str) -> None:
    source = cache_of(dtype=source_type)
    convert_and_compare(whole(source, cache_of(dtype=target_type, order="BLHNC")), 6, warps=7, widest=16)
    pages = canonical_pages(source, page_tokens=64, pages=3, dtype=target_type)
    pack_and_compare(whole(source, pages), 7, warps=7, widest=16)


def test_segments_of_nothing_write_nothing() -> None:
    source, target = cache_of(), cache_of(order="LBNHC")
    pair = Pair(source, target, np.empty((0, 5), dtype=np.int32))
    convert_and_compare(pair, 8, warps=2, widest=16)


def deal(source: Geometry, target: Geometry, shift: Shift = ALIGNED) -> list[int]:
    """What the host decides; see csrc/tests/shim_convert.cpp."""
    pair = whole(source, target, shift)
    here, there = (places.cache(places.empty(g, shift)) for g in (source, target))
    taken: list[list[int]] = []

    def ask(*args: object) -> None:
        taken.append(list(torch.ops.lmkv_shim.deal(*args)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.lmkv, "convert_blocks", ask)
        ops.convert_blocks(here, there, pair.segments, convert_dtype=True)
    return taken[0]


@pytest.mark.parametrize(
    ("source", "target", "shift", "packet"),
    [
        ({}, {"order": "LBNHC"}, ALIGNED, 16),
        ({}, {"order": "LBNHC"}, Shift(base=8), 8),
        ({}, {"order": "LBNHC"}, Shift(layers=12), 4),
        ({}, {"order": "LBNHC"}, Shift(base=2), 2),
        ({}, {"order": "LBNHC"}, Shift(layers=8, base=1), 1),
        ({"parts": (20, 20)}, {"parts": (20, 20), "order": "LBNHC"}, ALIGNED, 16),
        ({"parts": (20, 20)}, {"parts": (20, 20), "interior": "split"}, ALIGNED, 8),
        ({"parts": (33, 33)}, {"parts": (33, 33), "interior": "split"}, ALIGNED, 2),
        ({"parts": (33,), "heads": 1}, {"parts": (33,), "heads": 1, "block_tokens": 32}, ALIGNED, 2),
        ({"parts": (576,), "heads": 1}, {"parts": (576,), "heads": 1, "block_tokens": 32}, ALIGNED, 16),
        ({"interior": "amx"}, {}, ALIGNED, 0),
        ({"dtype": "float32"}, {}, ALIGNED, 0),
    ],
)
def test_packets_are_as_wide_as_the_layout_allows(
    source: dict[str, object], target: dict[str, object], shift: Shift, packet: int
) -> None:
    assert deal(cache_of(**source), cache_of(**target), shift)[0] == packet


def test_rows_that_follow_each_other_on_both_sides_are_merged() -> None:
    merged = slice(2, 4)
    assert deal(cache_of(), cache_of(block_tokens=32))[merged] == [1, 0]
    assert deal(cache_of(), cache_of(order="LBNHC"))[merged] == [0, 0]
    assert deal(cache_of(interior="split"), cache_of(interior="split", block_tokens=32))[merged] == [1, 1]


@pytest.mark.parametrize(
    ("target", "tokens_first"), [("plain", [0, 0]), ("split", [0, 0]), ("vec", [1, 0]), ("amx", [1, 0])]
)
def test_lanes_lie_along_what_the_target_has_side_by_side(target: str, tokens_first: list[int]) -> None:
    source = "vec" if target in ("plain", "split") else "plain"
    decided = deal(
        cache_of(interior=source, parts=(64, 64), block_tokens=32), cache_of(interior=target, parts=(64, 64))
    )
    assert decided[4:6] == tokens_first


def test_elements_across_alignments_are_refused() -> None:
    pair = whole(cache_of(), cache_of(interior="vec"), Shift(layers=1))
    with pytest.raises(KernelError, match=r"layer 0 at byte \d+ is not aligned to its elements of 2 bytes"):
        convert_and_compare(pair, 9, warps=1, widest=16)
