"""How an engine describes itself to others: its process, its ranks, their memory. `lmkv.wire` carries the cards."""

from __future__ import annotations

import msgspec

from .addresses import Address
from .ids import (
    EngineName,
    Incarnation,
    Index,
    Pointer,
    Rank,
    Size,
)
from .layout import Geometry

PROTOCOL = 5
"""Version of all messages between engines; both sides need the same."""


class Message(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Array-encoded, tagged by class name."""


class LayerCard(Message, frozen=True):
    """Where one layer's blocks lie in a worker: block b is `block_bytes` at `address + b * block_stride_bytes`."""

    address: Pointer
    block_bytes: Size
    block_stride_bytes: Size
    num_blocks: Index
    group: Index
    """Index of the KV cache group the layer belongs to (an index into Grant.block_ids)."""
    device: Index = 0


class ProcessCard(Message, frozen=True):
    """A process (lmkv.process): boot of its host, namespace of process ids, and start in clock ticks since boot."""

    host: str = ""
    namespace: str = ""
    pid: int = 0
    started: int = 0


class Times(Message, frozen=True):
    """An engine's deadlines, s: interval of heartbeats, leases, prefill's hold, decode's wait for a transfer."""

    beat_s: float = 0.5
    lease_s: float = 10.0
    hold_s: float = 120.0
    deadline_s: float = 120.0


class WorkerCard(Message, frozen=True):
    """One worker rank: its control address, its data plane export, its layers in model order."""

    rank: Rank
    address: Address
    scheme: str
    export: bytes
    kind: str
    """Memory kind of the KV cache: "DRAM" or "VRAM"."""
    layers: tuple[LayerCard, ...]
    scratch_address: Pointer
    scratch_bytes: Size
    """A few registered bytes nobody reads, for warming a pair."""
    geometries: tuple[Geometry, ...] = ()
    """How the layers lie, by group; none: the interior is not one that lmkv can convert (direct mode only)."""
    slots_address: Pointer = 0
    slots: Index = 0
    slot_bytes: Size = 0
    """Landing mode: slot i is `slot_bytes` at `slots_address + i * slot_bytes`, of the same memory kind."""
    checked_ppm: int = 1_000_000
    """As a receiver: so many writes of a million must carry a checksum (lmkv.vllm.checking)."""
    checksum: str = "xxh3-64"
    """The function that this rank can compute over its caches; "": none."""
    process: ProcessCard = ProcessCard()
    """The default names none: its end cannot be proved."""
    scratch_kind: str = "DRAM"
    """Memory kind of the scratch: that of the KV cache, so that warming opens what writes of KV will use."""
    scratch_device: int = 0


class EngineCard(Message, frozen=True):
    """One engine. `must` fields have to be equal for any exchange; `layout` fields for direct mode."""

    name: EngineName
    incarnation: Incarnation
    address: Address
    role: str
    """"prefill", "decode" or "both"."""
    must: dict[str, str]
    layout: dict[str, str]
    block_tokens: tuple[Index, ...]
    """Tokens a block, by KV cache group."""
    workers: tuple[WorkerCard, ...]
    protocol: int = PROTOCOL
    convert_dtype: bool = False
    """Decode takes KV of another dtype and converts it, which changes the numbers."""
    times: Times = Times()
