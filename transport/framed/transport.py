"""Peers, operations and events over channels. A back end adds how channels are opened, accepted and waited for."""

from __future__ import annotations

import logging
import secrets
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterable
from time import monotonic
from typing import ClassVar

import msgspec

from lmkv.errors import (
    ConfigError,
    ConnectError,
    PeerLostError,
    RegistrationError,
    StateError,
    TransportError,
    WireError,
)

from ..base import Capabilities, Event, Notification, OpId, PeerId, PeerLost, Region, Transport
from ..common import OpTable, OwnerThread, RegionMap, check_region, decode_export, encode_export, merge_checked
from ..extents import Extents, MemoryKind
from .channel import Channel, ChannelClosed
from .conduit import Conduit
from .frames import NOTE_BYTES_LIMIT, TOKEN_BYTES, Location, pack_hello
from .initiator import Direction, Initiator, InitiatorOwner, Operation
from .memory import Memory
from .target import Scratch, Target, TargetOwner

_log = logging.getLogger(__name__)

_CONDUIT_BUDGET_BYTES = 4 << 20
_POLL_BUDGET_BYTES = 32 << 20
"""A `poll` moves at most this much over all channels, about 10 ms of copying; it is used up in turns."""

_CALL_BUDGET_BYTES = 1 << 20
"""What `write`, `read` and `notify` may send at once: small ones need no poll to get going."""

_TARGETS_LIMIT = 1024
_STRANGERS_LIMIT = 128
_HELLO_TIMEOUT_S = 10.0
_LOST_NAMES_LIMIT = 4096

_LAST_WORDS_S = 1.0
"""How long a peer that is lost to us, but not dead, may go on with what it sends us."""


class _Peer:
    __slots__ = ("initiator", "lost", "lost_s", "regions")

    def __init__(self, initiator: Initiator, regions: RegionMap) -> None:
        self.initiator = initiator
        self.regions = regions
        self.lost = ""
        """Why, once the channel has ended; PeerLost is still to come."""
        self.lost_s = 0.0


