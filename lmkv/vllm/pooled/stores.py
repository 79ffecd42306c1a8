"""Storing: chunks of the engine's blocks packed into pages of a pool node. Loop thread only.

A store never holds anything up: what finds no node, no slot, or no staging in time is dropped and counted. The blocks
of a request have to stay until its stores have been packed (`take_packed`), not until they are committed.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lmkv import poolwire as pw
from lmkv.control.guard import Guard
from lmkv.errors import LmkvError, TransportError
from lmkv.hashing import page_key
from lmkv.ids import Incarnation, Rank, RequestId
from lmkv.kernels.paging import Sums
from lmkv.pool.access import NodeAccess, Reach
from lmkv.poolwire import Refusal
from lmkv.transport import OpId

from ..commands import BlockHold
from ..specs import StoreSpec
from .shares import Shares
from .staging import Staging

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0
"""A store that has not been packed by then is dropped: its blocks are wanted."""
ANSWER_S = 30.0
SLICE_BYTES = 16 << 20
"""So much is packed before transfers get their turn again; smaller slices cost more calls than they overlap."""
COMMIT_PAGES = 16
MOST_QUEUED_CHUNKS = 8192


class _RevokedError(LmkvError):
    """The engine has overwritten the blocks of a store (see BlockHold)."""


@dataclass(slots=True, eq=False)
class _Batch:
    """One spec: `left` of its groups are still to be packed."""

    spec: StoreSpec
    hold: BlockHold
    left: int


@dataclass(slots=True, eq=False)
class _Job:
    """One group of a batch, at one node."""

    batch: _Batch
    group: int
    access: NodeAccess
    node: Incarnation
    bond: int
    """What was reserved over another attachment of the same node is void."""
    until_s: float
    slots: list[tuple[int, pw.Slot]] = field(default_factory=list)
    """(chunk, slot) still to be packed."""
    flying: int = 0
    """Writes of it that have not ended."""
    written: list[tuple[int, pw.Slot, Sums]] = field(default_factory=list)
    """To be committed."""

    @property
    def spec(self) -> StoreSpec:
        return self.batch.spec

    @property
    def is_attached(self) -> bool:
        return (self.access.incarnation, self.access.bond) == (self.node, self.bond)


@dataclass(slots=True)
class _Write:
    """Packed into staging and on its way."""

    job: _Job
    chunks: list[tuple[int, pw.Slot]]
    sums: list[Sums]
    slots: list[int]


class Stores:
    """`arena(access)` gives the mapped arena of a LOCAL node as a tensor. `guard` is the loop's."""

    def __init__(
        self,
        incarnation: Incarnation,
        rank: Rank,
        shares: Shares,
        staging: Staging,
        arena: Callable[[NodeAccess], torch.Tensor],
        counters: Counter[str],
        guard: Guard,
    ) -> None:
        self._guard = guard
        self._writer = (incarnation, rank)
        self._shares = shares
        self._staging = staging
        self._arena = arena
        self._counters = counters
        self._ready: deque[_Job] = deque()
        self._asked: list[_Job] = []
        self._writes: dict[OpId, _Write] = {}
        self._packed_specs: list[RequestId] = []
        self._unanswered = 0

    # --- questions ---

    def take_packed(self) -> list[RequestId]:
        """One entry for each spec whose blocks are read no more, whatever became of it."""
        packed, self._packed_specs = self._packed_specs, []
        return packed

    @property
    def idle(self) -> bool:
        """Everything is packed, written and committed."""
        return not (self._ready or self._asked or self._writes or self._unanswered)

    @property
    def has_work(self) -> bool:
        """`work` would do something now."""
        return any(self._workable(job) for job in self._ready)

    # --- in ---

    def submit(self, spec: StoreSpec, hold: BlockHold, access: NodeAccess | None, now_s: float) -> None:
        if not self._shares.stores or access is None or self._is_full():
            if self._shares.stores:
                self._counters["store:no_node" if access is None else "store:queue_full"] += len(spec.keys)
            self._packed_specs.append(spec.request_id)
            return
        batch = _Batch(spec, hold, len(self._shares.groups))
        for group, share in enumerate(self._shares.groups):
            job = _Job(batch, group, access, access.incarnation, access.bond, now_s + PATIENCE_S)
            keys = b"".join(page_key(key, group) for key in spec.keys)
            self._asked.append(job)
            self._unanswered += 1
            access.link.ask(
                lambda token, keys=keys, share=share: pw.Reserve(  # type: ignore[misc]
                    token, *self._writer, spec.namespace, keys, share.page_bytes, share.shards, share.shard
                ),
                pw.Reserved,
                lambda answer, job=job: self._reserved(job, answer, now_s),  # type: ignore[misc]
                now_s + ANSWER_S,
            )

    def _is_full(self) -> bool:
        return sum(len(job.spec.keys) for job in self._ready) > MOST_QUEUED_CHUNKS

    def _reserved(self, job: _Job, answer: pw.Reserved | None, asked_s: float) -> None:
        self._unanswered -= 1
        late = job not in self._asked
        if not late:
            self._asked.remove(job)
        is_whole = answer is not None and len(answer.slots) == len(job.spec.keys)
        if not is_whole:
            self._counters["store:unanswered"] += len(job.spec.keys)
        for chunk, slot in enumerate(answer.slots[: len(job.spec.keys)] if answer is not None else (), job.spec.first):
            if slot.refusal is Refusal.NONE:
                job.slots.append((chunk, slot))
            else:
                self._counters[f"store:{slot.refusal.name.lower()}"] += 1
        if late or answer is None or not is_whole:
            self._abandon(job, job.slots)
            if not late:
                self._packed(job)
            return
        job.until_s = min(job.until_s, asked_s + answer.lease_s)
        if job.slots:
            self._ready.append(job)
        else:
            self._packed(job)

    def drop(self, request_ids: tuple[RequestId, ...], now_s: float) -> None:
        """Their blocks are about to be overwritten: nothing more is read from them."""
        for job in [j for j in [*self._ready, *self._asked] if j.spec.request_id in request_ids]:
            self._give_up(job, "preempted", now_s)

    # --- work ---

    def work(self, now_s: float) -> None:
        """Pack a slice. Call again while `has_work`."""
        for late in [j for j in [*self._ready, *self._asked] if now_s > j.until_s]:
            self._give_up(late, "late", now_s)
        job = next((job for job in self._ready if self._workable(job)), None)
        if job is None:
            return
        self._guard.attempt(
            "store",
            lambda: self._advance(job, now_s),
            lambda: self._failed(job, now_s),
            f"node {job.node}",
        )

    def _failed(self, job: _Job, now_s: float) -> None:
        if job in self._ready:
            self._give_up(job, "failed", now_s)

    def _advance(self, job: _Job, now_s: float) -> None:
        if not job.is_attached:
            self._give_up(job, "node_lost", now_s)
            return
        size = self._shares.groups[job.group].bytes
        batch = job.slots[: max(1, SLICE_BYTES // size)]
        try:
            if job.access.reach is Reach.LOCAL:
                self._pack_here(job, batch)
            else:
                batch = self._pack_and_send(job, batch, size)
        except _RevokedError:
            self._give_up(job, "revoked", now_s)
            return
        except LmkvError as error:
            logger.warning("a store failed: %s", error)
            self._give_up(job, "failed", now_s)
            return
        del job.slots[: len(batch)]
        if not job.slots:
            self._ready.remove(job)
            self._packed(job)
        self._commit_some(job, now_s)

    def _workable(self, job: _Job) -> bool:
        return job.access.reach is not Reach.REMOTE or not job.is_attached or self._staging.can_store

    def _pack_here(self, job: _Job, batch: list[tuple[int, pw.Slot]]) -> None:
        share = self._shares.groups[job.group]
        offsets = [slot.offset + share.offset_bytes for _, slot in batch]
        sums = self._pack(job, batch, self._arena(job.access), offsets)
        job.written += [(chunk, slot, own) for (chunk, slot), own in zip(batch, sums, strict=True)]

    def _pack_and_send(self, job: _Job, batch: list[tuple[int, pw.Slot]], size: int) -> list[tuple[int, pw.Slot]]:
        """Returns what there was staging for. Raises TransportError."""
        slots = self._staging.take(len(batch), for_store=True)
        batch = batch[: len(slots)]
        share = self._shares.groups[job.group]
        rows = [(slot.offset + share.offset_bytes, size) for _, slot in batch]
        try:
            sums = self._pack(job, batch, self._staging.data, [self._staging.offset(slot) for slot in slots])
            op = job.access.write(self._staging.extents(slots, size), rows)
        except BaseException:
            self._staging.give_back(slots)
            raise
        self._writes[op] = _Write(job, batch, sums, slots)
        job.flying += 1
        return batch

    def _pack(self, job: _Job, batch: list[tuple[int, pw.Slot]], data: torch.Tensor, offsets: list[int]) -> list[Sums]:
        """Raises _RevokedError if the blocks may have been overwritten while they were read."""
        blocks = job.spec.blocks[job.group]
        self._counters["stored_bytes"] += len(batch) * self._shares.groups[job.group].bytes
        sums = self._shares.pack(job.group, blocks, [chunk for chunk, _ in batch], data, offsets)
        if job.batch.hold.revoked:
            raise _RevokedError(f"blocks of {job.spec.request_id} were overwritten while they were stored")
        return sums

    def completed(self, op: OpId, error: TransportError | None, now_s: float) -> bool:
        """True: it was one of ours."""
        write = self._writes.pop(op, None)
        if write is None:
            return False
        self._staging.give_back(write.slots)
        job = write.job
        job.flying -= 1
        if error is None:
            job.written += [(c, s, sums) for (c, s), sums in zip(write.chunks, write.sums, strict=True)]
        else:
            self._counters["store:failed"] += len(write.chunks)
            self._abandon(job, write.chunks)
        self._commit_some(job, now_s)
        return True

    def _commit_some(self, job: _Job, now_s: float) -> None:
        """Many pages with one message, or what is left."""
        if len(job.written) < COMMIT_PAGES and (job.slots or job.flying):
            return
        written, job.written = job.written, []
        if written:
            self._commit(job, [(c, s) for c, s, _ in written], [sums for _, _, sums in written], now_s)

    def _commit(self, job: _Job, batch: list[tuple[int, pw.Slot]], sums: list[Sums], now_s: float) -> None:
        if job.access.incarnation != job.node:
            self._counters["store:node_lost"] += len(batch)
            self._abandon(job, batch)
            return
        spec, shard = job.spec, self._shares.groups[job.group].shard
        keys = self._keys(job, batch)
        generations = tuple(slot.generation for _, slot in batch)
        self._unanswered += 1
        job.access.link.ask(
            lambda token: pw.Commit(token, *self._writer, spec.namespace, keys, generations, shard, tuple(sums)),
            pw.Committed,
            lambda answer: self._committed(answer, len(batch)),
            now_s + PATIENCE_S,
        )

    def _committed(self, answer: pw.Committed | None, count: int) -> None:
        self._unanswered -= 1
        if answer is None:
            self._counters["store:unanswered"] += count
            return
        for refusal in answer.refusals:
            self._counters["stored" if refusal is Refusal.NONE else f"store:{refusal.name.lower()}"] += 1

    # --- ends ---

    def _give_up(self, job: _Job, why: str, now_s: float) -> None:
        self._counters[f"store:{why}"] += len(job.slots) if job in self._ready else len(job.spec.keys)
        if job in self._ready:
            self._ready.remove(job)
            self._abandon(job, job.slots)
            job.slots = []
            self._commit_some(job, now_s)  # what was packed before
        else:
            self._asked.remove(job)  # its slots are abandoned when the answer comes
        self._packed(job)

    def _abandon(self, job: _Job, batch: list[tuple[int, pw.Slot]]) -> None:
        """Nothing of ours can land in these slots (any more). A silent node is told as well, since slots that nobody
        gives back stay out of use. Another node at its address does not know them, and takes no notice."""
        if batch:
            generations = tuple(slot.generation for _, slot in batch)
            job.access.link.tell(
                pw.Abandon(*self._writer, job.spec.namespace, self._keys(job, batch), generations, True)
            )

    def _packed(self, job: _Job) -> None:
        job.batch.left -= 1
        if job.batch.left == 0:
            self._packed_specs.append(job.spec.request_id)

    def _keys(self, job: _Job, batch: list[tuple[int, pw.Slot]]) -> bytes:
        return b"".join(page_key(job.spec.keys[chunk - job.spec.first], job.group) for chunk, _ in batch)
