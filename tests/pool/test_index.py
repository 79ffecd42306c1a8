"""The index, case by case. What any order of events must keep is in test_index_machine."""

from __future__ import annotations

from collections import Counter

import pytest

from lmkv.ids import Incarnation, Rank
from lmkv.pool.arena import Arena
from lmkv.pool.index import PoolIndex, Writer
from lmkv.pool.leases import Leases
from lmkv.pool.policy import make_policy
from lmkv.poolwire import Refusal, Slot, Tier

PAGE = 4096
LEASE_S = 10.0
A0, A1, B0 = (Incarnation("a"), Rank(0)), (Incarnation("a"), Rank(1)), (Incarnation("b"), Rank(0))
K = [bytes([i]) * 33 for i in range(64)]


def make(pages: int = 16, slab_pages: int = 4, policy: str = "lru") -> PoolIndex:
    return PoolIndex(Arena(pages * PAGE, slab_pages * PAGE), lambda: make_policy(policy), LEASE_S)


def reserve(
    index: PoolIndex, writer: Writer, key: bytes, page: int = PAGE, shards: int = 1, shard: int = 0, now_s: float = 0.0
) -> Slot:
    (slot,) = index.reserve(writer, [key], page, shards, shard, now_s, question=1)
    return slot


def store(index: PoolIndex, key: bytes, page: int = PAGE) -> Slot:
    slot = reserve(index, A0, key, page)
    assert index.commit(A0, key, slot.generation, 0, (5,), 0.0) is Refusal.NONE
    return slot


# --- reserving ---


def test_a_page_is_visible_from_its_commit_on() -> None:
    index = make()
    slot = reserve(index, A0, K[0])
    assert slot == Slot(0, 1) and index.find(K[0]) is None and index.run(K[:1]) == []
    assert index.commit(A0, K[0], slot.generation, 0, (7, 8), 0.0) is Refusal.NONE
    entry = index.find(K[0])
    assert entry is not None and entry.checksums == (7, 8)
    assert index.take_events() == [(K[0], Tier.DRAM)]


def test_who_comes_second_is_told_why() -> None:
    index = make(pages=1)
    slot = reserve(index, A0, K[0])
    assert reserve(index, B0, K[0]).refusal is Refusal.BUSY
    assert reserve(index, A0, K[0]).refusal is Refusal.BUSY, "a slot is given once"
    assert reserve(index, B0, K[1]).refusal is Refusal.FULL
    index.commit(A0, K[0], slot.generation, 0, (), 0.0)
    assert reserve(index, B0, K[0]).refusal is Refusal.EXISTS
    assert index.counters["reserve:busy"] == 2
    assert index.counters["reserve:full"] == index.counters["reserve:exists"] == 1


def test_a_page_larger_than_the_arena_evicts_nothing() -> None:
    index = make(pages=4)
    for key in K[:4]:
        store(index, key)
    assert reserve(index, A0, K[9], page=5 * PAGE).refusal is Refusal.FULL
    assert len(index) == 4


def test_one_question_with_many_keys() -> None:
    index = make(pages=4)
    store(index, K[1])
    reserve(index, B0, K[2])
    index.hold(index.run([K[1]])[0])
    slots = index.reserve(A0, [K[0], K[1], K[2], K[3], K[4], K[5], K[6]], PAGE, 1, 0, 0.0)
    assert [s.refusal.name for s in slots] == ["NONE", "EXISTS", "BUSY", "NONE", "FULL", "FULL", "FULL"]


# --- shares ---


def test_half_committed_is_not_there() -> None:
    index = make()
    first = reserve(index, A0, K[0], shards=2, shard=0)
    second = reserve(index, A1, K[0], shards=2, shard=1)
    assert first == second, "one slot for all ranks"
    assert index.commit(A1, K[0], first.generation, 1, (3, 4), 0.0) is Refusal.NONE
    assert index.find(K[0]) is None and len(index) == 0
    assert index.commit(A0, K[0], first.generation, 0, (1, 2), 0.0) is Refusal.NONE
    entry = index.find(K[0])
    assert entry is not None and entry.checksums == (1, 2, 3, 4), "in the order of the shares"


