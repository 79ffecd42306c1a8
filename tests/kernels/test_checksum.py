"""checksum_runs: compiled op = reference in torch = body of the GPU = oracle, whatever the runs and where they lie."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmkv import oracle
from lmkv.errors import KernelError, LayoutError
from lmkv.kernels import _load, checksum, checksum_runs
from lmkv.layout import Array, canonical_pages, segments, vllm_cache

from . import bodies, places, shim

WIDE = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)
Implementation = Callable[[torch.Tensor, Array, int], int]


def compiled(data: torch.Tensor, runs: Array, first: int = 0) -> int:
    return unsigned(checksum_runs(data, runs, first))


def in_torch(data: torch.Tensor, runs: Array, first: int = 0) -> int:
    with bodies.swapped("checksum_runs", checksum.reference):
        return compiled(data, runs, first)


@functools.cache
def declare() -> None:
    schema = _load.SCHEMAS["checksum_runs"].replace(") -> ()", ", int warps, int widest_packet) -> int")
    torch.library.define("lmkv_shim::checksum_runs", schema)


def on_warps(warps: int, widest: int = 16, used: list[int] | None = None) -> Implementation:
    """The GPU's body on a grid of `warps` warps; `used` gets the packet it has read in."""
    declare()

    def op(*arguments: object) -> None:
        packet = torch.ops.lmkv_shim.checksum_runs(*arguments, warps, widest)
        if used is not None:
            used.append(packet)

    def run(data: torch.Tensor, runs: Array, first: int = 0) -> int:
        with bodies.swapped("checksum_runs", op):
            return compiled(data, runs, first)

    return run


def unsigned(sums: torch.Tensor) -> int:
    return int(sums.item()) & 0xFFFF_FFFF_FFFF_FFFF


def memory(size: int, seed: int, shift: int = 0) -> torch.Tensor:
    """Random bytes that begin `shift` bytes behind an address that 64 divides."""
    whole = np.random.default_rng(seed).integers(0, 256, size + 128, dtype=np.uint8)
    first = -whole.ctypes.data % 64 + shift
    return torch.from_numpy(whole[first : first + size])


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, Array, int]:
    """Few or many runs, of whole words and not, aligned and not, overlapping, some of nothing, in any order."""
    seed, step = draw(seeds), draw(st.sampled_from((1, 2, 4, 8, 16)))
    rng = np.random.default_rng(seed)
    size = draw(st.integers(1, 40_000))
    count = draw(st.one_of(st.integers(0, 6), st.integers(7, 40)))
    longest = draw(st.sampled_from((3, 40, 700, 20_000)))
    offsets = rng.integers(0, size, count) // step * step
    lengths = np.minimum(rng.integers(0, longest + 1, count) // step * step, size - offsets)
    runs = np.stack([offsets, lengths], axis=1).astype(np.int64).reshape(-1, 2)
    return memory(size, seed, draw(st.sampled_from((0, 1, 8)))), runs, draw(st.sampled_from((0, 1, 2**40 + 3)))


@WIDE
@given(case=cases(), warps=st.sampled_from((1, 2, 5, 64)), widest=st.sampled_from(shim.PACKETS))
def test_all_agree_with_the_oracle(
    shim_library: object, case: tuple[torch.Tensor, Array, int], warps: int, widest: int
) -> None:
    data, runs, first = case
    wanted = oracle.runs_sum(data.numpy(), runs, first)
    for implementation in (compiled, in_torch, on_warps(warps, widest)):
        assert implementation(data, runs, first) == wanted


@pytest.mark.parametrize(
    ("shift", "offsets", "packet"),
    [(0, (0, 64, 16), 16), (0, (0, 64, 8), 8), (8, (0, 64), 8), (4, (0, 64), 4), (0, (0, 2), 2), (1, (0, 64), 1)],
)
def test_the_gpu_reads_packets_as_wide_as_the_runs_allow(
    shim_library: object, shift: int, offsets: tuple[int, ...], packet: int
) -> None:
    used: list[int] = []
    runs = np.array([(offset, 40) for offset in offsets], dtype=np.int64)
    data = memory(256, 1, shift)
    assert on_warps(3, used=used)(data, runs, 0) == oracle.runs_sum(data.numpy(), runs)
    assert used == [packet]


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 8, (3 << 20) + 5])
def test_long_runs_are_shared_by_threads_and_warps(shim_library: object, size: int) -> None:
    data, runs = memory(size + 64, 2), np.array([(32, size)], dtype=np.int64)
    wanted = oracle.runs_sum(data.numpy(), runs)
    assert compiled(data, runs) == in_torch(data, runs) == on_warps(50)(data, runs, 0) == wanted


