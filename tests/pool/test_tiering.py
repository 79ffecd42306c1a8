"""Between arena and lower tier, with a real node and a tier in memory that fails when told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkv import poolwire as pw
from lmkv.hashing import namespace_of
from lmkv.pool.tiers.base import PageMeta
from lmkv.poolwire import Ack, Refusal, Tier
from tests.pool.bed import PAGE, PAGES, SPACE, NodeThread, User, content, key, until, using
from tests.pool.fake_tier import FakeTier, TierBed

OBJECT = SPACE + key(1)


@pytest.fixture
def tier() -> FakeTier:
    return FakeTier()


@pytest.fixture
def bed(tmp_path: Path, tier: FakeTier) -> Iterator[TierBed]:
    found = TierBed(tmp_path, tier, policy="lru")
    yield found
    found.end()


def fill(bed: TierBed) -> None:
    """All of memory is reserved: nothing else has room."""
    at, full = 30_000, False
    while not full:
        full = any(slot.refusal is Refusal.FULL for slot in bed.user.reserve(range(at, at + 64)))
        at += 64


# --- down and up ---


def test_a_page_goes_down_is_evicted_and_comes_up(bed: TierBed) -> None:
    bed.user.store(1, 2, 3)
    bed.on_disk(1, 2, 3)
    bed.out_of_memory(1, 2, 3)
    first = bed.user.pin([1, 2, 3])
    assert first.pages == () and first.why is Refusal.BUSY, "there, but not here: ask with wait_s"
    pinned = bed.user.pin([1, 2, 3], wait_s=5.0)
    assert [page.tier for page in pinned.pages] == [Tier.DISK] * 3
    assert [page.checksums for page in pinned.pages] == [(1,), (2,), (3,)]
    assert bed.user.load(1, 2, 3) == 3
    assert bed.user.counters()["promote:DISK"] == 3


def test_a_pin_waits_no_longer_than_it_says(bed: TierBed) -> None:
    bed.user.store(1, 2)
    bed.on_disk(1, 2)
    bed.out_of_memory(2)
    assert bed.user.load(1, wait_s=5.0) == 1
    bed.tier.get_gate.clear()
    pinned = bed.user.pin([1, 2], wait_s=0.2)
    assert len(pinned.pages) == 1 and pinned.why is Refusal.BUSY
    bed.tier.get_gate.set()
    assert bed.user.load(1, 2, wait_s=5.0) == 2
    assert bed.user.stats()["waiting"] == 0


def test_a_page_wanted_by_many_is_read_once(bed: TierBed) -> None:
    bed.user.store(1)
    bed.on_disk(1)
    bed.out_of_memory(1)
    got: list[pw.Pinned | None] = []
    bed.tier.get_gate.clear()
    for _ in range(5):
        question = (bed.user.incarnation, bed.user.rank, SPACE, key(1), 5.0, 5.0)
        bed.user.link.ask(lambda t, q=question: pw.Pin(t, *q), pw.Pinned, got.append, 1e18)
    bed.user.until_stats(lambda s: s["waiting"] == 5)
    bed.tier.get_gate.set()
    bed.user.pump(lambda: len(got) == 5)
    assert {len(p.pages) for p in got if p is not None} == {1}
    assert bed.user.counters()["promote:DISK"] == 1


def test_no_room_to_bring_a_page_up(bed: TierBed) -> None:
    bed.user.store(1)
    bed.on_disk(1)
    bed.out_of_memory(1)
    fill(bed)
    pinned = bed.user.pin([1], wait_s=5.0)
    assert pinned.pages == () and pinned.why is Refusal.BUSY
    assert bed.user.counters()["promote:full"] == 1


@pytest.mark.parametrize("fault", ["corrupt", "other meta", "not there"])
def test_what_a_tier_has_lost_is_a_miss(bed: TierBed, fault: str) -> None:
    bed.user.store(1, 2)
    bed.on_disk(1, 2)
    bed.out_of_memory(1, 2)
    match fault:
        case "corrupt":
            bed.tier.corrupt.add(OBJECT)
        case "other meta":
            bed.tier.pages[OBJECT] = (PageMeta(PAGE, (77,)), bed.tier.pages[OBJECT][1])
        case _:
            del bed.tier.pages[OBJECT]
    assert bed.user.pin([1, 2], wait_s=5.0).pages == ()
    assert bed.tiers(1) == Tier(0) and bed.user.load(2, wait_s=5.0) == 1
    assert bed.user.counters()["promote:DISK:failed"] == 1
    bed.user.store(1)
    assert bed.user.load(1) == 1


@pytest.mark.parametrize("fault", ["fail_get", "bug"])
def test_what_a_tier_cannot_read_now_stays(bed: TierBed, fault: str) -> None:
    bed.user.store(1)
    bed.on_disk(1)
    bed.out_of_memory(1)
    setattr(bed.tier, fault, True)
    assert bed.user.load(1, wait_s=5.0) == 0
    setattr(bed.tier, fault, False)
    assert bed.user.load(1, wait_s=5.0) == 1


@pytest.mark.parametrize("fault", ["fail_put", "bug"])
def test_what_a_tier_does_not_take_stays_in_memory(bed: TierBed, fault: str) -> None:
    setattr(bed.tier, fault, True)
    bed.user.store(1)
    bed.user.until_stats(lambda s: s["counters"].get("spill:DISK:failed") == 1)
    assert bed.tiers(1) == Tier.DRAM and bed.user.load(1) == 1
    bed.user.until_stats(lambda s: s["counters"].get("spill:DISK:failed", 0) <= 2)


# --- the queue ---


def test_a_full_queue_is_counted_and_leaves_room(bed: TierBed) -> None:
    """However slow the tier, half of the arena stays free for what comes."""
    bed.tier.gate.clear()
    bed.user.store(*range(PAGES))
    overflow = bed.user.counters()["spill:DISK:overflow"]
    assert overflow == PAGES // 2
    slots = bed.user.reserve(range(1000, 1000 + PAGES))
    assert sum(slot.refusal is Refusal.NONE for slot in slots) == PAGES // 2
    bed.tier.gate.set()


def test_a_queue_of_its_own_size(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, most_queued_bytes=3 * PAGE)
    with using(bed):
        bed.tier.gate.clear()
        bed.user.store(*range(10))
        assert bed.user.counters()["spill:DISK:overflow"] == 7
        bed.tier.gate.set()
        bed.on_disk(0, 1, 2)


def test_admission_by_hits(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, admit_hits=2)
    with using(bed):
        bed.user.store(1, 2)
        assert bed.user.load(1, 2) == 2 and bed.user.load(2) == 1
        bed.on_disk(2)
        assert bed.tiers(1) == Tier.DRAM and tier.puts == 1


# --- dropping ---


def test_a_drop_during_a_spill(bed: TierBed) -> None:
    bed.tier.gate.clear()
    bed.user.store(1)
    done: list[pw.Dropped | None] = []
    bed.user.link.ask(lambda t: pw.Drop(t, SPACE, key(1)), pw.Dropped, done.append, 1e18)
    bed.user.pump_for(0.1)
    assert bed.user.load(1) == 0, "forgotten at once"
    assert done == [], "but not gone for good yet"
    bed.user.store(1)  # another page of that name, behind it on its way
    bed.tier.gate.set()
    bed.user.pump(lambda: done)
    assert done[0] is not None and done[0].pages == 1
    bed.on_disk(1)
    bed.out_of_memory(1)
    assert bed.user.load(1, wait_s=5.0) == 1


def test_a_drop_during_a_promotion(bed: TierBed) -> None:
    bed.user.store(1)
    bed.on_disk(1)
    bed.out_of_memory(1)
    used = bed.user.stats()["used_bytes"]
    bed.tier.get_gate.clear()
    got: list[pw.Pinned | None] = []
    question = (bed.user.incarnation, bed.user.rank, SPACE, key(1), 5.0, 5.0)
    bed.user.link.ask(lambda t: pw.Pin(t, *question), pw.Pinned, got.append, 1e18)
    bed.user.until_stats(lambda s: s["waiting"])
    threading.Timer(0.1, bed.tier.get_gate.set).start()
    assert bed.user.drop([1]) == 1
    bed.user.pump(lambda: got)
    assert got[0] is not None and got[0].pages == ()
    assert OBJECT not in bed.tier.pages
    bed.user.until_stats(lambda s: s["used_bytes"] == used)


def test_a_namespace_is_dropped_with_what_is_being_written(bed: TierBed) -> None:
    other = b"o" * 16
    bed.user.store(1, 2)
    slots = bed.user.reserve([3])
    kept = bed.user.reserve([4], space=other)
    bed.on_disk(1, 2)
    bed.tier.pages[SPACE + key(99)] = (PageMeta(PAGE, ()), bytes(PAGE))  # of another node, in a shared store
    assert bed.user.drop() == 2
    assert bed.tier.pages == {}
    assert bed.user.commit([3], slots).refusals == (Refusal.STALE,)
    assert bed.user.commit([4], kept, space=other).refusals == (Refusal.NONE,)
    assert bed.pages() == 1


def test_what_is_stored_behind_a_dropped_namespace_stays(bed: TierBed) -> None:
    """The drop runs on one lane; pages of the others must not overtake it."""
    bed.user.store(*range(50))
    bed.on_disk(*range(50))
    dropping, going_on = threading.Event(), threading.Event()
    drop = bed.tier.drop_namespace

    def slow(namespace: bytes) -> int:
        dropping.set()
        assert going_on.wait(20)
        return drop(namespace)

    bed.tier.drop_namespace = slow  # type: ignore[method-assign]
    done: list[object] = []
    bed.user.link.ask(lambda t: pw.Drop(t, SPACE), pw.Dropped, done.append, 1e18)
    bed.user.pump(dropping.is_set)
    bed.user.store(*range(50))
    going_on.set()
    bed.user.pump(lambda: done)
    bed.on_disk(*range(50))
    bed.out_of_memory(*range(50))
    assert bed.user.load(*range(50), wait_s=5.0) == 50


def test_drops_are_done_before_the_end(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, drain_s=0.1)
    with using(bed):
        bed.user.store(1, 2)
        bed.on_disk(1, 2)
        tier.gate.clear()
        bed.user.store(3)  # keeps its lane busy
        bed.user.link.ask(lambda t: pw.Drop(t, SPACE, key(1) + key(2) + key(3)), pw.Dropped, lambda a: None, 1e18)
        bed.user.until_stats(lambda s: s["pages"] == 0)
        bed.node.node.stop()
        threading.Timer(0.5, tier.gate.set).start()
        bed.node.thread.join(20)
        assert bed.node.problem is None and tier.closed
        assert tier.pages == {}, "they would come back with the next start"


def test_a_page_found_corrupt_is_dropped_below_too(bed: TierBed) -> None:
    bed.user.store(1)
    bed.on_disk(1)
    bed.user.unpin(bed.user.pin([1]), corrupt=[1])
    until(lambda: OBJECT not in bed.tier.pages)


# --- acknowledgement ---


def test_a_durable_store_waits_until_it_is(bed: TierBed) -> None:
    bed.tier.gate.clear()
    threading.Timer(0.2, bed.tier.gate.set).start()
    assert bed.user.store(1, 2, ack=Ack.DURABLE, wait_s=10.0).reached is Ack.DURABLE
    assert OBJECT in bed.tier.pages
    assert bed.user.store(3).reached is Ack.VOLATILE


def test_a_durable_store_that_is_not(bed: TierBed) -> None:
    bed.tier.fail_put = True
    assert bed.user.store(1, 2, ack=Ack.DURABLE, wait_s=10.0).reached is Ack.VOLATILE


def test_a_durable_store_has_a_deadline(bed: TierBed) -> None:
    bed.tier.gate.clear()
    assert bed.user.store(1, ack=Ack.DURABLE, wait_s=0.2).reached is Ack.VOLATILE
    assert bed.user.load(1) == 1
    bed.tier.gate.set()
    bed.on_disk(1)


def test_a_node_without_tiers_is_volatile(tmp_path: Path) -> None:
    node = NodeThread(tmp_path)
    user = User(node.address)
    with using(node, user):
        assert user.store(1, ack=Ack.DURABLE, wait_s=10.0).reached is Ack.VOLATILE


def test_a_durable_store_past_a_full_queue(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, most_queued_bytes=PAGE)
    with using(bed):
        assert bed.user.store(*range(9), ack=Ack.DURABLE, wait_s=10.0).reached is Ack.DURABLE


# --- the tier's own doings, and restarts ---


def test_a_tier_makes_room(bed: TierBed) -> None:
    bed.user.store(1, 2)
    bed.on_disk(1, 2)
    bed.out_of_memory(2)
    bed.user.load(1, wait_s=5.0)
    for gone in (1, 2):
        del bed.tier.pages[SPACE + key(gone)]
    bed.tier.evicted([SPACE + key(1), SPACE + key(2)])
    until(lambda: bed.tiers(2) == Tier(0))
    assert bed.tiers(1) == Tier.DRAM


def test_a_restart_serves_what_was_durable(tmp_path: Path, tier: FakeTier) -> None:
    text = '{"model":"m"}'
    first = TierBed(tmp_path, tier)
    first.user.access.declare(namespace_of(text), text)
    first.user.store(1, 2, 3)
    first.on_disk(1, 2, 3)
    until(lambda: tier.described)
    first.end()
    again = FakeTier(tier.pages)
    again.described = tier.described
    bed = TierBed(tmp_path, again)
    with using(bed):
        assert bed.tiers(1) == Tier.DISK and bed.pages() == 3
        assert bed.user.reserve([1])[0].refusal is Refusal.EXISTS
        assert bed.user.load(1, 2, 3, wait_s=5.0) == 3
        assert bed.user.stats()["namespaces"] == {namespace_of(text).hex(): text}


def test_a_drain_writes_what_only_memory_holds(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, admit_hits=100)
    with using(bed):
        bed.user.store(*range(20))
        assert tier.pages == {}
        assert bed.user.get(lambda t: pw.Drain(t), pw.Drained).volatile == 0
        assert len(tier.pages) == 20


def test_a_drain_that_fails_says_how_much_is_volatile(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, admit_hits=100)
    with using(bed):
        bed.user.store(*range(20))
        tier.fail_put = True
        assert bed.user.get(lambda t: pw.Drain(t), pw.Drained).volatile == 20


def test_the_end_waits_for_what_is_being_written(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, admit_hits=100)
    bed.user.store(*range(20))
    bed.end()
    assert len(tier.pages) == 20 and tier.closed
    assert {data for _, data in tier.pages.values()} == {content(n) for n in range(20)}


def test_the_end_does_not_wait_for_ever(tmp_path: Path, tier: FakeTier) -> None:
    bed = TierBed(tmp_path, tier, drain_s=0.2)
    tier.gate.clear()
    bed.user.store(*range(20))
    bed.node.node.stop()
    threading.Timer(1.0, tier.gate.set).start()
    bed.node.thread.join(20)
    assert tier.closed and tier.puts <= 4, "what had begun on each lane, not what was queued"
    bed.end()
