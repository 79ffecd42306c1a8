"""Meeting, losing and burying peers, on the in-process data plane and real mailboxes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import zmq

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.transfer.events import Peer
from lmkv.transport import (
    Completion,
    Extents,
    MemoryKind,
    OpId,
    PeerId,
    PeerLost,
    Region,
    Transport,
    open_transport,
)
from lmkv.vllm.peers import DEPARTED_PROBE_S, Peers

THEM = Incarnation("them")
PEER = Peer(THEM, Rank(0))


class Side:
    """One transport with a registered scratch."""

    def __init__(self) -> None:
        self.transport: Transport = open_transport("inproc://", f"side-{secrets.token_hex(4)}")
        self.scratch = np.zeros(64, dtype=np.uint8)
        self.transport.register(Region(self.scratch.ctypes.data, 64, owner=self.scratch))

    @property
    def extents(self) -> Extents:
        return Extents.of((self.scratch.ctypes.data, 64))


class Bench:
    """Our Peers, the peer's transport and mailbox, our engine's mailbox, a clock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.ours, self.theirs = Side(), Side()
        self.engine, self.worker = Inbox(context, "tcp://127.0.0.1:0"), Inbox(context, "tcp://127.0.0.1:0")
        self.outbox = Outbox(context, watch=True)
        self.gone: list[tuple[Peer, bool]] = []
        self.now_s = 100.0
        settings = ConnectorSettings(lease_s=5, beat_s=1)
        self.peers = Peers(
            self.ours.transport,
            self.outbox,
            Rank(0),
            self.ours.extents,
            settings,
            lambda p, d: self.gone.append((p, d)),
        )
        card = wire.WorkerCard(
            Rank(0),
            self.worker.address,
            "inproc",
            self.theirs.transport.export(),
            "DRAM",
            (),
            self.theirs.scratch.ctypes.data,
            64,
        )
        engine = wire.EngineCard(EngineName("e"), THEM, "tcp://127.0.0.1:1", "prefill", {}, {}, (16,), (card,))
        self.own = wire.EngineCard(EngineName("o"), Incarnation("us"), self.engine.address, "decode", {}, {}, (16,), ())
        self.introduction = wire.Introduce(engine, self.own)

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass and both data planes work."""
        self.now_s += seconds
        for _ in range(20):
            for event in self.ours.transport.poll():
                match event:
                    case Completion(op, error):
                        self.ours.transport.release(op)
                        assert self.peers.completed(op, error, self.now_s)
                    case PeerLost(peer, reason):
                        self.peers.transport_lost(peer, reason)
            self.peers.tick(self.now_s)

    def told(self) -> list[str]:
        """The errors our engine was told of the peer ("" is: ready)."""
        assert self.engine.socket.poll(2000)
        letters = [letter.message for letter in self.engine.receive()]
        assert all(isinstance(m, wire.Introduced) and m.incarnation == THEM for m in letters)
        return [m.error for m in letters if isinstance(m, wire.Introduced)]

    def close(self) -> None:
        self.ours.transport.abort()
        self.theirs.transport.abort()
        for thing in (self.outbox, self.engine, self.worker):
            thing.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Bench(context)
    yield made
    made.close()
    context.term()


def test_introduced_warmed_and_beating(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and pal.ready and bench.told() == [""]
    assert bench.worker.socket.poll(2000)
    assert isinstance(bench.worker.receive()[0].message, wire.Beat)
    assert bench.peers.peer_of(bench.theirs.transport.name) == PEER
    bench.peers.introduce(bench.introduction, bench.now_s)
    assert bench.told() == [""]


def test_a_peer_is_warmed_and_probed_in_its_kind_of_memory(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write of a kind between two ranks is what costs: with DRAM alone the first KV in VRAM would pay it."""
    engine = bench.introduction.card
    worker = msgspec.structs.replace(engine.workers[0], scratch_kind="VRAM", scratch_device=3)
    card = msgspec.structs.replace(engine, workers=(worker,))
    targets: list[Extents] = []
    write = bench.ours.transport.write

    def seen(peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        targets.append(remote)
        return write(peer, local, Extents.of((worker.scratch_address, 64)), note)

    monkeypatch.setattr(bench.ours.transport, "write", seen)
    bench.peers.introduce(wire.Introduce(card, bench.own), bench.now_s)
    bench.run()
    assert bench.told() == [""]
    (target,) = targets
    assert target.kind is MemoryKind.VRAM and target.table.tolist() == [[worker.scratch_address, 64, 3]]


@pytest.mark.parametrize(
    ("scratch", "said"),
    [
        ({"scratch_kind": "TAPE"}, "scratch lies in 'TAPE'"),
        ({"scratch_address": -1}, "scratch is at -1 on device 0"),
        ({"scratch_address": 1 << 70}, "scratch is at 1180591620717411303424"),
        ({"scratch_device": -2}, "on device -2"),
    ],
)
def test_a_peer_with_scratch_memory_that_cannot_be_is_refused(
    bench: Bench, scratch: dict[str, object], said: str
) -> None:
    engine = bench.introduction.card
    card = msgspec.structs.replace(engine, workers=(msgspec.structs.replace(engine.workers[0], **scratch),))
    bench.peers.introduce(wire.Introduce(card, bench.own), bench.now_s)
    (error,) = bench.told()
    assert "cannot connect to 'e'" in error and said in error


def test_silence_ends_a_pair_and_beats_keep_it(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    for _ in range(4):
        bench.run(3.0)
        assert bench.peers.heard(wire.Beat(THEM, Rank(0), 1.0), bench.now_s) == PEER
    assert bench.gone == []
    bench.run(6.0)
    assert bench.gone == [(PEER, False)] and bench.peers.find(PEER) is None
    told = bench.told()
    while not any("silent" in error for error in told):
        told += bench.told()


def test_a_dismissed_peer_is_probed_until_its_death_is_proven(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.peers.dismiss(THEM, dead=False)
    assert bench.gone == [(PEER, False)]
    bench.theirs.transport.abort()
    bench.run(DEPARTED_PROBE_S)
    bench.run(DEPARTED_PROBE_S)
    assert bench.gone == [(PEER, False), (PEER, True)]
    bench.run(DEPARTED_PROBE_S)
    assert len(bench.gone) == 2


def test_a_dismissed_peer_may_come_back(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.peers.dismiss(THEM, dead=False)
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and pal.ready


def test_death_is_told_once(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.worker.close()
    bench.theirs.transport.abort()
    for _ in range(100):
        bench.run(0.2)
        if bench.gone:
            break
    assert bench.gone == [(PEER, True)]
    bench.peers.dismiss(THEM, dead=True)
    assert len(bench.gone) == 1


def test_a_peer_that_cannot_be_connected_is_refused(bench: Bench) -> None:
    card = bench.introduction.card
    worker = wire.WorkerCard(Rank(0), "tcp://127.0.0.1:1", "inproc", b"junk", "DRAM", (), 1, 64)
    broken = wire.EngineCard(card.name, THEM, card.address, card.role, {}, {}, (16,), (worker,))
    bench.peers.introduce(wire.Introduce(broken, bench.own), bench.now_s)
    assert "cannot connect" in bench.told()[0]
