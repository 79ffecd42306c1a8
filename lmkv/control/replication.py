"""Which pages should lie at one more node: those that are asked for often and that few have. Pure, and bounded in
memory.

Heat is counted at pages 1, 2, 4, 8, … of each run that was found. A page's key names everything before it, so two
conversations share the heat of what they have in common, and the deepest hot page tells how much that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from lmkv.errors import ConfigError
from lmkv.ids import Incarnation
from lmkv.poolwire import PAGE_KEY_BYTES, Holder, Member, NodeCard

from .follow import EXACT


@dataclass(frozen=True, slots=True)
class ReplicationSettings:
    """`copies` that a hot page should have, the first included; below 2 nothing is copied."""

    copies: int = 1
    heat: float = 20.0
    """Lookups, of which half are forgotten every `half_life_s`."""
    half_life_s: float = 60.0
    pages_per_s: float = 1000.0
    pages_burst: float = 10_000.0
    again_s: float = 30.0
    """The same run is not ordered again before."""
    entries: int = 16384

    def __post_init__(self) -> None:
        for name in ("copies", "entries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"replication: {name} is {getattr(self, name)}", hint="use 1 or more")
        for name in ("heat", "half_life_s", "pages_per_s", "pages_burst", "again_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"replication: {name} is {getattr(self, name)}", hint="use a positive number")


@dataclass(frozen=True, slots=True)
class Copy:
    """`target` should copy the pages of these keys from `source`."""

    source: NodeCard
    target: NodeCard
    keys: bytes


@dataclass(slots=True)
class _Heat:
    value: float
    at_s: float
    ordered_s: float


class Replication:
    def __init__(self, settings: ReplicationSettings) -> None:
        self._settings = settings
        self._heats: dict[bytes, _Heat] = {}
        self._allowance = settings.pages_burst
        self._allowed_s: float | None = None

    def __len__(self) -> int:
        """Pages whose heat is known."""
        return len(self._heats)

    def looked_up(
        self,
        namespace: bytes,
        keys: bytes,
        holders: Sequence[Holder],
        members: Callable[[], Sequence[Member]],
        now_s: float,
    ) -> Copy | None:
        """Count a lookup that these holders were found for; what should be copied now, if anything."""
        runs = [_run(holder.tiers) for holder in holders]
        depth, hot = 1, 0
        while depth <= max(runs, default=0):
            if self._warm(_key(namespace, keys, depth), now_s) >= self._settings.heat:
                hot = depth
            depth *= 2
        if not hot:
            return None
        having = {holder.incarnation for holder, run in zip(holders, runs, strict=True) if run >= hot}
        heat = self._heats[_key(namespace, keys, hot)]
        if len(having) >= self._settings.copies or now_s < heat.ordered_s + self._settings.again_s:
            return None
        if not self._may_spend(hot, now_s):
            return None
        found = members()
        source = next((m for m in found if m.card.incarnation in having and m.state == EXACT), None)
        target = _roomiest(found, having)
        if source is None or target is None:
            return None
        self._allowance -= hot
        heat.ordered_s = now_s
        return Copy(source.card, target.card, keys[: hot * PAGE_KEY_BYTES])

    def _warm(self, key: bytes, now_s: float) -> float:
        heat = self._heats.get(key)
        if heat is None:
            if len(self._heats) >= self._settings.entries:
                self._cool(now_s)
            heat = self._heats[key] = _Heat(0.0, now_s, -self._settings.again_s)
        heat.value = self._now(heat, now_s) + 1.0
        heat.at_s = now_s
        return heat.value

    def _now(self, heat: _Heat, now_s: float) -> float:
        return float(heat.value * 0.5 ** ((now_s - heat.at_s) / self._settings.half_life_s))

    def _cool(self, now_s: float) -> None:
        """Forget the colder half."""
        by_heat = sorted(self._heats, key=lambda key: self._now(self._heats[key], now_s))
        for key in by_heat[: max(1, len(by_heat) // 2)]:
            del self._heats[key]

    def _may_spend(self, pages: int, now_s: float) -> bool:
        settings = self._settings
        since_s = now_s - (now_s if self._allowed_s is None else self._allowed_s)
        self._allowance = min(settings.pages_burst, self._allowance + since_s * settings.pages_per_s)
        self._allowed_s = now_s
        return pages <= self._allowance


def _run(tiers: bytes) -> int:
    gap = tiers.find(0)
    return len(tiers) if gap < 0 else gap


def _key(namespace: bytes, keys: bytes, depth: int) -> bytes:
    return namespace + keys[(depth - 1) * PAGE_KEY_BYTES : depth * PAGE_KEY_BYTES]


def _roomiest(members: Sequence[Member], having: Set[Incarnation]) -> Member | None:
    """Of those that follow exactly and take new pages, the one with most room."""
    takes = [m for m in members if m.state == EXACT and not m.draining and m.card.incarnation not in having]
    takes = [m for m in takes if m.used_bytes < m.capacity_bytes]
    return max(takes, key=lambda m: (m.capacity_bytes - m.used_bytes, m.card.incarnation), default=None)