class FramedTransport(Transport, InitiatorOwner, TargetOwner):
    """All calls come from the owner thread, or raise StateError. Nothing waits.

    Closing a channel is a fence: after `abort`, after PeerLost, nothing of that peer's writes lands any more.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        kinds=frozenset({MemoryKind.DRAM}),
        one_sided=False,
        target_checks_bounds=True,
        cross_process=True,
        loss_is_fence=True,
    )

    def __init__(self, name: str) -> None:
        """Raises ConfigError for a name that cannot be sent."""
        super().__init__(name)
        self._token = secrets.token_bytes(TOKEN_BYTES)
        try:
            pack_hello(name, self._token)
        except WireError as error:
            raise ConfigError(error.message) from error
        self._owner = OwnerThread(f"{self.scheme} transport {name}")
        self._closed = False
        self._memory = Memory()
        self._ours = RegionMap()
        self._scratch = Scratch()
        self._peers: dict[PeerId, _Peer] = {}
        self._targets: set[Target] = set()
        self._strangers: dict[Target, float] = {}
        """Targets without a hello, oldest first, and the time by which it must have come."""
        self._ops: OpTable[None] = OpTable()
        self._events: deque[Event] = deque()
        self._lost_names: OrderedDict[str, str] = OrderedDict()
        self._first = 0

    # --- what a back end adds ---

    @abstractmethod
    def _address(self) -> bytes:
        """Where peers reach us, for the export."""

    @abstractmethod
    def _dial(self, location: Location) -> Channel:
        """Begin to open a channel. Raises ConnectError when it is known at once that it cannot be."""

    @abstractmethod
    def _ready(self) -> Iterable[Conduit]:
        """Accept what has come (by `_accepted`) and say which conduits may have work. Does not wait."""

    @abstractmethod
    def _attached(self, conduit: Conduit) -> None:
        """A new conduit: `_ready` is to report it."""

    @abstractmethod
    def _served(self, conduit: Conduit) -> None:
        """The conduit's wishes (`wants_send`, `wants_receive`) may have changed."""

    @abstractmethod
    def _detached(self, conduit: Conduit) -> None:
        """The conduit is about to be closed."""

    @abstractmethod
    def _wake(self, work: bool) -> None:
        """Whether there is work that no channel tells of: then a descriptor of `fds` must be readable."""

    @abstractmethod
    def _shutdown(self) -> None:
        """All channels are closed; give back the rest."""

    # --- memory and peers ---

    def _open(self) -> None:
        self._owner.check()
        if self._closed:
            raise StateError(f"transport {self.name} is closed")

    def register(self, region: Region) -> None:
        self._owner.check()
        if self._closed:
            raise RegistrationError(f"transport {self.name} is closed")
        check_region(region, self.capabilities.kinds)
        self._memory.add(region)
        self._ours.add(region)

    def export(self) -> bytes:
        self._open()
        data = msgspec.msgpack.encode(Location(self._address(), self._token))
        return encode_export(self.scheme, self.name, self._memory.regions, data)

    def connect(self, exported: bytes) -> PeerId:
        """As the contract, without waiting: a peer that turns out to be unreachable later is reported by PeerLost."""
        self._open()
        card = decode_export(self.scheme, exported)
        peer = PeerId(card.name)
        if peer == self.name:
            raise ConnectError(f"{peer} is this transport itself")
        if peer in self._peers:
            raise StateError(f"already connected to {peer}")
        try:
            location = msgspec.msgpack.decode(card.data, type=Location)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConnectError(f"the export of {peer} says not where it is: {error}") from error
        if len(location.token) != TOKEN_BYTES:
            raise ConnectError(f"the export of {peer} has a token of {len(location.token)} bytes")
        channel = self._dial(location)
        # The caller takes it back. Channels that it opened before the loss have been refused since.
        self._lost_names.pop(peer, None)
        initiator = Initiator(channel, self, self._memory, us=self.name, peer=peer, token=location.token)
        self._peers[peer] = _Peer(initiator, RegionMap(card.regions))
        self._attached(initiator)
        self._kick(initiator)
        if initiator.broken:
            self._drop_initiator(self._peers.pop(peer).initiator)
            raise ConnectError(f"{peer} cannot be reached: {initiator.broken}", hint="is that engine up?")
        return peer

    def disconnect(self, peer: PeerId) -> None:
        self._open()
        self._peer(peer)
        if self._ops.busy(peer):
            raise StateError(f"{self._ops.busy(peer)} operations to {peer} are in flight")
        self._drop_initiator(self._peers.pop(peer).initiator)

    def _peer(self, peer: PeerId) -> _Peer:
        found = self._peers.get(peer)
        if found is None:
            raise StateError(f"not connected to {peer}")
        if found.lost:
            raise PeerLostError(f"{peer} is gone: {found.lost}")
        return found

    # --- operations ---

    def write(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        return self._start(Direction.WRITE, peer, local, remote, note)

    def read(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        return self._start(Direction.READ, peer, local, remote, note)

    def _start(self, direction: Direction, peer: PeerId, local: Extents, remote: Extents, note: bytes) -> OpId:
        self._open()
        found = self._peer(peer)
        _check_note(note)
        local, remote = merge_checked(local, self._ours, remote, found.regions)
        op = self._ops.start(peer, None)
        found.initiator.start(Operation(direction, op, local, remote, note))
        self._kick(found.initiator)
        return op

    def notify(self, peer: PeerId, note: bytes) -> None:
        """As the contract; also StateError when the peer has not read for so long that too many notes wait for it."""
        self._open()
        found = self._peer(peer)
        if not note:
            raise StateError("an empty note says nothing")
        _check_note(note)
        found.initiator.notify(note)
        self._kick(found.initiator)

    def cancel(self, op: OpId) -> None:
        """Not begun, it is dropped; begun, no more frames of it are sent and it completes when the peer has answered
        those that were. Either way with an error, unless all had been sent. Raises StateError: unknown operation."""
        self._open()
        if op in self._ops.flying:
            initiator = self._peers[self._ops.flying[op][0]].initiator
            initiator.cancel(op)
            self._kick(initiator)
        elif not self._ops.known(op):
            raise StateError(f"operation {op} is unknown or was released before")

    def release(self, op: OpId) -> None:
        self._open()
        self._ops.release(op)

    @property
    def in_flight(self) -> int:
        return self._ops.in_flight

    def settled(self, op: OpId, error: TransportError | None) -> None:
        self._ops.settle(op, error)

    # --- what peers do ---

    def _accepted(self, channel: Channel, what: str) -> None:
        """For back ends: a channel opened by someone; `what` says who, for the log."""
        if len(self._strangers) >= _STRANGERS_LIMIT:
            self._ended(next(iter(self._strangers)), "too many channels without a hello")
        if len(self._targets) >= _TARGETS_LIMIT:
            _log.warning("%s: refused %s: %d channels are open", self.name, what, len(self._targets))
            channel.close()
            return
        target = Target(channel, self, self._memory, self._scratch, us=self.name, token=self._token)
        self._targets.add(target)
        self._strangers[target] = monotonic() + _HELLO_TIMEOUT_S
        self._attached(target)

    def admits(self, target: Target, name: str) -> bool:
        self._strangers.pop(target, None)
        # A dead peer's last channel may be accepted after its death was reported; its bytes must not land then.
        return name != self.name and name not in self._lost_names

    def noted(self, name: str, note: bytes) -> None:
        self._events.append(Notification(PeerId(name), note))

    # --- progress ---

    def poll(self) -> list[Event]:
        self._open()
        ready = list(self._ready())
        budget = _POLL_BUDGET_BYTES
        self._first += 1
        for i in range(len(ready)):
            # Who was served first last time is served last now, so a spent budget starves nobody.
            conduit = ready[(i + self._first) % len(ready)]
            budget -= self._serve(conduit)
            if budget <= 0:
                break
        self._drop_strangers()
        lost = self._lost_peers()
        events: list[Event] = [*self._ops.drain(), *self._events, *lost]
        self._events.clear()
        self._update_wake()
        return events

    def _serve(self, conduit: Conduit) -> int:
        used = 0
        try:
            used += conduit.pump_out(_CONDUIT_BUDGET_BYTES)
            taken = conduit.pump_in(_CONDUIT_BUDGET_BYTES)
            if taken:
                used += taken + conduit.pump_out(_CONDUIT_BUDGET_BYTES)
        except ChannelClosed as error:
            self._ended(conduit, str(error))
        else:
            self._served(conduit)
        return used

    def _kick(self, initiator: Initiator) -> None:
        # An initiator whose channel breaks here says so when it is served: its last answers are taken in first.
        initiator.pump_out(_CALL_BUDGET_BYTES)
        self._served(initiator)
        self._update_wake()

    def _update_wake(self) -> None:
        self._wake(bool(self._events) or self._ops.in_flight > len(self._ops.flying) or self._any_lost())

    def _any_lost(self) -> bool:
        return any(peer.lost for peer in self._peers.values())

    def _ended(self, conduit: Conduit, reason: str) -> None:
        if isinstance(conduit, Target):
            log = _log.info if conduit.greeted else _log.warning
            log("%s: channel from %s ended: %s", self.name, conduit.peer or "a stranger", reason)
            self._drop_target(conduit)
            return
        assert isinstance(conduit, Initiator)
        self._detached(conduit)
        conduit.channel.close()
        conduit.fail(reason)
        peer = self._peers[PeerId(conduit.peer)]
        peer.lost, peer.lost_s = reason, monotonic()

    def _drop_target(self, target: Target) -> None:
        self._targets.remove(target)
        self._strangers.pop(target, None)
        self._detached(target)
        target.channel.close()

    def _drop_initiator(self, initiator: Initiator) -> None:
        if not (initiator.idle or initiator.broken):
            _log.warning("%s: notes to %s had not left when it was disconnected", self.name, initiator.peer)
        self._detached(initiator)
        initiator.channel.close()

    def _drop_strangers(self) -> None:
        if not self._strangers:
            return
        now = monotonic()
        for target in [t for t, deadline in self._strangers.items() if deadline < now]:
            self._ended(target, f"no hello within {_HELLO_TIMEOUT_S:.0f} s")

    def _lost_peers(self) -> list[PeerLost]:
        """PeerLost for each peer whose own channels to us have been read to their end, and are closed."""
        if not self._any_lost():
            return []
        out = []
        for name, peer in [(n, p) for n, p in self._peers.items() if p.lost]:
            theirs = [t for t in self._targets if t.peer == name]
            moved = sum(self._serve(target) for target in theirs)
            if moved and monotonic() < peer.lost_s + _LAST_WORDS_S:
                continue
            for target in theirs:
                if target in self._targets:
                    self._drop_target(target)
            del self._peers[name]
            self._lost_names[name] = peer.lost
            if len(self._lost_names) > _LOST_NAMES_LIMIT:
                self._lost_names.popitem(last=False)
            out.append(PeerLost(name, peer.lost))
        return out

    # --- the end ---

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
        for target in list(self._targets):
            self._drop_target(target)
        for peer in self._peers.values():
            if not peer.lost:
                self._detached(peer.initiator)
                peer.initiator.channel.close()
        self._peers.clear()
        self._ops.clear()
        self._events.clear()
        self._shutdown()


def _check_note(note: bytes) -> None:
    if len(note) > NOTE_BYTES_LIMIT:
        raise StateError(f"a note of {len(note)} bytes; up to {NOTE_BYTES_LIMIT} are allowed")
