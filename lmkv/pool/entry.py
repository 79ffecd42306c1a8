"""One page as its node knows it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import Tier

NOWHERE = -1
NO_TIER = Tier(0)
NOBODY = Incarnation("")
Writer = tuple[Incarnation, Rank]


class Task(NamedTuple):
    """What a writer has been given to write: its share, and by which question (0: none that could be taken back)."""

    shard: int
    question: int


@dataclass(slots=True, eq=False)
class Entry:
    """One page. `tiers` NONE while it is reserved. `checksums` are complete once it is PRESENT."""

    key: bytes
    page_bytes: int
    tiers: Tier = NO_TIER
    offset: int = NOWHERE
    generation: int = 0
    holds: int = 0
    used: int = 0
    """When it was last used, in uses of any page: comparable between size classes."""
    condemned: bool = False
    """Dropped while held: the slot goes with the last hold."""
    shares: list[tuple[int, ...] | None] = field(default_factory=list)
    """While RESERVED: checksums by share, as they are committed."""
    writing: dict[Writer, Task] = field(default_factory=dict)
    """Who may still write to the slot."""
    owner: Incarnation = NOBODY
    until_s: float = 0.0
    """While RESERVED: end of the writers' lease."""
    checksums: tuple[int, ...] = ()

    @property
    def present(self) -> bool:
        return bool(self.tiers)