def test_a_share_has_one_writer_once() -> None:
    index = make()
    slot = reserve(index, A0, K[0], shards=2, shard=0)
    assert reserve(index, A1, K[0], shards=2, shard=0).refusal is Refusal.BUSY
    index.commit(A0, K[0], slot.generation, 0, (), 0.0)
    assert reserve(index, A0, K[0], shards=2, shard=0).refusal is Refusal.BUSY, "it could write after the page is whole"
    assert reserve(index, A1, K[0], shards=2, shard=1) == slot


@pytest.mark.parametrize("change", [{"page": 2 * PAGE}, {"shards": 4}])
def test_ranks_agree_on_the_page(change: dict[str, int]) -> None:
    index = make()
    reserve(index, A0, K[0], shards=2)
    assert reserve(index, A1, K[0], **{"shards": 2, "shard": 1, **change}).refusal is Refusal.BUSY


def test_a_writer_commits_its_own_share_only() -> None:
    index = make()
    slot = reserve(index, A0, K[0], shards=2, shard=0)
    reserve(index, A1, K[0], shards=2, shard=1)
    for writer, shard in ((A0, 1), (A1, 0), (B0, 0), (A0, 5), (A0, -1)):
        assert index.commit(writer, K[0], slot.generation, shard, (), 0.0) is Refusal.UNKNOWN
    assert index.commit(A0, K[1], slot.generation, 0, (), 0.0) is Refusal.STALE, "another key's generation"
    assert index.find(K[0]) is None


def test_one_of_two_ranks_dies() -> None:
    index = make()
    slot = reserve(index, A0, K[0], shards=2, shard=0)
    reserve(index, A1, K[0], shards=2, shard=1)
    index.writer_dead(*A1)
    assert index.quarantined_bytes == PAGE, "rank 0 may still write"
    assert reserve(index, B0, K[0]).offset != slot.offset
    assert index.commit(A0, K[0], slot.generation, 0, (), 0.0) is Refusal.STALE
    assert index.quarantined_bytes == 0 and index.used_bytes == PAGE


def test_a_share_that_never_comes_ends_with_the_lease() -> None:
    index = make()
    slot = reserve(index, A0, K[0], shards=2, shard=0)
    index.commit(A0, K[0], slot.generation, 0, (), 0.0)
    assert index.expire(LEASE_S + 1) == 1
    assert index.used_bytes == 0, "nobody was writing any more"


# --- too late ---


def test_a_stale_generation_is_refused() -> None:
    index = make()
    old = store(index, K[0])
    index.drop(K[0])
    new = reserve(index, A0, K[0])
    assert new.offset == old.offset and new.generation != old.generation
    assert index.commit(A0, K[0], old.generation, 0, (1,), 0.0) is Refusal.STALE
    assert index.commit(A0, K[0], 999, 0, (1,), 0.0) is Refusal.UNKNOWN
    assert index.find(K[0]) is None


@pytest.mark.parametrize("noticed", [True, False])
def test_a_commit_after_the_lease_is_stale_and_ends_the_quarantine(noticed: bool) -> None:
    index = make()
    slot = reserve(index, A0, K[0])
    if noticed:
        assert index.expire(LEASE_S + 1) == 1
        assert index.quarantined_bytes == PAGE
        assert reserve(index, B0, K[0], now_s=LEASE_S + 1).offset != slot.offset
    assert index.commit(A0, K[0], slot.generation, 0, (1,), LEASE_S + 1) is Refusal.STALE
    assert index.quarantined_bytes == 0 and index.find(K[0]) is None
    assert index.used_bytes == (PAGE if noticed else 0)


def test_an_abandoned_slot_waits_until_nothing_can_land() -> None:
    index = make()
    slot = reserve(index, A0, K[0])
    index.abandon(A0, slot.generation, drained=False)
    assert index.quarantined_bytes == index.used_bytes == PAGE
    index.abandon(B0, slot.generation, drained=True)
    assert index.used_bytes == PAGE, "that was somebody else"
    index.abandon(A0, slot.generation, drained=True)
    assert index.used_bytes == 0


