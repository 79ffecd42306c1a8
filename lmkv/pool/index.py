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

from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import Refusal, Slot, Tier

from .arena import Arena, class_bytes
from .entry import NO_TIER, NOBODY, NOWHERE, Entry, Task, Writer
from .policy import Policy
from .room import Room

__all__ = ["Entry", "PoolIndex", "Writer"]


class PoolIndex:
    """`policy_for()` makes the eviction order of one size class. `first_generation`: one that no node before has come
    to, so that what was meant for it is STALE here. Not thread-safe."""

    def __init__(
        self,
        arena: Arena,
        policy_for: Callable[[], Policy],
        write_lease_s: float = 30.0,
        first_generation: int = 1,
    ) -> None:
        self._room = Room(arena, policy_for, self._evicted, first_generation)
        self._write_lease_s = write_lease_s
        self._pages: dict[bytes, Entry] = {}
        self._reserved: dict[int, Entry] = {}
        """By generation, RESERVED only."""
        self._quarantine: dict[int, Entry] = {}
        """By generation: slots of no page, with writers that may still write."""
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
        return self._room.used_bytes

    @property
    def quarantined_bytes(self) -> int:
        return sum(class_bytes(entry.page_bytes) for entry in self._quarantine.values())

    @property
    def reserved(self) -> int:
        return len(self._reserved)

    def may_be_written(self, writer: Writer) -> bool:
        """The writer may still write to a slot, of a page that is reserved or in quarantine."""
        return any(writer in entry.writing for slots in (self._reserved, self._quarantine) for entry in slots.values())

    def take_events(self) -> list[tuple[bytes, Tier]]:
        """(object key, tiers that hold it now) in order, since the last call."""
        events, self._events = self._events, []
        return events

    # --- writing ---

    def reserve(
        self,
        writer: Writer,
        keys: Sequence[bytes],
        page_bytes: int,
        shards: int,
        shard: int,
        now_s: float,
        question: int = 0,
    ) -> list[Slot]:
        """By object key: a slot, or why there is none. Ranks of one engine (incarnation) share a reservation, each with
        a share of its own. `question`: see `take_back`."""
        slots: list[Slot] = []
        full = False
        for key in keys:
            entry = self._pages.get(key)
            if entry is None and not full:
                entry = self._new(key, page_bytes, shards, writer[0])
                full = entry is None
            slots.append(self._grant(entry, writer, page_bytes, shards, Task(shard, question), now_s))
        for key, slot in zip(reversed(keys), reversed(slots), strict=True):
            if slot.refusal is Refusal.EXISTS:
                self.touch(key)
        return slots

    def _new(self, key: bytes, page_bytes: int, shards: int, owner: Incarnation) -> Entry | None:
        entry = Entry(key, page_bytes, shares=[None] * shards, owner=owner)
        if not self._room.place(entry):
            return None
        self._pages[key] = self._reserved[entry.generation] = entry
        self.counters["reserve:new"] += 1
        return entry

    def _grant(
        self, entry: Entry | None, writer: Writer, page_bytes: int, shards: int, task: Task, now_s: float
    ) -> Slot:
        if entry is None:
            return self._refuse(Refusal.FULL, "reserve")
        if entry.present:
            return self._refuse(Refusal.EXISTS, "reserve")
        other = entry.owner != writer[0] or entry.page_bytes != page_bytes or len(entry.shares) != shards
        # One share has one writer, once: a second could still be writing when the page is complete.
        taken = other or entry.shares[task.shard] is not None or task.shard in (t.shard for t in entry.writing.values())
        if taken or writer in entry.writing:
            return self._refuse(Refusal.BUSY, "reserve")
        entry.writing[writer] = task
        entry.until_s = now_s + self._write_lease_s
        return Slot(entry.offset, entry.generation)

    def commit(
        self, writer: Writer, key: bytes, generation: int, shard: int, checksums: tuple[int, ...], now_s: float
    ) -> Refusal:
        """One share is written. NONE: taken; the page is visible once all shares are in (`find`)."""
        entry = self._reserved.get(generation)
        if entry is None or entry.key != key:
            self._drained(writer, generation)
            known = generation < self._room.next_generation
            return self._refusal(Refusal.STALE if known else Refusal.UNKNOWN, "commit")
        task = entry.writing.get(writer)
        if task is None or task.shard != shard:
            return self._refusal(Refusal.UNKNOWN, "commit")
        if now_s > entry.until_s:
            self._quarantine_page(entry)
            self._drained(writer, generation)
            return self._refusal(Refusal.STALE, "commit")
        del entry.writing[writer]
        entry.shares[shard] = checksums
        if all(share is not None for share in entry.shares):
            self._publish(entry)
        return Refusal.NONE

    def _publish(self, entry: Entry) -> None:
        del self._reserved[entry.generation]
        entry.checksums = tuple(c for share in entry.shares if share is not None for c in share)
        entry.shares, entry.owner = [], NOBODY
        entry.tiers = Tier.DRAM
        self._room.enter(entry)
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

    def take_back(self, writer: Writer, keys: Iterable[bytes], question: int) -> None:
        """The writer has not heard the answer to this question, and never will: what it was given is not written to."""
        keys = set(keys)
        for entry in [*self._reserved.values(), *self._quarantine.values()]:
            task = entry.writing.get(writer)
            if task is not None and task.question == question and entry.key in keys:
                self.abandon(writer, entry.generation, drained=True)

    def settle(self, writer: Writer, lo: int, hi: int) -> None:
        """The writer writes no more to what it has reserved with questions [lo, hi): what it said of these slots may
        have been lost on its way. Reservations are looked at once they are over, and in quarantine."""
        for entry in list(self._quarantine.values()) if lo < hi else ():
            task = entry.writing.get(writer)
            if task is not None and lo <= task.question < hi:
                self._drained(writer, entry.generation)

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
            self._room.free(entry)

    def _drained(self, writer: Writer, generation: int) -> None:
        entry = self._quarantine.get(generation)
        if entry is None:
            return
        entry.writing.pop(writer, None)
        if not entry.writing:
            del self._quarantine[generation]
            self._room.free(entry)

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
            self._room.free(entry)

    def touch(self, key: bytes) -> None:
        entry = self.find(key)
        if entry is not None:
            self._room.touch(entry)

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
            entry.condemned = True  # it may be on its way up

    def start_promotion(self, entry: Entry) -> bool:
        """Give the page a slot to be read into; False: no room. The caller holds it."""
        if self._room.place(entry):
            return True
        self.counters["promote:full"] += 1
        return False

    def promoted(self, entry: Entry, error: bool) -> None:
        """The slot has the page's bytes (or not: then it is freed). The caller still holds it."""
        if error or entry.condemned:
            self._room.free(entry)
            return
        self._room.enter(entry)
        self._set_tiers(entry, entry.tiers | Tier.DRAM)

    # --- away ---

    def _evicted(self, entry: Entry) -> None:
        self.counters["evicted"] += 1
        self.counters["evicted_bytes"] += entry.page_bytes
        self._set_tiers(entry, entry.tiers & ~Tier.DRAM)
        if not entry.present:
            self.counters["evicted:last_copy"] += 1
            del self._pages[entry.key]

    def demote(self, key: bytes) -> bool:
        """Give up the copy in memory of a page that a lower tier has, unless somebody holds it."""
        entry = self.find(key)
        if entry is None or entry.holds or Tier.DRAM not in entry.tiers or not entry.tiers & ~Tier.DRAM:
            return False
        self._room.evict(entry)
        return True

    def drop(self, key: bytes) -> bool:
        """Forget a page, at once for those who ask; its slot goes when nobody holds it."""
        entry = self._pages.get(key)
        if entry is None:
            return False
        if not entry.present:
            self._quarantine_page(entry)
            return False
        del self._pages[key]
        self._room.leave(entry)
        self._set_tiers(entry, NO_TIER)
        entry.condemned = True
        if entry.holds == 0:
            self._room.free(entry)
        return True

    def keys(self, namespace: bytes) -> list[bytes]:
        """All pages of a namespace (b"": of all), also those that are being written."""
        return [key for key in self._pages if key.startswith(namespace)]

    # --- inside ---

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
