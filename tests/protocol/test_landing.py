"""Landing mode: routes between ranks, shares and slots, lanes, and the Sender's credits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.errors import LayoutError, TransferError
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.layout import Geometry, segments, vllm_cache
from lmkv.oracle import Place, convert
from lmkv.transfer import events as ev
from lmkv.transfer.fanout import Fan, transfer_of
from lmkv.transfer.landing import extents_into_slot, kernel_ids, share_of, slot_geometry
from lmkv.transfer.plan import KvMap
from lmkv.transfer.routes import engine_routes, routes
from lmkv.transfer.slots import FIRST, Borrower, SlotRing
from lmkv.wire import LayerCard, WorkerCard

from .driving import ALL, D, P, R, Run, T, U, grant, of, posts

# --- routes ---


def shard(first: int, heads: int, total: int) -> Geometry:
    return vllm_cache(
        "LBHNC", layers=2, blocks=4, heads=heads, block_tokens=16, parts=(8, 8), first_head=first, total_heads=total
    )


def split(ranks: int, total: int) -> list[Geometry]:
    if ranks <= total:
        each = total // ranks
        return [shard(r * each, each, total) for r in range(ranks)]
    return [shard(r * total // ranks, 1, total) for r in range(ranks)]


@pytest.mark.parametrize("prefill", [1, 2, 4, 8])
@pytest.mark.parametrize("decode", [1, 2, 4, 8])
@pytest.mark.parametrize("total", [1, 2, 4])
def test_every_decode_rank_gets_each_head_once(prefill: int, decode: int, total: int) -> None:
    sources, targets = split(prefill, total), split(decode, total)
    found = routes(sources, targets)
    for d, target in enumerate(targets):
        got = sorted(head for (_, to), (lo, hi) in found.items() if to == d for head in range(lo, hi))
        assert got == list(range(target.first_head, target.first_head + target.heads))
    for (p, _), (lo, hi) in found.items():
        assert sources[p].first_head <= lo < hi <= sources[p].first_head + sources[p].heads


def test_ranks_with_the_same_heads_share_the_work() -> None:
    assert {p for p, _ in routes(split(4, 1), split(4, 1))} == {0, 1, 2, 3}


def test_a_head_that_nobody_has_is_an_error() -> None:
    with pytest.raises(LayoutError, match="head 2"):
        routes([shard(0, 2, 4)], [shard(2, 2, 4)])


def test_groups_must_go_the_same_way() -> None:
    two = [[a, b] for a, b in zip(split(2, 4), split(2, 4), strict=True)]
    assert engine_routes(two, two)[Rank(1), Rank(1)] == ((2, 4), (2, 4))
    mixed = [[shard(0, 2, 4), shard(2, 2, 4)], [shard(2, 2, 4), shard(0, 2, 4)]]
    with pytest.raises(LayoutError, match="group 1"):
        engine_routes(mixed, two)


# --- what lies in a slot ---


@settings(max_examples=60, deadline=None)
@given(
    order=st.sampled_from(["LBHNC", "LBNHC", "BLHNC", "BLNHC"]),
    kernel_blocks=st.sampled_from([1, 2]),
    heads=st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda h: h[0] < h[1]),
    layers=st.sampled_from([(0, 1), (1, 3), (0, 3)]),
    ids=st.lists(st.integers(1, 7), min_size=1, max_size=4, unique=True),
)
def test_the_slot_holds_what_its_geometry_says(
    order: str, kernel_blocks: int, heads: tuple[int, int], layers: tuple[int, int], ids: list[int]
) -> None:
    """Bytes copied by the extents, read by slot_geometry, are the blocks' own numbers."""
    source = vllm_cache(order, layers=3, blocks=8 * kernel_blocks, heads=4, block_tokens=4, parts=(2, 2))
    memory = np.random.default_rng(0).integers(0, 256, source.span_bytes(), dtype=np.uint8)
    base, width = int(memory.ctypes.data), source.width
    block_bytes = 4 * 4 * 4 * width * kernel_blocks
    offsets = source.layer_offsets_bytes()
    stride = source.strides[1] * width * kernel_blocks
    if kernel_blocks > 1 and not order.startswith("LB"):
        return  # kernel blocks of one manager block lie side by side only where layers are outside of blocks
    cards = tuple(LayerCard(base + int(at), block_bytes, stride, 8, 0) for at in offsets)
    own = KvMap.from_card(WorkerCard(Rank(0), "", "", b"", "DRAM", cards, 0, 0))
    rect = ev.Rect(0, *layers, 0, len(ids))
    share = share_of(source, heads, 4 * kernel_blocks)
    slot = np.zeros(1 << 16, dtype=np.uint8)
    local, remote = extents_into_slot(own, share, rect, ids, int(slot.ctypes.data), slot.nbytes)
    assert local.total_bytes == share.rect_bytes(rect) == remote.total_bytes
    for (a, n, _), (b, _, _) in zip(local.table.tolist(), remote.table.tolist(), strict=True):
        slot[b - slot.ctypes.data : b - slot.ctypes.data + n] = memory[a - base : a - base + n]

    target = vllm_cache("LBHNC", layers=3, blocks=16, heads=4, block_tokens=8, parts=(2, 2))
    tokens = (0, len(ids) * 4 * kernel_blocks)
    blocks = np.arange(16)
    straight, through = (np.zeros(target.span_bytes(), dtype=np.uint8) for _ in range(2))
    table = segments(source, target, kernel_ids(ids, kernel_blocks), blocks, tokens)
    convert(Place.of(memory, source), Place.of(straight, target), table)
    there = slot_geometry(share, rect)
    table = segments(there, target, np.arange(there.blocks), blocks, tokens)
    convert(Place.of(slot, there), Place.of(through, target), table)
    lo, hi = heads if share.heads < 4 else (0, 4)
    shape = (3, 16, 4, 8, 4 * width)
    wanted, got = straight.reshape(shape), through.reshape(shape)
    assert np.array_equal(got[layers[0] : layers[1], :, lo:hi], wanted[layers[0] : layers[1], :, lo:hi])


