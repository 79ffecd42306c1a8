"""rotate_keys: compiled op = reference in torch = the GPU's body = oracle, bit for bit, guard bytes included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkv import layout, oracle
from lmkv.errors import LayoutError
from lmkv.kernels import rotate, rotate_keys
from lmkv.layout import Geometry, canonical_pages, vllm_cache
from lmkv.rope import Rope

from . import bodies, places
from .places import Shift

WIDE = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Work = tuple[np.ndarray, np.ndarray, Rope]


def rope(pairs: int, *, interleaved: bool = False, first: int = 0) -> Rope:
    return Rope((10000.0 ** -(np.arange(pairs) / pairs)).astype(np.float32), interleaved, first)


def compiled(place: oracle.Place, work: Work) -> None:
    rotate_keys(places.cache(place), *work)


def in_torch(place: oracle.Place, work: Work) -> None:
    with bodies.swapped("rotate_keys", rotate.reference):
        rotate_keys(places.cache(place), *work)


def on_warps(warps: int) -> Callable[[oracle.Place, Work], None]:
    def run(place: oracle.Place, work: Work) -> None:
        with bodies.running("rotate_keys", warps):
            rotate_keys(places.cache(place), *work)

    return run


def compare(
    g: Geometry, shift: Shift, seed: int, work: Work, *implementations: Callable[[oracle.Place, Work], None]
) -> None:
    wanted = places.random(g, shift, seed)
    oracle.rotate(wanted, *work)
    for implementation in implementations:
        got = places.random(g, shift, seed)
        implementation(got, work)
        np.testing.assert_array_equal(got.data, wanted.data)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, Shift, Work]:
    parts, heads, layers, _, _ = draw(places.models())
    dtype = draw(st.sampled_from(layout.FLOATS))
    parts = (parts[0] + parts[0] % 2, *parts[1:])
    g = draw(places.caches(parts=parts, heads=heads, layers=layers, dtype=dtype, tokens=draw(st.integers(1, 80))))
    pairs = draw(st.one_of(st.integers(1, parts[0] // 2), st.just(parts[0] // 2)))
    first = draw(st.one_of(st.just(0), st.integers(0, parts[0] - 2 * pairs)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.permutation(g.blocks)[: draw(st.integers(1, g.blocks))]
    firsts = rng.integers(0, g.block_tokens, len(blocks))
    runs = np.stack([blocks, firsts, rng.integers(1, g.block_tokens - firsts + 1)], axis=1).astype(np.int32)
    offsets = rng.choice([0, 1, -3, 17, 4096, -131071, 2**28 + 1], len(runs))
    shift = Shift(*(rng.integers(0, 3, 2) * rng.choice([g.width, 16])))
    return g, shift, (runs, offsets, rope(pairs, interleaved=draw(st.booleans()), first=first))


@WIDE
@given(case=cases(), seed=st.integers(0, 2**32 - 1), warps=st.sampled_from((1, 2, 5, 64)))
def test_all_agree_with_the_oracle(
    shim_library: object, case: tuple[Geometry, Shift, Work], seed: int, warps: int
) -> None:
    """Random bytes have NaNs, infinities and subnormals among them."""
    g, shift, work = case
    compare(g, shift, seed, work, compiled, in_torch, on_warps(warps))


def cache_of(**changes: object) -> Geometry:
    order = str(changes.pop("order", "LBHNC"))
    fields = {"layers": 5, "blocks": 9, "heads": 3, "block_tokens": 32, "parts": (64, 64), **changes}
    return vllm_cache(order, **fields)  # type: ignore[arg-type]


def all_but_a_few(g: Geometry) -> np.ndarray:
    blocks = np.arange(g.blocks)
    return np.stack([blocks, blocks % 2, np.full(g.blocks, g.block_tokens - 2)], axis=1).astype(np.int32)


GEOMETRIES = [
    *({"order": order} for order in layout.ORDERS),
    *({"interior": interior} for interior in ("split", "vec", "amx")),
    {"parts": (576,), "heads": 1},
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", layout.FLOATS)
@pytest.mark.parametrize("changes", GEOMETRIES, ids=lambda c: str(*c.values()) if len(c) == 1 else "MLA")
def test_every_geometry(shim_library: object, changes: dict[str, object], dtype: str, interleaved: bool) -> None:
    if changes.get("interior") == "amx" and dtype == "float32":
        changes = {"interior": "vec16"}
    g = cache_of(**changes, dtype=dtype)
    kind = rope(32, interleaved=interleaved, first=512 if len(g.parts) == 1 else 0)
    work = (all_but_a_few(g), np.arange(9) * 100 - 300, kind)
    compare(g, Shift(), 1, work, compiled, in_torch, on_warps(7))


@pytest.mark.parametrize(
    ("changes", "pairs", "first", "shift", "vectors"),
    [
        ({}, 32, 0, Shift(), True),
        ({"order": "LBNHC"}, 16, 16, Shift(16, 16), True),
        ({"dtype": "float32"}, 4, 4, Shift(), True),
        ({"interior": "split"}, 8, 0, Shift(), True),
        ({}, 12, 0, Shift(), False),
        ({}, 8, 4, Shift(), False),
        ({}, 32, 0, Shift(layers=8), False),
        ({}, 32, 0, Shift(base=8), False),
        ({"parts": (66, 66)}, 32, 0, Shift(), False),
        ({"interior": "vec"}, 32, 0, Shift(), False),
        ({"interior": "amx"}, 32, 0, Shift(), False),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gpu_turns_vectors_where_it_can(
    shim_library: object,
    changes: dict[str, object],
    pairs: int,
    first: int,
    shift: Shift,
    vectors: bool,
    interleaved: bool,
) -> None:
    g = cache_of(**changes)
    work = (all_but_a_few(g), np.full(9, 5), rope(pairs, interleaved=interleaved, first=first))
    compare(g, shift, 2, work, compiled, on_warps(3))
    with bodies.running("rotate_keys", 3) as used:
        rotate_keys(places.cache(places.random(g, shift, 2)), *work)
    assert used == [vectors]


def test_pages_are_rotated_as_the_blocks_they_are_made_of(seed: int = 3) -> None:
    blocks = places.random(cache_of(), Shift(), seed, quiet=True)
    page = canonical_pages(blocks.geometry, page_tokens=64, pages=2)
    table = layout.segments(blocks.geometry, page, [4, 2, 7, 1], [1, 0], (3, 100))
    first_rotated, first_packed = places.empty(page, Shift()), places.empty(page, Shift())
    oracle.convert(blocks, first_packed, table)
    rotate_keys(places.cache(first_packed), table[:, 2:], 1000, rope(32))
    rotate_keys(places.cache(blocks), table[:, [0, 1, 4]], 1000, rope(32))
    oracle.convert(blocks, first_rotated, table)
    np.testing.assert_array_equal(first_packed.data, first_rotated.data)


def test_turns_add_up() -> None:
    """There and back again, and in two steps as in one, up to the rounding of float32."""
    g = cache_of(dtype="float32")
    values = np.random.default_rng(4).standard_normal(g.span_bytes() // 4).astype(np.float32)
    start = oracle.Place.of(values.view(np.uint8), g)
    runs, kind = all_but_a_few(g), rope(32)
    one, two = places.copy(start), places.copy(start)
    rotate_keys(places.cache(one), runs, 1_000_003, kind)
    rotate_keys(places.cache(two), runs, 1_000_000, kind)
    rotate_keys(places.cache(two), runs, 3, kind)
    np.testing.assert_allclose(two.data.view(np.float32), one.data.view(np.float32), atol=2e-6)
    rotate_keys(places.cache(one), runs, -1_000_003, kind)
    np.testing.assert_allclose(one.data.view(np.float32), values, atol=2e-6)


def test_large_offsets_stay_exact() -> None:
    """A turn by 2^28 + 1 tokens is one by the angle's remainder."""
    kind = Rope(np.float32([1.0, 0.1]))
    angles = (2**28 + 1) * kind.frequencies.astype(np.longdouble)
    cosines, sines = kind.turns([2**28 + 1])[0]
    np.testing.assert_array_equal(cosines, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sines, np.sin(angles).astype(np.float32))


