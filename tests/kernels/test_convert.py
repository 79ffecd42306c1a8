"""The compiled ops and the reference in torch: both are what the oracle says, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkv import kernels, layout, oracle
from lmkv.errors import KernelError, LayoutError
from lmkv.kernels import Cache, convert_blocks, pack_pages, unpack_pages
from lmkv.layout import Geometry, Segments, canonical_pages, segments, vllm_cache

from .geometries import Pair, cache, pairs, place, same, torch_reference, unsigned

pytestmark = pytest.mark.skipif("cpu" not in kernels.loaded, reason="no compiled library for the CPU is loaded")
thorough = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
brief = settings(thorough, max_examples=40)

Op = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small calls: where others use the cores too, waiting for threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(order: str = "LBHNC", n: int = 16, *, interior: str = "plain", **sizes: Any) -> Geometry:
    given = {"layers": 2, "heads": 4, "parts": (32, 32), "blocks": 512 // n} | sizes
    return vllm_cache(order, block_tokens=n, interior=interior, **given)


def all_tokens(source: Geometry, target: Geometry, lo: int = 0, hi: int = 512) -> Segments:
    """In blocks that lie in an order of their own wherever there are as many."""
    ids = [np.random.default_rng(3).permutation(g.blocks) for g in (source, target)]
    return segments(source, target, *ids, (lo, hi))


def prove(op: Op, pair: Pair, *, pages: str = "") -> None:
    """Compiled = reference = oracle; of the target nothing else is written, of the source nothing at all."""
    source, wanted = place(pair.source, pair.seed), place(pair.target, pair.seed + 1)
    before, compiled, by_torch = source.data.copy(), same(wanted), same(wanted)
    oracle.convert(source, wanted, pair.segments)
    sums = op(cache(source), cache(compiled), pair.segments, convert_dtype=True)
    with torch_reference():
        torch_sums = op(cache(source), cache(by_torch), pair.segments, convert_dtype=True)
    assert np.array_equal(by_torch.data, wanted.data)
    assert np.array_equal(compiled.data, wanted.data)
    assert np.array_equal(source.data, before)
    if pages:
        assert unsigned(sums) == unsigned(torch_sums)
        at_source = pages == "source"
        place_of_pages = shared(source if at_source else wanted, pair.target if at_source else pair.source)
        assert unsigned(sums) == list(oracle.page_sums(place_of_pages, pair.segments, pages_are_source=at_source))


def shared(pages: oracle.Place, other: Geometry) -> oracle.Place:
    """The heads and layers of `pages` that `other` has too: only they are summed."""
    g = pages.geometry
    w = layout.window(g, other)
    start = w.source_layer * g.strides[0] + w.source_head * g.strides[2]
    share = Geometry(
        w.layers,
        g.blocks,
        w.heads,
        g.block_tokens,
        g.parts,
        g.strides,
        g.interior,
        g.dtype,
        g.first_layer + w.source_layer,
        g.first_head + w.source_head,
        g.model_layers,
        g.model_heads,
    )
    first = w.source_head * g.strides[2] * g.width
    assert start >= 0
    return oracle.Place(pages.data, pages.layers[w.source_layer : w.source_layer + w.layers] + first, share)


@thorough
@given(pairs())
def test_any_geometry_becomes_any_other(pair: Pair) -> None:
    prove(convert_blocks, pair)


@thorough
@given(pairs(to_pages=True))
def test_pages_are_packed_and_summed(pair: Pair) -> None:
    prove(pack_pages, pair, pages="target")


@thorough
@given(pairs(to_pages=True))
def test_pages_are_unpacked_and_summed(pair: Pair) -> None:
    back = Pair(pair.target, pair.source, pair.segments[:, [2, 3, 0, 1, 4]], pair.seed)
    prove(unpack_pages, back, pages="source")


@brief
@given(pairs(converts=False))
def test_the_way_back_restores_every_number(pair: Pair) -> None:
    source, between = place(pair.source, pair.seed), place(pair.target, 1)
    back = same(source)
    back.data[:] ^= 0xFF
    wanted = same(back)
    convert_blocks(cache(source), cache(between), pair.segments)
    convert_blocks(cache(between), cache(back), pair.segments[:, [2, 3, 0, 1, 4]])
    w = layout.window(pair.source, pair.target)
    for layer in range(w.source_layer, w.source_layer + w.layers):
        for part in range(len(pair.source.parts)):
            for head in range(w.source_head, w.source_head + w.heads):
                for block, token, _, _, count in pair.segments.tolist():
                    tokens = np.arange(token, token + count)
                    at = oracle.element_bytes(source, layer, part, head, np.full(count, block), tokens)
                    at = at[..., None] + np.arange(pair.source.width)
                    wanted.data[at] = source.data[at]
    assert np.array_equal(back.data, wanted.data)


LARGE = {"layers": 8, "heads": 4, "parts": (64, 64)}
"""More than 4 MiB: written past the caches where a target's lines are whole."""


