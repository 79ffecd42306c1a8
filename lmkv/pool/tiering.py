"""Between the arena and the lower tiers: write-behind with bounded queues, promotion, and what follows from a drop.

The node's thread owns it. Tiers work on threads of their own, one lane a key (so that all that concerns a page happens
in order); their results come back through `collect`. A page that is written or read is held, so its slot stays.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lmkv.control.runtime import THREADS, Lane, Runtime
from lmkv.errors import PoolError
from lmkv.poolwire import Tier

from .faults import point
from .index import Entry, PoolIndex
from .memory import ArenaMemory
from .tiers.base import CorruptError, PageMeta, StoreTier

logger = logging.getLogger(__name__)

FORGET = 0.95
DROP_S = 3600.0
"""Longest time in which a tier forgets a namespace."""
LANES = 8
"""Writes of a disk wait for its flushes, not for us: eight at a time share them."""


@dataclass(frozen=True, slots=True)
class TierSettings:
    """`admit_hits`: a page is written once it has been hit so often (0: as soon as it is there)."""

    store: StoreTier
    admit_hits: int = 0
    most_queued_bytes: int = 1 << 30


class _Below:
    """One tier with its lanes and its queue."""

    def __init__(self, settings: TierSettings, runtime: Runtime) -> None:
        self.store = settings.store
        self.tier = settings.store.tier
        self.settings = settings
        name = f"lmkv-{(self.tier.name or 'tier').lower()}"
        self.lanes = [runtime.lane(f"{name}-{i}") for i in range(LANES)]
        self.queued_bytes = 0
        self.read_s = 0.005
        """A page's read takes about so long."""
        self.writing: set[Entry] = set()
        self.last_error = ""

    def lane(self, key: bytes) -> Lane:
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
        runtime: Runtime = THREADS,
    ) -> None:
        self._runtime = runtime
        self._index = index
        self._memory = memory
        self._below = [_Below(settings, runtime) for settings in tiers]
        # What waits to be written is held: it must leave the arena room for what comes.
        self._most_queued_bytes = memory.capacity_bytes // (2 * max(len(tiers), 1))
        self._drops = 0
        self._closing = False
        self._counters = counters
        self._wake = wake
        self._results: deque[Callable[[], None]] = deque()
        self._hits: Counter[bytes] = Counter()
        self._promoting: dict[Entry, list[Callable[[bool], None]]] = {}
        self._durable: dict[Entry, list[Callable[[bool], None]]] = {}

    @property
    def stores(self) -> list[StoreTier]:
        return [below.store for below in self._below]

    @property
    def busy(self) -> bool:
        return any(below.writing for below in self._below) or bool(self._promoting) or self._drops > 0

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
            self._durable.setdefault(entry, []).append(done)
            for below in self._below:
                self._spill(entry, below, urgent=True)
            self._settle_durable(entry)

    def spill_all(self) -> None:
        """Everything that is in memory only goes down (a drain)."""
        for entry in list(self._index.entries()):
            if entry.tiers == Tier.DRAM:
                for below in self._below:
                    self._spill(entry, below, urgent=True)

    def _spill(self, entry: Entry, below: _Below, urgent: bool = False) -> None:
        if entry in below.writing or below.tier in entry.tiers or Tier.DRAM not in entry.tiers:
            return
        most_bytes = min(below.settings.most_queued_bytes, self._most_queued_bytes)
        if not urgent and below.queued_bytes + entry.page_bytes > most_bytes:
            self._counters[f"spill:{below.store.tier.name}:overflow"] += 1
            return
        below.writing.add(entry)
        below.queued_bytes += entry.page_bytes
        self._index.hold(entry)
        below.lane(entry.key).submit(self._write, entry, below)

    def _write(self, entry: Entry, below: _Below) -> None:
        """On a lane."""
        error = "the node is ending" if self._closing else ""
        if not error and not entry.condemned:
            data = self._memory.view(entry.offset, entry.page_bytes)
            try:
                below.store.put(entry.key, PageMeta(entry.page_bytes, entry.checksums), data)
            except PoolError as problem:
                error = str(problem)
            except Exception as problem:
                logger.exception("%s failed to write a page", below.store.tier.name)
                error = repr(problem)
            finally:
                data.release()
        self._post(lambda: self._written(entry, below, error))

    def _written(self, entry: Entry, below: _Below, error: str) -> None:
        below.writing.discard(entry)
        below.queued_bytes -= entry.page_bytes
        name = below.store.tier.name
        if error:
            self._counters[f"spill:{name}:failed"] += 1
            self._complain(below, f"a page was not written to {name}: {error}")
        else:
            self._counters[f"spill:{name}"] += 1
            self._index.stored(entry, below.tier)  # (a page that was dropped meanwhile: its drop is next on the lane)
        self._index.release(entry)
        self._settle_durable(entry)

    def _complain(self, below: _Below, error: str) -> None:
        """Once, not for each of a thousand pages."""
        level = logging.DEBUG if self._closing or error == below.last_error else logging.WARNING
        below.last_error = error
        logger.log(level, error)

    def _settle_durable(self, entry: Entry) -> None:
        reached = bool(entry.tiers & ~Tier.DRAM)
        if reached or not any(entry in below.writing for below in self._below):
            for done in self._durable.pop(entry, []):
                done(reached)

    # --- up ---

    def promote(self, entry: Entry, done: Callable[[bool], None]) -> None:
        """Bring a page of a lower tier into memory; `done(here)`. Asked twice, it is read once."""
        waiting = self._promoting.get(entry)
        if waiting is not None:
            waiting.append(done)
            return
        below = next((b for b in self._below if b.store.tier in entry.tiers), None)
        if below is None or not self._index.start_promotion(entry):
            done(False)
            return
        self._promoting[entry] = [done]
        self._index.hold(entry)
        below.lane(entry.key).submit(self._read, entry, below)

    def promotion_s(self, entries: Sequence[Entry]) -> float:
        """About how long it takes to bring these up, from how long it has taken."""
        if not entries:
            return 0.0
        waits = [below.read_s * len(entries) / LANES for below in self._below]
        for below in self._below:  # who is told that it takes long may not try: without reads it would stay so for ever
            below.read_s *= FORGET
        return max(waits, default=0.0)

    def _read(self, entry: Entry, below: _Below) -> None:
        """On a lane."""
        started_s, error, lost = self._runtime.clock(), "", False
        if self._closing:
            self._post(lambda: self._came_up(entry, below, "the node is ending", False, 0.0))
            return
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
        except Exception as problem:
            logger.exception("%s failed to read a page", below.store.tier.name)
            error = repr(problem)
        finally:
            data.release()
        seconds = self._runtime.clock() - started_s
        self._post(lambda: self._came_up(entry, below, error, lost, seconds))

    def _came_up(self, entry: Entry, below: _Below, error: str, lost: bool, seconds: float) -> None:
        name = below.store.tier.name
        if error:
            self._counters[f"promote:{name}:failed"] += 1
            self._complain(below, f"a page of {name} cannot be brought up: {error}")
        else:
            self._counters[f"promote:{name}"] += 1
            below.read_s += (seconds - below.read_s) / 8
        self._index.promoted(entry, bool(error))
        point("promote:visible")
        self._index.release(entry)
        if lost and not entry.condemned:
            self._index.lost(entry.key, below.tier)
        for done in self._promoting.pop(entry):
            done(not error)

    # --- away ---

    def dropped(self, keys: Sequence[bytes], done: Callable[[], None] = lambda: None) -> None:
        """The index has forgotten these pages: so do the tiers, after whatever they are doing with them. `done` once
        they do not come back with a restart."""
        lanes: dict[int, list[bytes]] = {}
        for key in keys:
            lanes.setdefault(key[16] % LANES, []).append(key)
        work = [(below, lane, some) for below in self._below for lane, some in lanes.items()]
        settle = self._countdown(len(work), done)
        for below, lane, some in work:
            below.lanes[lane].submit(self._drop_on_lane, below, partial(below.store.drop, some), settle)

    def dropped_namespace(self, namespace: bytes, done: Callable[[], None] = lambda: None) -> None:
        """Also what the index does not know of (a shared store)."""
        settle = self._countdown(len(self._below), done)
        for below in self._below:
            drop, dropped = partial(below.store.drop_namespace, namespace), threading.Event()
            below.lanes[0].submit(self._drop_on_lane, below, drop, settle, dropped.set)
            for lane in below.lanes[1:]:
                lane.submit(self._runtime.wait, dropped, DROP_S)  # what is stored from now on is stored after it

    def _countdown(self, count: int, done: Callable[[], None]) -> Callable[[], None]:
        """Called `count` times, it calls `done` (without any: at once)."""
        self._drops += count
        if not count:
            done()
        left = count

        def settle() -> None:
            nonlocal left
            left -= 1
            self._drops -= 1
            if left == 0:
                done()

        return settle

    def _drop_on_lane(
        self,
        below: _Below,
        drop: Callable[[], int],
        settle: Callable[[], None],
        dropped: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            drop()
        except Exception:
            logger.exception("pages were not dropped from %s", below.store.tier.name)
            self._post(lambda: self._drop_failed(below))
        finally:
            dropped()
        self._post(settle)

    def _drop_failed(self, below: _Below) -> None:
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
        """Ends after the work that has begun, and all drops; of the rest, what is queued is not done."""
        self._closing = True
        for below in self._below:
            for lane in below.lanes:
                lane.shutdown(wait=True)
        self.collect()
        for below in self._below:
            below.store.close()
