"""The index against a model of who may write to which bytes, and who reads them.

The model keeps for each grant (writer, generation) the bytes that the writer may write to, until it commits, says that
it has drained, or is proven dead: whatever the index thinks, these bytes may change until then.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmkv.ids import Incarnation, Rank
from lmkv.pool.arena import Arena, class_bytes
from lmkv.pool.index import Entry, PoolIndex, Writer
from lmkv.pool.policy import make_policy
from lmkv.poolwire import Refusal, Tier

LEASE_S = 10.0
PAGE = 4096
KEYS = tuple(bytes([i]) * 33 for i in range(1, 15))
INCARNATIONS = tuple(Incarnation(name) for name in ("a", "b", "c"))
WRITERS = tuple((name, Rank(rank)) for name in INCARNATIONS for rank in (0, 1))
Span = tuple[int, int]


@dataclass
class Grant:
    """What the model knows of a generation."""

    key: bytes
    span: Span
    shards: int
    done: set[int] = field(default_factory=set)


def overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def span_of(entry: Entry) -> Span:
    return entry.offset, entry.offset + class_bytes(entry.page_bytes)


class Machine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(("s3fifo", "lru")),
        pages=st.integers(1, 9),
        slab_pages=st.sampled_from((1, 2, 4)),
        below=st.sets(st.sampled_from(KEYS), max_size=6),
    )
    def open(self, policy: str, pages: int, slab_pages: int, below: set[bytes]) -> None:
        arena = Arena(pages * PAGE, slab_pages * PAGE)
        self.capacity_bytes = pages * PAGE
        self.index = PoolIndex(arena, lambda: make_policy(policy), LEASE_S, first_generation=100)
        self.now_s = 0.0
        self.grants: dict[int, Grant] = {}
        self.may_write: dict[tuple[Writer, int], int] = {}
        """By writer and generation: the share."""
        self.asked: dict[tuple[Writer, int], int] = {}
        self.held: list[tuple[Entry, int, int]] = []
        """With offset and generation at that time."""
        self.promoting: list[Entry] = []
        self.seen: dict[bytes, Tier] = {}
        self.question = 0
        for key in sorted(below):
            self.index.adopt(key, PAGE, (7,), Tier.DISK)

    # --- writing ---

    @rule(
        writer=st.sampled_from(WRITERS),
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6),
        page=st.sampled_from((PAGE, PAGE, PAGE - 9, 2 * PAGE, 5 * PAGE)),
        shards=st.integers(1, 2),
        other_shard=st.booleans(),
    )
    def reserve(self, writer: Writer, keys: list[bytes], page: int, shards: int, other_shard: bool) -> None:
        shard = writer[1] % shards if not other_shard else (writer[1] + 1) % shards
        self.question += 1
        held_before = {key: tiers for key, tiers in self.seen.items()}
        slots = self.index.reserve(writer, keys, page, shards, shard, self.now_s, self.question)
        assert len(slots) == len(keys)
        for key, slot in zip(keys, slots, strict=True):
            if slot.refusal is Refusal.NONE:
                self.granted(writer, key, slot.offset, slot.generation, page, shards, shard)
            elif slot.refusal is Refusal.EXISTS:
                assert key in held_before
            elif slot.refusal is Refusal.FULL:
                in_use = self.may_write or self.held or self.promoting or self.index.reserved
                assert in_use or class_bytes(page) > self.capacity_bytes
            else:
                assert slot.refusal is Refusal.BUSY
                assert self.index._pages[key] in self.index._reserved.values()

    def granted(
        self, writer: Writer, key: bytes, offset: int, generation: int, page: int, shards: int, shard: int
    ) -> None:
        span = (offset, offset + class_bytes(page))
        known = self.grants.setdefault(generation, Grant(key, span, shards))
        assert (known.key, known.span, known.shards) == (key, span, shards), "a generation names one slot for one page"
        assert shard not in known.done, "a share has one writer, once"
        for (other, gen), its in self.may_write.items():
            if gen == generation:
                assert other[0] == writer[0] and its != shard and other != writer
        self.free_of_others(span, generation)
        self.may_write[writer, generation] = shard
        self.asked[writer, generation] = self.question

    def free_of_others(self, span: Span, generation: int) -> None:
        """Nobody else may write to these bytes, nobody reads them."""
        for _, gen in self.may_write:
            assert gen == generation or not overlap(self.grants[gen].span, span)
        for entry, offset, _ in self.held:
            if offset >= 0:
                assert not overlap((offset, offset + class_bytes(entry.page_bytes)), span)

    @precondition(lambda self: self.may_write)
    @rule(data=st.data(), twice=st.booleans())
    def commit(self, data: st.DataObject, twice: bool) -> None:
        writer, generation = data.draw(st.sampled_from(sorted(self.may_write)))
        shard, grant = self.may_write.pop((writer, generation)), self.grants[generation]
        reserved = self.index._reserved.get(generation)
        in_time = reserved is not None and self.now_s <= reserved.until_s
        why = self.index.commit(writer, grant.key, generation, shard, (generation, shard), self.now_s)
        assert why is (Refusal.NONE if in_time else Refusal.STALE)
        if why is Refusal.NONE:
            grant.done.add(shard)
            entry = self.index.find(grant.key)
            whole = len(grant.done) == grant.shards
            assert (entry is not None and entry.generation == generation) == whole, "visible when all shares are in"
            if whole:
                assert entry is not None
                assert entry.checksums == tuple(n for s in range(grant.shards) for n in (generation, s))
        if twice:
            again = self.index.commit(writer, grant.key, generation, shard, (0,), self.now_s)
            assert again in (Refusal.STALE, Refusal.UNKNOWN)

    @rule(
        writer=st.sampled_from(WRITERS),
        key=st.sampled_from(KEYS),
        generation=st.integers(98, 140),
        shard=st.integers(-1, 2),
    )
    def commit_of_what_one_has_not(self, writer: Writer, key: bytes, generation: int, shard: int) -> None:
        if (writer, generation) in self.may_write:
            return
        before = dict(self.index._pages)
        why = self.index.commit(writer, key, generation, shard, (1,), self.now_s)
        assert why in (Refusal.STALE, Refusal.UNKNOWN)
        assert {k: e for k, e in before.items() if e.present} == {
            k: e for k, e in self.index._pages.items() if e.present
        }

    @precondition(lambda self: self.may_write)
    @rule(data=st.data(), drained=st.booleans())
    def abandon(self, data: st.DataObject, drained: bool) -> None:
        writer, generation = data.draw(st.sampled_from(sorted(self.may_write)))
        self.index.abandon(writer, generation, drained)
        if drained:
            del self.may_write[writer, generation]

    @precondition(lambda self: self.may_write)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        writer, generation = data.draw(st.sampled_from(sorted(self.may_write)))
        question = self.asked[writer, generation]
        theirs = [g for w, g in self.may_write if w == writer and self.asked[w, g] == question]
        self.index.take_back(writer, [self.grants[g].key for g in theirs], question)
        for g in theirs:
            del self.may_write[writer, g]

    @rule(key=st.sampled_from(KEYS), page=st.sampled_from((PAGE, PAGE, 2 * PAGE)))
    def store(self, key: bytes, page: int) -> None:
        """All at once, so that there is something to evict."""
        writer = WRITERS[0]
        (slot,) = self.index.reserve(writer, [key], page, 1, 0, self.now_s)
        if slot.refusal is Refusal.NONE:
            self.granted(writer, key, slot.offset, slot.generation, page, 1, 0)
            del self.may_write[writer, slot.generation]
            assert self.index.commit(writer, key, slot.generation, 0, (1,), self.now_s) is Refusal.NONE
            self.grants[slot.generation].done.add(0)

    @rule(seconds=st.sampled_from((0.1, LEASE_S / 2, LEASE_S + 1)), noticed=st.booleans())
    def time_passes(self, seconds: float, noticed: bool) -> None:
        self.now_s += seconds
        if noticed:
            self.index.expire(self.now_s)

    @rule(incarnation=st.sampled_from(INCARNATIONS), rank=st.sampled_from((None, 0, 1)))
    def writer_dead(self, incarnation: Incarnation, rank: int | None) -> None:
        self.index.writer_dead(incarnation, None if rank is None else Rank(rank))
        for writer, generation in list(self.may_write):
            if writer[0] == incarnation and rank in (None, writer[1]):
                del self.may_write[writer, generation]

    # --- reading ---

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=4))
    def pin(self, keys: list[bytes]) -> None:
        run = self.index.run(keys)
        assert [entry.key for entry in run] == keys[: len(run)]
        for entry in run:
            if Tier.DRAM in entry.tiers:
                self.index.hold(entry)
                self.held.append((entry, entry.offset, entry.generation))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.held) - 1))
        self.index.release(self.held.pop(number)[0])

    @rule(key=st.sampled_from(KEYS))
    def touch(self, key: bytes) -> None:
        self.index.touch(key)

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: bytes) -> None:
        was = self.index.find(key) is not None
        assert self.index.drop(key) == was
        assert self.index.find(key) is None

    # --- tiers ---

    @rule(key=st.sampled_from(KEYS))
    def stored(self, key: bytes) -> None:
        entry = self.index.find(key)
        if entry is not None and Tier.DRAM in entry.tiers:
            self.index.stored(entry, Tier.DISK)

    @precondition(lambda self: self.promoting)
    @rule(data=st.data())
    def lost_on_its_way_up(self, data: st.DataObject) -> None:
        self.index.lost(data.draw(st.sampled_from(self.promoting)).key, Tier.DISK)

    @rule(key=st.sampled_from(KEYS))
    def lost(self, key: bytes) -> None:
        self.index.lost(key, Tier.DISK)

    @rule(key=st.sampled_from(KEYS))
    def promote(self, key: bytes) -> None:
        entry = self.index.find(key)
        if entry is None or Tier.DRAM in entry.tiers or entry in self.promoting:
            return
        if self.index.start_promotion(entry):
            self.index.hold(entry)
            self.free_of_others(span_of(entry), entry.generation)
            self.promoting.append(entry)

    @precondition(lambda self: self.promoting)
    @rule(data=st.data(), error=st.booleans())
    def promoted(self, data: st.DataObject, error: bool) -> None:
        entry = data.draw(st.sampled_from(self.promoting))
        self.promoting.remove(entry)
        self.index.promoted(entry, error)
        self.index.release(entry)

    # --- what always holds ---

    @invariant()
    def always(self) -> None:
        if not hasattr(self, "index"):
            return
        index = self.index
        for key, tiers in index.take_events():
            if tiers:
                self.seen[key] = tiers
            else:
                assert self.seen.pop(key, None) is not None, "gone, but it was never there"
        visible = {entry.key: entry.tiers for entry in index.entries()}
        assert self.seen == visible
        assert len(index) == len(visible)
        in_memory = [entry for entry in index.entries() if Tier.DRAM in entry.tiers]
        self.nobody_writes_to(in_memory)
        for entry, offset, generation in self.held:
            assert (entry.offset, entry.generation) == (offset, generation), "held, so it stays"
        room = index._room
        assert room._keys == {entry.key: entry for entry in in_memory}
        assert sum(len(policy) for policy in room._policies.values()) == len(in_memory)
        slots = sorted(span_of(entry) for entry in room._slots.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(slots))
        assert index.used_bytes == sum(b - a for a, b in slots)
        others = {e.generation for e in (*in_memory, *self.promoting)} | {g for _, _, g in self.held}
        accounted = others | set(index._reserved) | set(index._quarantine)
        assert {entry.generation for entry in room._slots.values()} == accounted, "every slot has somebody who needs it"
        assert {gen for _, gen in self.may_write} <= {entry.generation for entry in room._slots.values()}

    def nobody_writes_to(self, pages: list[Entry]) -> None:
        for entry in pages:
            for _, generation in self.may_write:
                assert not overlap(self.grants[generation].span, span_of(entry))

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for entry in self.promoting:
            self.index.promoted(entry, False)
            self.index.release(entry)
        for entry, _, _ in self.held:
            self.index.release(entry)
        self.promoting, self.held = [], []
        self.index.expire(self.now_s + 2 * LEASE_S)
        for writer, generation in list(self.may_write):
            self.index.abandon(writer, generation, drained=True)
        self.may_write.clear()
        self.always()
        for key in KEYS:
            self.index.drop(key)
        self.always()
        assert (self.index.used_bytes, self.index.quarantined_bytes, self.index.reserved, len(self.index)) == (0,) * 4


TestIndex = Machine.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=60)
