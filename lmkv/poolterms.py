"""What the pool's messages (lmkv.poolwire) speak of: keys, tiers, promises, refusals, nodes, slots, pages."""

from __future__ import annotations

import enum

import msgspec

from .addresses import Address, NoAddress
from .errors import WireError
from .ids import Incarnation, Pointer, Total
from .wire import PROTOCOL, ProcessCard

NAMESPACE_BYTES = 16
PAGE_KEY_BYTES = 17
OBJECT_KEY_BYTES = NAMESPACE_BYTES + PAGE_KEY_BYTES
EVENT_BYTES = OBJECT_KEY_BYTES + 1
"""Object key and the tiers that hold it from now on (a mask of Tier; 0: gone)."""


class Tier(enum.IntFlag):
    """Where a page lies at its node."""

    DRAM = 1
    DISK = 2
    OBJECT = 4


class Ack(enum.IntEnum):
    """What a store was promised, in rising order."""

    VOLATILE = 0
    """In one node's memory."""
    REPLICATED = 1
    """In the memory of as many nodes as the node is set to."""
    DURABLE = 2
    """On disk or in the object store, synced."""


class Refusal(enum.IntEnum):
    """Why there is no slot, no page, or no commit. Each has a counter of this name."""

    NONE = 0
    EXISTS = 1
    """The page is there already."""
    BUSY = 2
    """Another writer has it reserved."""
    FULL = 3
    """No memory that could be freed."""
    STALE = 4
    """The generation is not the slot's any more: too late."""
    UNKNOWN = 5
    """Nothing is known under that key, or the shard is not one of the page's."""
    DRAINING = 6
    """The node takes nothing new."""
    ABSENT = 7
    """Not in the pool."""
    CORRUPT = 8
    """The checksum of what a tier has is wrong; it was thrown away."""


class NodeCard(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One pool node. Its arena is `arena_bytes` at `arena_address`, registered with its data plane."""

    name: str
    incarnation: Incarnation
    address: Address
    """Of its ROUTER."""
    events: NoAddress
    """Of its PUB; "" for a controller's own card."""
    scheme: str
    export: bytes
    """Its data plane's; empty: none, the arena can only be mapped."""
    arena_address: Pointer
    arena_bytes: Total
    share: str = ""
    """A Unix socket that gives away the arena's file descriptor, for processes of the same host."""
    host: str = ""
    """Tells hosts apart (the kernel's boot id)."""
    protocol: int = PROTOCOL
    prefault: bool = False
    """All of the arena's memory is there from the start."""
    process: ProcessCard = ProcessCard()
    """The default names none: its end cannot be proved."""


class Slot(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where a page is, in the arena; `refusal` other than NONE: nowhere."""

    offset: int
    generation: int
    refusal: Refusal = Refusal.NONE


class Page(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A pinned page. `checksums`: of its parts in order, all shards together; their number divides the heads."""

    offset: int
    generation: int
    checksums: tuple[int, ...]
    tier: Tier = Tier.DRAM
    """Where it was found."""
    page_bytes: int = 0


class Member(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A node as a controller sees it. `state`: EXACT, CATCHING_UP or DEGRADED."""

    card: NodeCard
    state: str
    heard_s: float
    """Seconds since its last beat."""
    pages: int
    used_bytes: int
    capacity_bytes: int
    draining: bool


class Holder(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A node that holds some of them: for each key a byte, its tiers there (0: not there)."""

    incarnation: Incarnation
    address: Address
    tiers: bytes


def split_keys(keys: bytes, size: int = PAGE_KEY_BYTES) -> list[bytes]:
    """Raises WireError for bytes that are not a whole number of keys."""
    if len(keys) % size:
        raise WireError(f"{len(keys)} bytes are no whole number of keys of {size} bytes")
    return [keys[i : i + size] for i in range(0, len(keys), size)]
