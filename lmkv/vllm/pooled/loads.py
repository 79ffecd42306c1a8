"""Loading: pages of pool nodes unpacked into the engine's blocks. Loop thread only.

Mapped pages are unpacked where they lie; those of other hosts are read into staging, several at a time and from all
their holders, and unpacked as they land. A page counts only if its lease was still on when it had been unpacked and all
its checksums are right. The first page that does not ends the load; what came before it is kept.

A load is over at its deadline, and at once where a lost node was to write. The staging of what may still land then is
*held*: nobody waits for it, and it is free once nothing lands any more.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lmkv.control.guard import Guard
from lmkv.errors import LmkvError, TransportError
from lmkv.hashing import page_key
from lmkv.ids import Incarnation, RequestId
from lmkv.pool.access import NodeAccess, Reach
from lmkv.transport import Extents, OpId

from ..specs import LoadReport, LoadSpec, PageSource
from .shares import Shares
from .staging import Staging

logger = logging.getLogger(__name__)

SLICE_BYTES = 16 << 20
READ_BYTES = 12 << 20
"""So much is read with one operation, if so many pages of a node follow each other."""

HURRY_S = 0.25


@dataclass(slots=True, eq=False)
class _Load:
    spec: LoadSpec
    started_s: float
    next: int = 0
    """First page that has not been started."""
    right: set[int] = field(default_factory=set)
    """Indices of pages that are in the blocks."""
    flying: int = 0
    stop: int = 0
    """Pages from here on are not wanted any more."""
    reason: str = ""
    loaded_bytes: int = 0
    corrupt: list[PageSource] = field(default_factory=list)
    reported: bool = False


@dataclass(slots=True)
class _Read:
    """Pages [lo, hi) of a load in `slots` of staging, group by group for each page."""

    load: _Load
    lo: int
    hi: int
    slots: list[int]


class Loads:
    """`find(incarnation)` is the ready access of a node; `clock` the monotonic time, for leases. `fetch`: nodes of
    other hosts write into staging; otherwise it reads from there. `guard` is the loop's."""

    def __init__(
        self,
        shares: Shares,
        staging: Staging,
        find: Callable[[Incarnation], NodeAccess | None],
        arena: Callable[[NodeAccess], torch.Tensor],
        counters: Counter[str],
        clock: Callable[[], float],
        guard: Guard,
        fetch: bool = False,
    ) -> None:
        self._guard = guard
        self._shares = shares
        self._staging = staging
        self._find = find
        self._arena = arena
        self._counters = counters
        self._clock = clock
        self._fetch = fetch and len(shares.groups) == 1 and staging.in_host_memory
        self._loads: deque[_Load] = deque()
        self._reads: dict[OpId, _Read] = {}
        self._held: dict[OpId, list[int]] = {}
        """Slots into which something may still land for a load that is over."""
        self._reports: list[LoadReport] = []

    @property
    def active(self) -> bool:
        return bool(self._loads)

    def hurries(self, now_s: float) -> bool:
        """Bytes are on their way here, and have not been for long: on a slow link there is no hurry."""
        return bool(self._reads) and any(now_s - load.started_s < HURRY_S for load in self._loads)

    @property
    def has_work(self) -> bool:
        return any(self._workable(load) for load in self._loads)

    def submit(self, spec: LoadSpec, now_s: float) -> None:
        self._loads.append(_Load(spec, now_s, stop=len(spec.pages)))

    def cancel(self, request_id: RequestId) -> None:
        """The request has ended; vLLM frees its blocks with our report."""
        for load in self._loads:
            if load.spec.request_id == request_id:
                self._cut(load, load.next, "cancelled")

    def take(self) -> list[LoadReport]:
        reports, self._reports = self._reports, []
        return reports

    def deadline_s(self) -> float | None:
        return min((load.spec.until_s for load in self._loads), default=None)

    # --- work ---

    def work(self, now_s: float) -> None:
        """Do a slice. Call again while `has_work`."""
        for load in list(self._loads):
            if now_s > load.spec.until_s and not load.reported:
                # What is in flight lands in staging only, so the blocks are vLLM's at once.
                self._cut(load, load.next, "late", at_once=True)
                for op in [op for op, read in self._reads.items() if read.load is load]:
                    self._hold(op)
            elif load.next < load.stop and self._starves(load):
                self._cut(load, load.next, "no_staging")
            elif self._workable(load):
                first = load.next
                self._guard.attempt(
                    "load",
                    lambda load=load: self._advance(load),  # type: ignore[misc]
                    lambda load=load, first=first: self._cut(load, first, "failed"),  # type: ignore[misc]
                    f"node {load.spec.pages[first].node}",
                )
            self._end_if_over(load)

    def _workable(self, load: _Load) -> bool:
        if load.next >= load.stop:
            return False
        access = self._find(load.spec.pages[load.next].node)
        return access is None or access.reach is Reach.LOCAL or self._staging.can_load(len(self._shares.groups))

    def _starves(self, load: _Load) -> bool:
        """It waits for staging, and too much of that is held."""
        access = self._find(load.spec.pages[load.next].node)
        left = self._staging.count - sum(map(len, self._held.values()))
        return access is not None and access.reach is not Reach.LOCAL and left < len(self._shares.groups)

    def _advance(self, load: _Load) -> None:
        first = load.next
        page = load.spec.pages[first]
        access = self._find(page.node)
        if access is None:
            self._cut(load, first, "node_lost")
            return
        first = load.next
        try:
            if access.reach is Reach.LOCAL:
                self._unpack_here(load, access)
            else:
                self._read(load, access)
        except LmkvError as error:
            logger.warning("pages of %s cannot be loaded: %s", page.node, error)
            self._cut(load, first, "failed")

    def _same_node(self, load: _Load, most: int) -> int:
        """How many pages from `next` on are of its node, `most` at most."""
        pages, lo = load.spec.pages, load.next
        hi, here = lo, (pages[lo].node, pages[lo].lease)
        while hi < load.stop and hi - lo < most and (pages[hi].node, pages[hi].lease) == here:
            hi += 1
        return hi

    def _page_bytes(self) -> int:
        return sum(share.bytes for share in self._shares.groups)

    def _unpack_here(self, load: _Load, access: NodeAccess) -> None:
        lo, hi = load.next, self._same_node(load, max(1, SLICE_BYTES // self._page_bytes()))
        load.next = hi
        places = [
            [page.offsets[group] + share.offset_bytes for page in load.spec.pages[lo:hi]]
            for group, share in enumerate(self._shares.groups)
        ]
        self._unpack(load, lo, hi, self._arena(access), places)

    def _read(self, load: _Load, access: NodeAccess) -> None:
        """Raises TransportError."""
        groups = self._shares.groups
        lo, hi = load.next, self._same_node(load, max(1, READ_BYTES // self._page_bytes()))
        slots = self._staging.take((hi - lo) * len(groups))
        whole = len(slots) // len(groups)
        self._staging.give_back(slots[whole * len(groups) :])
        del slots[whole * len(groups) :]
        hi = lo + whole
        if whole == 0:
            return
        rows, tables = [], []
        for group, share in enumerate(groups):
            rows += [(page.offsets[group] + share.offset_bytes, share.bytes) for page in load.spec.pages[lo:hi]]
            tables += [(slot, share.bytes) for slot in slots[group * whole : (group + 1) * whole]]
        try:
            here = self._staging.rows(tables)
            op = self._fetched(load, access, lo, hi, here) if self._fetch else access.read(here, rows)
        except BaseException:
            self._staging.give_back(slots)
            raise
        load.next, load.flying = hi, load.flying + 1
        self._reads[op] = _Read(load, lo, hi, slots)

    def _fetched(self, load: _Load, access: NodeAccess, lo: int, hi: int, here: Extents) -> OpId:
        pages, share = load.spec.pages[lo:hi], self._shares.groups[0]
        keys = [page_key(page.key, 0) for page in pages]
        place = (share.offset_bytes, share.bytes)
        return access.fetch(pages[0].lease, load.spec.namespace, keys, place, here)

    def completed(self, op: OpId, error: TransportError | None) -> bool:
        """True: it was one of ours."""
        held = self._held.pop(op, None)
        if held is not None:
            self._counters["load:staging_freed"] += len(held)
            self._staging.give_back(held)
            return True
        read = self._reads.pop(op, None)
        if read is None:
            return False
        load = read.load
        load.flying -= 1
        if error is not None:
            self._cut(load, read.lo, "read_failed")
        elif not load.reported and read.lo < load.stop:
            whole = read.hi - read.lo
            places = [
                [self._staging.offset(slot) for slot in read.slots[group * whole : (group + 1) * whole]]
                for group in range(len(self._shares.groups))
            ]
            self._guard.attempt(
                "load:unpack",
                lambda: self._unpack(load, read.lo, read.hi, self._staging.data, places),
                lambda: self._cut(load, read.lo, "failed"),
            )
        self._staging.give_back(read.slots)
        self._end_if_over(load)
        return True

    def _unpack(self, load: _Load, lo: int, hi: int, data: torch.Tensor, places: list[list[int]]) -> None:
        """Pages [lo, hi) lie at `places` (by group and page) of `data`."""
        spec = load.spec
        pages = spec.pages[lo:hi]
        chunks = [page.chunk for page in pages]
        wrong: set[int] = set()
        for group, share in enumerate(self._shares.groups):
            try:
                sums = self._shares.unpack(group, spec.blocks[group], chunks, data, places[group], spec.tokens[0])
            except LmkvError as error:
                logger.warning("a load failed: %s", error)
                self._cut(load, lo, "failed")
                return
            load.loaded_bytes += len(pages) * share.bytes
            for i, (page, found) in enumerate(zip(pages, sums, strict=True)):
                if found != share.own_sums(page.checksums[group]):
                    wrong.add(lo + i)
        now_s = self._clock()
        for i, page in enumerate(pages, lo):
            if now_s > page.until_s:
                self._cut(load, i, "lease_expired")
            elif i in wrong:
                logger.error("a page of chunk %d has wrong checksums; it is not used", page.chunk)
                self._cut(load, i, "corrupt")
                load.corrupt.append(page)
            else:
                load.right.add(i)

    # --- ends ---

    def lost(self, op: OpId) -> None:
        """The node of a fetch is lost; nobody knows when nothing of it lands any more."""
        read = self._reads.get(op)
        if read is not None:
            self._hold(op)
            self._cut(read.load, read.lo, "node_lost")
            self._end_if_over(read.load)

    def _hold(self, op: OpId) -> None:
        read = self._reads.pop(op)
        read.load.flying -= 1
        self._held[op] = read.slots
        self._counters["load:staging_held"] += len(read.slots)

    def _cut(self, load: _Load, index: int, reason: str, at_once: bool = False) -> None:
        """Nothing from page `index` on."""
        if index < load.stop or at_once:
            load.stop, load.reason = min(index, load.stop), reason
            self._counters[f"load:{reason}"] += 1
        if at_once:
            self._report(load)

    def _end_if_over(self, load: _Load) -> None:
        if load.next >= load.stop and load.flying == 0 and not load.reported:
            self._report(load)
        if load.reported and load.flying == 0 and load in self._loads:
            self._loads.remove(load)

    def _report(self, load: _Load) -> None:
        load.reported = True
        spec = load.spec
        good = spec.tokens[0]
        for i, page in enumerate(spec.pages[: load.stop]):
            if i not in load.right:
                break
            good = min(spec.tokens[1], (page.chunk + 1) * self._shares.chunk_tokens)
        reason = load.reason if good < spec.tokens[1] else ""
        self._counters["loaded_bytes"] += load.loaded_bytes
        self._counters["load:done" if not reason else "load:cut"] += 1
        seconds = self._clock() - load.started_s
        logger.debug("%s: %.1f MB in %.1f ms", spec.request_id, load.loaded_bytes / 1e6, seconds * 1e3)
        self._reports.append(LoadReport(spec.request_id, good, reason, load.loaded_bytes, seconds, tuple(load.corrupt)))
