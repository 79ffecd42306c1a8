"""Opening a disk tier whose files were damaged: what is whole is served, nothing else ever is."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmkv.pool.tiers.base import CorruptError, TierError

from .tier_bed import MIB, DiskBed, DiskPlace, all_there, flip, get, key_of, put


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[DiskBed]:
    made = DiskBed(DiskPlace(tmp_path / "tier"), None)
    yield made
    made.close()


def filled(bed: DiskBed, count: int = 12, size: int = 250_000) -> dict[bytes, bytes]:
    """Pages in two or more segments, of a tier that is closed again."""
    tier = bed.open()
    pages = {key_of(number): put(tier, key_of(number), size) for number in range(count)}
    tier.close()
    return pages


def segment_files(bed: DiskBed) -> list[Path]:
    return sorted((bed.place.directory / "segments").glob("*.seg"))


def test_a_missing_segment_costs_its_pages_only(bed: DiskBed) -> None:
    pages = filled(bed)
    files = segment_files(bed)
    assert len(files) == 2
    files[0].unlink()
    tier = bed.open()
    lost = all_there(tier, pages)
    assert 0 < len(lost) < len(pages)
    assert {key for key, _ in tier.scan()} == set(pages) - set(lost)
    assert tier.counters()["torn"] == len(lost)
    assert tier.counters()["segments_lost"] == 1
    assert {key: put(tier, key, 250_000) for key in lost} == {key: pages[key] for key in lost}
    assert all_there(tier, pages) == []


@pytest.mark.parametrize("size", [0, 1000, 300_000, MIB])
def test_a_cut_segment_costs_what_was_behind_the_cut(bed: DiskBed, size: int) -> None:
    pages = filled(bed)
    os.truncate(segment_files(bed)[0], size)
    tier = bed.open()
    lost = all_there(tier, pages)
    assert len(lost) == 8 - size // 258_048
    assert tier.counters()["torn"] == len(lost)
    assert tier.counters()["corrupt"] == 0
    for key in lost:
        put(tier, key, 250_000)
    tier.close()
    assert all_there(bed.open(), pages) == []


def test_a_torn_header_is_dropped_at_opening(bed: DiskBed) -> None:
    pages = filled(bed)
    flip(segment_files(bed)[0], 40)
    tier = bed.open()
    assert tier.counters()["torn"] == 1
    assert len(all_there(tier, pages)) == 1
    assert len(list(tier.scan())) == len(pages) - 1


def test_a_turned_bit_of_a_page_is_found_when_it_is_read(bed: DiskBed) -> None:
    pages = filled(bed)
    flip(segment_files(bed)[0], 5000)
    tier = bed.open()
    assert tier.counters()["torn"] == 0
    errors = 0
    for key, data in pages.items():
        try:
            assert get(tier, key) == data
        except CorruptError:
            errors += 1
    assert errors == 1


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("key", key_of(77)),
        ("segment", 9),
        ("segment", -1),
        ("slot", 1),
        ("slot", 10**9),
        ("slot", "text"),
        ("generation", 5),
        ("page_bytes", 249_999),
        ("checksums", b"12345678"),
        ("checksums", b"1"),
        ("checksums", 7),
        ("key_id", b"1234"),
    ],
)
def test_a_damaged_row_is_dropped_at_opening(bed: DiskBed, column: str, value: Any) -> None:
    pages = filled(bed)
    with sqlite3.connect(bed.place.directory / "index.sqlite") as db:
        changed = db.execute(f"UPDATE pages SET {column}=? WHERE key=?", (value, key_of(3))).rowcount
    db.close()
    assert changed == 1
    tier = bed.open()
    assert tier.counters()["torn"] == 1
    assert all_there(tier, pages) == [key_of(3)]
    assert len(list(tier.scan())) == len(pages) - 1
    assert put(tier, key_of(3), 250_000) == get(tier, key_of(3))


@pytest.mark.parametrize("change", ["slot_bytes=4097", "slot_bytes=0", "slots=0", "slots='many'"])
def test_a_damaged_segment_row_costs_that_segment(bed: DiskBed, change: str) -> None:
    pages = filled(bed)
    with sqlite3.connect(bed.place.directory / "index.sqlite") as db:
        db.execute(f"UPDATE segments SET {change} WHERE number=1")
    db.close()
    tier = bed.open()
    assert len(all_there(tier, pages)) == 8
    assert tier.counters()["torn"] == 8
    assert len(segment_files(bed)) == 1


def test_turned_bits_anywhere_in_the_index_never_give_wrong_pages(bed: DiskBed) -> None:
    pages = filled(bed, count=12, size=20_000)
    index = bed.place.directory / "index.sqlite"
    whole = index.read_bytes()
    for offset in range(0, len(whole), len(whole) // 60 + 1):
        index.write_bytes(whole)
        flip(index, offset)
        try:
            tier = bed.open()
        except TierError as error:
            assert "version" in str(error)
            continue
        found = dict(tier.scan())
        assert set(found) <= set(pages)
        for key in found:
            assert get(tier, key) == pages[key]
        assert put(tier, key_of(100)) == get(tier, key_of(100))
        tier.drop([key_of(100)])
        tier.close()


@pytest.mark.parametrize("junk", [b"", b"no database at all" * 1000])
def test_an_index_that_is_none_is_set_aside(bed: DiskBed, junk: bytes) -> None:
    pages = filled(bed)
    (bed.place.directory / "index.sqlite").write_bytes(junk)
    tier = bed.open()
    assert len(all_there(tier, pages)) == len(pages)
    assert list(tier.scan()) == []
    assert segment_files(bed) == []
    assert tier.counters()["index_lost"] == int(bool(junk))
    put(tier, key_of(1))
    tier.close()
    assert len(list(bed.open().scan())) == 1


def test_an_index_of_another_version_is_refused(bed: DiskBed) -> None:
    filled(bed)
    with sqlite3.connect(bed.place.directory / "index.sqlite") as db:
        db.execute("UPDATE tier SET version=2")
    db.close()
    with pytest.raises(TierError, match="version 2"):
        bed.open()


def test_files_without_a_row_are_removed(bed: DiskBed) -> None:
    filled(bed)
    stray = bed.place.directory / "segments" / "000000ff.seg"
    stray.write_bytes(bytes(8192))
    tier = bed.open()
    assert not stray.exists()
    assert tier.counters()["segments_stray"] == 1
