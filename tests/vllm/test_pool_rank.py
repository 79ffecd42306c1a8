"""Stores and loads of a worker's loop, on a real node: mapped, and over data planes; and each thing that goes wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from lmkv import poolwire as pw
from lmkv.hashing import page_key
from lmkv.ids import Rank
from lmkv.pool.access import Reach
from lmkv.pool.node import PoolNode
from lmkv.transport import OpId
from lmkv.vllm.specs import LoadSpec, PageSource
from lmkv.wire import ProcessCard

from .pool_bed import CHUNK, HEADS, NAMESPACE, PAGE_BYTES, REQUEST, RankBed, running_node

IDS = [5, 2, 9, 1, 7, 3, 11, 4]
OTHER_IDS = [20, 21, 13, 14, 15, 16, 17, 18]
KEYS = 4
"""Chunks of eight blocks of 32 tokens."""


@pytest.fixture(params=["map", "tcp", "nixl", "nixl-read"])
def plane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def node(plane: str, tmp_path: Path) -> Iterator[PoolNode]:
    plane = plane.removesuffix("-read")
    if plane == "nixl":
        pytest.importorskip("nixl")
    more = {} if plane == "map" else {"share": "none", "transport": f"{plane}://"}
    with running_node(tmp_path, **more) as node:
        yield node


@pytest.fixture
def bed(plane: str, node: PoolNode) -> Iterator[RankBed]:
    scheme = plane.removesuffix("-read")
    more = {"remote_load": "read"} if plane.endswith("-read") else {}
    with RankBed(node, transport="" if plane == "map" else f"{scheme}://", **more) as bed:
        assert bed.access.reach is (Reach.LOCAL if plane == "map" else Reach.REMOTE)
        yield bed


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[RankBed]:
    with running_node(tmp_path) as node, RankBed(node) as bed:
        yield bed


def test_what_is_stored_is_loaded(bed: RankBed) -> None:
    keys = bed.keys(1, KEYS)
    bed.store(keys, IDS)
    assert bed.packed == [REQUEST]
    assert not torch.equal(bed.rows(IDS), bed.rows(OTHER_IDS))
    report = bed.load(keys, OTHER_IDS)
    assert (report.good, report.reason) == (KEYS * CHUNK, "")
    assert torch.equal(bed.rows(IDS), bed.rows(OTHER_IDS))
    assert bed.counters()["stored"] == KEYS


def test_more_pages_than_staging_holds(bed: RankBed) -> None:
    """Twenty pages of the same blocks, in order: the slots of staging are used again and again."""
    keys = bed.keys(2, 20)
    ids = (IDS + OTHER_IDS) * 2 + IDS
    bed.store(keys, ids)
    before = bed.rows(ids).clone()
    pinned = bed.pin(keys)
    assert len(pinned.pages) == 20
    bed.begin_load(bed.pages(keys, pinned), ids, (0, 20 * CHUNK))
    assert bed.report().good == 20 * CHUNK
    assert torch.equal(bed.rows(ids), before)


def test_cached_tokens_are_not_written(bed: RankBed) -> None:
    """The first block and a half chunk are here already (32 + 64 tokens): no block of theirs is touched."""
    keys = bed.keys(3, KEYS)
    bed.store(keys, IDS)
    pinned = bed.pin(keys)
    pages = bed.pages(keys, pinned)[1:]
    untouched = bed.rows(range(24)).clone()
    ids = [0, *OTHER_IDS[3:]]  # of chunk 1 the first block is cached
    spec_blocks = bed.blocks_for(ids, 2)

    bed.pool.load(
        [LoadSpec(REQUEST, NAMESPACE, (96, KEYS * CHUNK), spec_blocks, pages, time.monotonic() + 10)], time.monotonic()
    )
    assert bed.report().good == KEYS * CHUNK
    assert torch.equal(bed.rows(OTHER_IDS[3:]), bed.rows(IDS[3:]))
    kept = [i for i in range(24) if i not in OTHER_IDS[3:]]
    assert torch.equal(
        bed.rows(kept), untouched.reshape(untouched.shape[0], HEADS, 24, 32, -1)[:, :, kept].flatten(2, 3)
    )


def test_ranks_store_their_heads_and_others_load_all(tmp_path: Path) -> None:
    """Two ranks of one engine store; the page is there when both have; a rank with all heads loads it, checked."""
    with (
        running_node(tmp_path) as node,
        RankBed(node, heads=(0, 1), incarnation="00000000000000aa", seed=3) as first,
        RankBed(node, heads=(1, 2), incarnation="00000000000000aa", seed=4) as second,
        RankBed(node, block_tokens=64, blocks=12) as whole,
    ):
        keys = first.keys(1, KEYS)
        first.store(keys, IDS)
        assert not whole.pin(keys).pages, "half a page is visible"
        second.store(keys, IDS)
        report = whole.load(keys, [1, 2, 3, 4])
        assert report.good == KEYS * CHUNK
        rows = whole.rows([1, 2, 3, 4])
        assert torch.equal(rows[:, :1], first.rows(IDS)) and torch.equal(rows[:, 1:], second.rows(IDS))


def test_a_lease_that_is_over_is_a_miss(bed: RankBed) -> None:
    keys = bed.keys(4, KEYS)
    bed.store(keys, IDS)
    pages = bed.pages(keys, bed.pin(keys), lease_s=-0.001)
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK))
    report = bed.report()
    assert (report.good, report.reason, report.corrupt) == (0, "lease_expired", ())
    assert bed.counters()["load:lease_expired"] == 1


def test_an_overwritten_slot_is_a_miss(bed: RankBed) -> None:
    """The page was dropped, its slot has another page by now: nodes that push know, to readers the checksums tell."""
    keys, others = bed.keys(5, KEYS), bed.keys(6, KEYS)
    bed.store(keys, IDS)
    pinned = bed.pin(keys)
    pages = bed.pages(keys, pinned)
    bed.access.link.tell(pw.Unpin(pinned.lease))
    joined = b"".join(page_key(key, 0) for key in keys)
    assert bed.ask(lambda t: pw.Drop(t, NAMESPACE, joined), pw.Dropped).pages == KEYS
    bed.store(others, OTHER_IDS)
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK))
    report = bed.report()
    assert report.good == 0
    if report.reason == "corrupt":
        assert len(report.corrupt) >= 1
    else:
        assert report.reason == "read_failed" and bed.access.reach is Reach.REMOTE


@pytest.mark.parametrize("bad", [0, 2])
def test_a_flipped_bit_ends_the_load_there(mapped: RankBed, bad: int) -> None:
    keys = mapped.keys(7, KEYS)
    mapped.store(keys, IDS)
    pinned = mapped.pin(keys)
    page = mapped.access.view(pinned.pages[bad].offset, PAGE_BYTES)
    page[PAGE_BYTES // 2] ^= 4
    mapped.begin_load(mapped.pages(keys, pinned), OTHER_IDS, (0, KEYS * CHUNK))
    report = mapped.report()
    assert (report.good, report.reason) == (bad * CHUNK, "corrupt")
    assert torch.equal(mapped.rows(OTHER_IDS[: 2 * bad]), mapped.rows(IDS[: 2 * bad]))
    assert [source.chunk for source in report.corrupt] == [bad]


def test_what_was_overwritten_while_it_was_packed_is_not_kept(bed: RankBed) -> None:
    """The engine could wait no longer for the loop. Whatever the kernel has read by then gets no name."""
    keys = bed.keys(12, KEYS)
    bed.submit(keys, IDS).revoked = True
    bed.until(lambda: bed.packed == [REQUEST] and bed.pool.idle)
    assert bed.counters()["store:revoked"] == KEYS
    bed.until(lambda: stats(bed)["reserved"] == 0)
    assert not bed.pin(keys).pages


def test_without_a_node_nothing_is_held_up(mapped: RankBed) -> None:
    mapped.access._lose("for a test")
    mapped.submit(mapped.keys(8, KEYS), IDS)
    assert mapped.pool.take_packed() == [REQUEST]
    assert mapped.pool.idle
    assert mapped.counters()["store:no_node"] == KEYS


def test_blocks_that_are_wanted_are_not_read_any_more(mapped: RankBed) -> None:
    """Preempted between the question and the answer: nothing is stored, nothing stays reserved."""
    mapped.submit(mapped.keys(9, KEYS), IDS)
    mapped.pool.drop((REQUEST,), time.monotonic())
    mapped.until(lambda: mapped.packed == [REQUEST] and mapped.pool.idle)
    assert mapped.counters()["store:preempted"] == KEYS
    mapped.until(lambda: not mapped.pin(mapped.keys(9, KEYS)).pages and stats(mapped)["reserved"] == 0)
    assert stats(mapped)["quarantined_bytes"] == 0


def stats(bed: RankBed) -> dict[str, int]:

    told: dict[str, int] = json.loads(bed.ask(pw.Stats, pw.StatsAre).stats)
    return told


def test_a_cancelled_load_is_reported_once(bed: RankBed) -> None:
    keys = bed.keys(10, KEYS)
    bed.store(keys, IDS)
    bed.begin_load(bed.pages(keys, bed.pin(keys)), OTHER_IDS, (0, KEYS * CHUNK))
    bed.pool.cancel(REQUEST)
    report = bed.report()
    assert report.reason in ("", "cancelled")
    bed.until(lambda: not bed.pool.waiting)
    assert bed.pool.take_reports() == []


def test_a_load_from_a_node_that_is_gone(tmp_path: Path) -> None:
    with running_node(tmp_path) as node, RankBed(node) as bed:
        keys = bed.keys(11, KEYS)
        bed.store(keys, IDS)
        pages = bed.pages(keys, bed.pin(keys))
        node.stop()
        bed.until(lambda: not bed.pool.nodes())
        bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK))
        report = bed.report()
        assert (report.good, report.reason) == (0, "node_lost")


def test_a_full_node_is_no_error(tmp_path: Path) -> None:
    """Everything in it is pinned: what does not fit is dropped and counted."""
    with running_node(tmp_path, capacity="2MiB", pin_share=0.9) as node, RankBed(node) as bed:
        fits = (2 << 20) // (-(-PAGE_BYTES // 4096) * 4096)
        first = bed.keys(12, fits)
        bed.store(first, (IDS * 8)[: 2 * fits])
        assert bed.pin(first).pages
        bed.store(bed.keys(13, KEYS), IDS)
        counted = bed.counters()
        assert counted["store:full"] >= 1
        assert counted["stored"] + counted["store:full"] == fits + KEYS


def test_a_node_pushes_only_what_a_lease_holds(tmp_path: Path) -> None:
    """And only into registered memory of who asks."""
    with running_node(tmp_path, share="none", transport="tcp://") as node, RankBed(node, transport="tcp://") as bed:
        keys = bed.keys(14, 2)
        bed.store(keys, IDS[:4])
        pinned = bed.pin(keys)
        joined = b"".join(page_key(key, 0) for key in keys)
        staging = bed.pool.region.address

        def fetch(lease: int, addresses: tuple[int, ...], size: int = 64) -> str:
            answer = bed.ask(
                lambda t: pw.Fetch(t, bed.incarnation, Rank(0), lease, NAMESPACE, joined, 0, size, addresses),
                pw.Fetched,
            )
            return str(answer.error)

        assert fetch(pinned.lease, (staging, staging + 4096)) == ""
        assert "lease" in fetch(pinned.lease + 1, (staging, staging + 4096))
        assert "addresses" in fetch(pinned.lease, (staging,))
        assert "more than a page" in fetch(pinned.lease, (staging, staging + 4096), 1 << 30)
        assert fetch(pinned.lease, (4096, 8192)) != ""
        assert fetch(pinned.lease, (-1, staging)) != ""
        assert json.loads(bed.ask(pw.Stats, pw.StatsAre).stats)["counters"]["fetch:refused"] == 3


def test_a_node_that_dies_while_it_pushes_leaves_no_slot_behind(tmp_path: Path) -> None:
    with running_node(tmp_path, share="none", transport="tcp://") as node, RankBed(node, transport="tcp://") as bed:
        keys = bed.keys(15, KEYS)
        bed.store(keys, IDS)
        pages = bed.pages(keys, bed.pin(keys))
        node.stop()
        bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK), within_s=1.0)
        report = bed.report()
        assert report.good in (0, KEYS * CHUNK)
        bed.until(lambda: not bed.pool.nodes())
        bed.until(lambda: not bed.pool.waiting and bed.pool._staging.idle)


# --- what a node that is lost may still write to ---


@pytest.fixture(params=["nixl", "tcp"])
def pushed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RankBed, PoolNode, tuple[PageSource, ...]]]:
    """A node that has been asked to write pages, and neither writes them nor answers."""
    url = "nixl://?progress=event" if request.param == "nixl" else "tcp://"
    if request.param == "nixl":
        pytest.importorskip("nixl")
    with running_node(tmp_path, share="none", transport=url) as node, RankBed(node, transport=url) as bed:
        keys = bed.keys(21, KEYS)
        bed.store(keys, IDS)
        monkeypatch.setattr(node._pushing, "take", lambda *_: None)
        yield bed, node, bed.pages(keys, bed.pin(keys))


Pushed = tuple[RankBed, PoolNode, tuple[PageSource, ...]]


def lose(bed: RankBed) -> None:
    """Our connection to the node, as the data plane tells it."""
    access = bed.access
    assert access._peer is not None
    bed.transport.disconnect(access._peer)
    access.peer_lost(access._peer, "for a test")


def test_staging_stays_lent_to_a_node_that_may_still_write(pushed: Pushed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load is over at once. Where a lost connection is no fence, the node has to say that it does not write."""
    bed, node, pages = pushed
    fence = bed.transport.capabilities.loss_is_fence
    flying: list[tuple[int, ...]] = []
    monkeypatch.setattr(node._pushing, "recall", lambda incarnation, rank, tokens: flying.append(tokens) or tokens)
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK))
    bed.until(lambda: bool(bed.pool._loads._reads))  # type: ignore[union-attr]
    lose(bed)
    report = bed.report()
    assert (report.good, report.reason) == (0, "read_failed" if fence else "node_lost")
    assert bed.pool._staging.idle == fence and not bed.pool.waiting
    bed.until(lambda: bool(bed.pool.nodes()) and (fence or any(flying)))
    assert bed.pool._staging.idle == fence, "it is attached again, and still writes"
    assert bed.counters().get("load:staging_held", 0) == (0 if fence else KEYS)
    monkeypatch.undo()
    bed.until(lambda: bed.pool._staging.idle)
    assert bed.counters().get("load:staging_freed", 0) == (0 if fence else KEYS)
    assert bed.load(bed.keys(21, KEYS), OTHER_IDS).good == KEYS * CHUNK


