"""Between the arena and the lower tiers: write-behind with bounded queues, promotion, and what follows from a drop.

The node's thread owns it. Tiers work on threads of their own, one lane a key (so that all that concerns a page happens
in order); their results come back through `collect`. A page that is written or read is held, so its slot stays.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lmkv.errors import PoolError
from lmkv.poolwire import Tier

from .faults import point
from .index import Entry, PoolIndex
from .memory import ArenaMemory
from .tiers.base import CorruptError, PageMeta, StoreTier

logger = logging.getLogger(__name__)

LANES = 4


@dataclass(frozen=True, slots=True)
class TierSettings:
    """`admit_hits`: a page is written once it has been hit so often (0: as soon as it is there)."""

    store: StoreTier
    admit_hits: int = 0
    most_queued_bytes: int = 1 << 30


class _Below:
    """One tier with its lanes and its queue."""

    def __init__(self, settings: TierSettings) -> None:
        self.store = settings.store
        self.tier = settings.store.tier
        self.settings = settings
        name = f"lmkv-{(self.tier.name or 'tier').lower()}"
        self.lanes = [ThreadPoolExecutor(1, thread_name_prefix=f"{name}-{i}") for i in range(LANES)]
        self.queued_bytes = 0
        self.read_s = 0.005
        """A page's read takes about so long."""
        self.writing: set[bytes] = set()

    def lane(self, key: bytes) -> ThreadPoolExecutor:
        return self.lanes[key[16] % LANES]


