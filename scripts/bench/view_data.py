"""Nodes as data for the benchmark of the view, and one that answers over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from lmkv import poolwire as pw
from lmkv.control.view import View
from lmkv.ids import Incarnation
from lmkv.poolwire import EVENT_BYTES, Events, NodeBeat, NodeCard, SnapshotPart

NAMESPACE = b"bench-namespace!"
Chunks = npt.NDArray[np.uint8]
"""Chunk keys, a row of 16 bytes each."""


def card(number: int) -> NodeCard:
    address = f"tcp://10.{number >> 16}.{number >> 8 & 255}.{number & 255}:18410"
    return NodeCard(f"n{number}", Incarnation(f"{number:016x}"), address, address + "1", "nixl", b"", 0, 1 << 36)


def records(chunks: Chunks, tiers: int) -> bytes:
    """Of pages with these chunk keys (rows of 16 bytes)."""
    made = np.empty((len(chunks), EVENT_BYTES), np.uint8)
    made[:, :16] = np.frombuffer(NAMESPACE, np.uint8)
    made[:, 16:32] = chunks
    made[:, 32] = 0
    made[:, 33] = tiers
    return made.tobytes()


def chunk_keys(rng: np.random.Generator, count: int) -> Chunks:
    return np.frombuffer(rng.bytes(16 * count), np.uint8).reshape(count, 16)


def page_keys(chunks: Chunks) -> bytes:
    return np.concatenate((chunks, np.zeros((len(chunks), 1), np.uint8)), axis=1).tobytes()


def resident_bytes() -> int:
    """Private memory of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no Private_Dirty in smaps_rollup: this needs Linux 4.14 or newer")


class Fed:
    """A view whose nodes are data: exact from the start, then fed with events."""

    def __init__(self, nodes: int) -> None:
        self.view = View()
        self.seqs = [0] * nodes
        for number in range(nodes):
            self.view.join(card(number), 0.0)
            self.view.events(Events(card(number).incarnation, 1, b""), 0.0)
            self._answer()

    def _answer(self) -> None:
        for action in self.view.take_actions():
            question = getattr(action, "question", None)
            if question is not None:
                self.view.part(SnapshotPart(question.token, action.card.incarnation, 0, b"", b""), 0.0)

    def feed(self, node: int, chunks: Chunks, tiers: int = 1) -> None:
        first = self.seqs[node] + 1
        self.seqs[node] += len(chunks)
        self.view.events(Events(card(node).incarnation, first, records(chunks, tiers)), 0.0)


def times_us(call: Callable[[int], object], count: int) -> list[float]:
    found = []
    for number in range(count):
        began_s = time.perf_counter()
        call(number)
        found.append((time.perf_counter() - began_s) * 1e6)
    return found


def quantiles(samples: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(samples, p)), 2) for p in (50, 90, 99)}


class Node:
    """Serves one snapshot and beats; enough of a node for a controller to follow."""

    def __init__(self, controller: str, chunks: Chunks) -> None:
        self._context: Any = zmq.Context()
        self._router, self._pub, self._beats = (self._context.socket(k) for k in (zmq.ROUTER, zmq.PUB, zmq.DEALER))
        self._router.bind("tcp://127.0.0.1:*")
        self._pub.bind("tcp://127.0.0.1:*")
        self._beats.connect(controller)
        ends = [s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (self._router, self._pub)]
        self.card = NodeCard("bench", Incarnation("b" * 16), ends[0], ends[1], "tcp", b"", 0, 1 << 30)
        self._records = records(chunks, 1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        seq, step = len(self._records) // EVENT_BYTES, 8192 * EVENT_BYTES
        beat_at_s = 0.0
        while not self._stop.is_set():
            if self._router.poll(50):
                identity, payload = self._router.recv_multipart()
                question = pw.decode(payload)
                assert isinstance(question, pw.Snapshot)
                at = int(question.cursor or b"0")
                cursor = str(at + step).encode() if at + step < len(self._records) else b""
                body = self._records[at : at + step]
                part = SnapshotPart(question.token, self.card.incarnation, seq, body, cursor)
                self._router.send_multipart([identity, pw.encode(part)])
            if time.monotonic() > beat_at_s:
                beat_at_s = time.monotonic() + 0.5
                self._beats.send(pw.encode(NodeBeat(self.card, seq, seq, 0, 1 << 30)))
                self._pub.send(pw.encode(Events(self.card.incarnation, seq + 1, b"")))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for socket in (self._router, self._pub, self._beats):
            socket.close(0)
        self._context.term()
