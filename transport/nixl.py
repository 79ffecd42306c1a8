"""nixl://: one-sided WRITE and READ by NIXL's UCX plug-in, DRAM and VRAM. The only module that imports nixl.

    nixl://?progress=poll|event&threads=N&split_batch_size=N

`progress=poll` (default): no thread of NIXL's; `poll` drives everything, so both sides must call it. `progress=event`:
NIXL's progress thread, woken by UCX instead of spinning. `threads=N` copies in N threads of NIXL's where one operation
has at least `split_batch_size` extents (while a peer is stuck in mid-operation these threads spin).

What NIXL does not do, and what follows:

* It cannot cancel: `cancel` changes nothing, and an operation once posted runs to its end even when its handle is
  released or the peer removed. Only its Completion proves that nothing more lands.
* It sees only *dead* peers, and only by an operation or a notify: a peer that died while nothing was in flight is found
  by the next call to it. A peer that is stuck or cut off gives neither an error nor a Completion.
* It checks bounds only at the caller, so this module does that, and the target enforces nothing.
* Where UCX copies with CMA (same host) the copying is done inside `write` and `read`, unless `threads` > 0.
* The note of an operation leaves when the *initiator* polls after its bytes have landed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from lmkv.errors import (
    ConfigError,
    ConnectError,
    PeerLostError,
    RegistrationError,
    SchemeError,
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
from .nixl_agent import open_agent


def _import_nixl() -> tuple[Any, Any]:
    """NIXL's Python wrapper and its bindings, with the settings UCX and NIXL read while they load."""
    # Unbounded, UCX's registration cache keeps every unmapped region it has ever seen.
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")
    # Every error reaches the caller as an exception; a peer's death would otherwise print lines for each operation.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    # The package `nixl` imports torch to choose among the wheels (seconds, where torch is not loaded anyway). Where
    # only one is installed there is nothing to choose.
    wheels = [name for name in ("nixl_cu12", "nixl_cu13", "nixl_rocm") if find_spec(name)]
    package = wheels[0] if len(wheels) == 1 else "nixl"
    raise_exceptions = logging.raiseExceptions
    try:
        return import_module(f"{package}._api"), import_module(f"{package}._bindings")
    finally:
        # NIXL turns off the whole process's logging errors while it configures its own logger.
        logging.raiseExceptions = raise_exceptions


_api, _bindings = _import_nixl()

_log = logging.getLogger(__name__)

_NIXL_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(_bindings, name) for name in dir(_bindings) if name.startswith("nixl") and name.endswith("Error")
)
"""NIXL's exceptions have no common base."""

_START_ERRORS: tuple[type[Exception], ...] = (*_NIXL_ERRORS, RuntimeError)

_SPLIT_BATCH_SIZE = 64


