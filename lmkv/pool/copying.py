"""Pages copied here from other nodes: hot ones, as controllers wish, and those of a store that was promised copies.

The node's thread only. A copy is a client of the other node like any other: it pins, reads into slots reserved here,
and commits with the checksums that came with the page; who reads the page later checks it.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from lmkv import poolwire as pw
from lmkv.control.runtime import THREADS, Runtime
from lmkv.errors import TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import Refusal
from lmkv.transport import Extents, OpId, PeerId, Transport

from .access import Me, NodeAccess, Reach
from .index import Entry, PoolIndex
from .link import Link
from .memory import ArenaMemory

logger = logging.getLogger(__name__)

COPY_RANK = Rank(-2)
JOB_S = 20.0
PAGES_AT_ONCE = 16
MOST_JOBS = 256
MOST_SOURCES = 64
"""Nodes that are copied from at a time."""
IDLE_S = 60.0


@dataclass(slots=True, eq=False)
class _Job:
    source: pw.NodeCard
    namespace: bytes
    keys: list[bytes]
    until_s: float
    done: Callable[[int], None]
    asked: bool = False
    copied: int = 0
    lease: int = 0
    pages: deque[tuple[bytes, pw.Page]] = field(default_factory=deque)
    reading: list[tuple[bytes, pw.Slot, pw.Page]] = field(default_factory=list)


class Copying:
    """`visible(entry)` is told of each page that has come."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        incarnation: Incarnation,
        name: str,
        index: PoolIndex,
        memory: ArenaMemory,
        transport: Transport | None,
        scratch: Extents | None,
        visible: Callable[[Entry], None],
        counters: Counter[str],
        runtime: Runtime = THREADS,
    ) -> None:
        self._context = context
        self._me = Me(incarnation, COPY_RANK, name, transport, scratch, runtime)
        self._writer = (incarnation, COPY_RANK)
        self._index = index
        self._memory = memory
        self._visible = visible
        self._counters = counters
        self._accesses: dict[str, NodeAccess] = {}
        self._used_s: dict[str, float] = {}
        self._jobs: list[_Job] = []
        self._ops: dict[OpId, _Job] = {}

    @property
    def active(self) -> bool:
        return bool(self._jobs)

    def take(self, message: pw.Replicate, done: Callable[[int], None], now_s: float) -> None:
        """`done(pages)` when as many as could be are here (those that were, included)."""
        keys = [message.namespace + key for key in pw.split_keys(message.keys)]
        wanted = [key for key in keys if self._index.find(key) is None]
        sources = self._accesses.keys() | {job.source.address for job in self._jobs}
        crowded = len(sources) >= MOST_SOURCES and message.source.address not in sources
        if not wanted or len(self._jobs) >= MOST_JOBS or crowded:
            self._counters["copy:refused"] += len(wanted)
            done(len(keys) - len(wanted))
            return
        here = len(keys) - len(wanted)
        job = _Job(message.source, message.namespace, wanted, now_s + JOB_S, lambda count: done(here + count))
        self._jobs.append(job)

    def tick(self, now_s: float) -> None:
        for access in self._accesses.values():
            access.tick(now_s)
        for job in list(self._jobs):
            if now_s > job.until_s and not job.reading:
                self._finish(job)
            else:
                self._advance(job, now_s)
        for address in [a for a, used_s in self._used_s.items() if now_s - used_s > IDLE_S]:
            if not any(job.source.address == address for job in self._jobs):
                self._accesses.pop(address).close()
                del self._used_s[address]

    def _advance(self, job: _Job, now_s: float) -> None:
        address = job.source.address
        access = self._accesses.get(address)
        if access is None:
            access = self._reach(address)
        if access is None:
            self._counters["copy:unreachable"] += len(job.keys)
            self._finish(job)
            return
        self._used_s[address] = now_s
        if not access.ready:
            return
        if access.incarnation != job.source.incarnation:
            self._finish(job)
        elif not job.asked:
            self._ask(job, access, now_s)
        elif not job.reading and job.pages:
            self._copy_some(job, access, now_s)
        elif job.lease and not job.reading and not job.pages:
            self._finish(job)

    def _reach(self, address: str) -> NodeAccess | None:
        """None: there is no socket to be had."""
        try:
            access = self._accesses[address] = NodeAccess(self._context, address, self._me)
        except zmq.ZMQError as error:
            logger.warning("nothing can be copied from %s: %s", address, error)
            return None
        return access

    def _ask(self, job: _Job, access: NodeAccess, now_s: float) -> None:
        job.asked = True
        keys = b"".join(key[pw.NAMESPACE_BYTES :] for key in job.keys)

        def pinned(answer: pw.Pinned | None) -> None:
            if answer is None or not answer.pages:
                self._finish(job)
                return
            job.lease = answer.lease
            job.pages.extend(zip(job.keys, answer.pages, strict=False))

        access.link.ask(
            lambda token: pw.Pin(token, *self._writer, job.namespace, keys, JOB_S, JOB_S / 4),
            pw.Pinned,
            pinned,
            now_s + JOB_S / 2,
        )

    def _copy_some(self, job: _Job, access: NodeAccess, now_s: float) -> None:
        """Some pages at a time, so that the node's own clients get their turn."""
        some: list[tuple[bytes, pw.Slot, pw.Page]] = []
        while job.pages and len(some) < PAGES_AT_ONCE:
            key, page = job.pages.popleft()
            (slot,) = self._index.reserve(self._writer, [key], page.page_bytes, 1, 0, now_s)
            if slot.refusal is Refusal.NONE:
                some.append((key, slot, page))
        if not some:
            return
        if access.reach is Reach.LOCAL:
            for _, slot, page in some:
                source = access.view(page.offset, page.page_bytes)
                self._memory.data[slot.offset : slot.offset + page.page_bytes] = source
            self._commit(job, some, now_s)
            return
        here = Extents.of(*((self._memory.address + slot.offset, page.page_bytes) for _, slot, page in some))
        try:
            op = access.read(here, [(page.offset, page.page_bytes) for _, _, page in some])
        except TransportError as error:
            logger.warning("pages of %s cannot be copied: %s", job.source.name, error)
            self._give_up(some)
            self._finish(job)
            return
        job.reading = some
        self._ops[op] = job

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> bool:
        """True: it was one of ours."""
        job = self._ops.pop(op, None)
        if job is None:
            return any(access.completed(op, error) for access in self._accesses.values())
        some, job.reading = job.reading, []
        if error is None and now_s <= job.until_s:
            self._commit(job, some, now_s)
        else:
            self._give_up(some)
            self._finish(job)
        return True

    def peer_lost(self, peer: PeerId, reason: str) -> bool:
        return any(access.peer_lost(peer, reason) for access in self._accesses.values())

    def replaced(self) -> None:
        """The node's data plane is another one."""
        for access in self._accesses.values():
            access.replaced()

    def _commit(self, job: _Job, some: list[tuple[bytes, pw.Slot, pw.Page]], now_s: float) -> None:
        for key, slot, page in reversed(some):
            why = self._index.commit(self._writer, key, slot.generation, 0, page.checksums, now_s)
            entry = self._index.find(key) if why is Refusal.NONE else None
            if entry is not None:
                job.copied += 1
                self._counters["copy:pages"] += 1
                self._visible(entry)

    def _give_up(self, some: list[tuple[bytes, pw.Slot, pw.Page]]) -> None:
        """Nothing of ours lands there any more: the read has completed, or was never posted."""
        for _, slot, _ in some:
            self._index.abandon(self._writer, slot.generation, drained=True)

    def _finish(self, job: _Job) -> None:
        self._jobs.remove(job)
        access = self._accesses.get(job.source.address)
        if job.lease and access is not None:
            access.link.tell(pw.Unpin(job.lease))
        job.done(job.copied)

    def next_s(self, now_s: float) -> float:
        if not self._jobs:
            return 3600.0
        return min(0.005, *(access.next_s(now_s) for access in self._accesses.values())) if self._accesses else 0.0

    def close(self) -> None:
        for access in self._accesses.values():
            access.close()


class Replicas:
    """The nodes that hold copies of what is stored here with such a promise: asked to fetch them, and waited for."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], addresses: tuple[str, ...], runtime: Runtime = THREADS
    ) -> None:
        self._links = [Link(context, address, runtime.entropy) for address in addresses]

    def __len__(self) -> int:
        return len(self._links)

    def ask(
        self, card: pw.NodeCard, namespace: bytes, keys: bytes, until_s: float, done: Callable[[bool], None]
    ) -> None:
        """`done(all)` once for each replica: it has all of these pages."""
        count = len(keys) // pw.PAGE_KEY_BYTES
        for link in self._links:
            link.ask(
                lambda token: pw.Replicate(card, namespace, keys, token),
                pw.Replicated,
                lambda answer: done(answer is not None and answer.pages == count),
                until_s,
            )

    def tick(self, now_s: float) -> None:
        for link in self._links:
            link.receive(now_s)

    def next_s(self, now_s: float) -> float:
        return min((link.next_s(now_s) for link in self._links), default=3600.0)

    def close(self) -> None:
        for link in self._links:
            link.close()
