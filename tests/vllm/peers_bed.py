"""A worker's Peers with one real peer: its data plane, its mailbox, and our engine's; time is the test's."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import numpy as np
import zmq

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.transfer.events import Peer
from lmkv.transport import (
    Completion,
    Extents,
    PeerLost,
    Region,
    Transport,
    open_transport,
)
from lmkv.vllm.pal import Loss
from lmkv.vllm.peers import Peers

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


@contextlib.contextmanager
def running_bench() -> Iterator[Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Bench(context)
    yield made
    made.close()
    context.term()