class NixlTransport(Transport):
    """See the module's text. All calls come from the owner thread, or raise StateError.

    `Region.owner` is kept until the transport itself is garbage: on one host a peer may write by process id even after
    `close`, so the caller keeps the memory mapped until its process ends.
    """

    scheme: ClassVar[str] = "nixl"
    capabilities: ClassVar[Capabilities] = Capabilities(
        kinds=frozenset({MemoryKind.DRAM, MemoryKind.VRAM}),
        one_sided=True,
        target_checks_bounds=False,
        cross_process=True,
    )

    def __init__(self, name: str, netloc: str = "", options: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError (options), SchemeError (this NIXL has no UCX plug-in or it does not start)."""
        super().__init__(name)
        options = options or {}
        parse_options(self.scheme, netloc, options, ("progress", "threads", "split_batch_size"))
        progress = options.get("progress", "poll")
        if progress not in ("poll", "event"):
            raise ConfigError(f"nixl:// option progress={progress!r}", hint="poll or event")
        init = {"ucx_error_handling_mode": "peer"}
        threads = int_option(self.scheme, options, "threads", 0, 0, 64)
        if threads:
            split = int_option(self.scheme, options, "split_batch_size", _SPLIT_BATCH_SIZE, 1, 1 << 20)
            init |= {"num_threads": str(threads), "split_batch_size": str(split)}
        try:
            self._agent, self.progress = open_agent(_api, _bindings, name, progress)
            self._agent.create_backend("UCX", init)
        except _START_ERRORS as error:
            raise SchemeError(
                f"NIXL's UCX plug-in does not start: {_text(error)}", hint="look at UCX_TLS and UCX_NET_DEVICES"
            ) from error
        self._init = init
        self._owner = OwnerThread(f"nixl transport {name}")
        self._closed = False
        self._regions: list[Region] = []
        self._ours = RegionMap()
        self._peers: dict[PeerId, RegionMap] = {}
        self._lost: dict[PeerId, str] = {}
        self._ops: OpTable[Any] = OpTable()

    def _open(self) -> None:
        self._owner.check()
        if self._closed:
            raise StateError(f"transport {self.name} is closed")

    # --- memory and peers ---

    def register(self, region: Region) -> None:
        self._owner.check()
        if self._closed:
            raise RegistrationError(f"transport {self.name} is closed")
        check_region(region, self.capabilities.kinds)
        row = [(region.address, region.bytes, region.device, "")]
        try:
            self._agent.register_memory(row, region.kind.value, backends=["UCX"])
        except _NIXL_ERRORS as error:
            raise RegistrationError(
                f"{region.bytes} bytes of {region.kind} at {region.address:#x}, device {region.device}: {_text(error)}",
                hint="VRAM needs a UCX with CUDA or ROCm and a current device context; DRAM may be over `ulimit -l`",
            ) from error
        self._regions.append(region)
        self._ours.add(region)

    def export(self) -> bytes:
        self._open()
        return encode_export(self.scheme, self.name, self._regions, self._agent.get_agent_metadata())

    def connect(self, exported: bytes) -> PeerId:
        """As the contract. UCX reaches the peer lazily, so an unreachable one is not seen here."""
        self._open()
        card = decode_export(self.scheme, exported)
        peer = PeerId(card.name)
        if peer == self.name:
            raise ConnectError(f"{peer} is this transport itself")
        if peer in self._peers:
            raise StateError(f"already connected to {peer}")
        try:
            added = self._agent.add_remote_agent(card.data)
        except _NIXL_ERRORS as error:
            raise ConnectError(f"NIXL cannot use the metadata of {peer}: {_text(error)}") from error
        # The wrapper gives bytes or str, by version.
        added = added.decode() if isinstance(added, bytes) else added
        if added != peer:
            self._agent.remove_remote_agent(added)
            raise ConnectError(f"the export of {peer} carries the metadata of {added}")
        self._peers[peer] = RegionMap(card.regions)
        return peer

    def disconnect(self, peer: PeerId) -> None:
        self._open()
        self._peer(peer)
        if self._ops.busy(peer):
            raise StateError(f"{self._ops.busy(peer)} operations to {peer} are in flight")
        self._remove(peer)

    def _peer(self, peer: PeerId) -> RegionMap:
        if peer in self._lost:
            raise PeerLostError(f"{peer} is gone: {self._lost[peer]}")
        if peer not in self._peers:
            raise StateError(f"not connected to {peer}")
        return self._peers[peer]

    def _remove(self, peer: PeerId) -> None:
        del self._peers[peer]
        self._lost.pop(peer, None)
        try:
            self._agent.remove_remote_agent(peer)
        except _bindings.nixlNotFoundError:
            # Newer versions drop the metadata of a disconnected peer themselves; then there is nothing left to remove.
            _log.debug("NIXL had dropped %s already", peer)

    # --- operations ---

    def write(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        return self._post("WRITE", peer, local, remote, note)

    def read(self, peer: PeerId, local: Extents, remote: Extents, note: bytes = b"") -> OpId:
        return self._post("READ", peer, local, remote, note)

    def _post(self, operation: str, peer: PeerId, local: Extents, remote: Extents, note: bytes) -> OpId:
        self._open()
        local, remote = merge_checked(local, self._ours, remote, self._peer(peer))
        agent = self._agent
        try:
            # One call for any number of extents: prepared lists only pay where the same rows are used again, and
            # their indices cost more than these rows do.
            handle = agent.initialize_xfer(
                operation,
                agent.get_xfer_descs(local.table, local.kind),
                agent.get_xfer_descs(remote.table, remote.kind),
                peer,
                note,
            )
        except _NIXL_ERRORS as error:
            raise self._error(peer, error, f"{operation} of {len(local)} extents refused") from error
        op = self._ops.start(peer, handle)
        try:
            state = agent.transfer(handle)
        except _NIXL_ERRORS as error:
            self._ops.settle(op, self._error(peer, error, f"{operation} cannot be posted"))
        else:
            self._progressed(op, state)
        return op

    def _progressed(self, op: OpId, state: str) -> None:
        if state == "DONE":
            self._ops.settle(op, None)
        elif state != "PROC":
            self._ops.settle(op, TransportError(f"NIXL reports state {state} for operation {op}"))

    def _error(self, peer: PeerId, error: Exception, what: str) -> TransportError:
        """The typed error; a disconnect also marks the peer as lost."""
        if isinstance(error, _bindings.nixlRemoteDisconnectError):
            self._lost.setdefault(peer, _text(error))
        if peer in self._lost:
            return PeerLostError(f"{what}: {peer} is gone: {self._lost[peer]}")
        return TransportError(f"{what} by NIXL for {peer}: {_text(error)}")

    def notify(self, peer: PeerId, note: bytes) -> None:
        self._open()
        self._peer(peer)
        if not note:
            raise StateError("an empty note says nothing")
        try:
            self._agent.send_notif(peer, note)
        except _NIXL_ERRORS as error:
            raise self._error(peer, error, "notify failed") from error

    def poll(self) -> list[Event]:
        self._open()
        if self._ops.flying:
            self._check_flying()
        events: list[Event] = list(self._ops.drain())
        for name, notes in self._agent.get_new_notifs().items():
            events += [Notification(PeerId(name), note) for note in notes]
        # A lost peer's other operations are polled to their own end: until then their bytes may still land here.
        for peer in [p for p in self._lost if not self._ops.busy(p)]:
            reason = self._lost[peer]
            self._remove(peer)
            events.append(PeerLost(peer, reason))
        return events

    def _check_flying(self) -> None:
        for op, (peer, handle) in list(self._ops.flying.items()):
            try:
                state = self._agent.check_xfer_state(handle)
            except _NIXL_ERRORS as error:
                self._ops.settle(op, self._error(peer, error, f"operation {op} failed"))
            else:
                self._progressed(op, state)

    def fds(self) -> list[int]:
        self._open()
        return []

    @property
    def in_flight(self) -> int:
        return self._ops.in_flight

    def cancel(self, op: OpId) -> None:
        """Changes nothing: NIXL cannot cancel. Raises StateError for an operation that is unknown."""
        self._open()
        if not self._ops.known(op):
            raise StateError(f"operation {op} is unknown or was released before")

    def release(self, op: OpId) -> None:
        self._open()
        self._release_handle(self._ops.release(op))

    def _release_handle(self, handle: Any) -> None:
        try:
            self._agent.release_xfer_handle(handle)
        except _NIXL_ERRORS as error:
            # NIXL keeps such a handle and frees it with the agent; the operation itself is over for the caller.
            _log.warning("NIXL did not release %r: %s", handle, _text(error))

    # --- a new agent ---

    def replace(self, name: str) -> tuple[list[OpId], list[PeerId]]:
        """As the contract. The old agent's sockets are closed and its keys void, so nothing lands through it any more;
        a process of this host that copies by CMA or CUDA IPC needs neither."""
        self._open()
        ops, peers = self._ops.unsettled(), list(self._peers)
        self._end()
        self._peers.clear()
        self._lost.clear()
        try:
            self._agent, self.progress = open_agent(_api, _bindings, name, self.progress)
            self._agent.create_backend("UCX", self._init)
            for region in self._regions:
                row = [(region.address, region.bytes, region.device, "")]
                self._agent.register_memory(row, region.kind.value, backends=["UCX"])
        except _START_ERRORS as error:
            raise SchemeError(f"no new NIXL agent: {_text(error)}", hint="restart this engine") from error
        self.name, self._closed = PeerId(name), False
        return ops, peers

    # --- the end ---

    def close(self) -> None:
        """As the contract. A notify sent to a peer never reached before may not have left yet: poll before closing."""
        self._owner.check()
        if self._closed:
            return
        if self._ops.in_flight:
            raise StateError(f"{self._ops.in_flight} operations are in flight", hint="poll until none is, or abort()")
        self._end()

    def abort(self) -> None:
        """At once. What was posted may still land at the peers, and this process's memory may still be written to."""
        self._owner.check()
        if not self._closed:
            self._end()

    def _end(self) -> None:
        self._closed = True
        for handle in self._ops.clear():
            self._release_handle(handle)
        for peer in list(self._peers):
            self._remove(peer)
        # The agent goes with its last reference: threads joined, sockets closed, registrations given back.
        del self._agent


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


__all__ = ["NixlTransport"]
