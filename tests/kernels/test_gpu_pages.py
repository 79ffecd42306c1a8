"""Re-positioning and coding on a GPU against the CPU, whose ops are compared with the oracle elsewhere; bandwidth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmkv.codec import CODECS, coded_pages
from lmkv.kernels import Cache, decode_pages, encode_pages, rotate_keys
from lmkv.layout import Geometry, canonical_pages, vllm_cache

from . import places, test_codec, test_rotate
from .places import Shift
from .test_gpu import DEVICE, LAUNCHES, milliseconds, seeds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@LAUNCHES
@given(case=test_rotate.cases(), seed=seeds)
def test_turns_as_the_cpu(case: tuple[Geometry, Shift, test_rotate.Work], seed: int) -> None:
    g, shift, (runs, offsets, rope) = case
    place = places.random(g, shift, seed)
    there = places.cache(place, DEVICE)
    rotate_keys(there, runs, offsets, rope)
    here = places.cache(place)
    rotate_keys(here, runs, offsets, rope)
    np.testing.assert_array_equal(there.data.cpu().numpy(), here.data.numpy())


@LAUNCHES
@given(case=test_codec.cases(), seed=seeds, wild=st.booleans())
def test_codes_and_decodes_as_the_cpu(
    case: tuple[Geometry, Geometry, tuple[Shift, Shift], np.ndarray, str], seed: int, wild: bool
) -> None:
    page, coded, shifts, moves, codec = case
    pages = places.empty(page, shifts[0])
    test_codec.fill(pages, seed, wild=wild)
    results = []
    for where in ("cpu", DEVICE):
        codes = places.cache(places.empty(coded, shifts[1]), where)
        encode_pages(places.cache(pages, where), codes, codec, moves)
        back = places.cache(places.empty(page, shifts[0]), where)
        decode_pages(codes, back, codec, moves)
        results.append((codes.data.cpu().numpy(), back.data.cpu().numpy()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def pages(device: str) -> Cache:
    model = vllm_cache("LBHNC", layers=32, blocks=1, heads=8, block_tokens=16, parts=(128, 128))
    page = Cache.empty(canonical_pages(model, page_tokens=256, pages=8), device)
    page.data.view(torch.bfloat16).normal_()
    return page


def share_of_a_copy(call: Callable[[], object], data: torch.Tensor, moved_bytes: int) -> float:
    plain = torch.empty_like(data)
    ours, copy = milliseconds(call), milliseconds(lambda: plain.copy_(data))
    copied_bytes = 2 * data.numel()
    share = (moved_bytes / ours) / (copied_bytes / copy)
    print(f"\n{moved_bytes / ours / 1e6:.0f} GB/s, {share:.2f} of a device copy")
    return share


@pytest.mark.parametrize("codec", CODECS)
def test_bandwidth_of_codecs(codec: str) -> None:
    """A floor that only a fault can miss; the share itself is for the reader (-s)."""
    page = pages(DEVICE)
    coded = Cache.empty(coded_pages(page.geometry), DEVICE)
    moved_bytes = page.data.numel() + coded.data.numel()
    assert share_of_a_copy(lambda: encode_pages(page, coded, codec), page.data, moved_bytes) > 0.05
    assert share_of_a_copy(lambda: decode_pages(coded, page, codec), page.data, moved_bytes) > 0.05


def test_bandwidth_of_turning() -> None:
    page = pages(DEVICE)
    runs = np.array([[i, 0, 256] for i in range(8)], dtype=np.int32)
    rope = test_rotate.rope(64, interleaved=False, first=0)
    moved_bytes = page.data.numel()  # half of the page is keys, read and written
    assert share_of_a_copy(lambda: rotate_keys(page, runs, 17, rope), page.data, moved_bytes) > 0.05
