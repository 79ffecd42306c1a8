"""Decode's landing slots: lending them, and taking KV out of them into the engine's blocks. Loop thread only."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec
import numpy as np

from lmkv import wire
from lmkv.errors import LmkvError
from lmkv.ids import Epoch, Rank, TransferId
from lmkv.kernels import Cache, convert_blocks
from lmkv.layout import segments
from lmkv.transfer.events import Peer, Rect
from lmkv.transfer.landing import Share, kernel_ids, share_of, slot_geometry
from lmkv.transfer.slots import Borrower, Loan, SlotRing

from . import memory
from .checking import Verifier
from .peers import Peers
from .specs import ExpectSpec

logger = logging.getLogger(__name__)

_PER_WRITER = 8


@dataclass(slots=True)
class _Landing:
    """One grant: who writes to it, and what of their blocks each slot holds, by group."""

    spec: ExpectSpec
    shares: dict[Peer, tuple[Share, ...]]
    borrowers: list[Borrower] = field(default_factory=list)


class LandingSlots:
    """`convert_dtype` allows a dtype to be converted (the pairing has checked that it is wanted)."""

    def __init__(
        self, rank: Rank, found: memory.KvMemory, peers: Peers, convert_dtype: bool, verifier: Verifier
    ) -> None:
        self._rank = rank
        self._found = found
        self._peers = peers
        self._convert_dtype = convert_dtype
        self._verifier = verifier
        self._slots = found.slots
        self._ring = SlotRing(found.slots.count if found.slots else 0, _PER_WRITER)
        self._landings: dict[tuple[TransferId, Epoch], _Landing] = {}

    def writers(self, spec: ExpectSpec) -> tuple[Peer, ...] | None:
        """The ranks that will write for this grant; None when its engine is not our peer any more."""
        met = self._peers.met(spec.incarnation)
        return tuple(Peer(spec.incarnation, rank) for rank in sorted(met[1].receives)) if met else None

    def payload_bytes(self, spec: ExpectSpec, layers: tuple[int, ...]) -> int:
        """What each writer counts for the grant: whole blocks of its own, by its layer sizes."""
        met = self._peers.met(spec.incarnation)
        if met is None:
            return 0
        total = 0
        for group, (lo, hi) in enumerate(spec.landing):
            worker = met[0].workers[min(met[1].receives)]
            block_bytes = next(layer.block_bytes for layer in worker.layers if layer.group == group)
            total += (hi - lo) * layers[group] * block_bytes
        return total

    def open(self, spec: ExpectSpec) -> None:
        """The grant is expected: its writers get their first slots."""
        met = self._peers.met(spec.incarnation)
        if met is None or self._slots is None:
            return
        card, meeting = met
        landing = self._landings[spec.transfer_id, spec.epoch] = _Landing(spec, {})
        for rank, heads in meeting.receives.items():
            peer, worker = Peer(spec.incarnation, rank), card.workers[rank]
            landing.shares[peer] = tuple(
                share_of(geometry, part, tokens)
                for geometry, part, tokens in zip(worker.geometries, heads, card.block_tokens, strict=True)
            )
            borrower = Borrower(peer, spec.transfer_id, spec.epoch)
            landing.borrowers.append(borrower)
            self._tell(self._ring.open(borrower))

    def fault(self, peer: Peer, note: wire.WriteNote, rect: Rect) -> str:
        """What is wrong with a write: its slot is not the writer's, or does not hold what it says; or ""."""
        landing = self._landings.get((note.transfer_id, note.epoch))
        if landing is None or self._slots is None or peer not in landing.shares:
            return "comes from a rank that was not asked to write"
        if note.slot not in self._ring.held(Borrower(peer, note.transfer_id, note.epoch)):
            return f"is in slot {note.slot}, which is not lent to this writer"
        if not 0 <= rect.group < len(landing.shares[peer]):
            return f"is of KV group {rect.group}, which this engine does not have"
        size = landing.shares[peer][rect.group].rect_bytes(rect)
        if not 0 < size <= self._slots.slot_bytes:
            return f"has {size} bytes, which no slot of {self._slots.slot_bytes} holds"
        run = np.array([[self._slots.address + note.slot * self._slots.slot_bytes, size]], dtype=np.uint64)
        return self._verifier.fault(note, run)

    def take_out(self, peer: Peer, note: wire.WriteNote, rect: Rect) -> str:
        """Convert what has landed into our blocks and lend the slot on. Returns what went wrong, or ""."""
        landing, slots = self._landings[note.transfer_id, note.epoch], self._slots
        assert slots is not None, "its fault was asked for before"
        share = landing.shares[peer][rect.group]
        geometry = slot_geometry(share, rect)
        try:
            source = Cache.of(slots.slot(note.slot, share.rect_bytes(rect)), geometry)
            self._convert(landing.spec, source, rect, share)
        except LmkvError as error:
            return str(error)
        self._tell(self._ring.taken_out(Borrower(peer, note.transfer_id, note.epoch), note.slot))
        return ""

    def _convert(self, spec: ExpectSpec, source: Cache, rect: Rect, share: Share) -> None:
        group, found = rect.group, self._found
        whole = found.geometries[group]
        layers = found.layer_offsets(group)[rect.layer_lo : rect.layer_hi]
        target_geometry = msgspec.structs.replace(
            whole, layers=len(layers), first_layer=rect.layer_lo, total_layers=whole.model_layers
        )
        storage = found.storages[group]
        target = Cache.of(storage, target_geometry, layers)
        theirs, ours = share.kernel_blocks * share.geometry.block_tokens, found.block_tokens[group]
        blocks = spec.blocks[group]
        lo = max(spec.tokens[0], rect.block_lo * theirs, blocks.lo * ours)
        hi = min(spec.tokens[1], rect.block_hi * theirs)
        if lo >= hi:
            return
        table = segments(
            source.geometry,
            target_geometry,
            np.arange(source.geometry.blocks),
            kernel_ids(blocks.ids, ours // whole.block_tokens),
            (lo, hi),
            source_first=rect.block_lo * theirs,
            target_first=blocks.lo * ours,
        )
        convert_blocks(source, target, table, convert_dtype=self._convert_dtype)
        found.device.wait()  # for the loop's own stream: the slot is lent on, and the blocks are read, after this

    def release(self, tid: TransferId, epoch: Epoch, awaited: Collection[Peer]) -> None:
        """Lends on the slots of writers that have delivered everything: all but `awaited`. Another rank of the same
        transfer may wait for them."""
        landing = self._landings.get((tid, epoch))
        if landing is None:
            return
        over = [borrower for borrower in landing.borrowers if borrower.peer not in awaited]
        landing.borrowers = [borrower for borrower in landing.borrowers if borrower.peer in awaited]
        for borrower in over:
            self._tell(self._ring.close(borrower))

    def failed(self, tid: TransferId, epoch: Epoch) -> None:
        """It will not be loaded: no more slots for it. Those lent stay its own until `close`."""
        landing = self._landings.get((tid, epoch))
        for borrower in landing.borrowers if landing else ():
            self._ring.sated(borrower)

    def held(self, tid: TransferId, epoch: Epoch) -> int:
        """Slots that are lent to its writers."""
        landing = self._landings.get((tid, epoch))
        return sum(len(self._ring.held(borrower)) for borrower in landing.borrowers) if landing else 0

    def close(self, tid: TransferId, epoch: Epoch) -> None:
        """Nothing can land in its slots any more."""
        landing = self._landings.pop((tid, epoch), None)
        for borrower in landing.borrowers if landing else ():
            self._tell(self._ring.close(borrower))

    def _tell(self, loans: list[Loan]) -> None:
        for loan in loans:
            to, own = loan.borrower, self._peers.own_incarnation
            self._peers.tell(to.peer, wire.Credit(own, self._rank, to.transfer_id, to.epoch, loan.slots))
