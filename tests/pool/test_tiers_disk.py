"""The disk tier's own: errors of the disk, one owner a directory, O_DIRECT, commits that are shared."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmkv.pool.tiers import segments
from lmkv.pool.tiers.base import TierError
from lmkv.pool.tiers.disk import DiskTier

from .tier_bed import MIB, DiskBed, DiskPlace, get, in_threads, key_of, put


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[DiskBed]:
    made = DiskBed(DiskPlace(tmp_path / "tier"), None)
    yield made
    made.close()


def test_a_directory_has_one_owner(bed: DiskBed) -> None:
    tier = bed.open()
    code = (
        "import sys; from pathlib import Path; from lmkv.pool.tiers.disk import DiskTier\n"
        "try: DiskTier(Path(sys.argv[1]), 0, evicted=print)\n"
        "except Exception as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(bed.place.directory)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"LMKV-P822 the disk tier's directory {bed.place.directory} is in use by process {os.getpid()}" in said
    with pytest.raises(TierError, match=str(os.getpid())):
        bed.make()
    tier.close()
    bed.open()


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="cannot be made"):
        DiskTier(tmp_path / "file" / "tier", 0, evicted=lambda keys: None)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_frees_its_slot(bed: DiskBed, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    tier = bed.open()
    kept = put(tier, key_of(1))

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "pwritev", fail)
        for _ in range(100):
            with pytest.raises(TierError, match=os.strerror(code)):
                put(tier, key_of(1), version=1)
    assert get(tier, key_of(1)) == kept
    assert tier.counters()["failed"] == 100
    free = sum(len(each.free) for each in tier._pages.classes[77_824].segments)
    assert free == 2 * MIB // 77_824 - 1
    assert put(tier, key_of(2)) == get(tier, key_of(2))


def test_a_short_write_is_no_page(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bed.open()
    put(tier, key_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "pwritev", lambda *_: 4096)
        with pytest.raises(TierError):
            put(tier, key_of(2))
    assert get(tier, key_of(2)) is None


def test_a_failed_sync_is_no_page(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bed.open()
    kept = put(tier, key_of(1))

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "fdatasync", fail)
        with pytest.raises(TierError, match="Input/output error"):
            put(tier, key_of(1), version=1)
    assert get(tier, key_of(1)) == kept
    tier.close()
    assert get(bed.open(), key_of(1)) == kept


def test_a_failed_read_is_an_error_and_loses_nothing(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bed.open()
    kept = put(tier, key_of(1))

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(segments.os, "preadv", fail)
        with pytest.raises(TierError, match="cannot be read"):
            get(tier, key_of(1))
    assert get(tier, key_of(1)) == kept


def test_an_index_that_takes_no_commit_is_an_error_and_changes_nothing(bed: DiskBed) -> None:
    tier = bed.open()
    kept = put(tier, key_of(1))
    tier._index._db.execute("PRAGMA query_only=1")
    calls: list[Callable[[], object]] = [
        lambda: put(tier, key_of(1), version=1),
        lambda: put(tier, key_of(2)),
        lambda: tier.drop([key_of(1)]),
        lambda: tier.describe(b"n" * 16, "{}"),
    ]
    for call in calls:
        with pytest.raises(TierError, match="takes no changes"):
            call()
    assert get(tier, key_of(1)) == kept
    tier._index._db.execute("PRAGMA query_only=0")
    assert put(tier, key_of(2)) == get(tier, key_of(2))


def test_a_full_disk_is_an_error_until_there_is_room(tmp_path: Path) -> None:
    """A real ENOSPC: files may not grow beyond a limit, in a process of its own."""
    code = """
import resource, sys
from pathlib import Path
from lmkv.pool.tiers.base import TierError
from tests.pool.tier_bed import MIB, DiskTier, get, key_of, put
resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB, 3 * MIB))
tier = DiskTier(Path(sys.argv[1]), 0, evicted=print, segment_bytes=4 * MIB)
try:
    put(tier, key_of(1), 100_000)
except TierError as error:
    print(error)
