"""A tier in memory that fails when told to, and a node with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmkv import poolwire as pw
from lmkv.pool.tiering import TierSettings
from lmkv.pool.tiers.base import CorruptError, PageMeta, StoreTier, TierError
from lmkv.poolwire import Refusal, Tier
from tests.pool.bed import PAGES, SPACE, NodeThread, User, key, until


class FakeTier(StoreTier):
    """Pages in a dict. `gate` not set: puts wait. Faults are switched by attributes."""

    tier = Tier.DISK

    def __init__(self, pages: dict[bytes, tuple[PageMeta, bytes]] | None = None) -> None:
        self.pages = pages if pages is not None else {}
        self.gate = threading.Event()
        self.gate.set()
        self.get_gate = threading.Event()
        self.get_gate.set()
        self.fail_put = self.fail_get = self.bug = False
        self.corrupt: set[bytes] = set()
        self.described: dict[bytes, str] = {}
        self.evicted: Callable[[list[bytes]], None] = lambda keys: None
        self.puts = 0
        self.closed = False

    def settings(self, **more: Any) -> Any:
        """For PoolNode."""

        def tiers(evicted: Callable[[Tier, list[bytes]], None]) -> list[TierSettings]:
            self.evicted = lambda keys: evicted(self.tier, keys)
            return [TierSettings(self, **more)]

        return tiers

    def put(self, key: bytes, meta: PageMeta, data: memoryview) -> None:
        assert self.gate.wait(20)
        self.puts += 1
        if self.bug:
            raise ZeroDivisionError("a bug in a tier")
        if self.fail_put:
            raise TierError("no space")
        self.pages[key] = (meta, bytes(data[: meta.page_bytes]))

    def get(self, key: bytes, into: memoryview) -> PageMeta | None:
        assert self.get_gate.wait(20)
        if self.bug:
            raise ZeroDivisionError("a bug in a tier")
        if self.fail_get:
            raise TierError("unreachable")
        if key in self.corrupt:
            self.pages.pop(key)
            raise CorruptError("bits have flipped")
        if key not in self.pages:
            return None
        meta, data = self.pages[key]
        into[: meta.page_bytes] = data
        return meta

    def drop(self, keys: Sequence[bytes]) -> int:
        return sum(self.pages.pop(key, None) is not None for key in keys)

    def drop_namespace(self, namespace: bytes) -> int:
        return self.drop([key for key in list(self.pages) if key.startswith(namespace)])

    def scan(self) -> Iterator[tuple[bytes, PageMeta]]:
        return ((key, meta) for key, (meta, _) in self.pages.items())

    def describe(self, namespace: bytes, description: str) -> None:
        self.described[namespace] = description

    def descriptions(self) -> dict[bytes, str]:
        return dict(self.described)

    @property
    def used_bytes(self) -> int:
        return sum(meta.page_bytes for meta, _ in self.pages.values())

    @property
    def capacity_bytes(self) -> int:
        return 0

    def counters(self) -> dict[str, int]:
        return {"puts": self.puts}

    def close(self) -> None:
        self.closed = True


class TierBed:
    """A node with a fake tier, and a user of it."""

    def __init__(self, tmp: Path, tier: FakeTier, **more: Any) -> None:
        node = {name: more.pop(name) for name in list(more) if name in ("capacity", "policy", "drain_s")}
        self.tier = tier
        self.node = NodeThread(tmp, tier.settings(**more), **node)
        self.user = User(self.node.address)

    def end(self) -> None:
        self.tier.gate.set()
        self.tier.get_gate.set()
        self.user.close()
        if self.node.thread.is_alive():
            self.node.end()

    def on_disk(self, *numbers: int) -> None:
        until(lambda: all(SPACE + key(n) in self.tier.pages for n in numbers))
        self.until_tiers(Tier.DRAM | Tier.DISK, *numbers)

    def until_tiers(self, tiers: Tier, *numbers: int) -> None:
        until(lambda: all(self.tiers(n) == tiers for n in numbers))

    def tiers(self, number: int) -> Tier:
        before = (SPACE + key(number))[:-1]
        found = self.user.get(lambda t: pw.ListKeys(t, SPACE, before, 1), pw.Keys).records
        return Tier(found[-1]) if found[:-1] == SPACE + key(number) else Tier(0)

    def out_of_memory(self, *numbers: int) -> None:
        """Everything is evicted, and nothing comes for it."""
        others = range(10_000, 10_000 + PAGES)
        slots = self.user.reserve(others)
        self.user.abandon(others, [slot for slot in slots if slot.refusal is Refusal.NONE], drained=True)
        assert all(self.tiers(number) == Tier.DISK for number in numbers)

    def pages(self) -> int:
        return int(self.user.stats()["pages"])
