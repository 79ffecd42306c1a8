"""Decode's landing slots with real memory: what is believed, what is refused, and what ends up in the blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.ids import EngineName, Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer.events import Peer, Rect
from lmkv.transfer.landing import extents_into_slot, share_of
from lmkv.vllm import memory
from lmkv.vllm.checking import ALL_PPM, Verifier
from lmkv.vllm.geometry import Shard
from lmkv.vllm.landing import LandingSlots
from lmkv.vllm.meeting import Meeting
from lmkv.vllm.receiving import Receiving
from lmkv.vllm.specs import BlockRange, ExpectSpec

TID = TransferId("t" * 32)
US, THEM = Incarnation("us"), Incarnation("them")
PREFILL = Peer(THEM, Rank(0))
TOKENS = 40


@dataclass
class FullAttentionSpec:
    head_size: int
    head_size_v: int
    block_size: int


def engine(
    blocks: int, block_tokens: int, heads: int, shard: Shard, slots: int = 0
) -> tuple[memory.KvMemory, torch.Tensor]:
    """Two layers [blocks, heads, tokens, 8 + 8] of random numbers, as a worker finds them."""
    whole = torch.randn(2, blocks, heads, block_tokens, 16, generator=torch.Generator().manual_seed(blocks))
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(8, 8, block_tokens))
    config = SimpleNamespace(
        transfer_group_index_by_layer={"a": 0, "b": 0}, transfer_groups=(group,), num_blocks=blocks
    )
    caches = {"a": whole[0], "b": whole[1]}
    make = lambda device: memory.landing_slots(slots * 65536, 65536, device)  # noqa: E731
    return memory.describe(caches, config, "FLASH_ATTN", shard, make), whole


class Bench:
    """Prefill ranks with 4 heads in blocks of 16, and a decode rank with the last two in blocks of 32."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], ranks: int = 1, slots: int = 4) -> None:
        self.inbox = Inbox(context, "tcp://127.0.0.1:0")
        self.outbox = Outbox(context)
        self.theirs, self.source = engine(8, 16, 4, Shard(0, 1, 4))
        self.ours, self.target = engine(6, 32, 2, Shard(1, 2, 4), slots=slots)
        card = self.theirs.card(Rank(0), self.inbox.address, "tcp", b"")
        engine_card = wire.EngineCard(EngineName("p"), THEM, "tcp://h:1", "prefill", {}, {}, (16,), (card,) * ranks)
        meeting = Meeting(False, receives={Rank(rank): ((2, 4),) for rank in range(ranks)})
        peers = SimpleNamespace(
            met=lambda incarnation: (engine_card, meeting) if incarnation == THEM else None,
            tell=lambda peer, message: self.outbox.send(self.inbox.address, message),
            own_incarnation=US,
            find=lambda peer: SimpleNamespace(clock_offset_s=0.0),
            is_fenced=lambda peer, pair: False,
        )
        self.peers: Any = peers
        self.landing = LandingSlots(
            Rank(1),
            self.ours,
            self.peers,
            False,
            Verifier(ALL_PPM, SimpleNamespace(of=memory.checksum)),  # type: ignore[arg-type]
        )
        self.spec = ExpectSpec(
            TID, RequestId("r"), Epoch(1), THEM, 0, (BlockRange(0, 0, (4, 2)),), (0, TOKENS), ((0, 3),)
        )
        self.landing.open(self.spec)

    def credits(self) -> list[int]:
        found: list[int] = []
        while self.inbox.socket.poll(500 if not found else 50):
            for letter in self.inbox.receive():
                assert isinstance(letter.message, wire.Credit) and letter.message.transfer_id == TID
                found += letter.message.slots
        return found

    def write(self, slot: int, rect: Rect, ids: list[int]) -> wire.WriteNote:
        """What prefill does, by memmove instead of a transport."""
        share, slots = share_of(self.theirs.geometries[0], (2, 4), 16), self.ours.slots
        assert slots is not None
        address = slots.address + slot * slots.slot_bytes
        local, remote = extents_into_slot(self.theirs.map(), share, rect, ids, address, slots.slot_bytes)
        for (a, size, _), (b, _, _) in zip(local.table.tolist(), remote.table.tolist(), strict=True):
            ctypes.memmove(b, a, size)
        place = (rect.group, rect.layer_lo, rect.layer_hi, rect.block_lo, rect.block_hi)
        return wire.WriteNote(TID, Epoch(1), Rank(0), 0, *place, 1, memory.checksum(local.table[:, :2]), slot)

    def close(self) -> None:
        self.outbox.close()
        self.inbox.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Bench(context)
    yield made
    made.close()
    context.term()


ALL = Rect(0, 0, 2, 0, 3)
IDS = [5, 1, 3]