def test_what_an_unheard_answer_gave_is_taken_back() -> None:
    index = make()
    index.reserve(A0, K[:2], PAGE, 1, 0, 0.0, question=5)
    (kept,) = index.reserve(A0, K[2:3], PAGE, 1, 0, 0.0, question=6)
    index.take_back(B0, K[:3], 5)
    assert index.reserved == 3
    index.take_back(A0, K[:3], 5)
    assert index.reserved == 1 and index.used_bytes == PAGE
    assert index.commit(A0, K[2], kept.generation, 0, (), 0.0) is Refusal.NONE


def test_an_unheard_answer_is_taken_back_after_its_lease_too() -> None:
    index = make()
    index.reserve(A0, K[:1], PAGE, 1, 0, 0.0, question=5)
    index.expire(LEASE_S + 1)
    index.take_back(A0, K[:1], 5)
    assert index.used_bytes == 0


# --- dropping, evicting ---


def test_a_dropped_page_keeps_its_slot_while_it_is_held() -> None:
    index = make(pages=1)
    store(index, K[0])
    (entry,) = index.run(K[:1])
    index.hold(entry)
    assert index.drop(K[0]) and index.find(K[0]) is None
    assert index.take_events()[-1] == (K[0], Tier(0))
    assert reserve(index, B0, K[0]).refusal is Refusal.FULL
    index.release(entry)
    assert reserve(index, B0, K[0]).refusal is Refusal.NONE


def test_dropping_what_is_being_written_makes_the_commit_stale() -> None:
    index = make()
    slot = reserve(index, A0, K[0])
    assert not index.drop(K[0])
    assert index.keys(b"") == []
    assert index.commit(A0, K[0], slot.generation, 0, (), 0.0) is Refusal.STALE
    assert index.used_bytes == 0


def test_eviction_takes_neither_pinned_nor_uncommitted_pages() -> None:
    index = make(pages=4)
    for key in K[:3]:
        store(index, key)
    pinned = index.run(K[:1])[0]
    index.hold(pinned)
    reserve(index, B0, K[9])
    assert reserve(index, A0, K[10]).refusal is Refusal.NONE
    assert [index.find(k) is not None for k in K[:3]] == [True, False, True], "the oldest that is not pinned"
    assert reserve(index, A0, K[11]).refusal is Refusal.NONE
    assert reserve(index, A0, K[12]).refusal is Refusal.FULL
    assert pinned.present and index.counters["evicted:last_copy"] == 2


def test_the_end_of_a_chain_goes_first() -> None:
    index = make(pages=4)
    for key in reversed(K[:4]):  # as the desk commits and touches them
        store(index, key)
    reserve(index, A0, K[9])
    assert [entry.key for entry in index.run(K[:4])] == K[:3]


def test_another_size_takes_over_a_slab() -> None:
    """But none with a page in it that is held or being written."""
    index = make(pages=64, slab_pages=4)
    slot = reserve(index, B0, K[0])
    for key in K[1:64]:
        store(index, key)
    for key in K[8::4]:
        index.hold(index.run([key])[0])
    taken = [reserve(index, A0, bytes([100 + i]) * 33, page=2 * PAGE) for i in range(3)]
    assert [t.refusal.name for t in taken] == ["NONE", "NONE", "FULL"]
    assert [t.offset for t in taken[:2]] == [4 * PAGE, 6 * PAGE]
    assert [index.find(key) is None for key in K[:9]] == [True, False, False, False, True, True, True, True, False]
    assert index.commit(B0, K[0], slot.generation, 0, (), 0.0) is Refusal.NONE