SIDES = [
    (("LBNHC", 32, "plain"), ("LBHNC", 128, "plain")),
    (("LBHNC", 128, "vec"), ("LBHNC", 64, "plain")),
    (("LBNHC", 16, "plain"), ("LBHNC", 128, "vec")),
    (("BLNHC", 16, "plain"), ("LHBNC", 32, "plain")),
    (("LBNHC", 16, "plain"), ("LBHNC", 128, "amx")),
    (("LBHNC", 64, "amx"), ("LBHNC", 32, "vec")),
]


@pytest.mark.parametrize(
    ("dtype", "source", "target"),
    [("bfloat16", *sides) for sides in SIDES] + [(t, *sides) for t in ("float32", "uint8") for sides in SIDES[:4]],
)
@pytest.mark.parametrize("lo", [0, 21])
def test_large_calls(dtype: str, source: tuple[str, int, str], target: tuple[str, int, str], lo: int) -> None:
    tokens = {"bfloat16": 640, "float32": 384, "uint8": 1152}[dtype]
    a, b = (
        model(order, n, interior=interior, dtype=dtype, **LARGE | {"blocks": tokens // n})
        for order, n, interior in (source, target)
    )
    pages = canonical_pages(a, page_tokens=256, pages=-(-tokens // 256))
    there, packed, back = place(a, 1), place(pages, 2), place(b, 3)
    for op, src, dst in ((convert_blocks, there, back), (pack_pages, there, packed), (unpack_pages, packed, back)):
        table = all_tokens(src.geometry, dst.geometry, lo, tokens)
        wanted = same(dst)
        sums = op(cache(src), cache(dst), table)
        with torch_reference():
            torch_sums = op(cache(src), cache(wanted), table)
        assert np.array_equal(dst.data, wanted.data)
        assert sums is None or torch.equal(sums, torch_sums)


def test_threads_share_one_long_segment() -> None:
    a = model("LBNHC", 512, **LARGE | {"blocks": 2})
    b = canonical_pages(a, page_tokens=512, pages=2)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            source, target = place(a, 1), place(b, 2)
            sums = pack_pages(cache(source), cache(target), all_tokens(a, b, 0, 1024))
            found.append((unsigned(sums), target.data))
    finally:
        torch.set_num_threads(threads)
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


LIMITS = """
    00000000 00000001 007fffff 00800000 33000000 33000001 387fc000 387fe000 38800000 477fe000 477fefff 477ff000
    47800000 7f7fffff 7f7f8000 7f800000 7f800001 7fbfffff 7fc00000 7fffffff 3f808000 3f818000 3f801000 3f803000
"""
"""Of float32: where it is subnormal, infinite, no number, or half way between two numbers of 2 bytes."""


@pytest.mark.parametrize("source_type", layout.FLOATS)
@pytest.mark.parametrize("target_type", layout.FLOATS)
def test_every_kind_of_number_is_cast_alike(source_type: str, target_type: str) -> None:
    """All 65536 numbers of 2 bytes; of 4 bytes the limits of rounding, both signs, and random ones."""
    if source_type == "float32":
        positive = np.array([int(word, 16) for word in LIMITS.split()], dtype=np.uint32)
        limits = np.concatenate([positive, positive | np.uint32(1 << 31)])
        random = np.random.default_rng(0).integers(0, 2**32, 65536 - len(limits), dtype=np.uint32)
        numbers = np.concatenate([limits, random]).view(np.uint8)
    else:
        numbers = np.arange(65536, dtype=np.uint16).view(np.uint8)
    a, b = (
        vllm_cache("LBHNC", layers=1, blocks=1, heads=1, block_tokens=256, parts=(256,), dtype=dtype)
        for dtype in (source_type, target_type)
    )
    source, wanted = oracle.Place.of(numbers.copy(), a), oracle.Place.of(np.zeros(b.span_bytes(), dtype=np.uint8), b)
    compiled, by_torch, table = same(wanted), same(wanted), segments(a, b, [0], [0], (0, 256))
    oracle.convert(source, wanted, table)
    convert_blocks(cache(source), cache(compiled), table, convert_dtype=True)
    with torch_reference():
        convert_blocks(cache(source), cache(by_torch), table, convert_dtype=True)
    kind = f"<u{b.width}"
    differs = np.flatnonzero(compiled.data.view(kind) != wanted.data.view(kind))
    assert not len(differs), [hex(x) for x in numbers.view(f"<u{a.width}")[differs[:8]]]
    differs = np.flatnonzero(by_torch.data.view(kind) != wanted.data.view(kind))
    assert not len(differs), [hex(x) for x in numbers.view(f"<u{a.width}")[differs[:8]]]


@pytest.mark.parametrize("interior", ["plain", "vec", "amx"])
def test_heads_and_layers_may_be_shared_out_and_gathered(interior: str) -> None:
    """One rank to four, each to two others, by pipeline stages of one layer: nothing is lost on the way."""
    sizes = {"heads": 8, "total_heads": 8, "total_layers": 2}
    whole = model("LBNHC", 16, **sizes)
    source = place(whole, 1)
    quarters = [
        place(model("LBHNC", 32, interior=interior, **sizes | {"heads": 2, "first_head": 2 * i}), i) for i in range(4)
    ]
    stages = [
        place(model("LHBNC", 64, **sizes | {"heads": 4, "first_head": 4 * i, "layers": 1, "first_layer": j}), i + j)
        for i in range(2)
        for j in range(2)
    ]
    direct = [same(stage) for stage in stages]
    for quarter in quarters:
        convert_blocks(cache(source), cache(quarter), all_tokens(whole, quarter.geometry))
    for stage, wanted in zip(stages, direct, strict=True):
        for quarter in quarters:
            if layout_overlaps(quarter.geometry, stage.geometry):
                convert_blocks(cache(quarter), cache(stage), all_tokens(quarter.geometry, stage.geometry))
        oracle.convert(source, wanted, all_tokens(whole, wanted.geometry))
        assert np.array_equal(stage.data, wanted.data)


def layout_overlaps(a: Geometry, b: Geometry) -> bool:
    return a.first_head < b.first_head + b.heads and b.first_head < a.first_head + a.heads


def test_checksums_of_shares_add_up_to_the_whole() -> None:
    whole = model("LBNHC", 16, layers=4, heads=4)
    source = place(whole, 1)
    pages = place(canonical_pages(whole, page_tokens=256, pages=2), 2)
    table = all_tokens(whole, pages.geometry)
    wanted = unsigned(pack_pages(cache(source), cache(pages), table))
    assert len(set(wanted)) == 2
    for heads, layers in (
        ([(0, 1), (1, 4)], [(0, 4)]),
        ([(0, 4)], [(0, 3), (3, 4)]),
        ([(0, 2), (2, 4)], [(0, 2), (2, 4)]),
    ):
        sums = [0, 0]
        for head in heads:
            for layer in layers:
                share = place(canonical_pages(whole, page_tokens=256, pages=2, heads=head, layers=layer), 3)
                found = unsigned(pack_pages(cache(source), cache(share), table))
                sums = [(a + b) % 2**64 for a, b in zip(sums, found, strict=True)]
        assert sums == wanted
    halves = [unsigned(pack_pages(cache(source), cache(pages), table[rows])) for rows in (slice(0, 5), slice(5, None))]
    assert [(a + b) % 2**64 for a, b in zip(*halves, strict=True)] == wanted


@brief
@given(st.integers(0, 2**32 - 1), st.sampled_from([(64, 64), (20, 3), (33,)]), st.sampled_from(["bfloat16", "int8"]))
def test_any_flipped_bit_changes_its_pages_checksum_and_no_other(seed: int, parts: tuple[int, ...], dtype: str) -> None:
    heads = 2 if len(parts) == 2 else 1
    whole = model(parts=parts, dtype=dtype, heads=heads)
    g = canonical_pages(whole, page_tokens=256, pages=2)
    pages, target = (
        oracle.Place.of(np.random.default_rng(seed).integers(0, 256, g.span_bytes(), dtype=np.uint8), g),
        place(whole, 2),
    )
    table = all_tokens(g, whole)
    before = unsigned(unpack_pages(cache(pages), cache(target), table))
    bit = seed % (8 * len(pages.data))
    pages.data[bit // 8] ^= 1 << (bit % 8)
    after = unsigned(unpack_pages(cache(pages), cache(target), table))
    hit = bit // 8 // layout.page_bytes(g)
    assert [a != b for a, b in zip(after, before, strict=True)] == [page == hit for page in range(2)]


def test_swapped_rows_change_the_checksum() -> None:
    g = canonical_pages(model(), page_tokens=256)
    pages, target = place(g, 1), place(model(), 2)
    table = segments(g, target.geometry, [0], range(16), (0, 256))
    before = unsigned(unpack_pages(cache(pages), cache(target), table))
    rows = pages.data[pages.layers[0] : pages.layers[0] + 128].reshape(2, 64)
    rows[:] = rows[::-1].copy()
    assert unsigned(unpack_pages(cache(pages), cache(target), table)) != before


def test_no_segments_write_nothing() -> None:
    a, pages = place(model(), 1), place(canonical_pages(model(), page_tokens=256), 2)
    before = pages.data.copy()
    assert unsigned(pack_pages(cache(a), cache(pages), np.empty((0, 5), dtype=np.int32))) == [0]
    assert np.array_equal(pages.data, before)


REFUSED = {
    "parts differ": (model(), model(parts=(32, 16)), "parts of"),
    "other model": (model(), model(heads=2), "heads"),
    "no conversion asked for": (model(), model(dtype="float16"), "convert_dtype"),
    "bytes are no numbers": (model(dtype="int8"), model(), "is not converted"),
    "nothing in common": (
        model(heads=2, total_heads=4),
        model(heads=2, first_head=2, total_heads=4),
        "no heads and layers in common",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused(name: str) -> None:
    a, b, why = REFUSED[name]
    source, target = place(a, 1), place(b, 2)
    before = target.data.copy()
    with pytest.raises(LayoutError, match=why):
        convert_blocks(cache(source), cache(target), np.array([[0, 0, 0, 0, 1]], dtype=np.int32))
    assert np.array_equal(target.data, before)


def test_pages_have_the_interior_split() -> None:
    with pytest.raises(LayoutError, match="'split', not 'plain'"):
        pack_pages(cache(place(model(), 1)), cache(place(model(), 2)), np.array([[0, 0, 0, 0, 1]]))


def test_every_layer_has_an_offset() -> None:
    with pytest.raises(LayoutError, match="1 layer offsets for a geometry of 2"):
        Cache.of(torch.zeros(model().span_bytes(), dtype=torch.uint8), model(), [0])


BAD_SEGMENTS = {
    "source block": ([99, 0, 0, 0, 1], "source of .* too small"),
    "target block": ([0, 0, 99, 0, 1], "target of .* too small"),
    "negative": ([0, -1, 0, 0, 1], "segment 1 has a negative field"),
    "no tokens": ([0, 0, 0, 0, 0], "segment 1 has a negative field or no tokens"),
}


@pytest.mark.parametrize("name", BAD_SEGMENTS)
@pytest.mark.parametrize("op", [convert_blocks, pack_pages])
def test_bad_segments_raise_before_anything_is_written(name: str, op: Op) -> None:
    row, why = BAD_SEGMENTS[name]
    a, b = model(), canonical_pages(model(), page_tokens=16, pages=4)
    source, target = place(a, 1), place(b, 2)
    before = target.data.copy()
    with pytest.raises(KernelError, match=why):
        op(cache(source), cache(target), np.array([[0, 0, 0, 0, 1], row], dtype=np.int32))
    assert np.array_equal(target.data, before)