def test_what_does_not_fit_into_a_slot_is_refused() -> None:
    source = vllm_cache("LBHNC", layers=1, blocks=8, heads=1, block_tokens=4, parts=(2, 2))
    own = KvMap.from_card(
        WorkerCard(
            Rank(0), "", "", b"", "DRAM", (LayerCard(4096, source.strides[1] * 2, source.strides[1] * 2, 8, 0),), 0, 0
        )
    )
    share = share_of(source, (0, 1), 4)
    with pytest.raises(TransferError, match="landing slot"):
        extents_into_slot(own, share, ev.Rect(0, 0, 1, 0, 2), [1, 2], 1 << 20, share.bytes)
    with pytest.raises(TransferError, match="needs blocks"):
        extents_into_slot(own, share, ev.Rect(0, 0, 1, 0, 1), [8], 1 << 20, 1 << 20)
    with pytest.raises(TransferError, match="needs blocks"):
        extents_into_slot(own, share, ev.Rect(0, 0, 1, 0, 1), [0], 1 << 20, 1 << 20)
    with pytest.raises(LayoutError, match="not among"):
        share_of(source, (0, 2), 4)
    with pytest.raises(LayoutError, match="kernel blocks"):
        share_of(source, (0, 1), 6)


def test_null_blocks_have_no_kernel_blocks() -> None:
    assert kernel_ids([3, 0], 2).tolist() == [6, 7, -1, -1]


# --- slots ---


def borrower(n: int) -> Borrower:
    return Borrower(ev.Peer(Incarnation("p"), Rank(n)), TransferId(f"t{n}"), Epoch(1))


def test_a_slot_comes_back_only_when_it_is_taken_out_or_closed() -> None:
    ring = SlotRing(6, 2)
    a, b = borrower(0), borrower(1)
    assert [loan.slots for loan in ring.open(a)] == [(0, 1)]
    assert [loan.slots for loan in ring.open(b)] == [(2,)] and ring.free == 3
    assert ring.taken_out(b, 0) == [], "not its own"
    assert [(loan.borrower, loan.slots) for loan in ring.taken_out(a, 0)] in ([(a, (3,))], [(b, (3,))])
    assert ring.close(a) and ring.held(a) == frozenset()


