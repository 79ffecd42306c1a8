"""What ops raise: LayoutError for tensors of two devices before anything runs, KernelError for what fails in them."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

from lmkv.codec import coded_pages
from lmkv.errors import KernelError, LayoutError
from lmkv.kernels import (
    Cache,
    checksum_runs,
    convert_blocks,
    decode_pages,
    encode_pages,
    pack_pages,
    rotate_keys,
    unpack_pages,
)
from lmkv.kernels.paging import PageShare
from lmkv.layout import canonical_pages, segments, vllm_cache
from lmkv.rope import Rope

OTHER = "meta"
"""A device that every torch has; ops on it would fail in other ways."""
BLOCKS = vllm_cache("LBHNC", layers=2, blocks=4, heads=2, block_tokens=16, parts=(32, 32))
PAGES = canonical_pages(BLOCKS, page_tokens=64)
CODED = coded_pages(PAGES)
INTO = segments(BLOCKS, PAGES, np.arange(4), [0], (0, 64))
BACK = segments(PAGES, BLOCKS, [0], np.arange(4), (0, 64))
SAME = segments(BLOCKS, BLOCKS, np.arange(4), np.arange(4), (0, 64))
Call = Callable[[str, str], object]
TWO_CACHES: dict[str, Call] = {
    "convert_blocks": lambda a, b: convert_blocks(Cache.empty(BLOCKS, a), Cache.empty(BLOCKS, b), SAME),
    "pack_pages": lambda a, b: pack_pages(Cache.empty(BLOCKS, a), Cache.empty(PAGES, b), INTO),
    "unpack_pages": lambda a, b: unpack_pages(Cache.empty(PAGES, a), Cache.empty(BLOCKS, b), BACK),
    "encode_pages": lambda a, b: encode_pages(Cache.empty(PAGES, a), Cache.empty(CODED, b), "int8"),
    "decode_pages": lambda a, b: decode_pages(Cache.empty(CODED, b), Cache.empty(PAGES, a), "int8"),
}
ONE_CACHE: dict[str, Call] = {
    "rotate_keys": lambda a, _: rotate_keys(Cache.empty(BLOCKS, a), [[0, 0, 4]], 1, Rope(np.ones(4, np.float32))),
    "checksum_runs": lambda a, _: checksum_runs(Cache.empty(BLOCKS, a).data, [(0, 8)]),
}


@pytest.mark.parametrize("op", TWO_CACHES)
@pytest.mark.parametrize("devices", [("cpu", OTHER), (OTHER, "cpu")])
def test_two_devices_are_refused_by_name(op: str, devices: tuple[str, str]) -> None:
    with pytest.raises(LayoutError, match=rf"on {devices[0]} and \w+ on {devices[1]}"):
        TWO_CACHES[op](*devices)


def test_a_sum_on_another_device_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="data on cpu and a sum on meta"):
        checksum_runs(torch.zeros(8, dtype=torch.uint8), [(0, 8)], into=torch.zeros(1, dtype=torch.int64, device=OTHER))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory\nmore"), torch.OutOfMemoryError("none left")]
)
@pytest.mark.parametrize("op", [*TWO_CACHES, *ONE_CACHE])
def test_what_fails_in_an_op_is_a_kernel_error(op: str, error: RuntimeError) -> None:
    call = {**TWO_CACHES, **ONE_CACHE}[op]
    with mock.patch.object(torch.ops.lmkv, op, side_effect=error), pytest.raises(KernelError) as caught:
        call("cpu", "cpu")
    assert caught.value.code == "LMKV-K900" and caught.value.__cause__ is error
    assert (
        op in str(caught.value) and str(error).splitlines()[0] in str(caught.value) and "more" not in str(caught.value)
    )


def test_an_error_of_the_device_that_comes_with_the_checksums_is_a_kernel_error() -> None:
    """On a GPU a kernel's fault is told by the call that waits for it, which is not the op."""
    late = mock.Mock(tolist=mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    share, cache = PageShare(BLOCKS, 64), Cache.empty(BLOCKS)
    page = torch.zeros(share.bytes, dtype=torch.uint8)
    with mock.patch("lmkv.kernels.paging.pack_pages", return_value=late), pytest.raises(KernelError, match="illegal"):
        share.pack(cache, np.arange(4), 0, [0], page, [0])
    with mock.patch("lmkv.kernels.paging.unpack_pages", return_value=late), pytest.raises(KernelError, match="illegal"):
        share.unpack(page, [0], [0], cache, np.arange(4), 0)


def test_our_own_errors_stay_what_they_are() -> None:
    with pytest.raises(LayoutError):
        pack_pages(Cache.empty(BLOCKS), Cache.empty(BLOCKS), SAME)
