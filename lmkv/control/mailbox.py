"""Mailboxes: one-way messages over ZeroMQ. Each process part binds one Inbox and connects one Outbox.

A message from A to B always travels from A's DEALER to B's ROUTER; an answer travels the same way back, from B's own
DEALER. Only questions of outsiders (router, CLI) are answered on the ROUTER, to the identity that asked.
Neither class is thread-safe: each belongs to the thread that uses it. Sends never block.
"""

from __future__ import annotations

import logging
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from lmkv import wire
from lmkv.addresses import check_host, join_address
from lmkv.addresses import split_address as split_address
from lmkv.errors import ConfigError, WireError

logger = logging.getLogger(__name__)

HIGH_WATER_MESSAGES = 16384
MOST_MESSAGE_BYTES = 16 << 20
"""A larger message ends the connection that it comes over. A grant of 100,000 blocks has half a megabyte."""
MOST_ANSWER_BYTES = 64 << 20
"""Of one answer to a question: the members of 4,096 nodes with their cards have some 10 MB."""
MOST_SOCKETS = 65536

IDLE_S = 60.0
"""A connection that nothing was sent over for so long is closed; the next message opens another one."""
SWEEP_S = 1.0
GOODBYE_MS = 1000
"""What is queued when a connection is closed has so long to leave. After that it is lost, as it would be if the peer
had died; each question has a deadline."""
_DESCRIPTORS = {False: 2, True: 4}
"""Of one connection: the socket's own, the stream's, and those of a monitor's two ends."""


@dataclass(frozen=True, slots=True)
class Letter:
    message: wire.Control
    identity: bytes
    """Where an answer to an outsider goes (`Inbox.answer`)."""


def make_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context whose limit of sockets (1,023 unless told) is never the first to be met."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
    return context


