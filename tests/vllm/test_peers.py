"""Meeting, losing and burying peers, on the in-process data plane and real mailboxes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lmkv import wire
from lmkv.ids import Incarnation, Rank
from lmkv.process import DRAIN_S, REMOTE_DRAIN_S, own_process
from lmkv.transport import (
    Extents,
    MemoryKind,
    OpId,
    PeerId,
)
from lmkv.vllm.departed import DEPARTED_S
from lmkv.vllm.pal import AGAIN_S, Loss

from .peers_bed import PEER, THEM, Bench, running_bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    with running_bench() as made:
        yield made


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


def test_a_lost_peer_that_cannot_be_connected_again_is_still_watched(bench: Bench) -> None:
    """Its blocks come back when it is proven dead, although its return has failed."""
    bench.unfenced()
    bench.peers.introduce(bench.introduction, bench.now_s)
    bench.run()
    bench.peers.dismiss(THEM, dead=False)
    worker = msgspec.structs.replace(bench.introduction.card.workers[0], export=b"junk")
    card = msgspec.structs.replace(bench.introduction.card, workers=(worker,))
    bench.peers.introduce(wire.Introduce(card, bench.own, 1), bench.now_s)
    assert "cannot connect" in bench.told()[-1]
    bench.peers.dismiss(THEM, dead=True)
    bench.run(AGAIN_S)
    bench.run(REMOTE_DRAIN_S)
    assert bench.gone == [(PEER, Loss.SILENT), (PEER, Loss.DEAD)]


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


def test_a_new_data_plane_is_told_to_our_engine_though_no_peer_is_left(bench: Bench) -> None:
    """The pool wanted it, say: engines that come later must not connect to the old one."""
    bench.peers.engine_address = bench.engine.address
    bench.peers.replaced(b"new")
    assert bench.engine.socket.poll(2000)
    assert [letter.message for letter in bench.engine.receive()] == [wire.Replaced(Rank(0), b"new")]
