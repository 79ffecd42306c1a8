"""Meeting, losing and burying peers, on the in-process data plane and real mailboxes."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.process import DRAIN_S, REMOTE_DRAIN_S, own_process
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
from lmkv.vllm.pal import Loss
from lmkv.vllm.peers import AGAIN_S, DEPARTED_S, Peers

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
        self.gone: list[tuple[Peer, Loss]] = []
        self.now_s = 100.0
        self.holding = True
        settings = ConnectorSettings(lease_s=5, beat_s=1)
        self.peers = Peers(
            self.ours.transport,
            self.outbox,
            Rank(0),
            self.ours.extents,
            settings,
            lambda p, d: self.gone.append((p, d)),
            lambda peer: self.holding,
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

    def unfenced(self, process: wire.ProcessCard | None = None, worker_address: str = "") -> None:
        """As over NIXL: PeerLost says nothing of what the peer may still write. The peer is `process`."""
        transport = self.ours.transport
        transport.capabilities = replace(transport.capabilities, loss_is_fence=False)  # type: ignore[misc]
        card = self.introduction.card
        worker = msgspec.structs.replace(
            card.workers[0],
            process=process or wire.ProcessCard("another host", "pid:[1]", 7, 7),
            address=worker_address or card.workers[0].address,
        )
        self.introduction = wire.Introduce(msgspec.structs.replace(card, workers=(worker,)), self.own)

    def successor(self, **changes: object) -> wire.Introduce:
        """Another incarnation at the same address, whose data plane cannot be reached."""
        card = self.introduction.card
        worker = card.workers[0]
        process = msgspec.structs.replace(worker.process, **changes)
        worker = msgspec.structs.replace(worker, process=process, export=b"junk")
        return wire.Introduce(
            msgspec.structs.replace(card, incarnation=Incarnation("new"), workers=(worker,)), self.own
        )

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
    assert bench.gone == [(PEER, Loss.SILENT)] and bench.peers.find(PEER) is None
    told = bench.told()
    while not any("silent" in error for error in told):
        told += bench.told()


def test_a_dismissed_peer_is_probed_until_it_is_fenced(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.peers.dismiss(THEM, dead=False)
    assert bench.gone == [(PEER, Loss.SILENT)]
    bench.theirs.transport.abort()
    bench.run(AGAIN_S)
    bench.run(AGAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT), (PEER, Loss.FENCED)]
    bench.run(AGAIN_S)
    assert len(bench.gone) == 2


def test_a_dismissed_peer_may_come_back(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.peers.dismiss(THEM, dead=False)
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and pal.ready


def test_a_loss_is_told_once(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.worker.close()
    bench.theirs.transport.abort()
    for _ in range(100):
        bench.run(0.2)
        if bench.gone:
            break
    assert bench.gone == [(PEER, Loss.FENCED)]
    bench.peers.dismiss(THEM, dead=True)
    assert len(bench.gone) == 1


def test_a_peer_that_cannot_be_connected_is_refused(bench: Bench) -> None:
    card = bench.introduction.card
    worker = wire.WorkerCard(Rank(0), "tcp://127.0.0.1:1", "inproc", b"junk", "DRAM", (), 1, 64)
    broken = wire.EngineCard(card.name, THEM, card.address, card.role, {}, {}, (16,), (worker,))
    bench.peers.introduce(wire.Introduce(broken, bench.own), bench.now_s)
    assert "cannot connect" in bench.told()[0]


# --- what proves a death, and what does not ---


def test_a_lost_connection_proves_nothing_and_is_never_forgotten_while_it_matters(bench: Bench) -> None:
    bench.unfenced()
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.theirs.transport.abort()
    bench.peers.transport_lost(bench.theirs.transport.name, "reset")
    assert bench.gone == [(PEER, Loss.SILENT)]
    for _ in range(30):
        bench.run(DEPARTED_S / 10)
    assert bench.gone == [(PEER, Loss.SILENT)], "no timer frees what it may still write"
    assert bench.peers.overdue(bench.now_s) == [PEER]
    bench.holding = False
    bench.run(1.0)
    bench.holding = True
    assert bench.peers.overdue(bench.now_s) == [], "forgotten once it holds nothing"


def test_the_end_of_a_process_on_this_host_is_seen(bench: Bench) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        started = int(Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[19])
        bench.unfenced(msgspec.structs.replace(own_process(), pid=running.pid, started=started))
        bench.peers.introduce(bench.introduction, bench.now_s)
        bench.run()
        bench.peers.dismiss(THEM, dead=False)
        bench.run(AGAIN_S)
        bench.run(AGAIN_S)
        assert bench.gone == [(PEER, Loss.SILENT)], "it runs"
        running.kill()
    bench.run(AGAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT)], "what it had sent is given time to drain"
    bench.run(DRAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT), (PEER, Loss.DEAD)]


def test_the_control_planes_word_is_a_proof(bench: Bench) -> None:
    """Said of a peer that was lost before, of another host: what its kernel may still send gets time to come."""
    bench.unfenced()
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.run(6.0)
    assert bench.gone == [(PEER, Loss.SILENT)]
    bench.peers.dismiss(Incarnation("another"), dead=True)
    bench.run(REMOTE_DRAIN_S + 2 * AGAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT)]
    bench.peers.dismiss(THEM, dead=True)
    bench.run(AGAIN_S)
    bench.run(REMOTE_DRAIN_S - AGAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT)]
    bench.run(AGAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT), (PEER, Loss.DEAD)]


def test_a_peer_whose_first_write_has_failed_is_written_to_again(bench: Bench) -> None:
    bench.ours.transport.faults.fail_next = 1
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and not pal.ready
    bench.run(AGAIN_S)
    assert pal.ready and bench.told() == [""]


def test_another_process_at_its_address_on_its_host_is_a_proof(bench: Bench) -> None:
    bench.unfenced()
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.peers.dismiss(THEM, dead=False)
    for same in ({}, {"host": "a third host", "pid": 8}, {"namespace": "pid:[2]", "pid": 8}):
        bench.peers.introduce(bench.successor(**same), bench.now_s)
        bench.run(REMOTE_DRAIN_S)
        assert bench.gone == [(PEER, Loss.SILENT)], same
    bench.peers.introduce(bench.successor(pid=8), bench.now_s)
    bench.run(REMOTE_DRAIN_S / 2)
    assert bench.gone == [(PEER, Loss.SILENT)], "its kernel may still send"
    bench.run(REMOTE_DRAIN_S / 2)
    assert bench.gone == [(PEER, Loss.SILENT), (PEER, Loss.DEAD)]


def test_a_peer_that_was_cut_off_is_connected_anew(bench: Bench) -> None:
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.unfenced()
    bench.peers.introduce(bench.introduction, bench.now_s)  # its card has changed: parted and connected again
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and pal.ready and bench.gone == [(PEER, Loss.SILENT)]
    assert bench.peers.pair_of(THEM) == 0
    bench.peers.introduce(msgspec.structs.replace(bench.introduction, pair=4), bench.now_s)
    bench.run()
    pal = bench.peers.find(PEER)
    assert pal is not None and pal.ready and bench.peers.pair_of(THEM) == 4


@pytest.mark.parametrize("near", [False, True])
def test_a_new_data_plane_fences_all_but_processes_of_this_host(bench: Bench, near: bool) -> None:
    """CMA and CUDA IPC need no connection: such a peer must end, or answer."""
    bench.unfenced(own_process() if near else None)
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.told()
    bench.peers.dismiss(THEM, dead=False)
    bench.now_s += 601
    assert bench.peers.overdue(bench.now_s) == ([] if near else [PEER])
    bench.peers.replaced(b"new")
    assert bench.gone == [(PEER, Loss.SILENT), (PEER, Loss.SILENT if near else Loss.FENCED)]
    assert bench.engine.socket.poll(2000)
    assert [letter.message for letter in bench.engine.receive()] == [wire.Replaced(Rank(0), b"new")]
