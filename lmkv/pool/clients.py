"""A node's clients: ranks of engines that map the arena or reach it over the data plane, and how their death is proved.

Used by the node's thread alone. Silence proves nothing, and a silent client is written to. One that maps the arena is
dead when its connection to the share socket has ended. One on a data plane that closes both directions is dead when
that says so (PeerLost). On any other (NIXL) a lost connection is forgotten, and made anew when the client says hello:
the client is dead when its process has been seen to have ended, or *fenced* when the node has replaced its data plane
(docs/protocol.md, "What ends a quarantine"). What it says itself of its slots counts with or without a connection.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lmkv.control.host import Connection
from lmkv.errors import StateError, TransportError
from lmkv.ids import Incarnation, Rank
from lmkv.poolwire import PoolHello
from lmkv.process import drain_s, has_ended, may_share_host
from lmkv.transport import Extents, OpId, PeerId, Region, Transport
from lmkv.wire import ProcessCard

from .index import Writer

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 4096
MOST_CLIENTS = 8192
"""Ranks known at a time. One goes when it only asked and is silent, or when its death is proven."""
MOVING_S = 0.1
"""So long after a client on the data plane was given slots or pages its bytes are expected to move."""
PROBE_EVERY_S = 1.0
"""As long as a client is silent. What it may still write to stays in quarantine."""
LOOK_EVERY_S = 1.0
LOOK_AFTER_S = 2.0
"""A client that has been silent for so long, or whose connection is lost, is looked for among the host's processes."""
DRAIN_TICKS = 4
"""What an ended process has sent is read in so many turns at least."""


class Gone(Protocol):
    """`is_dead`: it reads no more, either. Otherwise only what it had posted has ended."""

    def __call__(self, writer: Writer, is_dead: bool) -> None: ...


@dataclass(slots=True)
class Client:
    writer: Writer
    name: str
    heard_s: float
    process: ProcessCard = field(default_factory=ProcessCard)
    transport_id: PeerId | None = None
    """Connected as that."""
    export: bytes = b""
    """By which it was connected last."""
    is_loose: bool = False
    """It may write by a connection whose loss proves nothing."""
    scratch: Extents | None = None
    shares: set[Connection] = field(default_factory=set)
    """It maps the arena as long as one of these is open."""
    probe_s: float = 0.0
    looked_s: float = float("-inf")
    ended_s: float | None = None
    """When its process was seen to have ended; from then on `ticks` are counted."""
    ticks: int = 0


