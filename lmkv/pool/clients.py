"""A node's clients: ranks of engines that map the arena or reach it over the data plane, and how their death is proved.

Used by the node's thread alone. Silence proves nothing. A client that maps the arena is dead when its connection to the
share socket has ended; one on the data plane when that says so (PeerLost), for which a silent one is written to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lmkv.control.host import Connection
from lmkv.errors import TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import PoolHello
from lmkv.transport import Extents, OpId, PeerId, Region, Transport

from .index import Writer

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 4096
MOST_CLIENTS = 8192
"""Ranks known at a time. One goes when it only asked and is silent, or when its death is proven."""
MOVING_S = 0.1
"""So long after a client on the data plane was given slots or pages its bytes are expected to move."""
PROBE_EVERY_S = 1.0
"""As long as a client is silent. What it may still write to stays in quarantine."""


@dataclass(slots=True)
class Client:
    writer: Writer
    name: str
    heard_s: float
    transport_id: PeerId | None = None
    scratch: Extents | None = None
    shares: set[Connection] = field(default_factory=set)
    """It maps the arena as long as one of these is open."""
    probe_s: float = 0.0


class Clients:
    """`gone(writer)`: proven dead. `transport` None: clients on this host only."""

    def __init__(self, transport: Transport | None, silent_s: float, gone: Callable[[Writer], None]) -> None:
        self._transport = transport
        self._silent_s = silent_s
        self._gone = gone
        self._clients: dict[Writer, Client] = {}
        self._by_transport: dict[PeerId, Writer] = {}
        self._probes: dict[OpId, Writer] = {}
        self._moved_s = float("-inf")
        self._zeros = np.zeros(SCRATCH_BYTES, dtype=np.uint8)
        if transport is not None:
            transport.register(Region(self._zeros.ctypes.data, SCRATCH_BYTES, owner=self._zeros))

    @property
    def scratch(self) -> Extents:
        """Registered bytes that nobody reads."""
        return Extents.of((self._zeros.ctypes.data, SCRATCH_BYTES))

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def remote(self) -> int:
        """Those on the data plane."""
        return len(self._by_transport)

    def find(self, incarnation: Incarnation, rank: Rank) -> Client | None:
        return self._clients.get((incarnation, rank))

    def names(self) -> dict[str, str]:
        """How each client reaches the arena, by its name, incarnation and rank."""
        return {
            f"{client.name}/{client.writer[0]}/{client.writer[1]}": "maps it"
            if client.shares
            else "data plane"
            if client.transport_id
            else "asks"
            for client in self._clients.values()
        }

    def hello(self, message: PoolHello, now_s: float) -> str:
        """Know the client; returns why not, or ""."""
        writer = (message.incarnation, message.rank)
        client = self._clients.get(writer)
        if client is None and len(self._clients) >= MOST_CLIENTS:
            return f"this node has {MOST_CLIENTS} clients already"
        if client is None:
            client = self._clients[writer] = Client(writer, message.name, now_s)
            logger.info("client %s rank %d (%s)", message.name, message.rank, message.incarnation)
        client.heard_s = now_s
        if not message.export or client.transport_id is not None:
            return ""
        if message.scratch_bytes < 0 or not 0 <= message.scratch_address < 1 << 63:
            return f"scratch memory of {message.scratch_bytes} bytes at {message.scratch_address} cannot be"
        if self._transport is None:
            return "this node has no data plane (--transport none): only processes of its host can use it"
        try:
            client.transport_id = self._transport.connect(message.export)
        except TransportError as error:
            return f"cannot connect to {message.name}: {error}"
        self._by_transport[client.transport_id] = writer
        size = min(message.scratch_bytes, SCRATCH_BYTES)
        client.scratch = Extents.of((message.scratch_address, size)) if size else None
        self._probe(client)
        return ""

    def shared(self, writer: Writer, connection: Connection, now_s: float) -> None:
        """The client has mapped the arena; `connection` ends with it."""
        client = self._clients.setdefault(writer, Client(writer, f"engine {writer[0]}", now_s))
        client.shares.add(connection)

    def can_write(self, writer: Writer) -> bool:
        """It has a way to the arena, by whose end its death is proved."""
        client = self._clients.get(writer)
        return client is not None and (bool(client.shares) or client.transport_id is not None)

    def share_ended(self, writer: Writer, connection: Connection) -> None:
        client = self._clients.get(writer)
        connection.close()
        if client is not None and connection in client.shares:
            client.shares.remove(connection)
            self._dead(client, "its process has ended")

    def moves(self, incarnation: Incarnation, rank: Rank, now_s: float) -> None:
        """The client has been given what makes bytes move."""
        client = self._clients.get((incarnation, rank))
        if client is not None and client.transport_id is not None:
            self._moved_s = now_s

    def are_moving(self, now_s: float) -> bool:
        """Over the data plane."""
        return now_s - self._moved_s < MOVING_S

    def heard(self, incarnation: Incarnation, rank: Rank, now_s: float) -> bool:
        """False: it has not said hello (to this incarnation of the node)."""
        client = self._clients.get((incarnation, rank))
        if client is not None:
            client.heard_s = now_s
        return client is not None

    # --- the data plane ---

    def completed(self, op: OpId, error: TransportError | None) -> None:
        writer = self._probes.pop(op, None)
        if error is not None and writer is not None:
            logger.debug("a probe of %s failed: %s", writer, error)

    def lost(self, transport_id: PeerId, reason: str) -> None:
        writer = self._by_transport.pop(transport_id, None)
        client = self._clients.get(writer) if writer is not None else None
        if client is not None:
            client.transport_id = client.scratch = None
            self._dead(client, reason)

    def tick(self, now_s: float) -> None:
        for client in list(self._clients.values()):
            silent_s = now_s - client.heard_s
            if silent_s < self._silent_s:
                continue
            if client.transport_id is None and not client.shares:
                del self._clients[client.writer]  # it only asked
            elif now_s - client.probe_s >= PROBE_EVERY_S and client.writer not in self._probes.values():
                client.probe_s = now_s
                self._probe(client)

    def _probe(self, client: Client) -> None:
        if self._transport is None or client.transport_id is None or client.scratch is None:
            return
        own = Extents.of((self._zeros.ctypes.data, client.scratch.total_bytes))
        try:
            self._probes[self._transport.write(client.transport_id, own, client.scratch)] = client.writer
        except TransportError as error:
            logger.debug("client %s cannot be written to: %s", client.name, error)

    def _dead(self, client: Client, reason: str) -> None:
        if not client.shares and client.transport_id is None:
            logger.info("client %s rank %d is gone: %s", client.name, client.writer[1], reason)
            self._clients.pop(client.writer, None)
            self._gone(client.writer)
