"""Looks at bytes on their way: blocks when a write reads them, and pages when a pool node makes them visible.

A checksum made of wrong bytes is right, and one that is wrong makes a miss of a mistake. So this is compared with the
values themselves, whatever becomes of the bytes afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmkv.pool.node import PoolNode
from lmkv.transfer.events import Peer
from lmkv.transfer.fanout import transfer_of
from lmkv.transfer.slots import Borrower

from .engine import SimEngine
from .job import Job
from .kinds import DTYPES, SHAPE
from .plan import CHUNK
from .runner import Rank, block_array
from .steps import Sequence
from .values import States, Values, prefix_states

NAMESPACE_BYTES = 16


@dataclass(slots=True)
class _Write:
    """One that has been posted and has not ended."""

    rank: Rank
    rect: Any
    blocks: list[int]
    """Of the whole prompt, as they were when it was posted."""
    prompt: Sequence


class Witness:
    """One a world. `fail(text)` takes what must never happen. Where no fault `spoils` bytes, a checksum that is wrong
    is a mistake of ours, too; where there are no `faults` at all, also one of a page that is read (a reader that stood
    still may read it after its lease)."""

    def __init__(self, fail: Callable[[str], None], events: Counter[str], faults: bool, spoils: bool) -> None:
        self._fail = fail
        self._events = events
        self._faults = faults
        self._strict = not spoils
        self._engines: list[SimEngine] = []
        self._nodes: list[tuple[str, PoolNode]] = []
        self._revoked = 0
        """Writes that ended after their transfer had been given up."""
        self._corrupt = 0
        """Writes whose checksum was wrong."""
        self._prompts: dict[str, Job] = {}
        """By transfer: what prefill computes for it."""
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._names: dict[bytes, tuple[int, bytes]] = {}
        """By object key without its group: (state after the chunk, states of its tokens)."""

    # --- engines ---

    def engine(self, engine: SimEngine) -> None:
        self._engines.append(engine)
        add = engine.add

        def watched(job: Job) -> None:
            params = (job.params or {}).get("lmkv", {})
            if params.get("role") == "prefill":
                self._prompts[params["transfer_id"]] = job
            add(job)

        engine.add = watched  # type: ignore[method-assign]
        for rank in engine.runner.ranks:
            self._watch_writes(engine, rank)
        self._watch_stores(engine)

    def _watch_writes(self, engine: SimEngine, rank: Rank) -> None:
        sending = rank.connector._worker._loop._sending
        flying: dict[tuple[str, int], _Write] = {}
        post, completed = sending._write, sending.completed

        def posted(action: Any, source: Any) -> Any:
            if source.grants[action.peer.incarnation, action.epoch].landing and not self._faults:
                self._look_at_slot(engine, rank, action)
            prompt = self._sequence(transfer_of(action.transfer_id))
            if prompt is not None:
                write = _Write(rank, action.rect, list(source.block_ids[action.rect.group]), prompt)
                flying[action.transfer_id, action.seq] = write
                self._look_at(engine, write, action.transfer_id, "is posted")
            return post(action, source)

        def ended(op: Any, error: Any, now_s: float) -> None:
            write = flying.pop(sending._ops[op], None)
            # The blocks of a revoked transfer may have been overwritten; its writes never count.
            tid = transfer_of(sending._ops[op][0])
            source = sending._sources.get(tid)
            revoked = tid in sending._revoked or (source is not None and source.revoked)
            self._revoked += revoked
            if write is not None and error is None and self._strict and not revoked:
                self._look_at(engine, write, sending._ops[op][0], "has ended")
            completed(op, error, now_s)

        sending._write, sending.completed = posted, ended
        verifier = rank.connector._worker._loop._receiving._verifier
        fault = verifier.fault

        def verified(note: Any, runs: Any) -> Any:
            found = fault(note, runs)
            self._corrupt += found == "is corrupt"
            return found

        verifier.fault = verified

    def _look_at_slot(self, engine: SimEngine, rank: Rank, action: Any) -> None:
        """Fails the world if the write goes to a slot that is not lent to its writer. Not for worlds with faults: a
        connection may be lost to one side only, and then nothing lands."""
        writer = Peer(_incarnation(engine), rank.connector._worker._rank)
        borrower = Borrower(writer, transfer_of(action.transfer_id), action.epoch)
        reader = next(one for one in self._engines if _incarnation(one) == action.peer.incarnation)
        landing = reader.runner.ranks[action.peer.rank].connector._worker._loop._receiving._landing
        self._events["slots_checked"] += 1
        if action.slot not in landing._ring.held(borrower):
            where = f"slot {action.slot} of {reader.name}, which is not lent to it"
            self._fail(f"{engine.name} rank {rank.number}: a write of {action.transfer_id} goes to {where}")

    def _sequence(self, transfer_id: str) -> Sequence | None:
        job = self._prompts.get(transfer_id)
        if job is None:
            return None
        key = (transfer_id, job.kv_seed)
        if key not in self._sequences:
            self._sequences[key] = Sequence(transfer_id, job.kv_seed, job.prompt, 0)
        return self._sequences[key]

    def _look_at(self, engine: SimEngine, write: _Write, transfer_id: str, when: str) -> None:
        rect, n = write.rect, engine.kind.block_tokens
        lo, hi = rect.block_lo * n, min(rect.block_hi * n, len(write.prompt.tokens))
        self._events["sent_blocks_checked"] += (rect.block_hi - rect.block_lo) * (rect.layer_hi - rect.layer_lo)
        for layer in range(rect.layer_lo, rect.layer_hi):
            wrong = write.rank.caches.wrong(layer, block_array(write.blocks), lo, hi, write.prompt)
            if wrong >= 0:
                block = write.blocks[wrong // n]
                poison = " (poison)" if write.rank.caches.is_poison(block) else ""
                self._fail(
                    f"{engine.name} rank {write.rank.number}: a write of {transfer_id} {when} and reads wrong KV"
                    f"{poison} for token {wrong} in block {block}, layer {layer}"
                )
                return

    # --- the pool ---

    def _watch_stores(self, engine: SimEngine) -> None:
        pool = engine.scheduler.connector._scheduler._pool
        if pool is None:
            return
        fill = pool.fill

        def filled(meta: Any, output: Any) -> None:
            before = len(meta.stores)
            fill(meta, output)
            for spec in meta.stores[before:]:
                job = engine.jobs[spec.request_id]
                tokens = list(engine.scheduler.requests[spec.request_id].all_token_ids)
                states = prefix_states(tokens[: (spec.first + len(spec.keys)) * CHUNK], job.kv_seed)
                for chunk, key in enumerate(spec.keys, spec.first):
                    self._name(spec.namespace + key, states[chunk * CHUNK : (chunk + 1) * CHUNK])

        pool.fill = filled

    def _name(self, key: bytes, states: States) -> None:
        known = self._names.setdefault(key, (len(states), states.tobytes()))
        if known != (len(states), states.tobytes()):
            self._fail(f"two prompts whose KV differs have the key {key.hex()} in the pool")

    def node(self, name: str, node: PoolNode) -> None:
        self._nodes.append((name, node))
        index, data = node._index, node._memory.data
        publish = index._publish

        def published(entry: Any) -> None:
            wrong = self._look_at_page(name, entry.key, data[entry.offset : entry.offset + entry.page_bytes])
            if wrong and self._strict:
                self._fail(wrong)
            elif wrong:
                # A fault may have spoiled it on its way. Its checksums are then those of what was packed: whoever
                # loads it has to notice, which the check of what requests read shows.
                self._events["page:spoiled"] += 1
            publish(entry)

        index._publish = published  # type: ignore[method-assign]

    def _look_at_page(self, node: str, key: bytes, page: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
        """What is wrong with it, or ""."""
        known = self._names.get(key[:-1])
        if known is None:
            return f"{node}: the page {key.hex()} is committed, and nobody has computed it"
        values = Values(SHAPE, (0, SHAPE.heads)).all_layers(np.frombuffer(known[1], dtype=np.uint64))
        # [layer, token, head, content] → [head, layer, part, token, dimension] (docs/page-format.md)
        half = SHAPE.content // 2
        parts = values.reshape(SHAPE.layers, -1, SHAPE.heads, 2, half).transpose(2, 0, 3, 1, 4)
        self._events["pages_checked"] += 1
        if page.tobytes() not in {_as_bytes(parts, dtype) for dtype in DTYPES.values()}:
            return f"{node}: the page {key.hex()} is committed and holds wrong KV"
        return ""

    # --- the end ---

    def check_sums(self) -> None:
        """No checksum is wrong, but of what its sender has given up."""
        if not self._strict:
            return
        for engine in () if self._faults else self._engines:
            if corrupt := engine.scheduler.connector._scheduler.book.counts().get("pool:load:corrupt"):
                self._fail(f"{engine.name}: {corrupt} loads have met pages whose checksums were wrong")
        if self._corrupt > self._revoked:
            self._fail(f"{self._corrupt} writes had a wrong checksum, {self._revoked} were given up by their sender")
        for name, node in self._nodes:
            if node._index.counters["corrupt"] and not self._faults:
                self._fail(f"{name}: readers found {node._index.counters['corrupt']} pages corrupt")


def _incarnation(engine: SimEngine) -> str:
    return str(engine.scheduler.connector._scheduler._incarnation)


def _as_bytes(values: np.ndarray[Any, np.dtype[np.uint8]], dtype: torch.dtype) -> bytes:
    raw: bytes = torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.uint8).numpy().tobytes()
    return raw