def test_memory_moves_to_the_size_that_is_used() -> None:
    """A model that nobody asks for any more does not keep all memory but a slab."""
    index = make(pages=64, slab_pages=4)
    for key in K:
        store(index, key)
    for round_ in range(40):
        store(index, bytes([100 + round_]) * 33, page=2 * PAGE)
    sizes = Counter(entry.page_bytes for entry in index.entries())
    assert sizes[2 * PAGE] >= 20, sizes


def test_sizes_that_are_both_used_share() -> None:
    index = make(pages=64, slab_pages=4)
    for round_ in range(200):
        store(index, bytes([1, round_]) * 16 + b"x", page=PAGE)
        store(index, bytes([2, round_]) * 16 + b"x", page=2 * PAGE)
    sizes = Counter(entry.page_bytes for entry in index.entries())
    assert sizes[PAGE] >= 8 and sizes[2 * PAGE] >= 8, sizes


# --- tiers ---


def test_a_page_below_is_promoted_with_a_new_generation() -> None:
    index = make()
    first = store(index, K[0])
    (entry,) = index.run(K[:1])
    index.stored(entry, Tier.DISK)
    index._room.evict(entry)
    assert index.find(K[0]) is entry and entry.tiers == Tier.DISK
    assert index.start_promotion(entry)
    index.hold(entry)
    index.promoted(entry, error=False)
    index.release(entry)
    assert entry.tiers == Tier.DRAM | Tier.DISK and entry.generation != first.generation
    assert [t for _, t in index.take_events()] == [
        Tier.DRAM,
        Tier.DRAM | Tier.DISK,
        Tier.DISK,
        Tier.DRAM | Tier.DISK,
    ]


@pytest.mark.parametrize("error", [True, False])
def test_a_page_that_its_tier_gives_up_on_its_way_up_is_gone(error: bool) -> None:
    index = make()
    index.adopt(K[0], PAGE, (1,), Tier.DISK)
    (entry,) = index.run(K[:1])
    assert index.start_promotion(entry)
    index.hold(entry)
    index.lost(K[0], Tier.DISK)
    assert index.find(K[0]) is None
    store(index, K[0])  # another one, meanwhile
    index.promoted(entry, error)
    index.release(entry)
    assert index.used_bytes == PAGE
    assert index.find(K[0]) is not entry
    for key in K[1:20]:
        store(index, key)  # eviction still knows all it meets


def test_no_room_to_promote() -> None:
    index = make(pages=1)
    index.adopt(K[0], PAGE, (1,), Tier.DISK)
    reserve(index, A0, K[1])
    assert not index.start_promotion(index.run(K[:1])[0])
    assert index.counters["promote:full"] == 1


# --- leases ---


def leases(index: PoolIndex, most: int = 4) -> Leases:
    return Leases(index, index.counters, most * PAGE, first=10)


def test_pins_run_out() -> None:
    index = make()
    store(index, K[0])
    pins = leases(index)
    lease = pins.pin(B0, index.run(K[:1]), 5.0, now_s=0.0)
    pins.expire(5.0)
    assert len(pins) == 1
    pins.expire(5.1)
    assert (len(pins), pins.pinned_bytes, index.counters["pin:expired"]) == (0, 0, 1)
    assert not pins.unpin(lease) and not pins.unpin(1)
    assert pins.pinned(lease) == ()


def test_a_page_pinned_by_many_counts_once() -> None:
    index = make()
    for key in K[:6]:
        store(index, key)
    pins = leases(index, most=4)
    first = [pins.pin(B0, index.run(K[:3]), 5.0, 0.0) for _ in range(10)]
    assert pins.pinned_bytes == 3 * PAGE
    assert pins.fits(index.run(K[:6])) == 4, "three are pinned anyway"
    for lease in first:
        pins.unpin(lease)
    assert pins.pinned_bytes == 0


def test_a_dead_reader_holds_nothing() -> None:
    index = make()
    store(index, K[0])
    pins = leases(index)
    pins.pin(B0, index.run(K[:1]), 5.0, 0.0)
    pins.pin(A0, index.run(K[:1]), 5.0, 0.0)
    pins.reader_gone(B0)
    assert len(pins) == 1 and index.run(K[:1])[0].holds == 1
