"""Engines that are a script: they speak the real wire (cards, mailboxes, a data plane), and then vanish without a word.

A ScriptedPeer pairs with an engine both ways, beats, is asked for KV and asks for KV, and ends without a goodbye in the
midst of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np
import zmq

from lmkv import wire
from lmkv.control.mailbox import Inbox, Outbox
from lmkv.ids import EngineName, Epoch, Incarnation, Rank, TransferId, make_incarnation, make_transfer_id
from lmkv.transport import Completion, Notification, OpId, PeerId, Region, open_transport

SCRATCH_BYTES = 4096
PATIENCE_S = 30.0
"""A peer that has not come to its end by then fails the run."""
START_S = 120.0
"""An engine says hello once it has read its weights."""
ALIVE = 8
"""So many are alive at a time; over NIXL one, as an agent takes longer to start than a silent peer's lease."""
BEAT_S = 0.2
AGAIN_S = 5.0
"""A peer that was not granted anything by then, because it was lost meanwhile, is asked for KV once more."""

Context = zmq.Context[zmq.Socket[bytes]]
Tell = Callable[[str, str, str], None]
"""(role, transfer id, address of the peer): a request reaches the engine."""


def new_transfer() -> TransferId:
    return make_transfer_id(time.time_ns() // 1_000_000, os.urandom(10))


def card_of(engine: str, context: Context) -> wire.EngineCard:
    """An engine's own card: it says hello to whom it is asked to meet."""
    inbox, outbox = Inbox(context, "tcp://127.0.0.1:0"), Outbox(context)
    try:
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:  # the endpoint hears from its start on, which is when the weights are read
            outbox.send(engine, wire.Meet(inbox.address, "card"))
            if inbox.socket.poll(1000):
                for letter in inbox.receive():
                    if isinstance(letter.message, wire.Hello):
                        return letter.message.card
        raise AssertionError(f"the engine at {engine} says no hello")
    finally:
        inbox.close()
        outbox.close()


class ScriptedPeer:
    """`step()` until `done`; then `vanish()`. `paired` tells that the engine had made a pair of it."""

    def __init__(self, context: Context, engine: wire.EngineCard, scheme: str, tell: Tell) -> None:
        self._engine = engine
        self._tell = tell
        self._until_s = time.monotonic() + PATIENCE_S
        self._inbox, self._outbox = Inbox(context, "tcp://127.0.0.1:0"), Outbox(context)
        self.incarnation: Incarnation = make_incarnation(os.urandom(8))
        self._transport = open_transport(scheme, f"scripted-{self.incarnation}")
        worker = engine.workers[0]
        self._memory = np.zeros(SCRATCH_BYTES + self._cache_bytes(worker), dtype=np.uint8)
        self._transport.register(Region(self._memory.ctypes.data, self._memory.nbytes, owner=self._memory))
        self.card = self._card(worker)
        self._worker = worker
        self._there: PeerId | None = None
        self._ops: set[OpId] = set()
        self._granted = False
        self._welcome = False
        self._greeted_s = self._beat_s = self._told_s = 0.0
        self.done = False

    @staticmethod
    def _cache_bytes(worker: wire.WorkerCard) -> int:
        return sum(layer.block_stride_bytes * layer.num_blocks for layer in worker.layers)

    def _card(self, worker: wire.WorkerCard) -> wire.EngineCard:
        """The engine's own, with other places: they are to be copies of each other."""
        base = self._memory.ctypes.data
        first = min(layer.address for layer in worker.layers)
        layers = tuple(
            msgspec.structs.replace(layer, address=base + SCRATCH_BYTES + layer.address - first)
            for layer in worker.layers
        )
        own = msgspec.structs.replace(
            worker,
            address=self._inbox.address,
            export=self._transport.export(),
            layers=layers,
            scratch_address=base,
            scratch_bytes=SCRATCH_BYTES,
            slots_address=0,
            slots=0,
        )
        return msgspec.structs.replace(
            self._engine,
            name=EngineName(f"scripted-{self.incarnation}"),
            incarnation=self.incarnation,
            address=self._inbox.address,
            workers=(own,),
        )

    @property
    def paired(self) -> bool:
        return self._welcome

    def step(self) -> None:
        now_s = time.monotonic()
        assert now_s < self._until_s, (
            f"a peer is not through after {PATIENCE_S} s: welcome {self._welcome}, granted {self._granted}"
        )
        if not self._welcome and now_s - self._greeted_s > 1.0:
            self._greeted_s = now_s
            self._outbox.send(self._engine.address, wire.Hello(self.card))
        if self._welcome and now_s - self._beat_s > BEAT_S:
            self._beat_s = now_s
            self._outbox.send(self._worker.address, wire.Beat(self.incarnation, Rank(0), now_s))
        if self._welcome and now_s - self._told_s > AGAIN_S:
            self._told_s = now_s
            self._tell("decode", new_transfer(), self.card.address)
        for event in self._transport.poll():
            if isinstance(event, Completion):
                self._transport.release(event.op)
                self._ops.discard(event.op)
            elif isinstance(event, Notification):
                self._confirm(wire.decode_note(event.payload))
        for letter in self._inbox.receive():
            self._take(letter.message)

    def _confirm(self, note: wire.Note) -> None:
        """Else our grants would not be served."""
        if isinstance(note, wire.WarmNote):
            told = wire.Warmed(self.incarnation, Rank(0), note.serial, 0)
            self._outbox.send(self._worker.address, told)

    def _take(self, message: wire.Control) -> None:
        worker = self._worker
        match message:
            case wire.Hello():  # it wants to pair as well
                self._outbox.send(self._engine.address, wire.Welcome(self.card))
            case wire.Welcome() if not self._welcome:
                self._welcome = True
                self._there = self._transport.connect(worker.export)
                self._ask()
            case wire.Refuse():
                raise AssertionError(f"the engine refuses: {message.reason}")
            case wire.Grant():
                self._granted = self.done = True

    def _ask(self) -> None:
        """As decode engines do: for what the engine computes, for what it has never heard of, and for nothing."""
        own, worker = self.incarnation, self._worker
        known, unknown = new_transfer(), new_transfer()
        self._tell("prefill", known, self.card.address)
        ids = tuple(range(1, 5))
        for tid in (known, unknown):
            grant = wire.Grant(own, tid, Epoch(1), 0, 64, (0,), (ids,), time.monotonic())
            self._outbox.send(worker.address, grant)
            self._outbox.send(worker.address, wire.Credit(own, Rank(0), tid, Epoch(1), (0, 1)))
        self._outbox.send(worker.address, wire.NotNeeded(own, new_transfer(), "scripted"))
        self._outbox.send(worker.address, wire.Cancel(own, Rank(0), new_transfer(), Epoch(1)))

    def vanish(self) -> None:
        """As a process does that is killed."""
        self._transport.abort()
        self._inbox.close()
        self._outbox.close()


def one_after_another(count: int, make: Callable[[], ScriptedPeer], most_alive: int = ALIVE) -> int:
    """Lets `count` peers come and vanish, a few alive at a time; returns how many were paired."""
    alive: list[ScriptedPeer] = []
    begun = paired = 0
    try:
        while begun < count or alive:
            if begun < count and len(alive) < most_alive:
                alive.append(make())
                begun += 1
            for peer in list(alive):
                peer.step()
                if peer.done:
                    paired += peer.paired
                    alive.remove(peer)
                    peer.vanish()
            if len(alive) == most_alive:
                time.sleep(0.001)
    finally:
        vanish_all(alive)
    return paired


def vanish_all(peers: Iterable[Any]) -> None:
    for peer in peers:
        peer.vanish()
