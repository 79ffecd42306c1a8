"""A controller's sockets towards nodes: one SUB for everybody's events, and a DEALER for each node that is being
asked."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import zmq

from lmkv.addresses import split_address
from lmkv.errors import WireError
from lmkv.ids import Incarnation
from lmkv.poolwire import Events, NodeCard, PoolMessage, decode, encode

from .mailbox import MOST_ANSWER_BYTES

logger = logging.getLogger(__name__)

_Socket = zmq.Socket[bytes]
_WAITING = 1024
"""Messages of one node that wait here; more are lost, which shows as a gap."""
_GOODBYE_MS = 500
"""What is not sent when a DEALER is closed gets so long."""


class Links:
    """Belongs to the thread that uses it. Sockets are in `poller` while they are open."""

    def __init__(self, context: zmq.Context[_Socket], poller: zmq.Poller) -> None:
        self._context = context
        self._poller = poller
        self._events = self._open(zmq.SUB)
        self._events.setsockopt(zmq.SUBSCRIBE, b"")
        self._heard: Counter[str] = Counter()
        """Connections by address of a PUB, with the nodes that named it."""
        self._dealers: dict[Incarnation, _Socket] = {}
        self.unreadable = 0

    def subscribe(self, card: NodeCard) -> None:
        """Raises ConfigError for an address that is none."""
        split_address(card.events)
        split_address(card.address)
        if not self._heard[card.events]:
            self._events.connect(card.events)
        self._heard[card.events] += 1

    def unsubscribe(self, card: NodeCard) -> None:
        self.hang_up(card)
        if not self._heard[card.events]:
            return
        self._heard[card.events] -= 1
        if not self._heard[card.events]:
            del self._heard[card.events]
            self._events.disconnect(card.events)

    def send(self, card: NodeCard, message: PoolMessage) -> bool:
        """Never blocks; False: the queue is full, or there is no connecting to this address."""
        dealer = self._dealers.get(card.incarnation)
        if dealer is None:
            dealer = self._dealers[card.incarnation] = self._open(zmq.DEALER)
        try:
            if not dealer.last_endpoint:
                dealer.connect(card.address)
            dealer.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.debug("%s to %s is not sent: %s", type(message).__name__, card.address, error)
            return False
        return True

    def hang_up(self, card: NodeCard) -> None:
        dealer = self._dealers.pop(card.incarnation, None)
        if dealer is not None:
            self._poller.unregister(dealer)
            dealer.close(_GOODBYE_MS)

    def events(self, limit: int) -> Iterator[Events]:
        """Up to `limit` that wait."""
        for message in self._read(self._events, limit):
            if isinstance(message, Events):
                yield message
            else:
                self.unreadable += 1

    def answers(self, ready: dict[object, int], limit: int) -> Iterator[PoolMessage]:
        """Up to `limit` of each DEALER that has any."""
        for dealer in list(self._dealers.values()):
            if dealer in ready:
                yield from self._read(dealer, limit)

    def close(self) -> None:
        for dealer in self._dealers.values():
            dealer.close(0)
        self._events.close(0)

    def _open(self, kind: int) -> _Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MOST_ANSWER_BYTES)
        socket.setsockopt(zmq.RCVHWM, _WAITING)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _read(self, socket: _Socket, limit: int) -> Iterator[PoolMessage]:
        for _ in range(limit):
            if socket.closed:
                return
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise WireError(f"a message of the pool has 1 frame, got {len(frames)}")
                yield decode(frames[0])
            except WireError as error:
                self.unreadable += 1
                logger.warning("from a node: dropped: %s", error)
