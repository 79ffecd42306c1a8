"""Any order of puts, reads, drops, compactions, damage and openings: the disk tier is a dictionary that may forget what
it was told it forgets, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmkv.pool.tiers.base import CorruptError
from lmkv.pool.tiers.disk import DiskTier

from .tier_bed import SEALER, all_there, flip, get, key_of, put

FAST = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Hundreds of tiers are opened, and what a sync costs is not the question here."""
KEYS = st.builds(key_of, st.integers(0, 11), st.integers(0, 2))
SIZES = st.sampled_from([1, 4096, 20_000, 61_440, 130_000])


class DiskMachine(RuleBasedStateMachine):
    @initialize(
        capacity_bytes=st.sampled_from([0, 0, 600_000]), sealed=st.booleans(), direct=st.sampled_from([None, False])
    )
    def begin(self, capacity_bytes: int, sealed: bool, direct: bool | None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="lmkv-tier-", dir=FAST))
        self.capacity_bytes, self.sealed, self.direct = capacity_bytes, sealed, direct
        self.pages: dict[bytes, bytes] = {}
        self.damaged: set[bytes] = set()
        self.version = 0
        self.open()

    def open(self) -> None:
        self.tier = DiskTier(
            self.directory,
            self.capacity_bytes,
            evicted=self.forget,
            sealer=SEALER if self.sealed else None,
            segment_bytes=200_000,
            direct=self.direct,
        )

    def forget(self, keys: list[bytes]) -> None:
        for key in keys:
            del self.pages[key]
            self.damaged.discard(key)

    @rule(key=KEYS, size=SIZES)
    def put(self, key: bytes, size: int) -> None:
        self.version = (self.version + 1) % 256
        self.pages[key] = put(self.tier, key, size, self.version)
        self.damaged.discard(key)

    @rule(key=KEYS)
    def get(self, key: bytes) -> None:
        try:
            assert get(self.tier, key) == self.pages.get(key)
            assert key not in self.damaged
        except CorruptError:
            self.damaged.remove(key)
            del self.pages[key]

    @rule(keys=st.lists(KEYS, max_size=12, unique=True))
    def drop(self, keys: list[bytes]) -> None:
        there = [key for key in keys if key in self.pages]
        assert self.tier.drop(keys) == len(there)
        self.forget(there)

    @rule(namespace=st.integers(0, 3), whole=st.sampled_from([True, True, False]))
    def drop_namespace(self, namespace: int, whole: bool) -> None:
        prefix = bytes([namespace]) * 16 if whole else b""
        there = [key for key in self.pages if key.startswith(prefix)]
        assert self.tier.drop_namespace(prefix) == len(there)
        self.forget(there)

    @rule()
    def compact(self) -> None:
        before = set(self.pages)
        self.tier.compact()
        for key in before & self.damaged:
            if key not in self.tier._pages.places:
                self.forget([key])

    @rule()
    def open_again(self) -> None:
        self.tier.close()
        self.open()

    @rule(key=KEYS)
    def damage(self, key: bytes) -> None:
        place = self.tier._pages.places.get(key)
        if place is not None and key not in self.damaged and not self.capacity_bytes:
            flip(place.segment.path, place.slot * place.segment.slot_bytes + 4096)
            self.damaged.add(key)

    @invariant()
    def it_is_what_it_should_be(self) -> None:
        if not hasattr(self, "tier"):
            return
        pages = self.tier._pages
        assert set(pages.places) >= set(self.pages) - self.damaged
        assert {key for key, _ in self.tier.scan()} == set(pages.places)
        segments = [each for size_class in pages.classes.values() for each in size_class.segments]
        assert pages.used_bytes == sum(place.segment.slot_bytes for place in pages.places.values())
        assert pages.file_bytes == sum(path.stat().st_size for path in (self.directory / "segments").glob("*.seg"))
        assert not self.capacity_bytes or pages.file_bytes <= self.capacity_bytes
        for segment in segments:
            assert segment.pending == segment.readers == 0
            live = {slot for slot, key in enumerate(segment.keys) if key is not None}
            assert live | set(segment.free) == set(range(segment.slots))
            assert len(live) + len(segment.free) == segment.slots
            assert (segment.number in pages.classes[segment.slot_bytes].with_free) == bool(segment.free)

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            whole = {key: data for key, data in self.pages.items() if key not in self.damaged}
            assert all_there(self.tier, whole) == []
            self.tier.close()
            shutil.rmtree(self.directory)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
