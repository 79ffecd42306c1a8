"""Checksums of registered memory: which algorithm, of what, and that both sides of a write get the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lmkv import oracle
from lmkv.errors import ExtentError, KernelError, LayoutError
from lmkv.transport import MemoryKind
from lmkv.vllm import memory
from lmkv.vllm.checksums import Algorithm, Checksums, algorithm_for
from lmkv.vllm.device import standing_in
from lmkv.vllm.geometry import Shard

from .fake_device import FakeModule
from .test_device import caches

DRAM, VRAM = MemoryKind.DRAM, MemoryKind.VRAM
BLOCK_BYTES = 2 * 16 * 16 * 4


@pytest.fixture
def fake() -> Iterator[FakeModule]:
    module = FakeModule()
    with standing_in("cpu", module):
        yield module


def filled(seed: int, layers: int = 2) -> tuple[memory.KvMemory, dict[str, torch.Tensor]]:
    """Layers of 4 blocks of random numbers, each in a storage of its own, as vLLM makes them; and landing slots."""
    tensors, config = caches(*["cpu"] * layers)
    for i, tensor in enumerate(tensors.values()):
        tensor.normal_(generator=torch.Generator().manual_seed(seed + i))
    found = memory.describe(tensors, config, "FLASH_ATTN", Shard(0, 1, 2))
    slots = memory.landing_slots(1 << 16, 1 << 15, torch.device("cpu"))
    assert slots is not None
    slots.data.random_(256, generator=torch.Generator().manual_seed(seed))
    return replace(found, slots=slots).with_region(slots.region()), tensors


def runs_of(tensors: dict[str, torch.Tensor], blocks: list[int], step: int = 1) -> NDArray[np.uint64]:
    """By layer, then by block; each block in `step` pieces."""
    size = BLOCK_BYTES // step
    return np.array(
        [
            (t.data_ptr() + b * BLOCK_BYTES + i * size, size)
            for t in tensors.values()
            for b in blocks
            for i in range(step)
        ],
        dtype=np.uint64,
    )


def words(tensors: dict[str, torch.Tensor], blocks: list[int]) -> int:
    stream = np.concatenate([t[blocks].numpy().view(np.uint8).ravel() for t in tensors.values()])
    return oracle.runs_sum(stream, np.array([(0, len(stream))]))


@pytest.mark.parametrize(("ours", "theirs"), [(DRAM, VRAM), (VRAM, DRAM), (VRAM, VRAM)])
def test_both_sides_use_the_same_algorithm(ours: MemoryKind, theirs: MemoryKind) -> None:
    assert algorithm_for(ours, theirs) is algorithm_for(theirs, ours) is Algorithm.WORDS
    assert algorithm_for(DRAM, DRAM) is Algorithm.XXH3


def test_host_memory_is_summed_by_xxh3_as_before() -> None:
    found, tensors = filled(1)
    runs = runs_of(tensors, [3, 0, 2])
    assert Checksums(found).of(runs) == memory.checksum(runs)


def test_a_device_and_the_host_get_the_same_for_the_same_bytes(fake: FakeModule) -> None:
    """A prefill engine on a GPU, a decode engine on a CPU, other blocks, cut otherwise."""
    found, tensors = filled(2)
    sent = Checksums(found).of(runs_of(tensors, [3, 0, 2]))
    with standing_in("cpu", None):  # this engine's memory is the host's
        landed, theirs = filled(30)
        for mine, its in zip(tensors.values(), theirs.values(), strict=True):
            its[[1, 2, 0]] = mine[[3, 0, 2]]
        assert landed.kind is DRAM
        runs = runs_of(theirs, [1, 2, 0], step=4)
        assert Checksums(landed).of(runs, algorithm_for(DRAM, VRAM)) == sent == words(tensors, [3, 0, 2])
        theirs["layer.1"][2, 1, 15, 15] += 1
        assert Checksums(landed).of(runs, algorithm_for(DRAM, VRAM)) != sent


def test_blocks_in_another_order_have_another_checksum(fake: FakeModule) -> None:
    found, tensors = filled(3)
    sums = Checksums(found)
    orders = [[3, 0, 2], [0, 3, 2], [2, 0, 3], [3, 2, 0]]
    assert len({sums.of(runs_of(tensors, order)) for order in orders}) == len(orders)


def test_landing_slots_are_summed_too(fake: FakeModule) -> None:
    found, _ = filled(4)
    assert found.slots is not None
    run = np.array([(found.slots.address + found.slots.slot_bytes, 1000)], dtype=np.uint64)
    wanted = oracle.runs_sum(found.slots.data.numpy(), np.array([(found.slots.slot_bytes, 1000)]))
    assert Checksums(found).of(run) == wanted


def test_a_checksum_on_its_way(fake: FakeModule) -> None:
    found, tensors = filled(5)
    pending = Checksums(found).begin(runs_of(tensors, [1]))
    assert not pending.done
    fake.pass_events()
    assert pending.done and pending.result() == words(tensors, [1])


def test_the_checksum_of_nothing_is_0() -> None:
    """A value like any other: a note without a checksum has None."""
    found, _ = filled(6)
    nothing = np.empty((0, 2), dtype=np.uint64)
    assert Checksums(found).begin(nothing).result() == 0


@pytest.mark.parametrize("shift", [-8, 4 * BLOCK_BYTES, 4 * BLOCK_BYTES - 8, 1 << 40])
def test_other_memory_is_refused(fake: FakeModule, shift: int) -> None:
    found, tensors = filled(7, layers=1)
    run = np.array([(tensors["layer.0"].data_ptr() + shift, 16)], dtype=np.uint64)
    with pytest.raises(ExtentError, match=r"16 bytes at 0x[0-9a-f]+ are not in the registered memory"):
        Checksums(found).of(run)


def test_addresses_that_wrap_around_are_refused() -> None:
    found, tensors = filled(8)
    run = np.array([(tensors["layer.0"].data_ptr(), 2**64 - 1)], dtype=np.uint64)
    with pytest.raises(ExtentError):
        Checksums(found).begin(run)


def test_what_cannot_be_summed_is_refused(fake: FakeModule) -> None:
    found, tensors = filled(9)
    sums = Checksums(found)
    with pytest.raises(LayoutError, match="xxh3 is of host memory"):
        sums.of(runs_of(tensors, [0]), Algorithm.XXH3)
    odd = runs_of(tensors, [0])
    odd[0, 1] -= 3
    with pytest.raises(LayoutError, match=r"2045 bytes in the first of them, not whole words"):
        sums.of(odd)


def test_an_error_of_the_device_is_told(fake: FakeModule) -> None:
    found, tensors = filled(10)
    pending = Checksums(found).begin(runs_of(tensors, [1]))
    fake.failing = "CUDA error: unspecified launch failure"
    with pytest.raises(KernelError, match="unspecified launch failure"):
        _ = pending.done