def test_a_load_is_over_at_its_deadline_and_its_staging_is_not_free(pushed: Pushed) -> None:
    bed, node, pages = pushed
    node._pushing.recall = lambda incarnation, rank, tokens: tokens  # type: ignore[method-assign]
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK), within_s=0.3)
    report = bed.report()
    assert (report.good, report.reason) == (0, "late")
    assert not bed.pool.waiting and not bed.pool._staging.idle


def test_without_staging_loads_are_misses_and_stores_are_dropped(pushed: Pushed) -> None:
    bed, node, pages = pushed
    node._pushing.recall = lambda incarnation, rank, tokens: tokens  # type: ignore[method-assign]
    loads, staging = bed.pool._loads, bed.pool._staging
    assert loads is not None
    others = staging.take(staging.count - KEYS)
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK), within_s=0.3)
    assert bed.report().reason == "late"
    assert not staging.can_load(1)
    loads._held[OpId(-1)] = others  # as if the same had happened to them before
    began_s = time.monotonic()
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK), within_s=10.0)
    assert (bed.report().reason, time.monotonic() - began_s < 5.0) == ("no_staging", True)
    bed.submit(bed.keys(22, KEYS), IDS)
    bed.until(lambda: bed.packed[-1:] == [REQUEST] and bed.pool.idle and len(bed.packed) == 2)
    counted = bed.counters()
    assert (counted["store:late"], counted["load:staging_held"], counted["load:no_staging"]) == (KEYS, KEYS, 1)


