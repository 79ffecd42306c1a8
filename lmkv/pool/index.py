"""What a node holds: pages, the slots they lie in, who writes, who reads, what may go. Pure: no I/O, no clock.

The life of a page in memory:

    reserve → RESERVED ──commit of all shares──→ PRESENT ──evict, drop──→ gone
                 │ abandon, lease over, drop
                 └→ quarantine: the slot is nobody's until none of its writers can write to it any more

A slot is named by (offset, generation); generations never repeat, so a late message about a slot that has another page
by now is STALE. A page is visible (pinned, listed, told to views) only as PRESENT. A page may be PRESENT in lower tiers
alone: then it has no slot until it is promoted.

Nothing leaves memory while somebody holds it: `holds` counts pins, tier writes in progress and promotions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import Refusal, Slot, Tier

from .arena import Arena, class_bytes
from .policy import Policy

NOWHERE = -1
NO_TIER = Tier(0)
NOBODY = Incarnation("")
Writer = tuple[Incarnation, Rank]
LOWER = Tier.DISK | Tier.OBJECT


@dataclass(slots=True, eq=False)
class Entry:
    """One page. `tiers` NONE while it is reserved. `checksums` are complete once it is PRESENT."""

    key: bytes
    page_bytes: int
    tiers: Tier = NO_TIER
    offset: int = NOWHERE
    generation: int = 0
    holds: int = 0
    condemned: bool = False
    """Dropped while held: the slot goes with the last hold."""
    shares: list[tuple[int, ...] | None] = field(default_factory=list)
    """While RESERVED: checksums by share, as they are committed."""
    writing: set[Writer] = field(default_factory=set)
    """Who may still write to the slot."""
    owner: Incarnation = NOBODY
    until_s: float = 0.0
    """While RESERVED: end of the writers' lease."""
    checksums: tuple[int, ...] = ()

    @property
    def present(self) -> bool:
        return bool(self.tiers)


