"""Mailboxes: one-way messages over ZeroMQ. Each process part binds one Inbox and connects one Outbox.

A message from A to B always travels from A's DEALER to B's ROUTER; an answer travels the same way back, from B's own
DEALER. Only questions of outsiders (router, CLI) are answered on the ROUTER, to the identity that asked.
Neither class is thread-safe: each belongs to the thread that uses it. Sends never block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from lmkv import wire
from lmkv.errors import ConfigError, WireError

logger = logging.getLogger(__name__)

HIGH_WATER_MESSAGES = 16384


@dataclass(frozen=True, slots=True)
class Letter:
    message: wire.Control
    identity: bytes
    """Where an answer to an outsider goes (`Inbox.answer`)."""


def split_address(address: str) -> tuple[str, int]:
    """`tcp://host:port` → (host, port). Raises ConfigError."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise ConfigError(f"{address!r} is not a control address", hint="write it as tcp://HOST:PORT")
    return parts.hostname, port


def _host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Inbox:
    """A bound ROUTER. `address` is what peers connect to."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], listen: str, advertise: str = "") -> None:
        host, port = split_address(listen)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MESSAGES)
        self.socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
        self.socket.setsockopt(zmq.IPV6, 1)
        try:
            self.socket.bind(f"tcp://{_host(host)}:{port if port else '*'}")
        except zmq.ZMQError as error:
            self.socket.close()
            raise ConfigError(
                f"cannot listen on {listen}: {error}", hint="choose another port or stop what uses this one"
            ) from error
        bound = split_address(self.socket.getsockopt_string(zmq.LAST_ENDPOINT))[1]
        self.address = f"tcp://{_host(advertise or host)}:{bound}"
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


class Outbox:
    """DEALERs to other inboxes, connected on first use. `lost()` tells which connections broke."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], watch: bool = False) -> None:
        self._context = context
        self._watch = watch
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._monitors: dict[str, zmq.Socket[bytes]] = {}
        self.dropped = 0

    def send(self, address: str, message: wire.Control) -> bool:
        """Queue a message; False (and counted) when the queue to that address is full."""
        socket = self._sockets.get(address) or self._connect(address)
        try:
            socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
            return False
        return True

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MESSAGES)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.IPV6, 1)
        if self._watch:
            self._monitors[address] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.connect(address)
        self._sockets[address] = socket
        return socket

    def lost(self) -> list[str]:
        """Addresses whose connection was closed by the other side since the last call."""
        gone = []
        for address, monitor in self._monitors.items():
            while monitor.poll(0):
                recv_monitor_message(monitor, zmq.NOBLOCK)
                gone.append(address)
        return gone

    def forget(self, address: str) -> None:
        """Close the connection to an address, if there is one."""
        socket = self._sockets.pop(address, None)
        if socket is not None:
            monitor = self._monitors.pop(address, None)
            if monitor is not None:
                socket.disable_monitor()
                monitor.close(0)
            socket.close()

    def close(self) -> None:
        for address in list(self._sockets):
            self.forget(address)