print(tier.counters()["no_space"], tier.counters()["failed"], get(tier, key_of(1)))
tier.close()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "tier")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert "LMKV-P820 no room for a page" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "1 1 None"


def test_direct_is_told_and_can_be_chosen(bed: DiskBed, tmp_path: Path) -> None:
    for direct in (False, None):
        bed.place.direct = direct
        tier = bed.open()
        assert tier.counters()["direct"] == int(tier.direct)
        assert direct is None or tier.direct == direct
        put(tier, key_of(1))
        tier.close()


def test_where_there_is_no_direct_io_it_is_refused_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(segments.os, "open", no_direct)
    with pytest.raises(TierError, match="takes no O_DIRECT"):
        DiskTier(tmp_path / "tier", 0, evicted=lambda keys: None, direct=True)
    tier = DiskTier(tmp_path / "tier", 0, evicted=lambda keys: None)
    assert not tier.direct
    assert put(tier, key_of(1)) == get(tier, key_of(1))
    tier.close()


def test_a_page_is_synced_before_its_row_is_committed(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bed.open()
    put(tier, key_of(1))
    steps: list[str] = []

    def noted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            steps.append(name)
            return real(*arguments)

        return call

    monkeypatch.setattr(segments.os, "pwritev", noted("written", os.pwritev))
    monkeypatch.setattr(segments.os, "fdatasync", noted("synced", os.fdatasync))
    monkeypatch.setattr(tier._index, "_commit", noted("committed", tier._index._commit))
    put(tier, key_of(2))
    assert steps == ["written", "synced", "committed"]
    steps.clear()
    tier.drop([key_of(1)])
    assert steps == ["committed"]
    (synchronous,) = tier._index._db.execute("PRAGMA synchronous").fetchone()
    assert synchronous == 2


def test_commits_are_shared(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = bed.open()
    put(tier, key_of(0))
    before = tier.counters()["commits"]
    started = threading.Barrier(16)
    real = tier._index._commit
    waiting = threading.Event()

    def slow(batch: Any) -> None:
        waiting.wait(0.05)
        real(batch)

    monkeypatch.setattr(tier._index, "_commit", slow)

    def work(number: int) -> None:
        started.wait(10)
        put(tier, key_of(number + 1))

    in_threads(16, work)
    assert tier.counters()["commits"] - before <= 8
    assert tier.counters()["puts"] == 17


def test_a_disk_that_does_not_answer_costs_a_bounded_time(bed: DiskBed, monkeypatch: pytest.MonkeyPatch) -> None:
    """One change is stuck in its commit; the next gives up and leaves nothing behind."""
    tier = bed.open()
    kept = put(tier, key_of(1))
    monkeypatch.setattr("lmkv.pool.tiers.disk_index.COMMIT_WAIT_S", 0.2)
    stuck, go_on = threading.Event(), threading.Event()
    real = tier._index._commit

    def slow(batch: Any) -> None:
        stuck.set()
        assert go_on.wait(30)
        real(batch)

    with monkeypatch.context() as patch:
        patch.setattr(tier._index, "_commit", slow)
        first = threading.Thread(target=put, args=(tier, key_of(2)))
        first.start()
        assert stuck.wait(10)
        for call in (lambda: put(tier, key_of(1), version=1), lambda: tier.drop([key_of(1)])):
            with pytest.raises(TierError, match="has not answered"):
                call()
        go_on.set()
        first.join(10)
        assert not first.is_alive()
    assert get(tier, key_of(1)) == kept
    assert get(tier, key_of(2)) is not None
    assert sum(each.pending for size_class in tier._pages.classes.values() for each in size_class.segments) == 0
    assert put(tier, key_of(3)) == get(tier, key_of(3))


def test_nothing_is_left_open(bed: DiskBed) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    bed.open().close()
    before = descriptors()
    for _ in range(3):
        tier = bed.open()
        for number in range(40):
            put(tier, key_of(number), 100_000)
        list(tier.scan())
        tier.drop_namespace(b"")
        tier.close()
    assert descriptors() == before
