"""Nodes that copy pages from each other: as a controller wishes, and for stores that are promised replicas."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmkv import poolwire as pw
from lmkv.pool.node import PoolNode
from lmkv.poolwire import Ack

from .bed import NodeThread
from .user import NAMESPACE, PoolUser, make_key

PAGE_BYTES = 64 << 10


@contextmanager
def running(tmp_path: Path, **more: Any) -> Iterator[PoolNode]:
    thread = NodeThread(tmp_path, capacity="8MiB", **more)
    try:
        yield thread.node
    finally:
        thread.end()


@pytest.mark.parametrize("plane", ["map", "tcp", "nixl"])
def test_hot_pages_are_copied(tmp_path: Path, plane: str) -> None:
    if plane == "nixl":
        pytest.importorskip("nixl")
    more = {} if plane == "map" else {"share": "none", "transport": f"{plane}://"}
    keys = [make_key(i) for i in range(40)]
    with running(tmp_path, **more) as source, running(tmp_path, transport=more.get("transport", "none")) as target:
        if plane == "map":
            with PoolUser(source.card.address, PAGE_BYTES, 1) as user:
                user.store(keys)
        else:
            remote_store(source, keys)
        with PoolUser(target.card.address, PAGE_BYTES, 2) as user:
            told = user.ask(lambda t: pw.Replicate(source.card, NAMESPACE, b"".join(keys), t), pw.Replicated, 20)
            assert isinstance(told, pw.Replicated) and told.pages == 40
            assert all(user.load(key, 0.0) for key in keys)
            again = user.ask(lambda t: pw.Replicate(source.card, NAMESPACE, b"".join(keys), t), pw.Replicated, 20)
            assert isinstance(again, pw.Replicated) and again.pages == 40


def remote_store(node: PoolNode, keys: list[bytes]) -> None:
    """By a client of another host: over the node's own data plane."""
    import numpy as np
    import zmq

    from lmkv.ids import Rank, make_incarnation
    from lmkv.pool.access import Me, NodeAccess
    from lmkv.transport import Completion, Extents, Region, open_transport

    from .user import MANIFEST, checksum, content

    incarnation = make_incarnation(secrets.token_bytes(8))
    transport = open_transport(f"{node.card.scheme}://", f"far-{incarnation}")
    data = np.concatenate([content(key, PAGE_BYTES) for key in keys])
    transport.register(Region(data.ctypes.data, data.nbytes, owner=data))
    context = zmq.Context()
    scratch = Extents.of((data.ctypes.data, 64))
    access = NodeAccess(context, node.card.address, Me(incarnation, Rank(0), "far", transport, scratch))
    access.declare(NAMESPACE, MANIFEST.description())
    done: list[object] = []

    def until(ready: object) -> None:
        end_s = time.monotonic() + 20
        while not ready():  # type: ignore[operator]
            access.tick(time.monotonic())
            for event in transport.poll():
                if isinstance(event, Completion):
                    transport.release(event.op)
                    if not access.completed(event.op, event.error):
                        assert event.error is None
                        done.append(event)
            assert time.monotonic() < end_s
            time.sleep(0.0005)

    answers: list[object] = []
    joined = b"".join(keys)
    until(lambda: access.ready)
    access.link.ask(
        lambda t: pw.Reserve(t, incarnation, Rank(0), NAMESPACE, joined, PAGE_BYTES, 1, 0),
        pw.Reserved,
        answers.append,
        time.monotonic() + 10,
    )
    until(lambda: answers)
    slots = answers.pop().slots  # type: ignore[attr-defined]
    # The first page was overwritten by nothing: scratch is only written to by a node's probes of a silent client.
    rows = [(slot.offset, PAGE_BYTES) for slot in slots]
    here = Extents.of(*((data.ctypes.data + i * PAGE_BYTES, PAGE_BYTES) for i in range(len(keys))))
    for i, key in enumerate(keys):
        data[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] = content(key, PAGE_BYTES)
    access.write(here, rows)
    until(lambda: done)
    sums = tuple((checksum(content(key, PAGE_BYTES)),) for key in keys)
    generations = tuple(slot.generation for slot in slots)
    access.link.ask(
        lambda t: pw.Commit(t, incarnation, Rank(0), NAMESPACE, joined, generations, 0, sums),
        pw.Committed,
        answers.append,
        time.monotonic() + 10,
    )
    until(lambda: answers)
    access.close()
    context.term()
    transport.abort()


def test_a_store_with_replicas_is_acknowledged_when_they_have_it(tmp_path: Path) -> None:
    with running(tmp_path) as other, running(tmp_path, replicas=other.card.address) as node:
        keys = [make_key(i) for i in range(10)]
        with PoolUser(node.card.address, PAGE_BYTES, 1) as user:
            assert set(user.store(keys, Ack.REPLICATED).values()) == {Ack.REPLICATED}
        with PoolUser(other.card.address, PAGE_BYTES, 2) as user:
            assert all(user.load(key, 0.0) for key in keys)


def test_a_store_whose_replica_is_away_is_volatile(tmp_path: Path) -> None:
    with running(tmp_path) as other:
        address = other.card.address
    with running(tmp_path, replicas=address) as node, PoolUser(node.card.address, PAGE_BYTES, 1) as user:
        keys = [make_key(i) for i in range(3)]
        slots = user.reserve(keys).slots
        sums = [user.fill(key, slot.offset) for key, slot in zip(keys, slots, strict=True)]
        user.wait_s = 1.0
        assert user.commit(keys, slots, sums, Ack.REPLICATED).reached is Ack.VOLATILE
        assert all(user.load(key, 0.0) for key in keys)


def test_a_source_that_is_gone_gives_nothing(tmp_path: Path) -> None:
    keys = [make_key(i) for i in range(5)]
    with running(tmp_path) as source, PoolUser(source.card.address, PAGE_BYTES, 1) as user:
        user.store(keys)
    with running(tmp_path) as target, PoolUser(target.card.address, PAGE_BYTES, 2) as user:
        told = user.ask(lambda t: pw.Replicate(source.card, NAMESPACE, b"".join(keys), t), pw.Replicated, 60)
        assert isinstance(told, pw.Replicated) and told.pages == 0
        assert not user.load(keys[0], 0.0)


@pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd here: apt-get install etcd-server")
def test_a_node_registers_with_etcd(tmp_path: Path) -> None:
    from lmkv.control.etcd import EtcdMembership
    from tests.ports import free_port

    port, peer = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        "etcd",
        "--data-dir",
        str(tmp_path / "etcd"),
        "--listen-client-urls",
        url,
        "--advertise-client-urls",
        url,
    ]
    command += ["--listen-peer-urls", f"http://127.0.0.1:{peer}"]
    etcd = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    watch = EtcdMembership(url, "/lmkv/nodes")
    try:
        watch.watch()

        def seen(count: int) -> None:
            until_s = time.monotonic() + 30
            while len(watch.cards()) != count:
                assert time.monotonic() < until_s, f"{watch.cards()}"
                time.sleep(0.05)

        with running(tmp_path, etcd=url) as node:
            seen(1)
            assert watch.cards()[0] == node.card
        seen(0)
    finally:
        watch.close()
        etcd.terminate()
        etcd.wait(20)