class Inbox:
    """A bound ROUTER. `address` is what peers connect to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], listen: str, advertise: str = "") -> None:
        host, port = split_address(listen, listen=True)
        advertise = check_host(advertise) if advertise else ""
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MESSAGES)
        self.socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.IPV6, 1)
        try:
            self.socket.bind(join_address(host, port or "*"))
        except zmq.ZMQError as error:
            self.socket.close()
            raise ConfigError(
                f"cannot listen on {listen}: {error}", hint="choose another port or stop what uses this one"
            ) from error
        bound = split_address(self.socket.getsockopt_string(zmq.LAST_ENDPOINT), listen=True)[1]
        self.address = join_address(advertise or host, bound)
        self.unreadable = 0

    def receive(self, limit: int = 256) -> list[Letter]:
        """Up to `limit` waiting messages; unreadable ones are counted and dropped."""
        letters: list[Letter] = []
        while len(letters) < limit:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                if len(frames) != 2:
                    raise WireError(f"a control message has 2 frames, got {len(frames)}")
                letters.append(Letter(wire.decode_control(frames[1]), frames[0]))
            except WireError as error:
                self.unreadable += 1
                logger.warning("%s: dropped: %s", self.address, error)
        return letters

    def answer(self, identity: bytes, message: wire.Control) -> bool:
        """To an outsider; False if it is gone or does not read."""
        try:
            self.socket.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.debug("an answer was not taken: %s", error)
            return False
        return True

    def close(self) -> None:
        self.socket.close()


@dataclass(slots=True)
class _Connection:
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes] | None
    used_s: float


def most_connections(watch: bool) -> int:
    """How many connections one Outbox keeps: a quarter of the descriptors that this process may have, between 64 and
    4,096 connections."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 4096
    return max(64, min(4096, soft // 4 // _DESCRIPTORS[watch]))


class Outbox:
    """DEALERs to other inboxes, connected on first use. `lost()` tells which connections broke (`watch`).

    At most `most` connections are open; above that the one least recently used is closed, as are all that were idle for
    `idle_s` seconds. Counters: `dropped` messages (queue full, no such address, no socket to be had), `idle_closed` and
    `crowded_out` connections.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        watch: bool = False,
        *,
        most: int = 0,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._watch = watch
        self._most = most or most_connections(watch)
        self._idle_s = idle_s
        self._clock = clock
        self._connections: OrderedDict[str, _Connection] = OrderedDict()
        """By address, the least recently used first."""
        self._swept_s = clock()
        self.dropped = 0
        self.idle_closed = 0
        self.crowded_out = 0

    def __len__(self) -> int:
        """Open connections."""
        return len(self._connections)

    def send(self, address: str, message: wire.Control) -> bool:
        """Queue a message; False (and counted) when it cannot be: the queue to that address is full, or there is no
        connecting to it."""
        now_s = self._clock()
        self.sweep()
        connection = self._connections.get(address) or self._open(address, now_s)
        if connection is None:
            self.dropped += 1
            return False
        connection.used_s = now_s
        self._connections.move_to_end(address)
        try:
            connection.socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if not isinstance(error, zmq.Again):
                logger.warning("%s to %s is not sent: %s", type(message).__name__, address, error)
            self.dropped += 1
            return False
        return True

    def lost(self) -> list[str]:
        """Addresses whose connection was closed by the other side since the last call. Those that were closed here are
        not among them."""
        self.sweep()
        gone = []
        for address, connection in self._connections.items():
            while connection.monitor is not None and connection.monitor.poll(0):
                recv_monitor_message(connection.monitor, zmq.NOBLOCK)
                gone.append(address)
        return gone

    def forget(self, address: str) -> None:
        """Close the connection to an address, if there is one, with what is queued."""
        self._shut(address, 0)

    def close(self, linger_ms: int = 0) -> None:
        """Close all connections. Queued messages have `linger_ms` to leave, while the context is terminated."""
        for address in list(self._connections):
            self._shut(address, linger_ms)

    # --- connections ---

    def _open(self, address: str, now_s: float) -> _Connection | None:
        """None, with the reason logged: no address that can be connected to, or no socket to be had."""
        try:
            split_address(address)
        except ConfigError as error:
            logger.warning("a message is not sent: %s", error.message)
            return None
        while len(self._connections) >= self._most:
            self._crowd_out()
        connection = self._try_open(address, now_s)
        if connection is None and self._connections:
            # Descriptors may be short elsewhere in this process: give some back, and try once more.
            for _ in range(max(1, len(self._connections) // 2)):
                self._crowd_out()
            connection = self._try_open(address, now_s)
        if connection is not None:
            self._connections[address] = connection
        return connection

    def _try_open(self, address: str, now_s: float) -> _Connection | None:
        socket: zmq.Socket[bytes] | None = None
        try:
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
            socket.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE_BYTES)
            socket.setsockopt(zmq.RECONNECT_IVL, 100)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            socket.setsockopt(zmq.IPV6, 1)
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) if self._watch else None
            socket.connect(address)
        except zmq.ZMQError as error:
            logger.warning("there is no connecting to %s: %s", address, error)
            if socket is not None:
                socket.disable_monitor()
                socket.close(0)
            return None
        return _Connection(socket, monitor, now_s)

    def sweep(self) -> None:
        """Close what was idle for long enough; part of `send` and `lost`. For who does neither for long."""
        now_s = self._clock()
        if now_s - self._swept_s < SWEEP_S:
            return
        self._swept_s = now_s
        for address, connection in list(self._connections.items()):
            if now_s - connection.used_s < self._idle_s:
                return  # the others were used later
            self._shut(address, GOODBYE_MS)
            self.idle_closed += 1

    def _crowd_out(self) -> None:
        address = next(iter(self._connections))
        self._shut(address, GOODBYE_MS)
        self.crowded_out += 1
        logger.debug("%d connections are open: the one to %s is closed", self._most, address)

    def _shut(self, address: str, linger_ms: int) -> None:
        connection = self._connections.pop(address, None)
        if connection is None:
            return
        if connection.monitor is not None:
            connection.socket.disable_monitor()
            connection.monitor.close(0)
        connection.socket.close(linger_ms)