ALL: list[Implementation] = [compiled, in_torch]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("length", [16, 13])
def test_order_counts_and_cuts_do_not(implementation: Implementation, length: int) -> None:
    """As the sum of what is sent and of what has landed: the blocks are merged into other runs on either side."""
    data = memory(1000, 3)
    one, two, three = (0, length), (500, length), (200, length)
    sums = {
        implementation(data, np.array(order), 0)
        for order in ([one, two, three], [one, three, two], [two, one, three], [two, three, one], [three, one, two])
    }
    assert len(sums) == 5
    whole = np.concatenate([data[offset : offset + size].numpy() for offset, size in (one, two, three)])
    cut = [(0, 5), (5, length - 5), (500, length), (200, 1), (201, 0), (201, length - 1)]
    side_by_side = implementation(torch.from_numpy(whole), np.array([(0, len(whole))]), 0)
    assert (
        side_by_side == implementation(data, np.array(cut), 0) == implementation(data, np.array([one, two, three]), 0)
    )


@pytest.mark.parametrize("implementation", ALL)
def test_a_flipped_bit_anywhere_is_seen(implementation: Implementation) -> None:
    data, runs = memory(64, 4), np.array([(3, 21), (40, 11)], dtype=np.int64)
    before = implementation(data, runs, 0)
    for byte in range(64):
        data[byte] ^= 1 << byte % 8
        inside = 3 <= byte < 24 or 40 <= byte < 51
        assert (implementation(data, runs, 0) != before) == inside, byte
        data[byte] ^= 1 << byte % 8


def test_bytes_in_several_tensors_have_one_sum() -> None:
    one, two = memory(200, 5), memory(200, 6)
    whole = torch.cat([one[8:48], two[16:37]])
    total = checksum_runs(one, [(8, 40)])
    checksum_runs(two, [(16, 21)], first=5, into=total)
    assert unsigned(total) == compiled(whole, np.array([(0, 61)]))


def test_it_is_the_checksum_of_pages() -> None:
    """A page of whole rows, read from front to back, has the sum that pack_pages tells of it."""
    g = vllm_cache("LBHNC", layers=3, blocks=2, heads=2, block_tokens=16, parts=(32, 32))
    page = canonical_pages(g, page_tokens=32)
    packed = places.random(page, places.Shift(), 7)
    sums = oracle.page_sums(packed, segments(g, page, [0, 1], [0], (0, 32)))
    run = np.array([(int(packed.layers[0]), page.span_bytes())], dtype=np.int64)
    assert compiled(torch.from_numpy(packed.data), run) == sums[0]


def test_nothing_sums_up_to_nothing() -> None:
    data = memory(8, 8)
    for runs in ([], [(8, 0)], [(0, 0), (3, 0)]):
        assert compiled(data, np.array(runs, dtype=np.int64).reshape(-1, 2)) == 0
    assert compiled(torch.zeros(8, dtype=torch.uint8), np.array([(0, 8)])) != 0, "zeros count"


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("run", [(0, 101), (100, 1), (-1, 4), (3, -1), (2**62, 2**62), (101, 0)])
def test_runs_outside_are_refused(implementation: Implementation, run: tuple[int, int]) -> None:
    with pytest.raises(LayoutError, match=rf"a run of {run[1]} bytes at {run[0]} does not lie within 100 bytes"):
        implementation(memory(100, 9), np.array([(0, 8), run], dtype=np.int64), 0)


@pytest.mark.parametrize(
    ("runs", "first", "message"),
    [
        (torch.tensor([[90, 11]]), 0, "run 0 of 11 bytes at 90 does not lie within 100 bytes"),
        (torch.tensor([[0, 8], [-8, 8]]), 0, "run 1 of 8 bytes at -8"),
        (torch.tensor([[2**62, 2**62]]), 0, "does not lie within"),
        (torch.tensor([0, 8]), 0, "int64 CPU tensor of shape"),
        (torch.tensor([[0, 8]], dtype=torch.int32), 0, "int64 CPU tensor of shape"),
        (torch.tensor([[0, 8]]), -1, "negative index -1"),
    ],
)
def test_the_compiled_op_refuses_what_it_must_not_read(runs: torch.Tensor, first: int, message: str) -> None:
    """Called directly, as nothing in Python lets it come to that."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lmkv.checksum_runs(memory(100, 10), runs, first, torch.zeros(1, dtype=torch.int64))


def test_memory_that_is_no_bytes_is_a_kernel_error() -> None:
    with pytest.raises(KernelError, match=r"LMKV-K900 checksum_runs failed: RuntimeError: .*data must be a contiguous"):
        checksum_runs(torch.zeros(8), [(0, 8)])
