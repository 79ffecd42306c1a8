"""Our operations on a peer's memory, over the channel that we opened to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from lmkv.errors import ExtentError, PeerLostError, StateError, TransportError, WireError

from ..base import OpId
from ..extents import Extents
from .channel import Channel, ChannelClosed
from .conduit import Conduit
from .frames import (
    FRAME_BYTES,
    FRAME_ROWS,
    HELLO_BYTES,
    READ_WINDOW,
    VERSION,
    Frame,
    Greeting,
    Hello,
    Kind,
    Status,
    pack_frame,
    pack_hello,
    pack_rows,
)
from .memory import Memory

_NOTES_LIMIT_BYTES = 16 << 20
"""Notes that wait for a peer that does not read."""

_REFUSALS = {
    Greeting.VERSION: "it speaks version {version} of the channel protocol, we speak {ours}",
    Greeting.TOKEN: "it does not know our token: its export is outdated, or another process has its address",
    Greeting.NAME: "it refuses our name: it holds us for dead, or the name is its own",
}


class Direction(Enum):
    WRITE = auto()
    READ = auto()


class Operation:
    """One write or read: its pieces, and how far it is. Belongs to one Initiator.

    `pieces` is (n, 3): local address, remote address, bytes; none empty, none over FRAME_BYTES.
    """

    __slots__ = ("_ends", "cut_short", "direction", "error", "next", "note", "op", "pieces", "started", "unanswered")

    def __init__(self, direction: Direction, op: OpId, local: Extents, remote: Extents, note: bytes) -> None:
        self.direction = direction
        self.op = op
        self.note = note
        self.pieces = _cut(local, remote)
        self._ends: list[int] = np.cumsum(self.pieces[:, 2], dtype=np.uint64).tolist()
        self.next = 0
        self.started = False
        """Something of it has been handed on; until then it can be withdrawn without a trace."""
        self.unanswered = 0
        """READs sent and not answered."""
        self.cut_short = False
        """Nothing more of it is to be started: cancelled, or refused by the peer."""
        self.error: TransportError | None = None

    @property
    def exhausted(self) -> bool:
        return self.cut_short or self.next == len(self.pieces)

    def stop(self, error: TransportError) -> None:
        self.cut_short = True
        self.error = self.error or error

    def take(self) -> NDArray[np.uint64]:
        """The pieces of the next frame."""
        begin = self.next
        done = self._ends[begin - 1] if begin else 0
        limit = min(begin + FRAME_ROWS, len(self._ends))
        self.next = bisect_right(self._ends, done + FRAME_BYTES, begin, limit)
        return self.pieces[begin : self.next]


def _cut(local: Extents, remote: Extents) -> NDArray[np.uint64]:
    """Rows as pieces of at most FRAME_BYTES, without empty ones."""
    rows = np.column_stack((local.table[:, 0], remote.table[:, 0], local.table[:, 1]))
    rows = rows[rows[:, 2] > 0]
    if not len(rows) or int(rows[:, 2].max()) <= FRAME_BYTES:
        return rows
    limit = np.uint64(FRAME_BYTES)
    counts = ((rows[:, 2] + limit - np.uint64(1)) // limit).astype(np.intp)
    pieces = np.repeat(rows, counts, axis=0)
    firsts = np.cumsum(counts) - counts
    offsets = (np.arange(len(pieces)) - np.repeat(firsts, counts)).astype(np.uint64) * limit
    pieces[:, 0] += offsets
    pieces[:, 1] += offsets
    pieces[:, 2] = np.minimum(pieces[:, 2] - offsets, limit)
    return pieces


class InitiatorOwner(ABC):
    """What an initiator tells the transport."""

    @abstractmethod
    def settled(self, op: OpId, error: TransportError | None) -> None:
        """`op` is terminal."""


class Initiator(Conduit):
    """Sends WRITE, READ, END and NOTE; takes DATA, REFUSED and DONE. Operations take turns by the frame."""

    def __init__(self, channel: Channel, owner: InitiatorOwner, memory: Memory, *, us: str, peer: str, token: bytes):
        super().__init__(channel, peer)
        self._owner = owner
        self._memory = memory
        hello = memoryview(pack_hello(us, token))
        self._put([hello[:HELLO_BYTES], hello[HELLO_BYTES:]])
        self._turns: deque[Operation] = deque()
        self._operations: dict[OpId, Operation] = {}
        self._reads: deque[tuple[Operation, list[memoryview]]] = deque()
        self._notes: deque[memoryview] = deque()
        self._notes_bytes = 0
        self._send_error: ChannelClosed | None = None

    # --- calls of the transport ---

    def start(self, operation: Operation) -> None:
        self._operations[operation.op] = operation
        self._turns.append(operation)

    def notify(self, note: bytes) -> None:
        """Raises StateError when the peer has not read for so long that no more notes are kept for it."""
        if self._notes_bytes + len(note) > _NOTES_LIMIT_BYTES:
            raise StateError(f"{self._notes_bytes} bytes of notes wait for {self.peer}", hint="it does not poll")
        self._notes.append(memoryview(note))
        self._notes_bytes += len(note)

    def cancel(self, op: OpId) -> None:
        """Start no more of `op`: not begun, it is over at once; begun, when the peer has answered what was sent."""
        operation = self._operations[op]
        if operation.exhausted and operation.started:
            return
        operation.stop(TransportError(f"operation {op} was cancelled"))
        if not operation.started:
            self._turns.remove(operation)
            self._settle(operation)
        elif operation.direction is Direction.READ:
            self._read_answered(operation)

    def fail(self, reason: str) -> None:
        """The channel has ended: every operation is over, whatever else was wrong with it."""
        self._turns.clear()
        self._reads.clear()
        for operation in list(self._operations.values()):
            operation.error = PeerLostError(f"{self.peer} is gone: {reason}")
            self._settle(operation)

    @property
    def broken(self) -> str:
        """Why nothing can be sent any more, or ""."""
        return str(self._send_error or "")

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent."""
        return not (self._staged or self._notes or self._turns)

    def _settle(self, operation: Operation) -> None:
        del self._operations[operation.op]
        self._owner.settled(operation.op, operation.error)

    # --- sending ---

    def pump_out(self, budget_bytes: int) -> int:
        """As Conduit. A channel that can no longer send may still hold answers: they are taken in before it counts as
        closed, so `pump_in` raises instead."""
        if self._send_error is None:
            try:
                return super().pump_out(budget_bytes)
            except ChannelClosed as error:
                self._send_error = error
        return 0

    @property
    def wants_send(self) -> bool:
        return self._send_error is None and super().wants_send

    def pump_in(self, budget_bytes: int) -> int:
        used = super().pump_in(budget_bytes)
        if self._send_error is not None and not used:
            raise self._send_error
        return used

    def _next_frame(self) -> Sequence[memoryview]:
        if self._notes:
            note = self._notes.popleft()
            self._notes_bytes -= len(note)
            return [memoryview(pack_frame(Frame(Kind.NOTE, note_bytes=len(note)))), note]
        for _ in range(len(self._turns)):
            operation = self._turns.popleft()
            if operation.direction is Direction.READ and not operation.exhausted and len(self._reads) >= READ_WINDOW:
                self._turns.append(operation)
                continue
            operation.started = True
            frame = self._write_frame if operation.direction is Direction.WRITE else self._read_frame
            if buffers := frame(operation):
                return buffers
        return ()

    def _write_frame(self, operation: Operation) -> list[memoryview]:
        buffers: list[memoryview] = []
        if not operation.exhausted:
            pieces = operation.take()
            head = pack_frame(Frame(Kind.WRITE, rows=len(pieces), op=operation.op))
            buffers = [memoryview(head), memoryview(pack_rows(pieces[:, 1:])), *self._local(pieces)]
        if operation.exhausted:
            note = b"" if operation.cut_short else operation.note
            buffers.append(memoryview(pack_frame(Frame(Kind.END, note_bytes=len(note), op=operation.op))))
            if note:
                buffers.append(memoryview(note))
        else:
            self._turns.append(operation)
        return buffers

    def _read_frame(self, operation: Operation) -> list[memoryview]:
        if operation.exhausted:
            # Only an operation without a single byte comes here: the others leave the turns with their last READ.
            self._read_answered(operation)
            return []
        pieces = operation.take()
        self._reads.append((operation, self._local(pieces)))
        operation.unanswered += 1
        if not operation.exhausted:
            self._turns.append(operation)
        head = pack_frame(Frame(Kind.READ, rows=len(pieces), op=operation.op))
        return [memoryview(head), memoryview(pack_rows(pieces[:, 1:]))]

    def _local(self, pieces: NDArray[np.uint64]) -> list[memoryview]:
        views, missing = self._memory.views(pieces[:, ::2])
        assert missing is None, "local extents were checked when the operation began"
        return views

    # --- receiving ---

    def _on_hello(self, hello: Hello, name: str) -> None:
        if hello.status in _REFUSALS:
            reason = _REFUSALS[Greeting(hello.status)].format(version=hello.version, ours=VERSION)
            raise ChannelClosed(f"the peer refused: {reason}")
        if hello.status != Greeting.WELCOME or hello.version != VERSION or name != self.peer:
            raise ChannelClosed(f"{name} answered for {self.peer} with version {hello.version}, status {hello.status}")

    def _accepts(self) -> bool:
        return True

    def _on_frame(self, frame: Frame, body: memoryview) -> Sequence[memoryview]:
        if frame.kind == Kind.DATA:
            operation, places = self._reads[0] if self._reads else (None, [])
            expected = sum(len(p) for p in places)
            if operation is None or operation.op != frame.op or expected != frame.value:
                raise WireError(f"data nobody asked for: operation {frame.op}, {frame.value} bytes")
            return places
        if frame.kind == Kind.REFUSED:
            self._refused(frame)
        elif frame.kind == Kind.DONE:
            self._done(frame)
        else:
            raise WireError(f"frame of kind {frame.kind} from a target")
        return ()

    def _on_payload(self, frame: Frame) -> None:
        operation, _ = self._reads.popleft()
        operation.unanswered -= 1
        self._read_answered(operation)

    def _refused(self, frame: Frame) -> None:
        operation = self._operations.get(OpId(frame.op))
        if operation is None:
            raise WireError(f"refusal of operation {frame.op}, which is not under way")
        operation.stop(ExtentError(f"{self.peer} refused an extent at {frame.value:#x}: outside its registered memory"))
        if operation.direction is Direction.WRITE:
            return
        if not self._reads or self._reads[0][0] is not operation:
            raise WireError(f"refusal of operation {frame.op} out of turn")
        self._reads.popleft()
        operation.unanswered -= 1
        self._read_answered(operation)

    def _read_answered(self, operation: Operation) -> None:
        """Settle a read that has nothing left to ask for and nothing unanswered."""
        if not operation.exhausted or operation.unanswered:
            return
        if operation in self._turns:
            self._turns.remove(operation)
        if operation.note and operation.error is None:
            self._notes.append(memoryview(operation.note))
            self._notes_bytes += len(operation.note)
        self._settle(operation)

    def _done(self, frame: Frame) -> None:
        operation = self._operations.get(OpId(frame.op))
        if operation is None or operation.direction is not Direction.WRITE or operation in self._turns:
            raise WireError(f"end of operation {frame.op}, which was not asked for")
        if frame.status != Status.OK:
            operation.stop(ExtentError(f"{self.peer} refused extents of operation {frame.op}"))
        self._settle(operation)