def test_a_new_data_plane_frees_what_nodes_of_other_hosts_hold(pushed: Pushed) -> None:
    bed, node, pages = pushed
    node._pushing.recall = lambda incarnation, rank, tokens: tokens  # type: ignore[method-assign]
    far = ProcessCard("another host", "pid:[1]", 7, 7)
    access = bed.access
    assert access.card is not None
    access.card = msgspec.structs.replace(access.card, process=far)
    bed.begin_load(pages, OTHER_IDS, (0, KEYS * CHUNK), within_s=0.3)
    assert bed.report().reason == "late"
    node.stop()
    assert bed.pool.overdue(time.monotonic()) == []
    bed.pool._settings = bed.pool._settings.model_copy(update={"quarantine_s": 0.1})
    bed.until(lambda: bed.pool._staging.idle or bool(bed.pool.overdue(time.monotonic())))
    bed.pool.replaced(b"")
    bed.until(lambda: bed.pool._staging.idle)


def test_what_was_reserved_over_another_attachment_is_not_written(
    pushed: Pushed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node may have freed it when the connection was lost, and lent it to somebody else."""
    bed, _, _ = pushed
    stores = bed.pool._stores
    assert stores is not None
    with monkeypatch.context() as patch:
        patch.setattr(stores, "work", lambda now_s: None)
        bed.submit(bed.keys(23, KEYS), IDS)
        bed.until(lambda: bool(stores._ready))
        lose(bed)
        bed.until(lambda: bool(bed.pool.nodes()))
    bed.until(lambda: bed.pool.idle)
    assert bed.counters()["store:node_lost"] == KEYS
    bed.until(lambda: stats(bed)["reserved"] == 0)
    assert not bed.pin(bed.keys(23, KEYS)).pages
