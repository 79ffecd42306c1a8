"""The ops on a GPU against the oracle, and how near they come to the device's own copy. `pytest -m gpu`; see
docs/kernels.md for compute-sanitizer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkv import layout, oracle
from lmkv.errors import LayoutError
from lmkv.kernels import Cache, checksum_runs, convert_blocks, loaded, pack_pages, unpack_pages
from lmkv.layout import Geometry, canonical_pages, segments, vllm_cache

from . import places, test_checksum
from .places import Pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
DEVICE = "cuda"
LAUNCHES = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)


def test_the_compiled_library_is_in_use() -> None:
    assert "cuda" in loaded


@LAUNCHES
@given(pair=places.pairs(), seed=seeds)
def test_converts_as_the_oracle(pair: Pair, seed: int) -> None:
    source = places.random(pair.source, pair.shifts[0], seed, quiet=pair.converts)
    wanted = places.empty(pair.target, pair.shifts[1])
    here, there = places.cache(source, DEVICE), places.cache(wanted, DEVICE)
    oracle.convert(source, wanted, pair.segments)
    convert_blocks(here, there, pair.segments, convert_dtype=True)
    np.testing.assert_array_equal(there.data.cpu().numpy(), wanted.data)


@LAUNCHES
@given(pair=places.pairs(to_page=True), seed=seeds)
def test_packs_and_unpacks_as_the_cpu(pair: Pair, seed: int) -> None:
    """The CPU's checksums are compared with the oracle elsewhere."""
    source = places.random(pair.source, pair.shifts[0], seed, quiet=pair.converts)
    pages = places.empty(pair.target, pair.shifts[1])
    here, there = places.cache(source, DEVICE), places.cache(pages, DEVICE)
    wanted = pack_pages(places.cache(source), places.cache(pages), pair.segments, convert_dtype=True)
    sums = pack_pages(here, there, pair.segments, convert_dtype=True)
    np.testing.assert_array_equal(there.data.cpu().numpy(), pages.data)
    assert torch.equal(sums.cpu(), wanted)
    back = np.ascontiguousarray(pair.segments[:, [2, 3, 0, 1, 4]])
    assert torch.equal(unpack_pages(there, here, back, convert_dtype=True).cpu(), wanted)


@LAUNCHES
@given(case=test_checksum.cases())
def test_sums_runs_as_the_cpu(case: tuple[torch.Tensor, layout.Array, int]) -> None:
    data, runs, first = case
    there = torch.empty(len(data) + 128, dtype=torch.uint8, device=DEVICE)
    shift = data.data_ptr() % 64
    there[shift : shift + len(data)].copy_(data)
    sums = checksum_runs(there[shift : shift + len(data)], runs, first)
    assert torch.equal(sums.cpu(), checksum_runs(data, runs, first))


def test_tensors_on_different_devices_are_refused() -> None:
    g = vllm_cache("LBHNC", layers=1, blocks=2, heads=1, block_tokens=16, parts=(16, 16))
    table = segments(g, g, [0], [1], (0, 16))
    with pytest.raises(LayoutError, match="source on cuda:0 and target on cpu"):
        convert_blocks(Cache.empty(g, DEVICE), Cache.empty(g), table)


def test_runs_on_the_current_stream() -> None:
    """What an earlier, slow kernel of the same stream writes is what is converted."""
    g = vllm_cache("LBHNC", layers=8, blocks=64, heads=8, block_tokens=16, parts=(128, 128))
    h = vllm_cache("LBNHC", layers=8, blocks=64, heads=8, block_tokens=16, parts=(128, 128))
    source, target = Cache.empty(g, DEVICE), Cache.empty(h, DEVICE)
    torch.cuda.synchronize()
    table = segments(g, h, np.arange(64), np.arange(64), (0, 1024))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        source.data.fill_(7)
        convert_blocks(source, target, table)
        torch.cuda.current_stream().synchronize()
    assert bool((target.data == 7).all())


def big(order: str, **changes: object) -> Geometry:
    fields = {"layers": 32, "blocks": 256, "heads": 8, "block_tokens": 16, "parts": (128, 128), **changes}
    return vllm_cache(order, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (big("LBNHC"), None),
        (big("LBHNC"), None),
        (big("LBNHC"), big("LBHNC")),
        (big("LBHNC"), big("LBHNC", block_tokens=64, blocks=64)),
        (big("LBHNC", parts=(576,), heads=1), big("LBHNC", parts=(576,), heads=1, block_tokens=64, blocks=64)),
    ],
    ids=["pack NHD", "pack HND", "transpose", "regroup", "regroup MLA"],
)
def test_bandwidth(source: Geometry, target: Geometry | None) -> None:
    """A floor that only a fault can miss; the share itself is for the reader (-s)."""
    tokens = 4096
    pages = canonical_pages(source, page_tokens=256, pages=tokens // 256)
    into = target or pages
    here, there = Cache.empty(source, DEVICE), Cache.empty(into, DEVICE)
    table = layout.segments(source, into, np.arange(source.blocks), np.arange(into.blocks), (0, tokens))
    plain = torch.empty_like(here.data)
    op = convert_blocks if target else pack_pages
    ours, copy = milliseconds(lambda: op(here, there, table)), milliseconds(lambda: plain.copy_(here.data))
    moved = 2 * here.data.numel()
    print(f"\n{moved / ours / 1e6:.0f} GB/s, {copy / ours:.2f} of a device copy ({moved / copy / 1e6:.0f} GB/s)")
    assert copy / ours > 0.1


def test_bandwidth_of_checksums() -> None:
    """Blocks of 64 KB in any order, read once; a copy reads and writes."""
    data = torch.randint(0, 256, (512 << 20,), dtype=torch.uint8, device=DEVICE)
    blocks = np.random.default_rng(0).permutation(len(data) >> 16)
    runs = np.stack([blocks << 16, np.full(len(blocks), 1 << 16)], axis=1)
    plain = torch.empty_like(data)
    ours, copy = milliseconds(lambda: checksum_runs(data, runs)), milliseconds(lambda: plain.copy_(data))
    share = (len(data) / ours) / (2 * len(data) / copy)
    print(f"\n{len(data) / ours / 1e6:.0f} GB/s, {share:.2f} of a device copy")
    assert share > 0.1


def milliseconds(call: Callable[[], object], rounds: int = 20) -> float:
    """The median of `rounds`, after one to warm up."""
    call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(np.median(times))