class PoolIndex:
    """`policy_for()` makes the eviction order of one size class. Not thread-safe."""

    def __init__(self, arena: Arena, policy_for: Callable[[], Policy], write_lease_s: float = 30.0) -> None:
        self._arena = arena
        self._policy_for = policy_for
        self._write_lease_s = write_lease_s
        self._pages: dict[bytes, Entry] = {}
        self._policies: dict[int, Policy] = {}
        self._reserved: dict[int, Entry] = {}
        """By generation, RESERVED only."""
        self._quarantine: dict[int, Entry] = {}
        """By generation: slots of no page, with writers that may still write."""
        self._next_generation = 1
        self._events: list[tuple[bytes, Tier]] = []
        self.counters: Counter[str] = Counter()

    # --- questions ---

    def __len__(self) -> int:
        """Visible pages."""
        return len(self._pages) - len(self._reserved)

    def find(self, key: bytes) -> Entry | None:
        """The visible page under an object key."""
        entry = self._pages.get(key)
        return entry if entry is not None and entry.present else None

    def entries(self) -> Iterator[Entry]:
        """All visible pages; the index must not be changed meanwhile."""
        return (entry for entry in self._pages.values() if entry.present)

    @property
    def used_bytes(self) -> int:
        """Of the arena, by slots of whatever state."""
        return self._arena.used_bytes

    @property
    def quarantined_bytes(self) -> int:
        return sum(class_bytes(entry.page_bytes) for entry in self._quarantine.values())

    @property
    def reserved(self) -> int:
        return len(self._reserved)

    def take_events(self) -> list[tuple[bytes, Tier]]:
        """(object key, tiers that hold it now) in order, since the last call."""
        events, self._events = self._events, []
        return events

    # --- writing ---

    def reserve(self, writer: Writer, keys: Iterable[bytes], page_bytes: int, shards: int, now_s: float) -> list[Slot]:
        """By object key: a slot, or why there is none. Ranks of one engine (incarnation) share a reservation."""
        return [self._reserve(writer, key, page_bytes, shards, now_s) for key in keys]

    def _reserve(self, writer: Writer, key: bytes, page_bytes: int, shards: int, now_s: float) -> Slot:
        entry = self._pages.get(key)
        if entry is not None and entry.present:
            self._touch(entry)
            return self._refuse(Refusal.EXISTS, "reserve")
        if entry is None:
            offset = self.make_room(page_bytes)
            if offset is None:
                return self._refuse(Refusal.FULL, "reserve")
            entry = self._pages[key] = Entry(key, page_bytes, shares=[None] * shards, owner=writer[0])
            self._place(entry, offset)
            self._reserved[entry.generation] = entry
            self.counters["reserve:new"] += 1
        elif entry.owner != writer[0] or entry.page_bytes != page_bytes or len(entry.shares) != shards:
            return self._refuse(Refusal.BUSY, "reserve")
        entry.writing.add(writer)
        entry.until_s = now_s + self._write_lease_s
        return Slot(entry.offset, entry.generation)

    def commit(
        self, writer: Writer, key: bytes, generation: int, shard: int, checksums: tuple[int, ...], now_s: float
    ) -> Refusal:
        """One share is written. NONE: taken; the page is visible once all shares are in (`find`)."""
        entry = self._reserved.get(generation)
        if entry is None or entry.key != key:
            self._drained(writer, generation)
            known = generation < self._next_generation
            return self._refusal(Refusal.STALE if known else Refusal.UNKNOWN, "commit")
        if writer not in entry.writing or not 0 <= shard < len(entry.shares) or entry.shares[shard] is not None:
            return self._refusal(Refusal.UNKNOWN, "commit")
        if now_s > entry.until_s:
            self._quarantine_page(entry)
            self._drained(writer, generation)
            return self._refusal(Refusal.STALE, "commit")
        entry.writing.discard(writer)
        entry.shares[shard] = checksums
        if all(share is not None for share in entry.shares):
            self._publish(entry)
        return Refusal.NONE

    def _publish(self, entry: Entry) -> None:
        del self._reserved[entry.generation]
        entry.checksums = tuple(c for share in entry.shares if share is not None for c in share)
        entry.shares, entry.owner = [], NOBODY
        entry.tiers = Tier.DRAM
        self._policy(entry).added(entry.key, class_bytes(entry.page_bytes))
        self.counters["commit:visible"] += 1
        self._tell(entry)

    def abandon(self, writer: Writer, generation: int, drained: bool) -> None:
        """The writer will not commit. `drained`: and can write no more."""
        entry = self._reserved.get(generation)
        if entry is not None and writer in entry.writing:
            self.counters["abandoned"] += 1
            self._quarantine_page(entry)
        if drained:
            self._drained(writer, generation)

    def expire(self, now_s: float) -> int:
        """Reservations whose lease is over go to quarantine. Returns how many did."""
        over = [entry for entry in self._reserved.values() if now_s > entry.until_s]
        for entry in over:
            self._quarantine_page(entry)
        self.counters["reserve:expired"] += len(over)
        return len(over)

    def writer_dead(self, incarnation: Incarnation, rank: Rank | None = None) -> None:
        """Proven: this rank (or all ranks) of the engine can write no more. What it had reserved is freed."""
        for entry in [*self._reserved.values(), *self._quarantine.values()]:
            theirs = {w for w in entry.writing if w[0] == incarnation and rank in (None, w[1])}
            if not theirs:
                continue
            if entry.generation in self._reserved:
                self._quarantine_page(entry)
            for writer in theirs:
                self._drained(writer, entry.generation)

    def _quarantine_page(self, entry: Entry) -> None:
        """The reservation is over; the key is free for others, the slot is not."""
        del self._reserved[entry.generation], self._pages[entry.key]
        if entry.writing:
            self._quarantine[entry.generation] = entry
            self.counters["quarantined"] += 1
        else:
            self._arena.free(entry.offset)

    def _drained(self, writer: Writer, generation: int) -> None:
        entry = self._quarantine.get(generation)
        if entry is None:
            return
        entry.writing.discard(writer)
        if not entry.writing:
            del self._quarantine[generation]
            self._arena.free(entry.offset)

    # --- reading ---

    def run(self, keys: Sequence[bytes]) -> list[Entry]:
        """The longest run of visible pages from the first key on, in whatever tiers."""
        found: list[Entry] = []
        for key in keys:
            entry = self.find(key)
            if entry is None:
                break
            found.append(entry)
        return found

    def hold(self, entry: Entry) -> None:
        """Its slot (if it has one, or gets one) stays until `release`."""
        entry.holds += 1

    def release(self, entry: Entry) -> None:
        entry.holds -= 1
        if entry.condemned and entry.holds == 0:
            self._give_up_slot(entry)

    def touch(self, key: bytes) -> None:
        entry = self.find(key)
        if entry is not None:
            self._touch(entry)

    def _touch(self, entry: Entry) -> None:
        if entry.offset != NOWHERE:
            self._policy(entry).touched(entry.key)

    # --- tiers ---

    def adopt(self, key: bytes, page_bytes: int, checksums: tuple[int, ...], tier: Tier) -> None:
        """A lower tier has this page (found at start, or in a shared store)."""
        entry = self._pages.get(key)
        if entry is None:
            entry = self._pages[key] = Entry(key, page_bytes, checksums=checksums)
        elif not entry.present:
            return  # being written anew
        self._set_tiers(entry, entry.tiers | tier)

    def stored(self, entry: Entry, tier: Tier) -> None:
        """A lower tier has written it."""
        if not entry.condemned and entry.present:
            self._set_tiers(entry, entry.tiers | tier)

    def lost(self, key: bytes, tier: Tier) -> None:
        """A lower tier has given it up, or found it corrupt."""
        entry = self.find(key)
        if entry is None:
            return
        self._set_tiers(entry, entry.tiers & ~tier)
        if not entry.present:
            del self._pages[key]

    def start_promotion(self, entry: Entry) -> bool:
        """Give the page a slot to be read into; False: no room. The caller holds it."""
        offset = self.make_room(entry.page_bytes)
        if offset is None:
            self.counters["promote:full"] += 1
            return False
        self._place(entry, offset)
        return True

    def promoted(self, entry: Entry, error: bool) -> None:
        """The slot has the page's bytes (or not: then it is freed). The caller still holds it."""
        if error or entry.condemned:
            if entry.offset != NOWHERE:
                self._arena.free(entry.offset)
                entry.offset = NOWHERE
            return
        self._policy(entry).added(entry.key, class_bytes(entry.page_bytes))
        self._set_tiers(entry, entry.tiers | Tier.DRAM)

    # --- room ---

    def make_room(self, page_bytes: int) -> int | None:
        """A free slot, after evicting what has to go for it; None when too much is held."""
        offset = self._arena.allocate(page_bytes)
        while offset is None:
            if not self._evict_one(class_bytes(page_bytes)) and not self._evict_slab(class_bytes(page_bytes)):
                return None
            offset = self._arena.allocate(page_bytes)
        return offset

    def _evict_one(self, size: int) -> bool:
        policy = self._policies.get(size)
        for key in policy.victims() if policy is not None else ():
            entry = self._pages[key]
            if entry.holds == 0:
                self._evict(entry)
                return True
        return False

    def _evict_slab(self, size: int) -> bool:
        """Another class has to give up a slab: of the one with most bytes, where its first victim lies."""
        others = sorted(
            ((other * count, other) for other, count in self._arena.classes().items() if other != size), reverse=True
        )
        for _, other in others:
            policy = self._policies.get(other)
            for key in policy.victims() if policy is not None else ():
                slab = [self._at(offset) for offset in self._arena.neighbours(self._pages[key].offset)]
                if all(entry is not None and entry.holds == 0 for entry in slab):
                    for entry in slab:
                        assert entry is not None
                        self._evict(entry)
                    return True
        return False

    def _at(self, offset: int) -> Entry | None:
        """The visible page in a slot. Rare, so there is no map for it."""
        return next((e for e in self._pages.values() if e.offset == offset and Tier.DRAM in e.tiers), None)

    def _evict(self, entry: Entry) -> None:
        self._policy(entry).evicted(entry.key)
        self._arena.free(entry.offset)
        entry.offset = NOWHERE
        self.counters["evicted"] += 1
        self.counters["evicted_bytes"] += entry.page_bytes
        self._set_tiers(entry, entry.tiers & ~Tier.DRAM)
        if not entry.present:
            self.counters["evicted:last_copy"] += 1
            del self._pages[entry.key]

    def drop(self, key: bytes) -> bool:
        """Forget a page, at once for those who ask; its slot goes when nobody holds it."""
        entry = self._pages.get(key)
        if entry is None:
            return False
        if not entry.present:
            self._quarantine_page(entry)
            return False
        del self._pages[key]
        if Tier.DRAM in entry.tiers:
            self._policy(entry).removed(key)
        self._set_tiers(entry, NO_TIER)
        entry.condemned = True
        if entry.holds == 0:
            self._give_up_slot(entry)
        return True

    def _give_up_slot(self, entry: Entry) -> None:
        if entry.offset != NOWHERE:
            self._arena.free(entry.offset)
            entry.offset = NOWHERE

    # --- inside ---

    def _place(self, entry: Entry, offset: int) -> None:
        entry.offset, entry.generation = offset, self._next_generation
        self._next_generation += 1

    def _policy(self, entry: Entry) -> Policy:
        size = class_bytes(entry.page_bytes)
        policy = self._policies.get(size)
        if policy is None:
            policy = self._policies[size] = self._policy_for()
        return policy

    def _set_tiers(self, entry: Entry, tiers: Tier) -> None:
        if tiers != entry.tiers:
            entry.tiers = tiers
            self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        self._events.append((entry.key, entry.tiers))

    def _refuse(self, why: Refusal, what: str) -> Slot:
        return Slot(NOWHERE, 0, self._refusal(why, what))

    def _refusal(self, why: Refusal, what: str) -> Refusal:
        self.counters[f"{what}:{why.name.lower()}"] += 1
        return why