class Clients:
    """`gone(writer, is_dead)`: nothing of it lands any more. `holds(writer)`: it may still write to something.
    `transport` None: clients on this host only."""

    def __init__(
        self,
        transport: Transport | None,
        silent_s: float,
        gone: Gone,
        holds: Callable[[Writer], bool] = lambda writer: True,
        quarantine_s: float = float("inf"),
    ) -> None:
        self._transport = transport
        self._silent_s = silent_s
        self._gone = gone
        self._holds = holds
        self._quarantine_s = quarantine_s
        self._clients: dict[Writer, Client] = {}
        self._by_transport: dict[PeerId, Writer] = {}
        self._leaving: set[PeerId] = set()
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
            else "lost"
            if client.is_loose
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
        client.heard_s, client.process = now_s, message.process
        if not message.export or (client.transport_id is not None and client.export == message.export):
            return ""
        if message.scratch_bytes < 0 or not 0 <= message.scratch_address < 1 << 63:
            return f"scratch memory of {message.scratch_bytes} bytes at {message.scratch_address} cannot be"
        if self._transport is None:
            return "this node has no data plane (--transport none): only processes of its host can use it"
        return self._connect(self._transport, client, message)

    def _connect(self, transport: Transport, client: Client, message: PoolHello) -> str:
        """As `hello`. With another export the client has another data plane: the old connection is left."""
        try:
            transport_id = transport.connect(message.export)
        except TransportError as error:
            if isinstance(error, StateError) and client.transport_id is not None:
                client.export = message.export
                return ""  # it is the connection that we have
            return f"cannot connect to {message.name}: {error}"
        if client.transport_id is not None:
            self._leaving.add(client.transport_id)
        client.transport_id, client.export = transport_id, message.export
        client.is_loose = not transport.capabilities.loss_is_fence
        self._by_transport[transport_id] = client.writer
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
        self._leaving.discard(transport_id)
        writer = self._by_transport.pop(transport_id, None)
        client = self._clients.get(writer) if writer is not None else None
        if client is None or client.transport_id != transport_id:
            return
        client.transport_id = client.scratch = None
        if client.is_loose:
            logger.info("the connection to client %s rank %d is lost: %s", client.name, client.writer[1], reason)
        else:
            self._dead(client, reason)

    def overdue(self, now_s: float) -> list[Writer]:
        """Silent for longer than the limit with slots that they may still write to. Not processes of this host, which
        may write without a connection (CMA)."""
        return [
            client.writer
            for client in self._clients.values()
            if client.is_loose
            and now_s - client.heard_s > self._quarantine_s
            and not may_share_host(client.process)
            and self._holds(client.writer)
        ]

    def is_probe(self, op: OpId) -> bool:
        return op in self._probes

    def replaced(self, export: bytes) -> None:
        """The node's data plane is another one. All clients have to connect anew; nothing that those of other hosts had
        posted lands any more, so that what they were given by then is void: they know, since their connection is."""
        self._by_transport.clear()
        self._leaving.clear()
        self._probes.clear()
        for client in list(self._clients.values()):
            client.transport_id = client.scratch = None
            if client.is_loose and not client.shares and not may_share_host(client.process):
                client.is_loose = False
                self._gone(client.writer, is_dead=False)

    # --- time ---

    def tick(self, now_s: float) -> None:
        self._let_go()
        for client in list(self._clients.values()):
            if client.is_loose:
                self._look(client, now_s)
            silent_s = now_s - client.heard_s
            if silent_s < self._silent_s:
                continue
            if client.transport_id is None and not client.shares:
                if not client.is_loose or not self._holds(client.writer):
                    self._clients.pop(client.writer, None)  # it only asked, or has nothing left
            elif now_s - client.probe_s >= PROBE_EVERY_S and client.writer not in self._probes.values():
                client.probe_s = now_s
                self._probe(client)

    def _look(self, client: Client, now_s: float) -> None:
        """Is its process still there? If not, what it had sent gets time to be read."""
        if client.ended_s is not None:
            client.ticks += 1
            if client.ticks >= DRAIN_TICKS and now_s - client.ended_s >= drain_s(client.process):
                self._ended(client)
            return
        is_suspect = client.transport_id is None or now_s - client.heard_s >= LOOK_AFTER_S
        if is_suspect and now_s - client.looked_s >= LOOK_EVERY_S:
            client.looked_s = now_s
            client.ended_s = now_s if has_ended(client.process) else None

    def _ended(self, client: Client) -> None:
        if client.transport_id is not None:
            self._leaving.add(client.transport_id)
        client.transport_id = client.scratch = None
        client.is_loose = False
        self._let_go()
        self._dead(client, "its process has ended")

    def _let_go(self) -> None:
        for transport_id in list(self._leaving):
            try:
                assert self._transport is not None
                self._transport.disconnect(transport_id)
            except TransportError:
                continue  # operations in flight, or a loss about to be told
            self._leaving.discard(transport_id)
            self._by_transport.pop(transport_id, None)

    def _probe(self, client: Client) -> None:
        if self._transport is None or client.transport_id is None or client.scratch is None:
            return
        own = Extents.of((self._zeros.ctypes.data, client.scratch.total_bytes))
        try:
            self._probes[self._transport.write(client.transport_id, own, client.scratch)] = client.writer
        except TransportError as error:
            logger.debug("client %s cannot be written to: %s", client.name, error)

    def _dead(self, client: Client, reason: str) -> None:
        if not client.shares and client.transport_id is None and not client.is_loose:
            logger.info("client %s rank %d is gone: %s", client.name, client.writer[1], reason)
            self._clients.pop(client.writer, None)
            self._gone(client.writer, is_dead=True)
