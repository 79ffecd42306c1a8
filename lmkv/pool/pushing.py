"""Pinned pages written by the node into the memory of who asked: over TCP twice as fast as being read from there.

The node's thread only. What is asked for is answered once, when nothing of it will be written any more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from lmkv import poolwire as pw
from lmkv.errors import LmkvError
from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import Tier
from lmkv.transport import Extents, OpId, PeerId, Transport

from .entry import Entry
from .index import PoolIndex
from .memory import ArenaMemory

MOST_FLYING = 4096
MOST_VOID = 65536
"""Questions that are remembered not to be served. Those that come late come within seconds."""
Answer = Callable[[pw.Fetched], None]


Name = tuple[Incarnation, Rank, int]
"""Of a question: who has asked, and its token."""


@dataclass(slots=True)
class _Push:
    name: Name
    entries: list[Entry]
    answer: Answer


class Pushing:
    """`transport` None: this node has no data plane, and refuses."""

    def __init__(
        self, index: PoolIndex, memory: ArenaMemory, transport: Transport | None, counters: Counter[str]
    ) -> None:
        self._index = index
        self._memory = memory
        self._transport = transport
        self._counters = counters
        self._pushes: dict[OpId, _Push] = {}
        self._void: OrderedDict[Name, None] = OrderedDict()

    def take(
        self, question: pw.Fetch, keys: list[bytes], held: list[Entry], peer: PeerId | None, answer: Answer
    ) -> None:
        """`held`: what the asker's lease holds; `peer`: the asker on the data plane."""
        by_key = {entry.key: entry for entry in held}
        entries = [by_key[key] for key in keys if key in by_key]
        why = self._refusal(question, keys, entries, peer)
        if why:
            self._counters["fetch:refused"] += 1
            answer(pw.Fetched(question.token, why))
            return
        assert self._transport is not None and peer is not None
        rows = [(self._memory.address + entry.offset + question.first, question.size) for entry in entries]
        try:
            there = Extents.of(*((address, question.size) for address in question.addresses))
            op = self._transport.write(peer, Extents.of(*rows), there)
        except (LmkvError, OverflowError) as error:
            answer(pw.Fetched(question.token, str(error)))
            return
        for entry in entries:
            self._index.hold(entry)
        self._counters["fetch:pages"] += len(entries)
        self._pushes[op] = _Push((question.incarnation, question.rank, question.token), entries, answer)

    def _refusal(self, question: pw.Fetch, keys: list[bytes], entries: list[Entry], peer: PeerId | None) -> str:
        if self._transport is None or peer is None:
            return "there is no data plane between us"
        if (question.incarnation, question.rank, question.token) in self._void:
            return "the asker has given it up"
        if len(self._pushes) >= MOST_FLYING:
            return "too much is being written"
        if len(entries) != len(keys) or any(Tier.DRAM not in entry.tiers for entry in entries):
            return "the lease does not hold all of these pages"
        if len(question.addresses) != len(keys) or question.size < 1 or question.first < 0:
            return f"{len(question.addresses)} addresses for {len(keys)} pages, {question.size} bytes each"
        if any(question.first + question.size > entry.page_bytes for entry in entries):
            return "that is more than a page"
        return ""

    def completed(self, op: OpId, error: LmkvError | None) -> bool:
        """True: it was one of ours."""
        push = self._pushes.pop(op, None)
        if push is None:
            return False
        for entry in push.entries:
            self._index.release(entry)
        push.answer(pw.Fetched(push.name[2], str(error) if error is not None else ""))
        return True

    def recall(self, incarnation: Incarnation, rank: Rank, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Those of these Fetch questions that are still being written. The others are over: one that comes late (over a
        connection that was lost) is not served, since the asker uses the memory for something else."""
        if not tokens:
            return ()
        writing = {push.name for push in self._pushes.values()}
        flying = tuple(token for token in tokens if (incarnation, rank, token) in writing)
        for token in set(tokens).difference(flying):
            self._void[incarnation, rank, token] = None
        while len(self._void) > MOST_VOID:
            self._void.popitem(last=False)
        return flying
