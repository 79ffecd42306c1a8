"""How a node takes the loss of its clients, on a data plane that closes both directions and on one that does not."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from lmkv.ids import Incarnation, Rank
from lmkv.pool.clients import DRAIN_TICKS, LOOK_EVERY_S, Clients
from lmkv.pool.index import Writer
from lmkv.poolwire import PoolHello
from lmkv.process import DRAIN_S, own_process
from lmkv.transport import Completion, PeerId, PeerLost, Region
from lmkv.transport.inproc import InprocTransport
from lmkv.wire import ProcessCard

WHO = (Incarnation("c" * 16), Rank(0))
FAR = ProcessCard("another host", "pid:[1]", 7, 7)
CONTAINER = msgspec.structs.replace(own_process(), namespace="pid:[1]")
SILENT_S, QUARANTINE_S = 5.0, 60.0
TICK_S = 0.25


class Bench:
    """The node's side of one client, which holds slots if `holds`."""

    def __init__(self) -> None:
        self.plane = InprocTransport(f"node-{secrets.token_hex(4)}")
        self.gone: list[tuple[Writer, bool]] = []
        self.holds = True
        self.now_s = 100.0
        self.clients = Clients(
            self.plane,
            SILENT_S,
            lambda writer, is_dead: self.gone.append((writer, is_dead)),
            lambda writer: self.holds,
            QUARANTINE_S,
        )
        self.memory = np.zeros(4096, dtype=np.uint8)
        self.theirs = self.new_plane()

    def unfenced(self) -> None:
        """As NIXL."""
        self.plane.capabilities = replace(self.plane.capabilities, loss_is_fence=False)  # type: ignore[misc]

    def new_plane(self) -> InprocTransport:
        """Of the client."""
        plane = InprocTransport(f"client-{secrets.token_hex(4)}")
        plane.register(Region(self.memory.ctypes.data, 4096, owner=self.memory))
        return plane

    def hello(self, process: ProcessCard | None = None) -> str:
        card = own_process() if process is None else process
        hello = PoolHello(1, *WHO, "c", self.theirs.export(), self.memory.ctypes.data, 64, process=card)
        return self.clients.hello(hello, self.now_s)

    def run(self, seconds: float = 0.0) -> None:
        end_s = self.now_s + seconds
        while True:
            for event in self.plane.poll():
                match event:
                    case Completion(op, error):
                        self.plane.release(op)
                        self.clients.completed(op, error)
                    case PeerLost(peer, reason):
                        self.clients.lost(peer, reason)
            self.clients.tick(self.now_s)
            if self.now_s >= end_s:
                return
            self.now_s += TICK_S

    @property
    def peer(self) -> PeerId | None:
        found = self.clients.find(*WHO)
        return found.transport_id if found is not None else None

    def lose(self) -> None:
        self.theirs.faults.dead = True
        self.run(1.0)

    def close(self) -> None:
        self.theirs.abort()
        self.plane.abort()


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = Bench()
    yield found
    found.close()


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], ProcessCard]]:
    say = "from lmkv.process import own_process; print(own_process().started, flush=True); input()"
    running = subprocess.Popen([sys.executable, "-c", say], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdin is not None
    yield running, msgspec.structs.replace(own_process(), pid=running.pid, started=int(running.stdout.readline()))
    running.kill()
    running.communicate()


def test_a_connection_closed_both_ways_is_the_clients_end(bench: Bench) -> None:
    assert bench.hello() == ""
    bench.run(1.0)
    bench.lose()
    assert bench.gone == [(WHO, True)] and bench.clients.find(*WHO) is None


@pytest.mark.parametrize("process", [None, FAR, CONTAINER, ProcessCard()])
def test_a_lost_connection_proves_nothing(bench: Bench, process: ProcessCard | None) -> None:
    bench.unfenced()
    assert bench.hello(process) == ""
    bench.lose()
    assert bench.peer is None and not bench.clients.can_write(WHO)
    assert [how for name, how in bench.clients.names().items() if WHO[0] in name] == ["lost"]
    bench.run(QUARANTINE_S / 2)
    assert bench.gone == [] and bench.clients.find(*WHO) is not None


def test_a_client_that_lost_its_connection_is_connected_anew(bench: Bench) -> None:
    bench.unfenced()
    bench.hello()
    before = bench.peer
    bench.lose()
    bench.theirs.faults.dead = False
    assert bench.hello() == "" and bench.peer == before and bench.clients.can_write(WHO)
    assert bench.gone == []


def test_a_client_with_another_data_plane_is_connected_to_that(bench: Bench) -> None:
    bench.unfenced()
    bench.hello()
    bench.run(1.0)
    old, bench.theirs = bench.theirs, bench.new_plane()
    assert bench.hello() == "" and bench.peer == bench.theirs.name
    bench.run(1.0)
    assert bench.clients.remote == 1, "the old connection is left"
    old.abort()
    bench.run(1.0)
    assert bench.peer == bench.theirs.name and bench.gone == []


def test_a_process_that_has_ended_is_proof_once_its_bytes_are_read(bench: Bench, child: Any) -> None:
    running, card = child
    bench.unfenced()
    bench.hello(card)
    bench.lose()
    bench.run(3 * LOOK_EVERY_S)
    assert bench.gone == []
    running.kill()
    running.wait()
    bench.run(LOOK_EVERY_S)
    assert bench.gone == [], "what it had sent is still to be read"
    bench.run(max(DRAIN_S, DRAIN_TICKS * TICK_S))
    assert bench.gone == [(WHO, True)] and bench.clients.find(*WHO) is None


def test_the_end_of_a_silent_clients_process_is_seen_although_its_connection_is_not_lost(
    bench: Bench, child: Any
) -> None:
    running, card = child
    bench.unfenced()
    bench.hello(card)
    running.kill()
    running.wait()
    bench.run(10.0)
    assert bench.gone == [(WHO, True)] and bench.clients.remote == 0


def test_a_mapping_that_is_given_up_proves_nothing_of_the_data_plane(bench: Bench) -> None:
    class Share:
        def close(self) -> None: ...

        def recv(self, size: int, /) -> bytes:
            return b""

    bench.unfenced()
    bench.hello()
    share = Share()
    bench.clients.shared(WHO, share, bench.now_s)
    bench.lose()
    bench.clients.share_ended(WHO, share)
    assert bench.gone == []


def test_a_lost_client_without_slots_is_forgotten(bench: Bench) -> None:
    bench.unfenced()
    bench.holds = False
    bench.hello(FAR)
    bench.lose()
    bench.run(SILENT_S)
    assert bench.clients.find(*WHO) is None and bench.gone == []


@pytest.mark.parametrize("process", [FAR, CONTAINER, None, ProcessCard()])
@pytest.mark.parametrize("is_lost", [True, False])
def test_a_new_data_plane_fences_other_hosts_only(bench: Bench, process: ProcessCard | None, is_lost: bool) -> None:
    far = process is FAR
    bench.unfenced()
    bench.hello(process)
    if is_lost:
        bench.lose()
    bench.run(QUARANTINE_S / 2)
    assert bench.clients.overdue(bench.now_s) == []
    bench.run(QUARANTINE_S)
    assert bench.clients.overdue(bench.now_s) == ([WHO] if far else [])
    bench.holds = False
    assert bench.clients.overdue(bench.now_s) == []
    bench.holds = True
    bench.clients.replaced(b"")
    assert bench.gone == ([(WHO, False)] if far else []) and bench.peer is None
    assert bench.clients.overdue(bench.now_s) == []
    bench.run(QUARANTINE_S)
    assert (bench.clients.find(*WHO) is None) == far


def test_who_is_heard_is_not_overdue(bench: Bench) -> None:
    bench.unfenced()
    bench.hello(FAR)
    bench.run(2 * QUARANTINE_S)
    bench.hello(FAR)
    assert bench.clients.overdue(bench.now_s) == []
