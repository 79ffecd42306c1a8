"""Geometries, index maps, segments, windows and refusals: numbers only."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv import layout
from lmkv.errors import LayoutError
from lmkv.layout import Geometry, canonical_pages, part_maps, refusal, segments, vllm_cache, window

brief = settings(max_examples=200, deadline=None)


def model(order: str = "LBHNC", **sizes: Any) -> Geometry:
    given = {"layers": 2, "blocks": 3, "heads": 4, "block_tokens": 16, "parts": (32, 32)} | sizes
    return vllm_cache(order, **given)


def every_element(g: Geometry) -> np.ndarray:
    """(layers, blocks, heads, tokens, content): the element offset of every number."""
    b, h, n = np.arange(g.blocks), np.arange(g.heads), np.arange(g.block_tokens)
    found = []
    for part, size in zip(part_maps(g), g.parts, strict=True):
        d = np.arange(size)
        found.append(part.element(b[:, None, None, None], h[:, None, None], n[:, None], d))
    one = np.concatenate(found, axis=-1)
    return np.asarray([one + layer * g.strides[0] for layer in range(g.layers)])


@pytest.mark.parametrize("order", layout.ORDERS)
def test_an_order_is_the_engines_permuted_tensor(order: str) -> None:
    g = model(order)
    sizes = {"L": 2, "B": 3, "H": 4, "N": 16, "C": 64}
    dense = np.arange(np.prod(list(sizes.values()))).reshape([sizes[axis] for axis in order])
    assert np.array_equal(every_element(g), dense.transpose([order.index(axis) for axis in "LBHNC"]))
    assert g.span_bytes() == dense.size * 2


@pytest.mark.parametrize("interior", layout.INTERIORS)
@pytest.mark.parametrize("order", ["LBHNC", "LHBNC", "BLHNC", "BHLNC"])
def test_an_interior_permutes_each_area_within_itself(order: str, interior: str) -> None:
    g = model(order, interior=interior, block_tokens=32)
    area = 32 * 64
    found = np.sort(every_element(g).reshape(2 * 3 * 4, area), axis=1)
    assert np.array_equal(found % area, np.tile(np.arange(area), (24, 1)))
    assert len(np.unique(found)) == found.size


def test_canonical_pages_are_dense_in_the_order_of_the_format() -> None:
    pages = canonical_pages(model("LBNHC"), page_tokens=64, pages=2)
    found = every_element(pages)  # L, pages, H, N, K and V
    dense = np.arange(found.size).reshape(2, 4, 2, 2, 64, 32)  # pages, H, L, K and V, N, D
    wanted = dense.transpose(2, 0, 1, 4, 3, 5).reshape(found.shape)
    assert np.array_equal(found, wanted)
    assert layout.page_bytes(pages) == found.size // 2 * 2 == pages.span_bytes() // 2


def test_a_share_of_a_page_keeps_its_place_in_the_model() -> None:
    share = canonical_pages(model(layers=4), page_tokens=64, heads=(1, 3), layers=(2, 3), dtype="float32")
    assert (share.first_head, share.heads, share.first_layer, share.layers) == (1, 2, 2, 1)
    assert (share.model_heads, share.model_layers, share.width) == (4, 4, 4)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "LBHCN"}, "order 'LBHCN' is unknown"),
    "interior": ({"interior": "neon"}, "interior 'neon' is unknown"),
    "dtype": ({"dtype": "float64"}, "dtype 'float64' is unknown"),
    "no heads": ({"heads": 0}, "sizes from 1 up"),
    "no tokens": ({"block_tokens": 0}, "sizes from 1 up"),
    "three parts": ({"parts": (8, 8, 8)}, "one or two parts"),
    "empty part": ({"parts": (8, 0)}, "sizes from 1 up"),
    "too many heads": ({"first_head": 2, "total_heads": 5}, "exceed the model's 5 and 2"),
    "too many layers": ({"first_layer": 1, "total_layers": 2}, "exceed the model's 4 and 2"),
    "tokens apart": ({"order": "LBNHC", "interior": "vec"}, "tokens of a head side by side"),
    "packed latent": ({"parts": (576,), "heads": 1, "interior": "vec"}, "K and V of one size"),
    "packed parts that differ": ({"parts": (32, 16), "interior": "vec16"}, "K and V of one size"),
    "amx tokens": ({"interior": "amx", "block_tokens": 24}, "in sixteens"),
    "amx dimensions": ({"interior": "amx", "parts": (40, 40)}, "in sixteens"),
    "amx width": ({"interior": "amx", "dtype": "float32"}, "2-byte elements"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_engine_has_is_refused(name: str) -> None:
    sizes, why = IMPOSSIBLE[name]
    with pytest.raises(LayoutError, match=why):
        model(**sizes)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Geometry, Geometry, int, int, tuple[int, int], np.ndarray, np.ndarray]:
    """Two block sizes whose grids begin anywhere, and tokens that lie in both."""
    a, b = (model(block_tokens=draw(st.integers(1, 40))) for _ in range(2))
    first_a, first_b = draw(st.integers(0, 50)), draw(st.integers(0, 50))
    lo = max(first_a, first_b) + draw(st.integers(0, 60))
    hi = lo + draw(st.integers(0, 200))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    ids_a, ids_b = (
        rng.permutation(-(-(hi - first) // g.block_tokens)) + 1 for g, first in ((a, first_a), (b, first_b))
    )
    ids_b[rng.random(len(ids_b)) < draw(st.sampled_from((0, 0.3)))] = -1
    return a, b, first_a, first_b, (lo, hi), ids_a, ids_b


@brief
@given(grids())
def test_segments_hold_every_wanted_token_once(
    grid: tuple[Geometry, Geometry, int, int, tuple[int, int], np.ndarray, np.ndarray],
) -> None:
    a, b, first_a, first_b, (lo, hi), ids_a, ids_b = grid
    table = segments(a, b, ids_a, ids_b, (lo, hi), source_first=first_a, target_first=first_b)
    assert table.dtype == np.int32
    found = [(source, n + i, target, m + i) for source, n, target, m, count in table.tolist() for i in range(count)]
    wanted = []
    for token in range(lo, hi):
        at_a, n = divmod(token - first_a, a.block_tokens)
        at_b, m = divmod(token - first_b, b.block_tokens)
        if ids_b[at_b] >= 0:
            wanted.append((ids_a[at_a], n, ids_b[at_b], m))
    assert found == wanted


@brief
@given(grids())
def test_segments_are_as_long_as_can_be(
    grid: tuple[Geometry, Geometry, int, int, tuple[int, int], np.ndarray, np.ndarray],
) -> None:
    a, b, first_a, first_b, tokens, ids_a, ids_b = grid
    table = segments(a, b, ids_a, ids_b, tokens, source_first=first_a, target_first=first_b)
    assert np.all(table[:, 4] >= 1)
    for before, after in zip(table[:-1].tolist(), table[1:].tolist(), strict=True):
        joins = before[0] == after[0] and before[2] == after[2]
        assert not (joins and before[1] + before[4] == after[1] and before[3] + before[4] == after[3])


@pytest.mark.parametrize(
    ("tokens", "first", "side"), [((0, 49), 0, "source"), ((3, 20), 4, "source"), ((0, 33), 0, "target")]
)
def test_tokens_without_a_block_are_refused(tokens: tuple[int, int], first: int, side: str) -> None:
    g = model()
    with pytest.raises(LayoutError, match=f"not in the {side}'s"):
        segments(g, g, [0, 1, 2], [0, 1] if side == "target" else [0, 1, 2, 0], tokens, source_first=first)


def test_a_window_is_what_both_have() -> None:
    a = model(layers=6, heads=3, first_head=1, first_layer=2, total_heads=8, total_layers=10)
    b = model(layers=4, heads=4, first_head=2, first_layer=0, total_heads=8, total_layers=10)
    w = window(a, b)
    assert (w.source_head, w.target_head, w.heads) == (1, 0, 2)
    assert (w.source_layer, w.target_layer, w.layers) == (0, 2, 2)


@brief
@given(st.data())
def test_a_window_has_the_heads_and_layers_that_sets_share(data: st.DataObject) -> None:
    def share() -> Geometry:
        head, layer = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 5))
        return model(
            heads=data.draw(st.integers(1, 8 - head)),
            layers=data.draw(st.integers(1, 6 - layer)),
            first_head=head,
            first_layer=layer,
            total_heads=8,
            total_layers=6,
        )

    a, b = share(), share()
    heads = {*range(a.first_head, a.first_head + a.heads)} & {*range(b.first_head, b.first_head + b.heads)}
    layers = {*range(a.first_layer, a.first_layer + a.layers)} & {*range(b.first_layer, b.first_layer + b.layers)}
    if not heads or not layers:
        with pytest.raises(LayoutError, match="no heads and layers in common"):
            window(a, b)
        return
    w = window(a, b)
    for side, head, layer in ((a, w.source_head, w.source_layer), (b, w.target_head, w.target_layer)):
        assert {*range(side.first_head + head, side.first_head + head + w.heads)} == heads
        assert {*range(side.first_layer + layer, side.first_layer + layer + w.layers)} == layers


@pytest.mark.parametrize(
    ("change", "allowed", "why"),
    [
        ({}, False, ""),
        ({"blocks": 7}, False, ""),
        ({"interior": "split"}, False, ""),
        ({"parts": (64,)}, True, "a token has parts of"),
        ({"total_heads": 8}, True, "layers of 4 heads, the target's 2 of 8"),
        ({"total_layers": 4}, True, "the target's 4 of 4"),
        ({"dtype": "float16"}, False, "it has to be allowed"),
        ({"dtype": "float16"}, True, ""),
        ({"dtype": "int8"}, True, "bfloat16 is not converted to int8"),
        ({"dtype": "float8_e4m3fn"}, True, "is not converted"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], allowed: bool, why: str) -> None:
    found = refusal(model(), msgspec.structs.replace(model(), **change), convert_dtype=allowed)
    assert (why in found) if why else not found