def test_the_failed_get_no_more() -> None:
    ring = SlotRing(4, 4)
    a = borrower(0)
    ring.open(a)
    ring.sated(a)
    assert ring.taken_out(a, 0) == [] and len(ring.held(a)) == 1


@settings(max_examples=100)
@given(
    st.integers(1, 6), st.integers(1, 4), st.lists(st.tuples(st.integers(0, 4), st.sampled_from("otsc")), max_size=60)
)
def test_slots_are_never_lent_twice_and_never_lost(count: int, per_writer: int, steps: list[tuple[int, str]]) -> None:
    ring, known = SlotRing(count, per_writer), {borrower(n) for n in range(5)}
    for n, what in steps:
        who = borrower(n)
        held = sorted(ring.held(who))
        match what:
            case "o":
                ring.open(who)
            case "t" if held:
                ring.taken_out(who, held[0])
            case "s":
                ring.sated(who)
            case "c":
                ring.close(who)
        lent = [slot for b in known for slot in ring.held(b)]
        assert len(lent) == len(set(lent)) and len(lent) + ring.free == count
        assert all(len(ring.held(b)) <= per_writer for b in known)


def test_idle_writers_hold_few() -> None:
    ring = SlotRing(64, 8)
    for n in range(5):
        ring.open(borrower(n))
    assert all(len(ring.held(borrower(n))) == FIRST for n in range(5))
    ring.taken_out(borrower(0), min(ring.held(borrower(0))))
    assert len(ring.held(borrower(0))) == 8


@settings(max_examples=50)
@given(st.integers(1, 40), st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_engines_that_are_lost_with_their_slots_leave_some_to_the_others(count: int, writers: list[int]) -> None:
    """Each takes what it can get, one engine after the other, and gives nothing back."""
    ring = SlotRing(count, 8)
    for engine, ranks in enumerate(writers):
        free = ring.free
        mine = [Borrower(ev.Peer(Incarnation(f"p{engine}"), Rank(rank)), T, Epoch(1)) for rank in range(ranks)]
        for one in mine:
            ring.open(one)
        for one in mine * 3:  # those that use their slots get more
            if held := ring.held(one):
                ring.taken_out(one, min(held))
        most = sum(len(ring.held(one)) for one in mine)
        assert min(free, 1) <= most <= -(-free // 2)


# --- lanes ---


def test_lanes_are_told_what_was_said_before() -> None:
    fan = Fan(T)
    assert fan.offer(R, P) == [ev.Offer(T, R, P)]
    assert fan.compute(ALL) == [ev.Computed(T, ALL)]
    assert fan.prompt_done() == [ev.PromptDone(T)]
    lane = TransferId(f"{T}@1")
    assert fan.open([Rank(0), Rank(1)]) == [ev.Offer(lane, R, P), ev.Computed(lane, ALL), ev.PromptDone(lane)]
    assert fan.open([Rank(0), Rank(1)]) == []
    assert fan.lane(Rank(0)) == T and fan.lane(Rank(1)) == lane and transfer_of(lane) == T
    assert fan.withdraw("x") == [ev.Withdraw(T, "x"), ev.Withdraw(lane, "x")]
    fan.ended.add(T)
    assert not fan.over
    fan.ended.add(lane)
    assert fan.over


def test_a_grant_before_the_offer_opens_all_lanes() -> None:
    fan = Fan(T)
    assert fan.open([Rank(2), Rank(3)]) == []
    assert [e.transfer_id for e in fan.offer(R, P) if isinstance(e, ev.Offer)] == [T, f"{T}@3"]
    fan.compute(ALL)
    assert fan.preempt() and fan.computed == [] and not fan.done


# --- the Sender's credits ---


def landing(epoch: int) -> ev.Granted:
    direct = grant(epoch)
    return ev.Granted(direct.peer, direct.transfer_id, direct.epoch, direct.blocks, P, slot_bytes=40)


def credit(*slots: int, epoch: int = 1) -> ev.Credited:
    return ev.Credited(D, T, Epoch(epoch), slots)


def slots_of(actions: list[ev.SenderAction]) -> list[int]:
    return [a.slot for a in of(ev.PostWrite, actions)]


def test_nothing_is_posted_without_a_slot() -> None:
    run = Run()
    assert posts(run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ALL), ev.PromptDone(T))) == []
    first = run.go(credit(5, 3))
    assert slots_of(first) == [5, 3] and of(ev.SendSeal, first) == []
    assert all(run.machine.limits.rect_bytes(rect) <= 40 for _, rect in posts(first))
    rest = run.go(credit(7), credit(5))
    assert slots_of(rest) == [7, 5] and len(of(ev.SendSeal, rest)) == 1


