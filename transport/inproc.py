"""inproc://: transports of one process, for tests of what is built on top, with faults on demand.

    inproc://?piece_bytes=N

The writer's `poll` copies, at most `piece_bytes` a call, so that operations are in flight for as many polls as a test
needs. Each transport may live on a thread of its own; its `faults` may be changed from any thread at any time.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lmkv.errors import (
    ConnectError,
    ExtentError,
    PeerLostError,
    RegistrationError,
    StateError,
    TransportError,
)

from .base import Capabilities, Event, Notification, OpId, PeerId, PeerLost, Region, Transport
from .common import (
    OpTable,
    OwnerThread,
    RegionMap,
    check_region,
    decode_export,
    encode_export,
    int_option,
    merge_checked,
    parse_options,
)
from .extents import Extents, MemoryKind

_PIECE_BYTES = 4 << 20

_live: dict[str, InprocTransport] = {}
_live_lock = threading.Lock()


@dataclass(slots=True)
class Faults:
    """What goes wrong at one transport. Counters count down by one for each operation they hit."""

    hold: bool = False
    """Operations of this transport are on the wire: nothing lands until it is lifted, then everything does, cancelled
    or not. It catches what is in flight while it is set."""
    stall: bool = False
    """This process is stopped: its polls do nothing, and operations to it land but do not complete."""
    dead: bool = False
    """This process was killed: what it was writing stops where it is, and its peers see PeerLost."""
    cut: set[str] = field(default_factory=set)
    """Names of peers that cannot be reached, either way: nothing passes and nothing fails until they are removed."""
    delay_polls: int = 0
    """Polls that each new operation waits before it begins."""
    fail_next: int = 0
    """Coming operations that fail after their first piece has landed."""
    corrupt_next: int = 0
    """Coming operations whose first byte arrives inverted, without an error."""
    reorder_notes: bool = False
    """Notes that arrive here between two polls are delivered in reverse order."""


@dataclass(slots=True)
class _Move:
    """An operation. `row` and `offset_bytes` say where copying goes on."""

    is_write: bool
    local: Extents
    remote: Extents
    note: bytes
    delay_polls: int
    fails: bool
    corrupts: bool
    row: int = 0
    offset_bytes: int = 0
    landed_bytes: int = 0
    on_the_wire: bool = False
    cancelled: bool = False

    @property
    def all_landed(self) -> bool:
        return self.row == len(self.local)

    def copy(self, budget_bytes: int) -> int:
        """Copy up to `budget_bytes`, return how many."""
        source, target = (self.local, self.remote) if self.is_write else (self.remote, self.local)
        copied = 0
        while copied < budget_bytes and not self.all_landed:
            start, size = int(source.table[self.row, 0]), int(source.table[self.row, 1])
            piece = min(size - self.offset_bytes, budget_bytes - copied)
            to = int(target.table[self.row, 0]) + self.offset_bytes
            ctypes.memmove(to, start + self.offset_bytes, piece)
            if self.corrupts and piece:
                first = ctypes.c_ubyte.from_address(to)
                first.value ^= 0xFF
                self.corrupts = False
            copied += piece
            self.offset_bytes += piece
            if self.offset_bytes == size:
                self.row, self.offset_bytes = self.row + 1, 0
        self.landed_bytes += copied
        return copied


@dataclass(frozen=True, slots=True)
class _Peer:
    transport: InprocTransport
    regions: RegionMap


class InprocTransport(Transport):
    """See the module's text. Calls come from the owner thread; `faults` is the test's."""

    scheme: ClassVar[str] = "inproc"
    capabilities: ClassVar[Capabilities] = Capabilities(
        kinds=frozenset({MemoryKind.DRAM}),
        one_sided=True,
        target_checks_bounds=True,
        cross_process=False,
        loss_is_fence=True,
    )

    def __init__(self, name: str, netloc: str = "", options: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError (options), StateError (the name is in use in this process)."""
        super().__init__(name)
        options = options or {}
        parse_options(self.scheme, netloc, options, ("piece_bytes",))
        self._piece_bytes = int_option(self.scheme, options, "piece_bytes", _PIECE_BYTES, 1, 1 << 40)
        self.faults = Faults()
        self._owner = OwnerThread(f"inproc transport {name}")
        self._closed = False
        self._regions: list[Region] = []
        self._ours = RegionMap()
        self._ours_lock = threading.Lock()
        self._peers: dict[PeerId, _Peer] = {}
        self._ops: OpTable[_Move] = OpTable()
        self._inbox: deque[Notification] = deque()
        self._outbox: list[tuple[PeerId, bytes]] = []
        with _live_lock:
            if name in _live:
                raise StateError(f"a transport named {name} lives in this process already")
            _live[name] = self

    @property
    def gone(self) -> bool:
        """As peers see it: closed, or dead by its faults. Any thread."""
        return self._closed or self.faults.dead

    def _open(self) -> None:
        self._owner.check()
        if self._closed:
            raise StateError(f"transport {self.name} is closed")

    def register(self, region: Region) -> None:
        self._owner.check()
        if self._closed:
            raise RegistrationError(f"transport {self.name} is closed")
        check_region(region, self.capabilities.kinds)
        self._regions.append(region)
        with self._ours_lock:
            self._ours.add(region)

    def export(self) -> bytes:
        self._open()
        return encode_export(self.scheme, self.name, self._regions, b"")

    def connect(self, exported: bytes) -> PeerId:
        self._open()
        card = decode_export(self.scheme, exported)
        peer = PeerId(card.name)
        if peer == self.name:
            raise ConnectError(f"{peer} is this transport itself")
        if peer in self._peers:
            raise StateError(f"already connected to {peer}")
        with _live_lock:
            transport = _live.get(peer)
        if transport is None or transport.gone:
            raise ConnectError(f"no transport named {peer} lives in this process")
        self._peers[peer] = _Peer(transport, RegionMap(card.regions))
        return peer

    def disconnect(self, peer: PeerId) -> None:
        self._open()
        self._peer(peer)
        if self._ops.busy(peer):
            raise StateError(f"{self._ops.busy(peer)} operations to {peer} are in flight")
        self._forget(peer)

    def _peer(self, peer: PeerId) -> _Peer:
        if peer not in self._peers:
            raise StateError(f"not connected to {peer}")
        return self._peers[peer]

    def _forget(self, peer: PeerId) -> None:
        del self._peers[peer]
        self._outbox = [(to, note) for to, note in self._outbox if to != peer]

    def write(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        return self._post(True, peer, local, remote, note)

    def read(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        return self._post(False, peer, local, remote, note)

    def _post(self, is_write: bool, peer: PeerId, local: Extents, remote: Extents, note: bytes) -> OpId:
        self._open()
        there = self._peer(peer)
        if there.transport.gone:
            raise PeerLostError(f"{peer} is gone")
        local, remote = merge_checked(local, self._ours, remote, there.regions)
        faults = self.faults
        fails, corrupts = faults.fail_next > 0, faults.corrupt_next > 0
        faults.fail_next -= fails
        faults.corrupt_next -= corrupts
        on_the_wire = faults.hold or self._cut_off(there.transport)
        move = _Move(is_write, local, remote, note, faults.delay_polls, fails, corrupts, on_the_wire=on_the_wire)
        return self._ops.start(peer, move)

    def notify(self, peer: PeerId, note: bytes) -> None:
        self._open()
        there = self._peer(peer)
        if not note:
            raise StateError("an empty note says nothing")
        if there.transport.gone:
            raise PeerLostError(f"{peer} is gone")
        self._outbox.append((peer, note))
        self._send_notes()

    def poll(self) -> list[Event]:
        self._open()
        if self.faults.stall or self.faults.dead:
            return []
        budget_bytes = self._piece_bytes
        for op, (peer, move) in list(self._ops.flying.items()):
            budget_bytes -= self._advance(op, peer, move, budget_bytes)
        self._send_notes()
        events: list[Event] = list(self._ops.drain())
        events += self._received()
        for peer in [p for p, there in self._peers.items() if there.transport.gone and not self._ops.busy(p)]:
            self._forget(peer)
            events.append(PeerLost(peer, "its transport is closed or dead"))
        return events

    def _received(self) -> list[Notification]:
        """Notes that have arrived since the last poll."""
        notes = [self._inbox.popleft() for _ in range(len(self._inbox))]
        return notes[::-1] if self.faults.reorder_notes else notes

    def _advance(self, op: OpId, peer: PeerId, move: _Move, budget_bytes: int) -> int:
        """One poll's worth of `op`; returns the bytes copied."""
        target = self._peers[peer].transport
        if target.gone:
            self._ops.settle(op, PeerLostError(f"{peer} died after {move.landed_bytes} bytes of operation {op}"))
            return 0
        if self.faults.hold or self._cut_off(target):
            move.on_the_wire = True
            return 0
        if move.cancelled:
            self._ops.settle(op, TransportError(f"operation {op} was cancelled after {move.landed_bytes} bytes"))
            return 0
        if move.delay_polls > 0:
            move.delay_polls -= 1
            return 0
        row = target.refuses(move.remote)
        if row is not None:
            self._ops.settle(op, ExtentError(f"{peer} refuses remote extent {row}: outside its registered memory"))
            return 0
        copied = move.copy(budget_bytes)
        if move.fails and (copied or move.all_landed):
            self._ops.settle(op, TransportError(f"operation {op} failed by injection after {copied} bytes"))
        elif move.all_landed and not target.faults.stall:
            if move.note:
                target.deliver(Notification(self.name, move.note))
            self._ops.settle(op, None)
        return copied

    def _cut_off(self, target: InprocTransport) -> bool:
        return target.name in self.faults.cut or self.name in target.faults.cut

    def _send_notes(self) -> None:
        waiting = []
        for peer, note in self._outbox:
            target = self._peers[peer].transport
            if self._cut_off(target) and not target.gone:
                waiting.append((peer, note))
            elif not target.gone:
                target.deliver(Notification(self.name, note))
        self._outbox = waiting

    def refuses(self, remote: Extents) -> int | None:
        """The target's own check, called from a peer's thread: index of the first row outside, or None."""
        with self._ours_lock:
            return self._ours.outside(remote)

    def deliver(self, note: Notification) -> None:
        """Called from a peer's thread."""
        self._inbox.append(note)

    def fds(self) -> list[int]:
        self._open()
        return []

    @property
    def in_flight(self) -> int:
        return self._ops.in_flight

    def cancel(self, op: OpId) -> None:
        """Stops where it is at the next poll, unless it is on the wire (`Faults.hold`, `Faults.cut`)."""
        self._open()
        if op in self._ops.flying:
            peer, move = self._ops.flying[op]
            move.on_the_wire |= self.faults.hold or self._cut_off(self._peers[peer].transport)
            move.cancelled = not (move.on_the_wire or move.all_landed)
        elif not self._ops.known(op):
            raise StateError(f"operation {op} is unknown or was released before")

    def release(self, op: OpId) -> None:
        self._open()
        self._ops.release(op)

    def close(self) -> None:
        self._owner.check()
        if self._closed:
            return
        if self._ops.in_flight:
            raise StateError(f"{self._ops.in_flight} operations are in flight", hint="poll until none is, or abort()")
        self._end()

    def abort(self) -> None:
        self._owner.check()
        if not self._closed:
            self._end()

    def _end(self) -> None:
        self._closed = True
        with _live_lock:
            del _live[self.name]
        self._ops.clear()
        self._peers.clear()
        self._outbox.clear()


__all__ = ["Faults", "InprocTransport"]
