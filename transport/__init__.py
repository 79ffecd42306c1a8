"""Data planes. `open_transport("nixl://", name)` gives one; see `base` for the contract."""

from .base import (
    Capabilities,
    Completion,
    Event,
    Notification,
    OpId,
    PeerId,
    PeerLost,
    Region,
    Transport,
)
from .extents import Extents, MemoryKind, merge_runs
from .registry import open_transport, schemes

__all__ = [
    "Capabilities",
    "Completion",
    "Event",
    "Extents",
    "MemoryKind",
    "Notification",
    "OpId",
    "PeerId",
    "PeerLost",
    "Region",
    "Transport",
    "merge_runs",
    "open_transport",
    "schemes",
]