def test_offset_0_changes_no_bit() -> None:
    place = places.random(cache_of(), Shift(), 5)
    before = place.data.copy()
    rotate_keys(places.cache(place), all_but_a_few(place.geometry), 0, rope(32))
    np.testing.assert_array_equal(place.data, before)


@pytest.mark.parametrize("implementation", [compiled, in_torch])
@pytest.mark.parametrize(
    ("changes", "runs", "offsets", "kind", "message"),
    [
        ({}, [[0, 0, 4], [0, 3, 2]], 1, rope(32), "token 3 of block 0 is in two runs"),
        ({}, [[0, 30, 4]], 1, rope(32), r"tokens \[30, 34\) of block 0; the cache has 9 blocks of 32"),
        ({}, [[8, 0, 32], [9, 0, 4]], 1, rope(32), r"tokens \[0, 4\) of block 9"),
        ({}, [[-1, 0, 4]], 1, rope(32), "of block -1"),
        ({}, [[2**32 + 1, 0, 4]], 1, rope(32), "of block 4294967297"),
        ({}, [[0, -1, 4]], 1, rope(32), r"tokens \[-1, 3\) of block 0"),
        ({}, [[0, 0, 0]], 1, rope(32), "a run at least one token"),
        ({}, [[0, 4, -2]], 0, rope(32), r"tokens \[4, 2\)"),
        ({}, [[0, 0, 4]], 1.5, rope(32), "whole tokens, not float64"),
        ({}, [[0, 0, 4]], [1, 2], rope(32), r"offsets of shape \(2,\) for 1 runs"),
        ({}, [[0, 0, 4]], 1, rope(33), "33 pairs from dimension 0 on are not in keys of 64 elements"),
        ({"dtype": "int8"}, [[0, 0, 4]], 1, rope(32), "keys in int8 cannot be re-positioned"),
    ],
)
def test_what_does_not_fit_is_refused(
    implementation: Callable[[oracle.Place, Work], None],
    changes: dict[str, object],
    runs: list[list[int]],
    offsets: object,
    kind: Rope,
    message: str,
) -> None:
    place = places.random(cache_of(**changes), Shift(), 6)
    before = place.data.copy()
    with pytest.raises(LayoutError, match=message):
        implementation(place, (np.array(runs), offsets, kind))  # type: ignore[arg-type]
    np.testing.assert_array_equal(place.data, before)


