"""A node that speaks the real protocol over real sockets, in a thread, with pages that are only names.

node = FakeNode([controller]); node.put({key: tiers}); …; node.close()
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import zmq

from lmkv import poolwire as pw
from lmkv.control.wake import Wake
from lmkv.ids import Incarnation, make_incarnation

from .model import ModelNode

BEAT_S = 0.2


class FakeNode:
    """`port`, `events_port`: 0 picks. Public methods may be called by any thread; the sockets belong to the node's
    own."""

    def __init__(
        self,
        controllers: Sequence[str] = (),
        *,
        pages: Mapping[bytes, int] | None = None,
        name: str = "fake",
        port: int = 0,
        part_records: int = 4096,
        capacity_bytes: int = 1 << 30,
        beat_s: float = BEAT_S,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._bound(zmq.ROUTER, port)
        self._pub = self._bound(zmq.PUB, 0)
        self._beats = [self._connected(address) for address in controllers]
        incarnation = make_incarnation(os.urandom(8))
        address, events = (s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (self._router, self._pub))
        self.card = pw.NodeCard(name, incarnation, address, events, "tcp", b"", 0, capacity_bytes)
        self.model = ModelNode(self.card, part_records)
        self.model.pages = dict(pages or {})
        self.model.seq = len(self.model.pages)
        self.draining = False
        self.replicates: list[pw.Replicate] = []
        self.snapshots = 0
        self.muted = False
        """Publishes nothing, as if the network ate it."""
        self.silent = False
        """Neither beats nor publishes."""
        self._beat_s = beat_s
        self._lock = threading.Lock()
        self._jobs: list[Callable[[], None]] = []
        self._wake = Wake()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="fake node", daemon=True)
        self._thread.start()

    @property
    def incarnation(self) -> Incarnation:
        return self.card.incarnation

    @property
    def port(self) -> int:
        return int(self.card.address.rpartition(":")[2])

    def put(self, changes: Mapping[bytes, int], *, clear: bool = False) -> None:
        """Change pages (tiers 0: gone) and publish that."""

        def job() -> None:
            events = self.model.change(changes.items(), clear=clear)
            if not self.muted:
                self._pub.send(pw.encode(events))

        self._do(job)

    def close(self, *, leave: bool = False) -> None:
        """`leave`: with an orderly last beat. Idempotent."""
        if self._stopped:
            return
        if leave:
            self._do(lambda: self._send_beats(leaving=True))
        self._stopped = True
        self._wake.set()
        self._thread.join(10)
        self._wake.close()
        for socket in (self._router, self._pub, *self._beats):
            socket.close(1000 if leave else 0)
        self._context.term()

    # --- the thread ---

    def _do(self, job: Callable[[], None]) -> None:
        done = threading.Event()

        def and_tell() -> None:
            job()
            done.set()

        with self._lock:
            self._jobs.append(and_tell)
        self._wake.set()
        assert done.wait(10)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake.fd, zmq.POLLIN)
        beat_at_s = 0.0
        while not self._stopped:
            ready = dict(poller.poll(max(0, int((beat_at_s - time.monotonic()) * 1000))))
            if self._wake.fd in ready:
                self._wake.clear()
            with self._lock:
                jobs, self._jobs = self._jobs, []
            for job in jobs:
                job()
            if self._router in ready:
                identity, payload = self._router.recv_multipart()
                answer = self._take(pw.decode(payload))
                if answer is not None:
                    self._router.send_multipart([identity, pw.encode(answer)])
            if time.monotonic() >= beat_at_s:
                beat_at_s = time.monotonic() + self._beat_s
                if not self.silent:
                    self._send_beats()

    def _send_beats(self, *, leaving: bool = False) -> None:
        pages = len(self.model.pages)
        beat = pw.NodeBeat(self.card, self.model.seq, pages, pages * 100, self.card.arena_bytes, self.draining, leaving)
        for socket in self._beats:
            socket.send(pw.encode(beat))
        if not self.muted:
            self._pub.send(pw.encode(self.model.sign_of_life()))

    def _take(self, message: pw.PoolMessage) -> pw.PoolMessage | None:
        match message:
            case pw.Snapshot():
                self.snapshots += message.cursor == b""
                return self.model.answer(message)
            case pw.Replicate():
                self.replicates.append(message)
                return None
            case pw.Drain(token, _):
                self.draining = True
                return pw.Drained(token, sum(tiers == pw.Tier.DRAM for tiers in self.model.pages.values()))
            case pw.Drop(token, namespace, keys):
                whole = [namespace + key for key in pw.split_keys(keys)]
                gone = [k for k in self.model.pages if k in whole or (not whole and k.startswith(namespace))]
                self._pub.send(pw.encode(self.model.change([(key, 0) for key in gone])))
                return pw.Dropped(token, len(gone))
            case pw.ListKeys(token, namespace, after, limit):
                keys = sorted(k for k in self.model.pages if k.startswith(namespace) and k > after)
                records = b"".join(k + bytes((self.model.pages[k],)) for k in keys[:limit])
                return pw.Keys(token, records, len(keys) > limit)
            case pw.Stats(token):
                return pw.StatsAre(token, self.card, json.dumps(self._stats()).encode())
        token = getattr(message, "token", None)
        return None if token is None else pw.Unreadable(token, f"a fake node does not take {type(message).__name__}")

    def _stats(self) -> dict[str, object]:
        return {"pages": len(self.model.pages), "capacity_bytes": self.card.arena_bytes, "draining": self.draining}

    def _bound(self, kind: int, port: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        return socket

    def _connected(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        socket.connect(address)
        return socket
