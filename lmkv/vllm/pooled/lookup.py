"""Lookups: which pages of a prompt are in the pool, pinned where they are. A thread in the scheduler process.

A lookup asks the host's own node first (a pin is the lookup), and at the same time a controller, or the other nodes
where there is none. What the own node lacks comes from others. The engine thread asks with `seek`, and takes what is
known when its time is over; pins that come later are given back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import zmq

from lmkv import poolwire as pw
from lmkv.config import ConnectorSettings
from lmkv.control.guard import Guard
from lmkv.control.runtime import THREADS, Runtime
from lmkv.hashing import page_key
from lmkv.ids import ENGINE_RANK, Incarnation
from lmkv.pool.access import Me, NodeAccess
from lmkv.pool.directory import Directory

from ..specs import PageSource

logger = logging.getLogger(__name__)

LEASE_MORE_S = 2.0
"""A lease outlives the load by this."""
MOST_HOLDERS = 4
SPLIT_PAGES = 4
"""Fewer pages than this are not read from several nodes."""


@dataclass(slots=True)
class Lease:
    node: Incarnation
    lease: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """`node` was asked to pin the chunks from `first` on."""

    node: Incarnation
    first: int
    pinned: pw.Pinned


@dataclass(slots=True, eq=False)
class Lookup:
    """Owned by the thread until `done` is set; by the engine thread afterwards."""

    namespace: bytes
    keys: list[bytes]
    asked_s: float
    until_s: float
    lease_s: float
    first: int = 0
    """Chunks before this one are not asked for."""
    wait_s: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)
    pages: list[PageSource] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    below: int = 0
    """So many pages more are in lower tiers of `below_node`, and up after about `below_s`."""
    below_s: float = 0.0
    answers: list[_Answer] = field(default_factory=list)
    found: pw.Found | None = None
    open: int = 0
    extended: bool = False
    why: str = ""
    abandoned: bool = False

    @property
    def chunks(self) -> int:
        """Chunks from the first on that are there."""
        return self.first + len(self.pages)


class Lookups:
    """`seek`, `release`, `usable` from the engine or endpoint thread; the rest, a `Part`, is the thread's."""

    def __init__(self, settings: ConnectorSettings, groups: int, name: str, runtime: Runtime = THREADS) -> None:
        self._runtime = runtime
        self._settings = settings
        self._groups = groups
        self._name = name
        self._asked: deque[Lookup] = deque()
        self._released: deque[Lease] = deque()
        self._corrupt: deque[tuple[bytes, PageSource]] = deque()
        self._usable: dict[Incarnation, bool] = {}
        self._names: deque[tuple[bytes, str]] = deque()
        self._open: list[Lookup] = []
        self._incarnation = Incarnation("")
        self._guard = Guard("lookups", runtime.caught)
        self._is_over = self._is_closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._directory: Directory | None = None
        self._runner = runtime.runner("lmkv-lookups", self)

    # --- any thread ---

    def start(self, incarnation: Incarnation) -> None:
        self._incarnation = incarnation
        self._runner.start()

    def declare(self, namespace: bytes, description: str) -> None:
        self._names.append((namespace, description))
        self._tell()

    def usable(self, nodes: dict[Incarnation, bool]) -> None:
        """What all ranks can load from, and whether they map it."""
        self._usable = nodes

    @property
    def reachable(self) -> bool:
        """There is a node that all ranks can load from, and a thread that asks it."""
        return bool(self._usable) and not self._is_over

    @property
    def trouble(self) -> str:
        """The thread has ended before `close`: why, or ""."""
        failed = self._is_over and not self._is_closed
        return "the thread that asks the pool has failed; the engine's log has more" if failed else ""

    def is_mapped(self, lookup: Lookup) -> bool:
        """All its pages lie in memory that all ranks map."""
        return all(self._usable.get(page.node, False) for page in lookup.pages)

    def seek(self, namespace: bytes, keys: list[bytes], first: int = 0, wait_s: float = 0.0) -> Lookup:
        """`wait_s`: let pages of lower tiers come up for so long; otherwise an answer comes within `lookup_ms`."""
        now_s = self._runtime.clock()
        own = self._settings
        until_s = now_s + (wait_s + 0.1 if wait_s else own.lookup_ms / 1e3)
        lookup = Lookup(namespace, keys, now_s, until_s, own.load_s + wait_s + LEASE_MORE_S, first, wait_s)
        self._asked.append(lookup)
        self._tell()
        return lookup

    def corrupt(self, namespace: bytes, pages: Sequence[PageSource]) -> None:
        """Tell their nodes, as long as the leases are held: call `release` afterwards."""
        self._corrupt += [(namespace, page) for page in pages]
        self._tell()

    def abandon(self, lookup: Lookup) -> None:
        """Nobody wants it any more, done or not."""
        lookup.abandoned = True
        if lookup.done.is_set():
            self.release(lookup.leases)

    def release(self, leases: list[Lease]) -> None:
        """Twice is once."""
        self._released += leases
        self._tell()

    def _tell(self) -> None:
        """There is something to do; nothing of it is kept once nobody does it."""
        self._runner.wake()
        if self._is_over:
            self._let_go()

    def close(self) -> None:
        self._is_closed = True
        self._runner.stop()

    # --- the thread ---

    def open(self) -> None:
        """Raises ConfigError for an address that is none."""
        own = self._settings
        self._context = self._runtime.context()
        me = Me(self._incarnation, ENGINE_RANK, self._name, runtime=self._runtime)
        self._directory = Directory(self._context, me, own.pool, own.controller, use_arenas=False)

    def turn(self, now_s: float) -> None:
        directory, guard = self._nodes, self._guard
        while self._names:
            name = self._names.popleft()
            guard.attempt("name", lambda name=name: directory.declare(*name))  # type: ignore[misc]
        guard.work("nodes", lambda: directory.tick(now_s))
        guard.attempt("release", lambda: self._give_back(directory))
        while self._asked:
            lookup = self._asked.popleft()
            self._attempt(lookup, lambda lookup=lookup: self._begin(directory, lookup))  # type: ignore[misc]
        for lookup in [lookup for lookup in self._open if now_s > lookup.until_s]:
            self._attempt(lookup, lambda lookup=lookup: self._plan(directory, lookup, late=True))  # type: ignore[misc]

    def _attempt(self, lookup: Lookup, step: Callable[[], None]) -> None:
        """A lookup that a bug has met finds nothing."""

        def fail() -> None:
            lookup.pages.clear()
            self._finish(lookup, "failed")

        self._guard.attempt("lookup", step, fail)

    def next_s(self, now_s: float) -> float:
        """Whole milliseconds, so that what comes meanwhile is seen (`wait` sleeps shorter ones)."""
        next_s = min(1.0, self._nodes.next_s(now_s), *(lookup.until_s - now_s for lookup in self._open))
        return max(0.001, next_s) if next_s > 0 else 0.0

    def descriptors(self) -> Sequence[int] | None:
        if not self._nodes.fds_changed:
            return None
        self._nodes.fds_changed = False
        return self._nodes.fds

    def end(self) -> None:
        self._is_over = True
        with contextlib.ExitStack() as closing:  # whatever fails, the rest is closed
            closing.callback(self._let_go)
            if self._context is not None:
                closing.callback(self._context.term)
            if self._directory is not None:
                closing.callback(self._directory.close)
                closing.callback(self._give_back, self._directory)
            closing.callback(self._finish_open)

    def _finish_open(self) -> None:
        for lookup in list(self._open):
            self._finish(lookup, "closed")

    def _let_go(self) -> None:
        """Nobody waits for what is not looked up any more. Leases that cannot be given back run out."""
        self._released.clear()
        self._corrupt.clear()
        self._names.clear()
        self._finish_open()
        while True:
            try:
                lookup = self._asked.popleft()
            except IndexError:
                return
            self._finish(lookup, "closed")

    @property
    def _nodes(self) -> Directory:
        assert self._directory is not None, "`open` comes first"
        return self._directory

    def _give_back(self, directory: Directory) -> None:
        while self._corrupt:
            namespace, page = self._corrupt.popleft()
            access = directory.find(page.node)
            if access is not None:
                keys = b"".join(page_key(page.key, group) for group in range(self._groups))
                access.link.tell(pw.Unpin(page.lease, namespace, keys))
        while self._released:
            lease = self._released.popleft()
            access = directory.find(lease.node)
            if access is not None:
                access.link.tell(pw.Unpin(lease.lease))

    def _begin(self, directory: Directory, lookup: Lookup) -> None:
        usable = self._usable
        nodes = [access for access in directory.ready() if access.incarnation in usable]
        own = [access for access in nodes if usable[access.incarnation]]
        others = [access for access in nodes if not usable[access.incarnation]]
        self._open.append(lookup)
        controller = directory.controller(lookup.asked_s) if others else None
        asked = own if controller is not None else [*own, *others]
        if not asked and controller is None:
            self._finish(lookup, "no_node")
            return
        lookup.open = len(asked) + (controller is not None)
        for access in asked:
            self._pin(directory, lookup, access, lookup.first, len(lookup.keys))
        if controller is not None:
            keys = self._page_keys(lookup, lookup.first, len(lookup.keys))

            def found(answer: pw.Found | None) -> None:
                lookup.found = answer
                self._answered(directory, lookup)

            controller.ask(
                lambda token: pw.Lookup(token, lookup.namespace, keys), pw.Found, found, lookup.until_s + 1.0
            )

    def _pin(self, directory: Directory, lookup: Lookup, access: NodeAccess, lo: int, hi: int) -> None:
        node, keys = access.incarnation, self._page_keys(lookup, lo, hi)

        def pinned(answer: pw.Pinned | None) -> None:
            if answer is not None and lookup.done.is_set():
                self._released.append(Lease(node, answer.lease))  # it came too late
                self._give_back(directory)
                return
            if answer is not None:
                lookup.answers.append(_Answer(node, lo, answer))
                if answer.lease:
                    lookup.leases.append(Lease(node, answer.lease))
            self._answered(directory, lookup)

        access.link.ask(
            lambda token: pw.Pin(
                token, self._incarnation, ENGINE_RANK, lookup.namespace, keys, lookup.lease_s, lookup.wait_s
            ),
            pw.Pinned,
            pinned,
            lookup.until_s + 5.0,  # an answer that is late has a lease to be given back
        )

    def _answered(self, directory: Directory, lookup: Lookup) -> None:
        lookup.open -= 1
        if lookup.open == 0 and not lookup.done.is_set():
            self._plan(directory, lookup)

    # --- what to load from where ---

    def _plan(self, directory: Directory, lookup: Lookup, late: bool = False) -> None:
        """All have answered, or the time is over."""
        runs = [self._pages(lookup, answer) for answer in lookup.answers]
        own = [run for run, answer in zip(runs, lookup.answers, strict=True) if self._usable.get(answer.node)]
        others = [run for run, answer in zip(runs, lookup.answers, strict=True) if not self._usable.get(answer.node)]
        if not lookup.extended:
            lookup.pages = max(own, key=len, default=[])
            if not late and self._extend(directory, lookup):
                return
            self._take_from_others(lookup, others)
        else:
            for run in sorted((run for run in others if run), key=lambda run: run[0].chunk):
                lookup.pages += run if run[0].chunk == lookup.chunks else []
        lowest = max(lookup.answers, key=lambda answer: answer.pinned.below, default=None)
        if lowest is not None and lowest.pinned.below:
            lookup.below, lookup.below_s = lowest.pinned.below // self._groups, lowest.pinned.below_s
        self._finish(lookup, "late" if late and not lookup.pages else "")

    def _extend(self, directory: Directory, lookup: Lookup) -> bool:
        """A controller has told who has what the own node lacks: pin it there. False: nothing to be had."""
        at = lookup.chunks
        if lookup.found is None or at >= len(lookup.keys):
            return False
        skip = len(lookup.pages) * self._groups
        lengths: dict[Incarnation, int] = {}
        for holder in lookup.found.holders:
            if self._usable.get(holder.incarnation, True) or directory.find(holder.incarnation) is None:
                continue
            row = holder.tiers[skip:]
            run = next((i for i, tiers in enumerate(row) if not tiers & pw.Tier.DRAM), len(row))
            lengths[holder.incarnation] = run // self._groups
        longest = max(lengths.values(), default=0)
        if longest == 0:
            return False
        holders = [node for node, length in lengths.items() if length == longest][:MOST_HOLDERS]
        if longest < SPLIT_PAGES:
            holders = holders[:1]
        lookup.extended, lookup.answers = True, []
        lookup.open = len(holders)
        cuts = [at + longest * i // len(holders) for i in range(len(holders) + 1)]
        for node, (lo, hi) in zip(holders, pairwise(cuts), strict=True):
            access = directory.find(node)
            assert access is not None
            self._pin(directory, lookup, access, lo, hi)
        return True

    def _take_from_others(self, lookup: Lookup, runs: list[list[PageSource]]) -> None:
        """No controller: other nodes have been asked for everything. Those with the longest run share what is left."""
        have = len(lookup.pages)
        longest = max((len(run) for run in runs), default=0)
        if longest <= have:
            return
        best = [run for run in runs if len(run) == longest][:MOST_HOLDERS]
        if longest - have < SPLIT_PAGES:
            best = best[:1]
        for i in range(have, longest):
            lookup.pages.append(best[(i - have) * len(best) // (longest - have)][i])

    def _pages(self, lookup: Lookup, answer: _Answer) -> list[PageSource]:
        """Whole chunks of an answer: all groups of each."""
        until_s = lookup.asked_s + answer.pinned.lease_s
        found = []
        for i in range(len(answer.pinned.pages) // self._groups):
            pages = answer.pinned.pages[i * self._groups : (i + 1) * self._groups]
            chunk = answer.first + i
            offsets, sums = tuple(page.offset for page in pages), tuple(page.checksums for page in pages)
            lease = answer.pinned.lease
            found.append(PageSource(chunk, lookup.keys[chunk], answer.node, lease, until_s, offsets, sums))
        return found

    def _finish(self, lookup: Lookup, why: str) -> None:
        lookup.why = why
        with contextlib.suppress(ValueError):  # (at the end two threads may finish it)
            self._open.remove(lookup)
        lookup.done.set()
        if lookup.abandoned:
            self._released += lookup.leases
            self._runner.wake()

    def _page_keys(self, lookup: Lookup, lo: int, hi: int) -> bytes:
        return b"".join(page_key(key, group) for key in lookup.keys[lo:hi] for group in range(self._groups))