def test_nothing_to_do_is_done() -> None:
    place = places.random(cache_of(), Shift(), 8)
    before = place.data.copy()
    rotate_keys(places.cache(place), np.empty((0, 3), dtype=np.int32), [], rope(32))
    np.testing.assert_array_equal(place.data, before)


@pytest.mark.parametrize(
    ("run", "shift", "message"),
    [
        ([9, 0, 4, 0], Shift(), r"keys of \d+ bytes are too small: layer 4 .* for block 9, token 3"),
        ([0, -1, 4, 0], Shift(), "run 0 has a negative field"),
        ([0, 0, 0, 0], Shift(), "run 0 has a negative field, no tokens"),
        ([0, 0, 4, 1], Shift(), "none of the 1 turns"),
        ([0, 0, 1, 0], Shift(layers=1), r"layer 0 at byte \d+ is not aligned to its elements of 2 bytes"),
    ],
)
def test_the_compiled_op_refuses_what_it_must_not_touch(run: list[int], shift: Shift, message: str) -> None:
    """Called directly, as nothing in Python lets it come to that."""
    place = places.random(cache_of(), shift, 7)
    before, keys, turns = place.data.copy(), places.cache(place), torch.from_numpy(rope(32).turns([1]))
    fields = list(layout.part_maps(place.geometry)[0].fields())
    table = torch.tensor([run], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lmkv.rotate_keys(keys.data, keys.layers, fields, table, turns, [3, 0, 32, 0], 0)
    np.testing.assert_array_equal(place.data, before)
