"""Lookups of the scheduler process: at the host's node, at others, with a controller; and what is held by them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lmkv import poolwire as pw
from lmkv.config import ConnectorSettings
from lmkv.control.controller import Controller, ControllerSettings
from lmkv.ids import Incarnation
from lmkv.pool.node import PoolNode
from lmkv.pool.serve import open_tiers
from lmkv.vllm.pooled.lookup import Lookup, Lookups

from .pool_bed import CHUNK, MANIFEST, NAMESPACE, RankBed, running_node

IDS = [5, 2, 9, 1, 7, 3, 11, 4]
CHUNKS = 4


@contextmanager
def lookups(*nodes: PoolNode, usable: dict[Incarnation, bool], **settings: object) -> Iterator[Lookups]:
    own = ConnectorSettings(
        pool=tuple(node.card.address for node in nodes), chunk_tokens=CHUNK, **{"lookup_ms": 500.0, **settings}
    )
    found = Lookups(own, 1, "test")
    found.declare(NAMESPACE, MANIFEST.description())
    found.usable(usable)
    found.start(Incarnation("00000000000000bb"))
    try:
        yield found
    finally:
        found.close()


def settled(lookups: Lookups, keys: list[bytes], ready: Callable[[Lookup], bool] = lambda lookup: True) -> Lookup:
    """The first lookup that finds its nodes attached, and satisfies `ready`."""
    until_s = time.monotonic() + 20
    while True:
        lookup = lookups.seek(NAMESPACE, keys)
        assert lookup.done.wait(10)
        if lookup.why != "no_node" and ready(lookup):
            return lookup
        lookups.release(lookup.leases)
        assert time.monotonic() < until_s, lookup
        time.sleep(0.02)


def leases_of(bed: RankBed) -> int:
    told: dict[str, int] = json.loads(bed.ask(pw.Stats, pw.StatsAre).stats)
    return told["leases"]


def test_a_pin_is_the_lookup(tmp_path: Path) -> None:
    with running_node(tmp_path) as node, RankBed(node) as bed:
        keys = bed.keys(1, CHUNKS + 2)
        bed.store(keys[:CHUNKS], IDS)
        with lookups(node, usable={node.card.incarnation: True}) as found:
            lookup = settled(found, keys)
            assert (lookup.chunks, lookup.why, lookup.below) == (CHUNKS, "", 0)
            assert [page.chunk for page in lookup.pages] == list(range(CHUNKS))
            assert leases_of(bed) == 1
            found.release(lookup.leases)
            bed.until(lambda: leases_of(bed) == 0)


def test_nodes_that_the_ranks_do_not_have_are_not_asked(tmp_path: Path) -> None:
    with running_node(tmp_path) as node, RankBed(node) as bed:
        keys = bed.keys(1, CHUNKS)
        bed.store(keys, IDS)
        with lookups(node, usable={}) as found:
            assert not found.reachable
            lookup = found.seek(NAMESPACE, keys)
            assert lookup.done.wait(5)
            assert (lookup.chunks, lookup.why) == (0, "no_node")


def test_a_lookup_that_nobody_waits_for_holds_nothing(tmp_path: Path) -> None:
    with running_node(tmp_path) as node, RankBed(node) as bed:
        keys = bed.keys(1, CHUNKS)
        bed.store(keys, IDS)
        with lookups(node, usable={node.card.incarnation: True}) as found:
            found.release(settled(found, keys).leases)
            for _ in range(20):
                found.abandon(found.seek(NAMESPACE, keys))
            bed.until(lambda: leases_of(bed) == 0)


def test_time_is_over_before_the_node_answers(tmp_path: Path) -> None:
    with running_node(tmp_path) as node, RankBed(node) as bed:
        keys = bed.keys(1, CHUNKS)
        bed.store(keys, IDS)
        with lookups(node, usable={node.card.incarnation: True}, lookup_ms=0.001) as found:
            lookup = settled(found, keys, lambda lookup: lookup.why == "late")
            assert lookup.chunks == 0
            bed.until(lambda: leases_of(bed) == 0)


def test_what_the_own_node_lacks_comes_from_others(tmp_path: Path) -> None:
    """The own node has two chunks, each of the others all eight: these share the other six."""
    with ExitStack() as stack:
        nodes = [stack.enter_context(running_node(tmp_path)) for _ in range(3)]
        beds = [stack.enter_context(RankBed(node)) for node in nodes]
        keys = beds[0].keys(1, 8)
        beds[0].store(keys[:2], IDS)
        for bed in beds[1:]:
            bed.store(keys, IDS * 2)
        usable = {node.card.incarnation: node is nodes[0] for node in nodes}
        found = stack.enter_context(lookups(*nodes, usable=usable))
        lookup = settled(found, keys, lambda lookup: len({page.node for page in lookup.pages}) == 3)
        assert [page.chunk for page in lookup.pages] == list(range(8))
        by_node = [sum(page.node == node.card.incarnation for page in lookup.pages) for node in nodes]
        assert by_node == [2, 3, 3]
        found.release(lookup.leases)
        for bed in beds:
            bed.until(lambda bed=bed: leases_of(bed) == 0)  # type: ignore[misc]


def test_a_controller_tells_who_has_it(tmp_path: Path) -> None:
    controller = Controller(ControllerSettings("tcp://127.0.0.1:0"))
    thread = threading.Thread(target=controller.run)
    thread.start()
    try:
        with ExitStack() as stack:
            nodes = [stack.enter_context(running_node(tmp_path, controller=controller.address)) for _ in range(2)]
            beds = [stack.enter_context(RankBed(node)) for node in nodes]
            keys = beds[0].keys(1, 8)
            beds[0].store(keys[:2], IDS)
            beds[1].store(keys, IDS * 2)
            usable = {node.card.incarnation: node is nodes[0] for node in nodes}
            found = stack.enter_context(lookups(usable=usable, controller=(controller.address,)))
            lookup = settled(found, keys, lambda lookup: lookup.chunks == 8)
            assert [page.node == nodes[0].card.incarnation for page in lookup.pages] == [True] * 2 + [False] * 6
            assert lookup.extended
    finally:
        controller.stop()
        thread.join(10)
        controller.close()


def test_pages_below_are_told_of_and_come_up_when_waited_for(tmp_path: Path) -> None:
    more = {"disk": str(tmp_path / "disk"), "disk_capacity": "64MiB"}
    with running_node(tmp_path, tiers=open_tiers, **more) as node, RankBed(node) as bed:
        keys = bed.keys(1, CHUNKS)
        bed.store(keys, IDS)
        bed.until(lambda: bed.ask(lambda t: pw.Demote(t, NAMESPACE), pw.Dropped).pages >= 0 and below(bed))
        with lookups(node, usable={node.card.incarnation: True}) as found:
            lookup = settled(found, keys)
            assert (lookup.chunks, lookup.below) == (0, CHUNKS) and lookup.below_s > 0
            waited = found.seek(NAMESPACE, keys, wait_s=10.0)
            assert waited.done.wait(15)
            assert waited.chunks == CHUNKS


def below(bed: RankBed) -> bool:
    """No page is in memory any more."""
    answer = bed.ask(lambda t: pw.ListKeys(t, NAMESPACE, b"", 100), pw.Keys)
    tiers = [answer.records[i] for i in range(pw.EVENT_BYTES - 1, len(answer.records), pw.EVENT_BYTES)]
    return bool(tiers) and all(tier == pw.Tier.DISK for tier in tiers)
