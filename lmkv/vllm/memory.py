"""A worker's KV memory: found in vLLM's tensors, described by cards, read for checksums and dumps."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmkv import wire
from lmkv.errors import ConfigError
from lmkv.ids import Rank
from lmkv.transfer.plan import KvMap
from lmkv.transport import Extents, MemoryKind, Region

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class KvMemory:
    """The caches of this worker. `regions` are to be registered once; they keep the tensors' storages alive."""

    kind: MemoryKind
    layers: tuple[wire.LayerCard, ...]
    layer_names: tuple[tuple[str, ...], ...]
    """By transfer group, in the order of the layer indices of the protocol."""
    layout: dict[str, str]
    scratch: np.ndarray[Any, np.dtype[np.uint8]]
    regions: tuple[Region, ...]

    @property
    def scratch_extents(self) -> Extents:
        return Extents.of((self.scratch.ctypes.data, SCRATCH_BYTES))

    def card(self, rank: Rank, address: str, scheme: str, export: bytes) -> wire.WorkerCard:
        return wire.WorkerCard(
            rank, address, scheme, export, self.kind.value, self.layers, self.scratch.ctypes.data, SCRATCH_BYTES
        )

    def map(self) -> KvMap:
        """Our own layers for the planner."""
        return KvMap.from_card(self.card(Rank(0), "", "", b""))


def describe(kv_caches: dict[str, Any], kv_cache_config: Any, interior: str) -> KvMemory:
    """Every storage behind `kv_caches` (layer name → tensor [blocks, heads, tokens, content]) as one region.

    Addresses come from `data_ptr` and `stride`, never from assumption. Raises ConfigError for caches that cannot be
    moved block by block (states that are not per token, blocks that are not contiguous).
    """
    group_of = kv_cache_config.transfer_group_index_by_layer
    names: list[list[str]] = [[] for _ in kv_cache_config.transfer_groups]
    layers: list[list[wire.LayerCard]] = [[] for _ in kv_cache_config.transfer_groups]
    storages: dict[int, Any] = {}
    device = next(iter(kv_caches.values())).device
    kind = MemoryKind.DRAM if device.type == "cpu" else MemoryKind.VRAM
    for name, tensor in kv_caches.items():
        if name not in group_of:
            continue
        group = group_of[name]
        layers[group].append(_layer_card(name, tensor, group, kv_cache_config.num_blocks))
        names[group].append(name)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
    regions = [Region(a, s.nbytes(), kind, device.index or 0, s) for a, s in storages.items()]
    scratch = np.zeros(SCRATCH_BYTES, dtype=np.uint8)
    regions.append(Region(scratch.ctypes.data, SCRATCH_BYTES, MemoryKind.DRAM, 0, scratch))
    layout = {
        "interior": interior,
        "block_bytes": ",".join(str(group[0].block_bytes) if group else "0" for group in layers),
        "group_layers": ",".join(str(len(group)) for group in layers),
    }
    flat = tuple(card for group in layers for card in group)
    return KvMemory(kind, flat, tuple(tuple(group) for group in names), layout, scratch, tuple(regions))


def _layer_card(name: str, tensor: Any, group: int, num_blocks: int) -> wire.LayerCard:
    if tensor.dim() != 4:
        raise ConfigError(
            f"the cache of layer {name!r} has shape {tuple(tensor.shape)}; lmkv moves attention caches of 4 dimensions",
            hint="models with Mamba or linear attention states are not supported",
        )
    kernel_blocks = tensor.shape[0]
    ratio, rest = divmod(kernel_blocks, num_blocks)
    inner = [(tensor.shape[i], tensor.stride(i)) for i in range(1, 4)]
    span = 1 + sum((size - 1) * stride for size, stride in inner)
    dense = int(np.prod([size for size, _ in inner]))
    if rest or span != dense or (ratio > 1 and tensor.stride(0) != dense):
        raise ConfigError(
            f"blocks of layer {name!r} are not contiguous: shape {tuple(tensor.shape)}, stride {tensor.stride()}",
            hint="set VLLM_KV_CACHE_LAYOUT=LBHNC",
        )
    width = tensor.element_size()
    return wire.LayerCard(
        address=tensor.data_ptr(),
        block_bytes=dense * ratio * width,
        block_stride_bytes=tensor.stride(0) * ratio * width,
        num_blocks=num_blocks,
        group=group,
        device=tensor.device.index or 0,
    )


Runs = NDArray[np.uint64]
"""A table (n, 2) of address and bytes."""


def checksum(runs: Runs) -> int:
    """xxh3-64 over the bytes of the runs, in order. Host memory only."""
    state = xxhash.xxh3_64()
    for address, size in runs.tolist():
        state.update((ctypes.c_char * size).from_address(address))
    return state.intdigest()


def dump(path: Path, runs: Runs) -> None:
    """Write the bytes of the runs to a file (tests compare both sides' files)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        for address, size in runs.tolist():
            file.write((ctypes.c_char * size).from_address(address))
    partial.rename(path)
