"""A worker's KV memory: found in vLLM's tensors, described by cards, read for checksums."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from lmkv import wire
from lmkv.errors import ConfigError
from lmkv.ids import Rank
from lmkv.layout import Geometry
from lmkv.transfer.plan import KvMap
from lmkv.transport import Extents, MemoryKind, Region

from .device import HOST, Device, device_of
from .geometry import Shard, geometries, storage_bytes
from .unsupported import layer_specs, refuse_spec

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """Decode's landing slots: `count` of `slot_bytes` each, one after the other, on the caches' device."""

    data: torch.Tensor
    count: int
    slot_bytes: int

    @property
    def address(self) -> int:
        return int(self.data.data_ptr())

    def slot(self, index: int, size: int) -> torch.Tensor:
        """The first `size` bytes of a slot, sharing its memory."""
        return self.data[index * self.slot_bytes : index * self.slot_bytes + size]

    def region(self) -> Region:
        device = device_of(self.data)
        return Region(self.address, self.data.numel(), device.kind, device.index, self.data)


def landing_slots(landing_bytes: int, slot_bytes: int, device: torch.device) -> SlotMemory | None:
    """New slots; None when there is no room for one."""
    count = landing_bytes // slot_bytes
    if count == 0:
        return None
    return SlotMemory(torch.zeros(count * slot_bytes, dtype=torch.uint8, device=device), count, slot_bytes)


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
    geometries: tuple[Geometry, ...] = ()
    """By transfer group; empty where the interior is not known (direct mode only)."""
    storages: tuple[torch.Tensor, ...] = ()
    """By transfer group: the bytes its layers lie in."""
    slots: SlotMemory | None = None
    block_tokens: tuple[int, ...] = ()
    """Of a manager block, by transfer group."""
    device: Device = HOST
    """The one that all caches lie on."""
    device_scratch: torch.Tensor | None = None
    """SCRATCH_BYTES on the device; None where the caches are in host memory."""

    @property
    def scratch_extents(self) -> Extents:
        """In host memory, whatever the caches lie in: nodes of the pool write there."""
        return Extents.of((self.scratch.ctypes.data, SCRATCH_BYTES))

    @property
    def warm_extents(self) -> Extents:
        """Throw-away bytes in the caches' kind of memory: the first write of that kind between two ranks opens what all
        later ones use (CUDA IPC handles, keys of remote memory)."""
        if self.device_scratch is None:
            return self.scratch_extents
        row = (int(self.device_scratch.data_ptr()), SCRATCH_BYTES)
        return Extents.of(row, device=self.device.index, kind=self.kind)

    def card(self, rank: Rank, address: str, scheme: str, export: bytes) -> wire.WorkerCard:
        slots, warm = self.slots, self.warm_extents
        return wire.WorkerCard(
            rank,
            address,
            scheme,
            export,
            self.kind.value,
            self.layers,
            int(warm.table[0, 0]),
            SCRATCH_BYTES,
            self.geometries,
            slots.address if slots else 0,
            slots.count if slots else 0,
            slots.slot_bytes if slots else 0,
            scratch_kind=warm.kind.value,
            scratch_device=int(warm.table[0, 2]),
        )

    def layer_offsets(self, group: int) -> list[int]:
        """Where each layer of a group begins in its storage, bytes."""
        base = self.storages[group].data_ptr()
        return [card.address - base for card in self.layers if card.group == group]

    def with_region(self, region: Region) -> KvMemory:
        """The same with one more region to be registered."""
        return replace(self, regions=(*self.regions, region))

    def map(self) -> KvMap:
        """Our own layers for the planner."""
        return KvMap.from_card(self.card(Rank(0), "", "", b""))


def describe(
    kv_caches: dict[str, Any],
    kv_cache_config: Any,
    interior: str,
    shard: Shard,
    slots_for: Callable[[torch.device], SlotMemory | None] = lambda device: None,
) -> KvMemory:
    """Every storage behind `kv_caches` (layer name → tensor [blocks, heads, tokens, content]) as one region.

    `slots_for(device)` makes the landing slots, of an engine that wants some.

    Addresses come from `data_ptr` and `stride`, never from assumption. Raises ConfigError for caches that cannot be
    moved block by block (states that are not per token, blocks that are not contiguous), or lie on two devices.
    """
    _check_specs(kv_cache_config)
    group_of = kv_cache_config.transfer_group_index_by_layer
    names: list[list[str]] = [[] for _ in kv_cache_config.transfer_groups]
    layers: list[list[wire.LayerCard]] = [[] for _ in kv_cache_config.transfer_groups]
    storages: dict[int, Any] = {}
    device = _one_device(kv_caches)
    for name, tensor in kv_caches.items():
        if name not in group_of:
            continue
        layers[group_of[name]].append(_layer_card(name, tensor, group_of[name], kv_cache_config.num_blocks))
        names[group_of[name]].append(name)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
    regions = [Region(a, s.nbytes(), device.kind, device.index, s) for a, s in storages.items()]
    scratch, device_scratch = np.zeros(SCRATCH_BYTES, dtype=np.uint8), None
    regions.append(Region(scratch.ctypes.data, SCRATCH_BYTES, MemoryKind.DRAM, 0, scratch))
    if device.kind is not MemoryKind.DRAM:
        device_scratch = torch.zeros(SCRATCH_BYTES, dtype=torch.uint8, device=device.device)
        where = int(device_scratch.data_ptr())
        regions.append(Region(where, SCRATCH_BYTES, device.kind, device.index, device_scratch))
    flat = tuple(card for cards in layers for card in cards)
    layer_names = tuple(tuple(group_names) for group_names in names)
    found = geometries(kv_caches, layer_names, kv_cache_config.transfer_groups, interior, shard)
    slots = slots_for(device.device) if found else None
    if slots is not None:
        regions.append(slots.region())
    return KvMemory(
        device.kind,
        flat,
        layer_names,
        _layout(interior, layers),
        scratch,
        tuple(regions),
        found,
        tuple(storage_bytes(kv_caches[group_names[0]]) for group_names in layer_names) if found else (),
        slots,
        tuple(group.kv_cache_spec.block_size for group in kv_cache_config.transfer_groups),
        device,
        device_scratch,
    )


def _check_specs(kv_cache_config: Any) -> None:
    """Raise ConfigError for states and other caches that are not per token: their shape alone does not tell them."""
    for index, group in enumerate(kv_cache_config.transfer_groups):
        for spec in layer_specs(group.kv_cache_spec):
            refuse_spec(spec, f"KV cache group {index}")


def _layout(interior: str, layers: list[list[wire.LayerCard]]) -> dict[str, str]:
    """What has to be equal for direct mode, as far as this worker sees it. `layers` by transfer group."""
    return {
        "interior": interior,
        "block_bytes": ",".join(str(cards[0].block_bytes) if cards else "0" for cards in layers),
        "group_layers": ",".join(str(len(cards)) for cards in layers),
    }


def _one_device(kv_caches: dict[str, Any]) -> Device:
    (first, here), *others = ((name, tensor.device) for name, tensor in kv_caches.items())
    for name, device in others:
        if device != here:
            raise ConfigError(
                f"the cache of layer {first!r} lies on {here}, that of {name!r} on {device}",
                hint="the caches of a rank have to lie on one device; lmkv does not move those of an offloaded layer",
            )
    return device_of(here)


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