def test_a_prompt_without_slots_gives_way_to_one_whose_receiver_waits() -> None:
    """The other prompt cannot be computed while this one has its blocks, and may have the slots that this one lacks."""
    run = Run()
    run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ALL), ev.PromptDone(T))
    assert run.go(ev.Yield(T)) == [], "nobody waits for another prompt"
    run.go(grant(1, tid=U))
    actions = run.go(ev.Yield(T))
    assert [(a.outcome, a.reason) for a in of(ev.Finished, actions)] == [
        ("failed", "no landing slot came, and its blocks were wanted")
    ]
    assert len(of(ev.SendFailed, actions)) == 1, "its receiver computes the prompt itself"


def test_a_prompt_that_is_being_written_does_not_give_way() -> None:
    run = Run()
    run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ALL), ev.PromptDone(T), grant(1, tid=U))
    assert len(posts(run.go(credit(5)))) == 1
    assert run.go(ev.Yield(T)) == []


def test_credit_before_the_kv_waits_for_it() -> None:
    run = Run()
    assert slots_of(run.go(ev.Offer(T, R, P), landing(1), credit(1, 2, 3, 4))) == []
    assert slots_of(run.go(ev.Computed(T, ev.Rect(0, 0, 1, 0, 4)))) == [1]


def test_a_failed_write_is_repeated_into_its_slot() -> None:
    run = Run()
    actions = run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ALL), credit(9))
    assert slots_of(actions) == [9]
    assert slots_of(run.go(ev.WriteDone(T, 0, "error"))) == [9]


def test_credit_of_an_older_epoch_or_an_ended_transfer_is_nothing() -> None:
    run = Run()
    run.go(ev.Offer(T, R, P), landing(2), ev.Computed(T, ALL))
    assert run.go(credit(1, epoch=1)) == [] and run.machine.counters.stray == 1
    run.go(ev.CancelCame(D, T, Epoch(2)))
    assert run.go(credit(1, epoch=2)) == []


def test_a_new_epoch_starts_without_slots() -> None:
    run = Run()
    run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ev.Rect(0, 0, 1, 0, 4)), credit(1, 2))
    assert slots_of(run.go(landing(2))) == []
    assert slots_of(run.go(credit(4, epoch=2))) == [4]


def test_preempted_slots_are_used_again() -> None:
    run = Run()
    run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ev.Rect(0, 0, 1, 0, 4)), credit(1))
    run.go(ev.Computed(T, ev.Rect(0, 1, 2, 0, 4)), ev.Preempted(T))
    assert slots_of(run.go(credit(2), ev.Computed(T, ev.Rect(0, 1, 2, 0, 4)))) == [2]


def test_a_transfer_without_slots_holds_up_no_other() -> None:
    run = Run()
    other = TransferId("u" * 32)
    run.go(ev.Offer(T, R, P), landing(1), ev.Computed(T, ALL))
    actions = run.go(
        ev.Offer(other, RequestId("s"), P), grant(1, tid=other), ev.Computed(other, ev.Rect(0, 0, 1, 0, 4))
    )
    assert [a.transfer_id for a in of(ev.PostWrite, actions)] == [other]
    assert all(a < b for a, b in pairwise(seq for seq, _ in posts(actions)))
