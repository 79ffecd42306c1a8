"""encode_pages and decode_pages: compiled ops = references in torch = the GPU's bodies = oracle, bit for bit; and how
far what is decoded may be from what was encoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkv import codec_oracle, layout, oracle
from lmkv.codec import CODECS, LARGEST, SMALLEST_SCALE, area_bytes, coded_pages
from lmkv.errors import KernelError, LayoutError
from lmkv.kernels import codec as codec_ops
from lmkv.kernels import convert_blocks, decode_pages, encode_pages
from lmkv.layout import FLOATS, Geometry, canonical_pages, page_bytes, vllm_cache

from . import bodies, places
from .places import Shift

WIDE = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
TINIEST = {"bfloat16": 2.0**-134, "float16": 2.0**-25, "float32": 2.0**-150}
"""Half of the least subnormal."""


@contextmanager
def in_torch() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(bodies.swapped("encode_pages", codec_ops.encode_reference))
        stack.enter_context(bodies.swapped("decode_pages", codec_ops.decode_reference))
        yield


@contextmanager
def on_warps(warps: int) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(bodies.running("encode_pages", warps))
        stack.enter_context(bodies.running("decode_pages", warps))
        yield


@contextmanager
def compiled() -> Iterator[None]:
    yield


def pages_of(dtype: str, *, tokens: int = 32, pages: int = 3, **changes: object) -> Geometry:
    fields = {"layers": 3, "blocks": 1, "heads": 4, "block_tokens": 16, "parts": (16, 16), "dtype": dtype, **changes}
    return canonical_pages(vllm_cache("LBHNC", **fields), page_tokens=tokens, pages=pages)  # type: ignore[arg-type]


def share_of(page: Geometry, heads: tuple[int, int], layers: tuple[int, int]) -> Geometry:
    return canonical_pages(page, page_tokens=page.block_tokens, pages=page.blocks, heads=heads, layers=layers)


def fill(place: oracle.Place, seed: int, *, wild: bool) -> None:
    """Numbers of many magnitudes; `wild`: any bits, so NaNs, infinities, subnormals and all magnitudes at once."""
    rng = np.random.default_rng(seed)
    if wild:
        place.data[:] = rng.integers(0, 256, len(place.data), dtype=np.uint8)
        return
    first, width = int(place.layers[0]) % place.geometry.width, place.geometry.width
    count = (len(place.data) - first) // width
    scaled = rng.standard_normal(count) * np.exp2(rng.integers(-16, 10, count)) * (rng.random(count) > 0.1)
    raw = oracle.from_float(scaled.astype(np.float32), place.geometry.dtype)
    place.data[first : first + count * width] = raw.ravel()


def numbers(place: oracle.Place) -> np.ndarray:
    """(pages, heads, layers, parts · tokens · D) of whole canonical pages."""
    g, first = place.geometry, int(place.layers[0])
    raw = place.data[first : first + page_bytes(g) * g.blocks].reshape(-1, g.width)
    return oracle.to_float(raw, g.dtype).reshape(g.blocks, g.heads, g.layers, -1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, Geometry, tuple[Shift, Shift], np.ndarray, str]:
    dtype, tokens = draw(st.sampled_from(FLOATS)), draw(st.sampled_from((1, 2, 16, 20, 32, 48, 64)))
    dims = st.sampled_from((4, 8, 12, 16, 40, 64))
    parts = (draw(dims),) if draw(st.booleans()) else (draw(dims), draw(dims))
    heads, layers = 1 if len(parts) == 1 else draw(st.integers(1, 4)), draw(st.integers(1, 4))
    whole = pages_of(dtype, tokens=tokens, heads=heads, layers=layers, parts=parts)
    first_head, first_layer = draw(st.integers(0, heads - 1)), draw(st.integers(0, layers - 1))
    share = share_of(whole, (first_head, heads), (first_layer, layers))
    page, coded = draw(st.sampled_from([(whole, whole), (share, whole), (whole, share), (share, share)]))
    gap = draw(st.sampled_from((0, 8, 24)))
    page = msgspec.structs.replace(page, strides=(page.strides[0], page.strides[1] + gap, *page.strides[2:]))
    rng = np.random.default_rng(draw(seeds))
    count = rng.integers(1, 4)
    moves = np.stack([rng.permutation(3)[:count], rng.permutation(3)[:count]], axis=1).astype(np.int32)
    shifts = Shift(int(rng.choice([0, 4, 16])), int(rng.choice([0, 4, 16]))), Shift(4 * int(rng.integers(0, 4)))
    return page, coded_pages(coded), shifts, moves, draw(st.sampled_from(CODECS))


@WIDE
@given(case=cases(), seed=seeds, wild=st.booleans(), warps=st.sampled_from((1, 3, 64)))
def test_all_agree_with_the_oracle(
    shim_library: object,
    case: tuple[Geometry, Geometry, tuple[Shift, Shift], np.ndarray, str],
    seed: int,
    wild: bool,
    warps: int,
) -> None:
    page, coded, shifts, moves, codec = case
    source = places.empty(page, shifts[0])
    fill(source, seed, wild=wild)
    codes, back = places.empty(coded, shifts[1]), places.empty(page, shifts[0])
    codec_oracle.encode(source, codes, moves, codec)
    codec_oracle.decode(codes, back, moves, codec)
    for how in (compiled(), in_torch(), on_warps(warps)):
        got, got_back = places.empty(coded, shifts[1]), places.empty(page, shifts[0])
        with how:
            encode_pages(places.cache(source), places.cache(got), codec, moves)
            decode_pages(places.cache(codes), places.cache(got_back), codec, moves)
        np.testing.assert_array_equal(got.data, codes.data)
        np.testing.assert_array_equal(got_back.data, back.data)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("parts", "tokens", "shift", "vectors"),
    [
        ((128, 128), 32, Shift(), True),
        ((576,), 64, Shift(), True),
        ((128, 128), 16, Shift(), False),
        ((128, 128), 32, Shift(8), False),
        ((4, 4), 17, Shift(), False),
    ],
)
def test_the_gpu_codes_vectors_where_it_can(
    shim_library: object, parts: tuple[int, ...], tokens: int, shift: Shift, vectors: bool, dtype: str, codec: str
) -> None:
    """Areas of 16 tokens end 4 bytes off, with their one scale."""
    page = pages_of(dtype, parts=parts, tokens=tokens, heads=4 if len(parts) == 2 else 1)
    source, wanted, got = places.empty(page, shift), *(places.empty(coded_pages(page), Shift()) for _ in range(2))
    fill(source, 1, wild=True)
    codec_oracle.encode(source, wanted, np.array([[0, 0], [1, 1], [2, 2]], dtype=np.int32), codec)
    with bodies.running("encode_pages", 7) as used:
        encode_pages(places.cache(source), places.cache(got), codec)
    np.testing.assert_array_equal(got.data, wanted.data)
    assert used == [vectors]


@WIDE
@given(seed=seeds, dtype=st.sampled_from(FLOATS), codec=st.sampled_from(CODECS))
def test_what_is_decoded_is_near_what_was_encoded(seed: int, dtype: str, codec: str) -> None:
    """int8: half a scale. fp8: 2^-4 of the number, or for small ones half a step of 2^-9 scales. To either, the
    rounding of the pages' type and of three operations in float32 is added."""
    page = pages_of(dtype, tokens=32)
    source, back = places.empty(page, Shift()), places.empty(page, Shift())
    coded = places.empty(coded_pages(page), Shift())
    fill(source, seed, wild=False)
    encode_pages(places.cache(source), places.cache(coded), codec)
    decode_pages(places.cache(coded), places.cache(back), codec)
    x, y = (numbers(p).reshape(-1, 16 * 16).astype(np.float64) for p in (source, back))
    scale = np.abs(x).max(axis=1, keepdims=True) / LARGEST[codec]
    half_step = scale / 2 if codec == "int8" else np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)
    arithmetic = LARGEST[codec] * scale * 2.0**-22
    bound = half_step + arithmetic + (np.abs(x) + half_step) * ROUNDING[dtype] + TINIEST[dtype]
    assert (np.abs(x - y) <= bound).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_extremes(dtype: str, codec: str) -> None:
    """The largest numbers of a type come back as they were; what is not finite comes back as NaN and harms nothing.

    The very largest float32 would round to infinity."""
    page = pages_of(dtype, tokens=16, pages=1, layers=1, heads=1, parts=(8,))
    source, back = places.empty(page, Shift()), places.empty(page, Shift())
    coded = places.empty(coded_pages(page), Shift())
    largest = {"bfloat16": 2.0**127 * (2 - 2.0**-7), "float16": 65504.0, "float32": 3.4e38}[dtype]
    values = np.zeros(16 * 8, dtype=np.float32)
    values[:6] = np.float32([largest, -largest, np.inf, -np.inf, np.nan, 0])
    first = int(source.layers[0])
    source.data[first : first + 128 * page.width] = oracle.from_float(values, dtype).ravel()
    encode_pages(places.cache(source), places.cache(coded), codec)
    decode_pages(places.cache(coded), places.cache(back), codec)
    wanted = np.where(np.isfinite(values), values, np.nan)
    np.testing.assert_allclose(numbers(back).ravel(), wanted, rtol=2.0**-22)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("largest", [0.0, 2.0**-149, LARGEST["int8"] * SMALLEST_SCALE / 2])
