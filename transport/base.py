"""The contract of a data plane: one-sided extents between registered memories, with notifications.

A transport belongs to one process and moves bytes between its registered memory and its peers'. In order of life:

    register(region)                 memory becomes readable and writable for connected peers; returns nothing to keep
    export() -> bytes                what a peer needs to connect (name, address, regions): opaque, safe to send
    connect(exported) -> PeerId      learn a peer; both sides connect to move bytes in both directions
    write / read (peer, local, remote, note) -> OpId      start moving; returns at once or after the copy
    notify(peer, note)               a message of its own; not ordered with any write
    poll() -> list[Event]            make progress; deliver Completion, Notification, PeerLost
    cancel(op)                       no more of it is started where the back end can help it; see below
    release(op)                      forget a completed operation
    disconnect(peer)                 refuses while operations are in flight
    close() / abort()                orderly: waits for nothing, refuses while operations are in flight / at once

Rules every back end keeps, checked by one conformance suite (`tests/transport`):

1. **Ownership of memory.** The caller owns registered memory and keeps it mapped until the process ends: a late
   write from a peer into unmapped memory kills the process on some back ends. Registration is never undone.
2. **Completion is the only proof of quiescence.** After `cancel`, after a peer fell silent, after anything, the bytes
   of an operation may still land at the target until its `Completion` (or the peer's death) has been delivered. A
   target must quarantine the memory until the writer says that it has seen the Completion.
3. **A notification implies its data.** `note` of a write is delivered at the target after all bytes of that write are
   visible there. An empty note means none. Two operations are never ordered with each other.
4. **Exactly one Completion** per operation, with `error=None` or a TransportError. After an error its note is never
   delivered, unless the connection is lost too: then nothing posted later can land either. Then `release(op)`;
   releasing an operation in flight, twice, or one that never was raises StateError.
5. **Bounds.** Extents outside registered memory raise ExtentError at the caller before anything moves. Where
   `capabilities.target_checks_bounds`, the target also refuses them (Completion with ExtentError), whatever the
   caller claims.
6. **Loss.** When a peer's process dies, or the connection to it is reset, operations complete with PeerLostError, then
   `PeerLost(peer)` follows. It does not prove a death, and only with `capabilities.loss_is_fence` that nothing of the
   peer's own operations lands any more. A peer that is stuck or unreachable gives nothing: deadlines are the caller's.
7. **Names.** `PeerId` is the name given at construction, unique in time (it carries the incarnation). Connecting the
   same name twice raises StateError; after `disconnect` or PeerLost a peer that is still there may be connected anew.
8. **Thread.** One thread owns a transport: all calls come from it, the first call after construction decides which.
   No call blocks for longer than its own copying.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NewType

from lmkv.errors import StateError, TransportError

from .extents import Extents, MemoryKind

PeerId = NewType("PeerId", str)
OpId = NewType("OpId", int)


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous range of memory. `owner` is kept alive by the transport (a tensor, an array, an mmap)."""

    address: int
    bytes: int
    kind: MemoryKind = MemoryKind.DRAM
    device: int = 0
    owner: object = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a back end can do beyond the rules."""

    kinds: frozenset[MemoryKind]
    one_sided: bool
    """The target's CPU takes no part in a write (it may still have to poll to make progress)."""
    target_checks_bounds: bool
    cross_process: bool
    loss_is_fence: bool = False
    """After PeerLost nothing of that peer's operations lands here either (until it is connected anew), whether its
    process is dead or not. Without it PeerLost only says that our connection has ended."""


@dataclass(frozen=True, slots=True)
class Completion:
    """`op` is terminal: nothing of it will land any more. Call `release(op)`."""

    op: OpId
    error: TransportError | None


@dataclass(frozen=True, slots=True)
class Notification:
    """A note from `peer`; if it came with a write, the bytes of that write are visible."""

    peer: PeerId
    payload: bytes


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The connection to the peer has ended (see rule 6); all operations to it have completed."""

    peer: PeerId
    reason: str


Event = Completion | Notification | PeerLost


class Transport(ABC):
    """See the module's text for the rules. `name` must be unique in time: role, rank and incarnation."""

    scheme: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(self, name: str) -> None:
        self.name = PeerId(name)

    @abstractmethod
    def register(self, region: Region) -> None:
        """Raises RegistrationError (zero bytes, wrong kind, closed). May be called before and after `connect`;
        peers that connected earlier do not learn of regions registered later."""

    @abstractmethod
    def export(self) -> bytes:
        """All a peer needs, including the regions registered so far. No pickle."""

    @abstractmethod
    def connect(self, exported: bytes) -> PeerId:
        """Raises ConnectError (unreadable, other scheme, unreachable), StateError (already connected)."""

    @abstractmethod
    def write(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        """Move local → remote. Raises ExtentError, PeerLostError, StateError (unknown peer)."""

    @abstractmethod
    def read(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        """Move remote → local; `note` is delivered at the peer after the bytes are here."""

    @abstractmethod
    def notify(self, peer: PeerId, note: bytes) -> None:
        """Raises StateError (unknown peer, empty note), PeerLostError."""

    @abstractmethod
    def poll(self) -> list[Event]:
        """Progress without waiting. Must be called while operations are in flight on either side."""

    @abstractmethod
    def fds(self) -> list[int]:
        """Descriptors that become readable when `poll` has work; empty: poll by time (`poll_interval_s`)."""

    @property
    @abstractmethod
    def in_flight(self) -> int:
        """Operations whose Completion has not been delivered."""

    @abstractmethod
    def cancel(self, op: OpId) -> None:
        """Ask that no more of `op` is started. Its Completion still comes, and only it proves quiescence."""

    @abstractmethod
    def release(self, op: OpId) -> None:
        """Forget a completed operation. Raises StateError otherwise."""

    @abstractmethod
    def disconnect(self, peer: PeerId) -> None:
        """Forget a peer. Raises StateError while operations to it are in flight, or if it is unknown."""

    def replace(self, name: str) -> tuple[list[OpId], list[PeerId]]:
        """Start over under a new name with the same memory: no connection made before can write to it any more.

        Returns the operations whose Completion will not come (what of them is on its way may still land at the peer for
        a while) and the peers, which have to be connected anew after a new `export`. Raises StateError where the back
        end cannot do it, SchemeError when it fails; the transport is closed then.
        """
        raise StateError(f"{self.scheme}:// cannot be made anew", hint="restart this engine")

    @abstractmethod
    def close(self) -> None:
        """Orderly end; raises StateError while operations are in flight. Idempotent."""

    @abstractmethod
    def abort(self) -> None:
        """End at once, whatever is in flight. Idempotent."""