def test_what_lands_ends_up_in_the_blocks_and_the_slot_goes_round(bench: Bench) -> None:
    assert bench.landing.writers(bench.spec) == (PREFILL,)
    assert bench.landing.payload_bytes(bench.spec, (2,)) == 3 * 2 * 16 * 4 * 16 * 4, "whole blocks of prefill"
    first = bench.credits()
    assert len(first) == 2
    before = bench.target.clone()
    note = bench.write(first[0], ALL, IDS)
    assert bench.landing.fault(PREFILL, note, ALL) == ""
    assert bench.landing.take_out(PREFILL, note, ALL) == ""
    assert len(bench.credits()) >= 1, "an active writer gets more"
    tokens = torch.cat([bench.source[:, i, 2:4] for i in IDS], dim=2)[:, :, :TOKENS]
    assert torch.equal(bench.target[:, 4], tokens[:, :, :32])
    assert torch.equal(bench.target[:, 2, :, :8], tokens[:, :, 32:40])
    bench.target[:, 4], bench.target[:, 2, :, :8] = before[:, 4], before[:, 2, :, :8]
    assert torch.equal(bench.target, before), "nothing else was written"


def test_a_flipped_bit_is_seen(bench: Bench) -> None:
    slot = bench.credits()[0]
    note = bench.write(slot, ALL, IDS)
    assert bench.ours.slots is not None
    bench.ours.slots.slot(slot, 1000)[999] ^= 4
    assert bench.landing.fault(PREFILL, note, ALL) == "is corrupt"


@pytest.mark.parametrize(
    ("peer", "slot", "rect"),
    [
        (Peer(THEM, Rank(1)), 0, ALL),
        (PREFILL, 3, ALL),
        (PREFILL, -1, ALL),
        (PREFILL, 0, Rect(7, 0, 2, 0, 3)),
        (PREFILL, 0, Rect(0, 0, 2, 3, 3)),
        (PREFILL, 0, Rect(0, 0, 2, 0, 300)),
    ],
    ids=["stranger", "not-lent", "no-slot", "no-group", "nothing", "too-much"],
)
def test_what_cannot_be_is_not_believed(bench: Bench, peer: Peer, slot: int, rect: Rect) -> None:
    note = bench.write(0, ALL, IDS)
    told = wire.WriteNote(TID, Epoch(1), peer.rank, 0, 0, 0, 2, 0, 3, 1, note.checksum, slot)
    assert bench.landing.fault(peer, told, rect) not in ("", "is corrupt")


def test_a_writer_that_has_delivered_leaves_its_slots_to_the_others_of_its_transfer() -> None:
    """A rank that is done would else hold what another rank waits for, until the deadline."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bench = Bench(context, ranks=2)
    other = Peer(THEM, Rank(1))
    try:
        slots = bench.credits()
        note = bench.write(slots[0], ALL, IDS)
        assert bench.landing.fault(PREFILL, note, ALL) == "", "the first rank has all slots that its engine may have"
        bench.landing.release(TID, Epoch(1), [PREFILL, other])
        assert bench.credits() == [], "both still deliver"
        bench.landing.release(TID, Epoch(1), [other])
        assert len(bench.credits()) == len(slots), "as many for the other rank"
        assert "not lent to this writer" in bench.landing.fault(PREFILL, note, ALL)
        assert bench.landing.held(TID, Epoch(1)) == len(slots)
        bench.landing.release(TID, Epoch(1), [])
        bench.landing.close(TID, Epoch(1))
        assert bench.landing._ring.free == 4, "each slot comes back once"
    finally:
        bench.close()
        context.term()


def test_slots_come_back_with_the_end(bench: Bench) -> None:
    held = set(bench.credits())
    bench.landing.failed(TID, Epoch(1))
    assert bench.credits() == [], "the failed gets no more"
    bench.landing.close(TID, Epoch(1))
    bench.landing.open(bench.spec)
    assert set(bench.credits()) <= {0, 1, 2, 3} and len(held) == 2
    unknown = ExpectSpec(TID, RequestId("r"), Epoch(1), Incarnation("gone"), 0, (), (0, 0), ((0, 1),))
    assert bench.landing.writers(unknown) is None and bench.landing.payload_bytes(unknown, (2,)) == 0


def test_slots_stay_lent_until_a_cancel_is_answered(bench: Bench) -> None:
    """The writer has posted to them, and that may still land."""
    bench.credits()
    receiving = Receiving(ConnectorSettings(), Rank(1), bench.ours, bench.peers, lambda: 0.0)
    receiving.expected((bench.spec,), 0.0)
    assert len(bench.credits()) == 2
    receiving.abandoned((TID,), 0.0)
    assert receiving._landing._ring.free == 2
    receiving.answer_came(wire.Cancelled(THEM, Rank(0), TID, Epoch(1)), 1.0)
    assert receiving._landing._ring.free == 4
