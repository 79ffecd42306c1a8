"""Room on the disk: the capacity holds, what was not read goes first, and space returns to other sizes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmkv.pool.tiers import segments
from lmkv.pool.tiers.base import TierError

from .tier_bed import MIB, DiskBed, DiskPlace, all_there, data_of, flip, get, in_threads, key_of, put

SMALL = 60_000
LARGE = 500_000
CAPACITY = 8 * MIB


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[DiskBed]:
    made = DiskBed(DiskPlace(tmp_path / "tier", capacity_bytes=CAPACITY, segment_bytes=2 * MIB), None)
    yield made
    made.close()


def disk_bytes(bed: DiskBed) -> int:
    return sum(path.stat().st_size for path in (bed.place.directory / "segments").glob("*.seg"))


def fill(tier: Any, count: int, size: int, start: int = 0) -> dict[bytes, bytes]:
    return {key_of(number): put(tier, key_of(number), size) for number in range(start, start + count)}


def test_the_capacity_holds_and_the_oldest_go(bed: DiskBed) -> None:
    tier = bed.open()
    pages = fill(tier, 60, LARGE)
    assert disk_bytes(bed) == tier.counters()["file_bytes"] <= CAPACITY
    gone = all_there(tier, pages)
    assert gone == bed.place.evicted == list(pages)[: len(gone)]
    assert tier.counters()["evicted"] == len(gone) > 40
    assert tier.used_bytes <= CAPACITY
    tier.close()
    again = bed.open()
    assert all_there(again, pages) == gone
    assert set(dict(again.scan())) == set(pages) - set(gone)


def test_age_outlives_an_opening(bed: DiskBed) -> None:
    tier = bed.open()
    pages = fill(tier, 22, LARGE)
    gone = len(bed.place.evicted)
    tier.close()
    tier = bed.open()
    pages |= fill(tier, 8, LARGE, start=100)
    assert len(bed.place.evicted) > gone
    assert bed.place.evicted == list(pages)[: len(bed.place.evicted)]


def test_what_was_read_gets_a_second_chance(bed: DiskBed) -> None:
    tier = bed.open()
    hot = key_of(1)
    pages = fill(tier, 8, LARGE)
    for number in range(8, 80):
        assert get(tier, hot) == pages[hot]
        put(tier, key_of(number), LARGE)
    assert hot not in bed.place.evicted
    assert key_of(2) in bed.place.evicted


def test_without_a_capacity_nothing_goes(bed: DiskBed) -> None:
    bed.place.capacity_bytes = 0
    tier = bed.open()
    pages = fill(tier, 40, LARGE)
    assert all_there(tier, pages) == []
    assert bed.place.evicted == []


def test_a_page_larger_than_a_segment_has_one_of_its_own(bed: DiskBed) -> None:
    tier = bed.open()
    data = put(tier, key_of(1), 3 * MIB)
    assert get(tier, key_of(1)) == data


def test_a_page_larger_than_the_capacity_is_refused(bed: DiskBed) -> None:
    tier = bed.open()
    pages = fill(tier, 3, SMALL)
    with pytest.raises(TierError, match="no room"):
        put(tier, key_of(9), CAPACITY)
    assert get(tier, key_of(9)) is None
    assert set(all_there(tier, pages)) <= set(bed.place.evicted)


def test_a_segment_takes_what_is_left_of_the_capacity(bed: DiskBed) -> None:
    bed.place.capacity_bytes = 3 * MIB
    tier = bed.open()
    pages = fill(tier, 44, SMALL)
    assert all_there(tier, pages) == []
    assert disk_bytes(bed) > 2 * MIB


def test_older_pages_of_another_size_give_way(bed: DiskBed) -> None:
    tier = bed.open()
    small = fill(tier, 130, SMALL)
    large = fill(tier, 40, LARGE, start=1000)
    gone = all_there(tier, small | large)
    assert set(gone) == set(bed.place.evicted)
    assert set(small) <= set(gone)
    assert disk_bytes(bed) <= CAPACITY
    assert len(large) - len([key for key in gone if key in large]) >= 12


def test_a_size_that_is_used_keeps_room_beside_another(bed: DiskBed) -> None:
    tier = bed.open()
    for number in range(60):
        put(tier, key_of(number), LARGE)
        put(tier, key_of(1000 + number), SMALL)
    recent = {key_of(number): data_of(key_of(number), LARGE) for number in range(56, 60)}
    recent |= {key_of(1000 + number): data_of(key_of(1000 + number), SMALL) for number in range(56, 60)}
    assert all_there(tier, recent) == []


def test_mostly_empty_segments_are_taken_back_before_anything_goes(bed: DiskBed) -> None:
    tier = bed.open()
    small = fill(tier, 120, SMALL)
    kept = {key: data for at, (key, data) in enumerate(small.items()) if at % 4 == 0}
    tier.drop([key for key in small if key not in kept])
    large = fill(tier, 8, LARGE, start=1000)
    assert bed.place.evicted == []
    assert tier.counters()["compacted"] > 0
    assert all_there(tier, kept | large) == []
    tier.close()
    assert all_there(bed.open(), kept | large) == []


def test_compact_gives_files_back(bed: DiskBed) -> None:
    tier = bed.open()
    pages = fill(tier, 120, SMALL)
    kept = dict(list(pages.items())[::5])
    order = [key for key, _ in tier.scan() if key in kept]
    tier.drop([key for key in pages if key not in kept])
    before = disk_bytes(bed)
    assert tier.compact() == 3
    assert disk_bytes(bed) < before / 2
    assert tier.compact() == 0
    assert all_there(tier, kept) == []
    tier.close()
    again = bed.open()
    assert all_there(again, kept) == []
    assert [key for key, _ in again.scan()] == order


def test_a_dropped_namespace_gives_its_files_back(bed: DiskBed) -> None:
    tier = bed.open()
    fill(tier, 120, SMALL)
    tier.drop_namespace(b"")
    assert len(list((bed.place.directory / "segments").glob("*.seg"))) == 1
    assert tier.used_bytes == 0


def test_compaction_under_reads_writes_and_drops(bed: DiskBed) -> None:
    bed.place.capacity_bytes = 0
    tier = bed.open()
    pages = fill(tier, 200, SMALL)
    kept = dict(list(pages.items())[::4])
    doomed = [key for key in pages if key not in kept]
    done = threading.Event()

    def work(thread: int) -> None:
        try:
            if thread == 0:
                for at in range(0, len(doomed), 10):
                    tier.drop(doomed[at : at + 10])
                    tier.compact()
            elif thread == 1:
                while not done.is_set():
                    for number in range(500, 520):
                        put(tier, key_of(number), SMALL)
                    tier.drop([key_of(number) for number in range(500, 520)])
            else:
                while not done.is_set():
                    assert all_there(tier, kept) == []
        finally:
            if thread == 0:
                done.set()

    in_threads(5, work)
    assert tier.counters()["compacted"] > 20
    assert tier.counters()["corrupt"] == 0
    tier.close()
    again = bed.open()
    assert all_there(again, kept) == []
    assert set(dict(again.scan())) == set(kept)


def test_a_damaged_page_is_not_moved(bed: DiskBed) -> None:
    tier = bed.open()
    pages = fill(tier, 60, SMALL)
    kept = dict(list(pages.items())[::8])
    tier.drop([key for key in pages if key not in kept])
    victim = next(iter(kept))
    place = tier._pages.places[victim]
    flip(place.segment.path, place.slot * place.segment.slot_bytes + 10_000)
    assert tier.compact() >= 1
    assert get(tier, victim) is None
    assert tier.counters()["corrupt"] == 1
    assert all_there(tier, kept) == [victim]


def test_a_compaction_that_fails_changes_nothing(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bed.open()
    pages = fill(tier, 60, SMALL)
    kept = dict(list(pages.items())[::8])
    tier.drop([key for key in pages if key not in kept])

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "pwritev", fail)
        assert tier.compact() == 0
    assert tier.counters()["compaction_failed"] == 1
    assert all_there(tier, kept) == []
    assert tier.compact() >= 1
    assert all_there(tier, kept) == []


def test_a_full_disk_evicts_below_the_capacity(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    bed.place.capacity_bytes = 0
    tier = bed.open()
    pages = fill(tier, 8, LARGE)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(segments.os, "posix_fallocate", fail)
    pages |= fill(tier, 8, LARGE, start=100)
    assert tier.counters()["no_space"] > 0
    assert sorted(all_there(tier, pages)) == sorted(bed.place.evicted)
    assert all_there(tier, {key_of(107): pages[key_of(107)]}) == []


def test_threads_share_a_small_capacity(bed: DiskBed) -> None:
    bed.place.capacity_bytes = 2 * MIB
    tier = bed.open()

    def work(thread: int) -> None:
        for number in range(30):
            key = key_of(number, thread)
            put(tier, key, LARGE)
            assert get(tier, key) in (None, data_of(key, LARGE))

    in_threads(8, work)
    left = dict(tier.scan())
    assert len(left) == 4
    assert len(bed.place.evicted) == len(set(bed.place.evicted)) == 240 - len(left)
    assert disk_bytes(bed) <= 2 * MIB


def test_evicted_is_told_without_a_lock_held(bed: DiskBed) -> None:
    seen: list[bytes | None] = []
    tier = bed.open()

    def told(keys: list[bytes]) -> None:
        seen.extend(get(tier, key) for key in keys)
        tier.drop(keys)

    tier._room._evicted = told
    fill(tier, 30, LARGE)
    assert seen
    assert set(seen) == {None}
