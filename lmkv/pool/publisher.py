"""What a node tells the world of itself: numbered events, snapshots, signs of life. The node's thread only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from lmkv import poolwire as pw
from lmkv.addresses import join_address, split_address
from lmkv.errors import ConfigError
from lmkv.ids import Incarnation

from .index import PoolIndex

logger = logging.getLogger(__name__)

PART_BYTES = 4 << 20
SNAPSHOT_S = 60.0
BATCH_EVENTS = 4096
MOST_PICTURES_BYTES = 1 << 30


@dataclass(slots=True)
class _Picture:
    """All that was there after event `seq`, being read part by part."""

    seq: int
    records: bytes
    until_s: float


class Publisher:
    """Events go out with `flush`; the first has number 1."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, advertise: str, index: PoolIndex) -> None:
        self._context = context
        self._index = index
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 4096)
        self._socket.setsockopt(zmq.IPV6, 1)
        try:
            self._socket.bind(join_address(host, "*"))
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"cannot publish on {host}: {error}", hint="correct --listen") from error
        port = split_address(self._socket.getsockopt_string(zmq.LAST_ENDPOINT), listen=True)[1]
        self.address = join_address(advertise or host, port)
        self.seq = 0
        self._pictures: dict[int, _Picture] = {}
        self._next_picture = 1
        self._controllers: list[zmq.Socket[bytes]] = []

    def beat_to(self, controllers: Sequence[str]) -> None:
        for address in controllers:
            split_address(address)
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.SNDHWM, 4)
            socket.setsockopt(zmq.MAXMSGSIZE, 1 << 20)  # a controller answers no beat
            socket.setsockopt(zmq.IPV6, 1)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            # A controller that is away gets no heap of old beats when it comes back.
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.connect(address)
            self._controllers.append(socket)

    def flush(self, incarnation: Incarnation) -> None:
        """Send what the index has to tell."""
        events = self._index.take_events()
        for at in range(0, len(events), BATCH_EVENTS):
            some = events[at : at + BATCH_EVENTS]
            records = b"".join(key + bytes((tiers,)) for key, tiers in some)
            self._send(pw.Events(incarnation, self.seq + 1, records))
            self.seq += len(some)

    def sign_of_life(self, incarnation: Incarnation) -> None:
        self._send(pw.Events(incarnation, self.seq + 1, b""))

    def beat(self, beat: pw.NodeBeat) -> None:
        payload = pw.encode(beat)
        for socket in self._controllers:
            try:
                socket.send(payload, zmq.NOBLOCK)
            except zmq.Again:
                logger.debug("a controller does not take beats")

    def snapshot(self, question: pw.Snapshot, incarnation: Incarnation, now_s: float) -> pw.SnapshotPart | None:
        """One part; None for a cursor that is not (any more) known. All parts are of one moment."""
        self.flush(incarnation)
        for old in [n for n, picture in self._pictures.items() if now_s > picture.until_s]:
            del self._pictures[old]
        number, _, at = question.cursor.partition(b":")
        if question.cursor:
            picture = self._pictures.get(int(number)) if number.isdigit() and at.isdigit() else None
            if picture is None:
                return None
            start = int(at)
        else:
            records = b"".join(entry.key + bytes((entry.tiers,)) for entry in self._index.entries())
            picture, start = _Picture(self.seq, records, now_s + SNAPSHOT_S), 0
            number = b"%d" % self._next_picture
            self._make_room(len(records))
            self._pictures[self._next_picture] = picture
            self._next_picture += 1
        stop = start + PART_BYTES // pw.EVENT_BYTES * pw.EVENT_BYTES
        last = stop >= len(picture.records)
        if last:
            self._pictures.pop(int(number), None)
        cursor = b"" if last else b"%s:%d" % (number, stop)
        return pw.SnapshotPart(question.token, incarnation, picture.seq, picture.records[start:stop], cursor)

    def _make_room(self, size: int) -> None:
        """Many readers of a large node: the oldest has to begin again."""
        while self._pictures and size + sum(len(p.records) for p in self._pictures.values()) > MOST_PICTURES_BYTES:
            del self._pictures[min(self._pictures)]

    def _send(self, message: pw.Events) -> None:
        self._socket.send(pw.encode(message))  # PUB never blocks: a slow subscriber sees a gap and asks for a snapshot
