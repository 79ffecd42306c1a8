"""What every tier promises (`lmkv.pool.tiers.base`), on each of them, encrypted or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkv.pool.tiers.base import CorruptError, PageMeta, TierError
from lmkv.pool.tiers.record import HEADER_BYTES, MAX_CHECKSUMS
from lmkv.pool.tiers.sealing import Sealer

from .tier_bed import (
    MIB,
    SEALER,
    Bed,
    DiskBed,
    DiskPlace,
    ObjectBed,
    all_there,
    data_of,
    get,
    in_threads,
    key_of,
    meta_of,
    put,
    serve_s3,
)

OTHER = Sealer(bytes(32))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    yield from serve_s3()


@pytest.fixture(params=["disk", "buffered", "file", "memory", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["plain", "sealed"])
def bed(request: pytest.FixtureRequest, kind: str, tmp_path: Path, s3: str) -> Iterator[Bed]:
    sealer = SEALER if request.param == "sealed" else None
    made: Bed
    if kind in ("disk", "buffered"):
        made = DiskBed(DiskPlace(tmp_path / "tier", direct=False if kind == "buffered" else None), sealer)
    elif kind == "s3":
        url = f"s3://pool/{tmp_path.name}"
        made = ObjectBed(url, sealer, endpoint=s3, region="us-east-1", allow_http=True)
    else:
        made = ObjectBed("memory://" if kind == "memory" else f"file://{tmp_path}/objects", sealer)
    yield made
    made.close()


def reopened(bed: Bed, tier: object) -> object:
    if not bed.persistent:
        return tier
    tier.close()  # type: ignore[attr-defined]
    return bed.open()


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 70_001, 1 * MIB, 3 * MIB])
def test_what_was_put_is_read(bed: Bed, size: int) -> None:
    tier = bed.open()
    data = put(tier, key_of(1), size)
    assert get(tier, key_of(1)) == data
    again = reopened(bed, tier)
    assert get(again, key_of(1)) == data  # type: ignore[arg-type]


def test_what_is_not_there_is_none(bed: Bed) -> None:
    tier = bed.open()
    put(tier, key_of(1))
    assert get(tier, key_of(2)) is None
    assert tier.counters()["misses"] == 1


def test_pages_can_be_replaced(bed: Bed) -> None:
    tier = bed.open()
    put(tier, key_of(1), 1 * MIB)
    data = put(tier, key_of(1), 300_000, version=1)
    assert get(tier, key_of(1)) == data
    again = reopened(bed, tier)
    assert get(again, key_of(1)) == data  # type: ignore[arg-type]
    assert [key for key, _ in again.scan()] == [key_of(1)]  # type: ignore[attr-defined]


def test_a_target_may_be_larger_but_not_smaller(bed: Bed) -> None:
    tier = bed.open()
    data = put(tier, key_of(1), 10_000)
    into = bytearray(b"x" * 12_000)
    assert tier.get(key_of(1), memoryview(into)) == meta_of(data)
    assert into == data + b"x" * 2_000
    with pytest.raises(TierError, match="does not fit"):
        tier.get(key_of(1), memoryview(bytearray(9_999)))
    assert get(tier, key_of(1)) == data


def test_dropped_pages_stay_dropped(bed: Bed) -> None:
    tier = bed.open()
    pages = {key_of(number): put(tier, key_of(number)) for number in range(6)}
    gone = [key_of(1), key_of(4)]
    assert tier.drop([*gone, key_of(99)]) == 2
    assert tier.drop(gone) == 0
    assert [get(tier, key) for key in gone] == [None, None]
    again = reopened(bed, tier)
    assert [get(again, key) for key in gone] == [None, None]  # type: ignore[arg-type]
    kept = {key: data for key, data in pages.items() if key not in gone}
    assert all_there(again, kept) == []  # type: ignore[arg-type]
    assert {key for key, _ in again.scan()} == set(kept)  # type: ignore[attr-defined]


def test_namespaces_are_dropped_whole(bed: Bed) -> None:
    tier = bed.open()
    for namespace in (1, 2, 255):
        for number in range(3):
            put(tier, key_of(number, namespace))
    assert tier.drop_namespace(bytes([255]) * 16) == 3
    assert tier.drop_namespace(bytes([7]) * 16) == 0
    again = reopened(bed, tier)
    assert {key[0] for key, _ in again.scan()} == {1, 2}  # type: ignore[attr-defined]
    assert again.drop_namespace(b"") == 6  # type: ignore[attr-defined]
    assert list(again.scan()) == []  # type: ignore[attr-defined]


def test_a_scan_lists_everything_with_its_meta(bed: Bed, kind: str) -> None:
    tier = bed.open()
    order = [key_of(number, namespace) for number in range(20) for namespace in (3, 1)]
    metas = {key: meta_of(put(tier, key, 5_000 + at)) for at, key in enumerate(order)}
    again = reopened(bed, tier)
    found = list(again.scan())  # type: ignore[attr-defined]
    assert dict(found) == metas
    assert len(found) == len(metas)
    if kind in ("disk", "buffered"):
        assert [key for key, _ in found] == order


def test_descriptions_are_kept(bed: Bed) -> None:
    tier = bed.open()
    tier.describe(b"n" * 16, '{"model": "ä"}')
    tier.describe(b"n" * 16, '{"model": "ä"}')
    tier.describe(b"m" * 16, "{}")
    put(tier, key_of(1))
    again = reopened(bed, tier)
    assert again.descriptions() == {b"n" * 16: '{"model": "ä"}', b"m" * 16: "{}"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("offset", [3, 20, 40, 90, 110, 122, 130, 4000, HEADER_BYTES, HEADER_BYTES + 35_000, -1])
def test_a_turned_bit_is_found_and_the_page_thrown_away(bed: Bed, offset: int) -> None:
    tier = bed.open()
    data = put(tier, key_of(2))
    put(tier, key_of(1))
    bed.flip(tier, key_of(1), offset)
    with pytest.raises(CorruptError):
        get(tier, key_of(1))
    assert tier.counters()["corrupt"] == 1
    assert get(tier, key_of(1)) is None
    again = reopened(bed, tier)
    assert get(again, key_of(1)) is None  # type: ignore[arg-type]
    assert get(again, key_of(2)) == data  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + 69_000])
def test_a_record_that_was_cut_is_found(bed: Bed, size: int) -> None:
    tier = bed.open()
    put(tier, key_of(1))
    bed.cut(tier, key_of(1), size)
    with pytest.raises(CorruptError):
        get(tier, key_of(1))
    assert get(tier, key_of(1)) is None
    data = put(tier, key_of(1), version=1)
    assert get(tier, key_of(1)) == data


def test_another_key_makes_misses_and_loses_nothing(bed: Bed) -> None:
    if not bed.persistent:
        pytest.skip("nothing of a store in memory outlives its tier")
    tier = bed.open()
    data = put(tier, key_of(1))
    tier.close()
    ours = bed.sealer
    for sealer in {None, SEALER, OTHER} - {ours}:
        bed.sealer = sealer
        tier = bed.open()
        assert get(tier, key_of(1)) is None
        assert tier.counters()["wrong_key"] == 1
        assert list(tier.scan()) == []
        tier.close()
    bed.sealer = ours
    assert get(bed.open(), key_of(1)) == data


@pytest.mark.parametrize(
    ("key", "meta", "data"),
    [
        (b"short", PageMeta(4, ()), b"data"),
        (key_of(1), PageMeta(0, ()), b"data"),
        (key_of(1), PageMeta(5, ()), b"data"),
        (key_of(1), PageMeta(4, (1 << 64,)), b"data"),
        (key_of(1), PageMeta(4, (-1,)), b"data"),
        (key_of(1), PageMeta(4, (0,) * (MAX_CHECKSUMS + 1)), b"data"),
        (key_of(1), PageMeta(1 << 40, ()), b"data"),
    ],
)
def test_what_cannot_be_stored_is_refused(bed: Bed, key: bytes, meta: PageMeta, data: bytes) -> None:
    tier = bed.open()
    with pytest.raises(TierError):
        tier.put(key, meta, memoryview(data))
    assert list(tier.scan()) == []


def test_as_many_checksums_as_a_header_holds(bed: Bed) -> None:
    tier = bed.open()
    meta = PageMeta(4, tuple((1 << 64) - 1 - head for head in range(MAX_CHECKSUMS)))
    tier.put(key_of(1), meta, memoryview(b"data"))
    assert tier.get(key_of(1), memoryview(bytearray(4))) == meta


def test_eight_threads_put_get_and_drop(bed: Bed, kind: str) -> None:
    tier = bed.open()
    rounds = 12 if kind == "s3" else 40

    def work(thread: int) -> None:
        for number in range(rounds):
            mine, shared = key_of(number, thread), key_of(number % 5, 99)
            data = put(tier, mine, 20_000 + thread * 5_000)
            put(tier, shared, 30_000)
            assert get(tier, mine) == data
            assert get(tier, shared) in (None, data_of(shared, 30_000))
            if number % 3 == 0:
                tier.drop([mine, shared])
                assert get(tier, mine) is None

    in_threads(8, work)
    again = reopened(bed, tier)
    left = {
        key_of(number, thread): 20_000 + thread * 5_000 for thread in range(8) for number in range(rounds) if number % 3
    }
    assert all_there(again, {key: data_of(key, size) for key, size in left.items()}) == []  # type: ignore[arg-type]
    assert {key for key, _ in again.scan() if key[0] != 99} == set(left)  # type: ignore[attr-defined]


def test_counters_and_use(bed: Bed) -> None:
    tier = bed.open()
    put(tier, key_of(1), 10_000)
    put(tier, key_of(2), 10_000)
    assert tier.used_bytes >= 20_000
    get(tier, key_of(1))
    tier.drop([key_of(1)])
    counts = tier.counters()
    wanted = {"puts": 2, "gets": 1, "put_bytes": 20_000, "got_bytes": 10_000, "dropped": 1, "misses": 0, "failed": 0}
    assert {name: counts[name] for name in wanted} == wanted
    assert 10_000 <= tier.used_bytes < 20_000


def test_a_closed_tier_says_so(bed: Bed) -> None:
    tier = bed.open()
    tier.close()
    tier.close()
    for call in (lambda: put(tier, key_of(1)), lambda: get(tier, key_of(1)), lambda: tier.drop_namespace(b"")):
        with pytest.raises(TierError, match="closed"):
            call()