class Tiering:
    """`wake()` is called from tier threads when `collect` has something to do."""

    def __init__(
        self,
        index: PoolIndex,
        memory: ArenaMemory,
        tiers: Sequence[TierSettings],
        counters: Counter[str],
        wake: Callable[[], None],
    ) -> None:
        self._index = index
        self._memory = memory
        self._below = [_Below(settings) for settings in tiers]
        self._counters = counters
        self._wake = wake
        self._results: deque[Callable[[], None]] = deque()
        self._hits: Counter[bytes] = Counter()
        self._promoting: dict[bytes, list[Callable[[bool], None]]] = {}
        self._durable: dict[bytes, list[Callable[[bool], None]]] = {}

    @property
    def stores(self) -> list[StoreTier]:
        return [below.store for below in self._below]

    @property
    def busy(self) -> bool:
        return any(below.writing for below in self._below) or bool(self._promoting)

    # --- down ---

    def visible(self, entry: Entry) -> None:
        """A page has come into memory by a store."""
        for below in self._below:
            if below.settings.admit_hits == 0:
                self._spill(entry, below)

    def hit(self, entry: Entry) -> None:
        """A page was pinned; one that is hit often enough goes down as well."""
        if not self._below or Tier.DRAM not in entry.tiers:
            return
        self._hits[entry.key] += 1
        for below in self._below:
            if self._hits[entry.key] >= below.settings.admit_hits and below.tier not in entry.tiers:
                self._spill(entry, below)
        if len(self._hits) > 1 << 20:
            self._hits = Counter({key: hits // 2 for key, hits in self._hits.items() if hits > 1})

    def make_durable(self, entry: Entry, done: Callable[[bool], None]) -> None:
        """`done(reached)` once a lower tier has it, or none takes it."""
        if entry.tiers & ~Tier.DRAM:
            done(True)
        elif not self._below:
            done(False)
        else:
            self._durable.setdefault(entry.key, []).append(done)
            for below in self._below:
                self._spill(entry, below, urgent=True)
            self._settle_durable(entry.key)

    def spill_all(self) -> None:
        """Everything that is in memory only goes down (a drain)."""
        for entry in list(self._index.entries()):
            if entry.tiers == Tier.DRAM:
                for below in self._below:
                    self._spill(entry, below, urgent=True)

    def _spill(self, entry: Entry, below: _Below, urgent: bool = False) -> None:
        if entry.key in below.writing or below.tier in entry.tiers or Tier.DRAM not in entry.tiers:
            return
        if not urgent and below.queued_bytes + entry.page_bytes > below.settings.most_queued_bytes:
            self._counters[f"spill:{below.store.tier.name}:overflow"] += 1
            return
        below.writing.add(entry.key)
        below.queued_bytes += entry.page_bytes
        self._index.hold(entry)
        below.lane(entry.key).submit(self._write, entry, below)

    def _write(self, entry: Entry, below: _Below) -> None:
        """On a lane."""
        error = ""
        if not entry.condemned:
            data = self._memory.view(entry.offset, entry.page_bytes)
            try:
                below.store.put(entry.key, PageMeta(entry.page_bytes, entry.checksums), data)
            except PoolError as problem:
                error = str(problem)
            finally:
                data.release()
        self._post(lambda: self._written(entry, below, error))

    def _written(self, entry: Entry, below: _Below, error: str) -> None:
        below.writing.discard(entry.key)
        below.queued_bytes -= entry.page_bytes
        tier = below.store.tier
        if error:
            self._counters[f"spill:{tier.name}:failed"] += 1
            logger.warning("a page was not written to %s: %s", tier.name, error)
        elif entry.condemned:
            below.lane(entry.key).submit(self._drop_on_lane, below, [entry.key])
        else:
            self._counters[f"spill:{tier.name}"] += 1
            self._index.stored(entry, tier)
        self._index.release(entry)
        self._settle_durable(entry.key)

    def _settle_durable(self, key: bytes) -> None:
        entry = self._index.find(key)
        reached = entry is not None and bool(entry.tiers & ~Tier.DRAM)
        if reached or not any(key in below.writing for below in self._below):
            for done in self._durable.pop(key, []):
                done(reached)

    # --- up ---

    def promote(self, entry: Entry, done: Callable[[bool], None]) -> None:
        """Bring a page of a lower tier into memory; `done(here)`. Asked twice, it is read once."""
        waiting = self._promoting.get(entry.key)
        if waiting is not None:
            waiting.append(done)
            return
        below = next((b for b in self._below if b.store.tier in entry.tiers), None)
        if below is None or not self._index.start_promotion(entry):
            done(False)
            return
        self._promoting[entry.key] = [done]
        self._index.hold(entry)
        below.lane(entry.key).submit(self._read, entry, below)

    def promotion_s(self, entries: Sequence[Entry]) -> float:
        """About how long it takes to bring these up, from how long it has taken."""
        waits = [below.read_s * len(entries) / LANES for below in self._below]
        return max(waits, default=0.0) if entries else 0.0

    def _read(self, entry: Entry, below: _Below) -> None:
        """On a lane."""
        started_s, error, lost = time.monotonic(), "", False
        data = self._memory.view(entry.offset, entry.page_bytes)
        try:
            meta = below.store.get(entry.key, data)
            if meta is None:
                error, lost = "it is not there any more", True
            elif meta != PageMeta(entry.page_bytes, entry.checksums):
                error, lost = "it is another page than was stored", True
        except CorruptError as problem:
            error, lost = str(problem), True
        except PoolError as problem:
            error = str(problem)
        finally:
            data.release()
        seconds = time.monotonic() - started_s
        self._post(lambda: self._came_up(entry, below, error, lost, seconds))

    def _came_up(self, entry: Entry, below: _Below, error: str, lost: bool, seconds: float) -> None:
        tier = below.store.tier
        if error:
            self._counters[f"promote:{tier.name}:failed"] += 1
            logger.warning("a page of %s cannot be brought up: %s", tier.name, error)
        else:
            self._counters[f"promote:{tier.name}"] += 1
            below.read_s += (seconds - below.read_s) / 8
        self._index.promoted(entry, bool(error))
        point("promote:visible")
        self._index.release(entry)
        if lost:
            self._index.lost(entry.key, tier)
        for done in self._promoting.pop(entry.key):
            done(not error)

    # --- away ---

    def dropped(self, keys: Sequence[bytes]) -> None:
        """The index has forgotten these pages: so do the tiers, after whatever they are doing with them."""
        for below in self._below:
            lanes: dict[int, list[bytes]] = {}
            for key in keys:
                lanes.setdefault(key[16] % LANES, []).append(key)
            for lane, some in lanes.items():
                below.lanes[lane].submit(self._drop_on_lane, below, some)

    def dropped_namespace(self, namespace: bytes) -> None:
        """Also what the index does not know of (a shared store)."""
        for below in self._below:
            below.lanes[0].submit(self._drop_namespace_on_lane, below, namespace)

    def _drop_on_lane(self, below: _Below, keys: list[bytes]) -> None:
        try:
            below.store.drop(keys)
        except PoolError as error:
            self._drop_failed(below, error)

    def _drop_namespace_on_lane(self, below: _Below, namespace: bytes) -> None:
        try:
            below.store.drop_namespace(namespace)
        except PoolError as error:
            self._drop_failed(below, error)

    def _drop_failed(self, below: _Below, error: PoolError) -> None:
        logger.error("pages were not dropped from %s: %s", below.store.tier.name, error)
        self._counters[f"drop:{below.store.tier.name}:failed"] += 1

    def evicted(self, tier: Tier, keys: list[bytes]) -> None:
        """From a tier's thread: it has made room."""

        def tell() -> None:
            for key in keys:
                self._index.lost(key, tier)

        self._post(tell)

    def adopt(self) -> int:
        """What the tiers already had goes into the index. At start, before anything else."""
        count = 0
        for below in self._below:
            for key, meta in below.store.scan():
                self._index.adopt(key, meta.page_bytes, meta.checksums, below.tier)
                count += 1
        return count

    def describe(self, store: StoreTier, namespace: bytes, description: str) -> None:
        """Keep it with the pages; a tier that cannot will say so again with its first page."""
        below = next(b for b in self._below if b.store is store)

        def work() -> None:
            try:
                store.describe(namespace, description)
            except PoolError as error:
                logger.warning("%s keeps no description: %s", store.tier.name, error)

        below.lanes[0].submit(work)

    # --- threads ---

    def _post(self, result: Callable[[], None]) -> None:
        self._results.append(result)
        self._wake()

    def collect(self) -> None:
        while self._results:
            self._results.popleft()()

    def close(self) -> None:
        """Ends after the work that has begun; what is queued is not done."""
        for below in self._below:
            for lane in below.lanes:
                lane.shutdown(wait=True, cancel_futures=True)
            below.store.close()