def test_groups_without_a_scale_are_zero(codec: str, largest: float) -> None:
    scale, codes = codec_oracle.encode_group(np.full((16, 4), -largest, dtype=np.float32), codec)
    assert scale == 0
    assert (codec_oracle.code_values(codec)[codes] * scale == 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_codes_are_fixed_points(codec: str) -> None:
    """What has been decoded once is coded to the same bytes again: errors do not add up."""
    page = pages_of("float32")
    source, back = places.empty(page, Shift()), places.empty(page, Shift())
    once, twice = (places.empty(coded_pages(page), Shift()) for _ in range(2))
    fill(source, 5, wild=False)
    encode_pages(places.cache(source), places.cache(once), codec)
    decode_pages(places.cache(once), places.cache(back), codec)
    encode_pages(places.cache(back), places.cache(twice), codec)
    codes = [c.data[int(c.layers[0]) :][: area_bytes(32, 16)][: 32 * 16] for c in (once, twice)]
    np.testing.assert_array_equal(codes[0], codes[1])


def test_ranks_code_their_share_of_a_page() -> None:
    """The coded shares of two ranks' heads and two stages' layers are the coded page, byte by byte."""
    whole = pages_of("bfloat16", heads=4, layers=3)
    source, wanted, got = places.empty(whole, Shift()), *(places.empty(coded_pages(whole), Shift()) for _ in range(2))
    fill(source, 6, wild=False)
    encode_pages(places.cache(source), places.cache(wanted), "int8")
    for heads in ((0, 2), (2, 4)):
        for layers in ((0, 1), (1, 3)):
            share = places.empty(share_of(whole, heads, layers), Shift())
            table = layout.segments(whole, whole, [0, 1, 2], [0, 1, 2], (0, 96))
            oracle.convert(source, share, table)
            encode_pages(places.cache(share), places.cache(got), "int8")
    np.testing.assert_array_equal(got.data, wanted.data)


def test_coded_pages_are_a_cache_that_is_moved_as_others_are() -> None:
    coded = coded_pages(pages_of("bfloat16"))
    share = msgspec.structs.replace(coded_pages(share_of(pages_of("bfloat16"), (1, 3), (0, 3))))
    source, target = places.random(coded, Shift(), 7), places.empty(share, Shift())
    convert_blocks(places.cache(source), places.cache(target), layout.segments(coded, share, [2, 0], [0, 1], (0, 2)))
    first, head = int(source.layers[0]), coded.strides[2]
    page = first + 2 * coded.strides[1]
    got = target.data[int(target.layers[0]) :][: 2 * head]
    np.testing.assert_array_equal(got, source.data[page + head : page + 3 * head])


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_sizes_shrink_to_a_byte_a_number_and_the_scales(dtype: str, share: int) -> None:
    page = pages_of(dtype, tokens=256, parts=(128, 128))
    coded = coded_pages(page)
    scales = 4 * page.heads * page.layers * 2 * (256 // 16)
    assert coded.strides[1] == page_bytes(page) // share + scales
    assert scales / coded.strides[1] < 0.002


@pytest.mark.parametrize(
    ("page", "coded", "codec", "moves", "message"),
    [
        (pages_of("bfloat16"), coded_pages(pages_of("bfloat16")), "int4", None, "codec 'int4' is unknown"),
        (pages_of("int8"), coded_pages(pages_of("bfloat16")), "int8", None, "pages in int8 .* are not coded"),
        (
            pages_of("bfloat16"),
            coded_pages(pages_of("bfloat16", tokens=16)),
            "int8",
            None,
            r"have areas of \(520, 520\)",
        ),
        (pages_of("bfloat16"), coded_pages(pages_of("bfloat16")), "int8", [[0, 1], [0, 2]], "a page is named twice"),
        (pages_of("bfloat16"), coded_pages(pages_of("bfloat16")), "int8", [[0, 3]], "none of the 3 there are"),
        (
            pages_of("bfloat16", tokens=3, parts=(2, 2)),
            coded_pages(pages_of("bfloat16")),
            "int8",
            None,
            "not be aligned",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    page: Geometry, coded: Geometry, codec: str, moves: list[list[int]] | None, message: str
) -> None:
    source, target = places.random(page, Shift(), 8), places.random(coded, Shift(), 9)
    before = target.data.copy()
    with pytest.raises(LayoutError, match=message):
        encode_pages(places.cache(source), places.cache(target), codec, moves)
    np.testing.assert_array_equal(target.data, before)


def test_the_compiled_op_refuses_what_it_must_not_touch() -> None:
    page = pages_of("bfloat16")
    source, target = places.random(page, Shift(), 10), places.random(coded_pages(page), Shift(), 11)
    short = oracle.Place(target.data[:-200], target.layers, target.geometry)
    with pytest.raises(KernelError, match=r"coded pages of \d+ bytes are too small"):
        encode_pages(places.cache(source), places.cache(short), "int8")
    odd = places.random(coded_pages(page), Shift(2), 12)
    with pytest.raises(KernelError, match="is not aligned to 4 bytes"):
        encode_pages(places.cache(source), places.cache(odd), "int8")
