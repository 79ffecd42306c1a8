"""Warming a peer's connections: writes that nobody reads. Loop thread only.

The first write of a connection wires it up: hundreds of ms that no request should pay. Its note asks the peer to
confirm (`wire.Warmed`): that the connection has reached it, and which number its side of the pair has then. Grants of
that number may be served over this connection, and over no other: when the peer loses the pair later, it loses the
connection with it. A number that was only told in a Hello may be over by the time that we connect.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict

from lmkv import wire
from lmkv.errors import ConnectError, TransportError
from lmkv.ids import Incarnation
from lmkv.transfer.events import Peer
from lmkv.transport import Extents, MemoryKind, OpId, PeerId, Transport

from .pal import Pal

logger = logging.getLogger(__name__)

MOST_NOTES = 2048


class Warming:
    """`scratch` are our registered throw-away bytes."""

    def __init__(self, transport: Transport, scratch: Extents) -> None:
        self._transport = transport
        self._scratch = scratch
        self._ops: dict[OpId, tuple[Peer, int]] = {}
        """Whom each warms, and the serial of the connection: one that has ended may keep its operations for long."""
        self._serials = itertools.count(1)
        self._notes: OrderedDict[PeerId, int] = OrderedDict()
        """The last note that came over each connection. The peer may have connected before we were introduced."""

    # --- ours ---

    def serial(self) -> int:
        """A number for a connection of ours."""
        return next(self._serials)

    def remote(self, worker: wire.WorkerCard) -> Extents:
        """Returns the bytes of a peer that warming and probing write to, as many as our own scratch has. Raises
        ConnectError."""
        if worker.scratch_kind not in list(MemoryKind):
            raise ConnectError(f"its scratch lies in {worker.scratch_kind!r}", hint=f"known: {', '.join(MemoryKind)}")
        if not (0 <= worker.scratch_address < 1 << 63 and 0 <= worker.scratch_device < 1 << 31):
            raise ConnectError(f"its scratch is at {worker.scratch_address} on device {worker.scratch_device}")
        row = (worker.scratch_address, self._scratch.total_bytes)
        return Extents.of(row, device=worker.scratch_device, kind=MemoryKind(worker.scratch_kind))

    def start(self, pal: Pal, own: Incarnation) -> None:
        note = wire.encode(wire.WarmNote(own, pal.serial))
        try:
            op = self._transport.write(pal.transport_id, self._scratch, self.remote(pal.worker), note)
        except TransportError as error:
            # A death is told by PeerLost with the next poll, anything else ends as silence.
            logger.debug("peer %s cannot be reached: %s", pal.name, error)
            return
        self._ops[op] = pal.peer, pal.serial

    def ended(self, op: OpId) -> tuple[Peer, int] | None:
        """Whom it was to warm, over which connection (its serial); None if it is not ours."""
        return self._ops.pop(op, None)

    def is_ours(self, op: OpId) -> bool:
        return op in self._ops

    @property
    def serials(self) -> set[int]:
        """The connections that are being warmed."""
        return {serial for _, serial in self._ops.values()}

    # --- theirs ---

    def note_came(self, transport_id: PeerId, serial: int) -> None:
        self._notes[transport_id] = max(serial, self._notes.get(transport_id, 0))  # notes overtake each other
        self._notes.move_to_end(transport_id)
        while len(self._notes) > MOST_NOTES:
            self._notes.popitem(last=False)

    def asked(self, transport_id: PeerId) -> int | None:
        """The serial that the peer wants to have confirmed."""
        return self._notes.get(transport_id)

    def forget(self, transport_id: PeerId) -> None:
        """The connection has ended."""
        self._notes.pop(transport_id, None)

    def clear(self) -> None:
        """All connections have."""
        self._ops.clear()
        self._notes.clear()
