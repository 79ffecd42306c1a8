"""A peer's operations on our memory, over a channel that it opened to us."""

from __future__ import annotations

import hmac
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from lmkv.errors import WireError

from .channel import Channel, ChannelClosed
from .conduit import Conduit
from .frames import (
    FRAME_BYTES,
    HELLO_BYTES,
    READ_WINDOW,
    REFUSED_OPS_LIMIT,
    TOKEN_BYTES,
    VERSION,
    Frame,
    Greeting,
    Hello,
    Kind,
    Status,
    pack_frame,
    pack_hello,
    unpack_rows,
)
from .memory import Memory

_ANSWERS_LIMIT = 1024
"""Answers that wait for a peer that does not read; then we stop reading from it."""


class TargetOwner(ABC):
    """What a target asks of and tells the transport."""

    @abstractmethod
    def admits(self, target: Target, name: str) -> bool:
        """Whether a peer of that name may come in; called once, with a valid hello."""

    @abstractmethod
    def noted(self, name: str, note: bytes) -> None:
        """A note from a peer; the bytes it speaks of are in place."""


class Scratch:
    """Where refused payloads go. One for all channels: nobody reads it, so it does not matter who writes."""

    __slots__ = ("_memory",)

    def __init__(self) -> None:
        self._memory: memoryview | None = None

    def view(self, size_bytes: int) -> memoryview:
        """Up to FRAME_BYTES; allocated when the first row is refused."""
        if self._memory is None:
            self._memory = memoryview(bytearray(FRAME_BYTES))
        return self._memory[:size_bytes]


class Target(Conduit):
    """Takes WRITE, READ, END and NOTE; sends DATA, REFUSED and DONE.

    What it holds for a peer is bounded: one body, `_ANSWERS_LIMIT` answers, READ_WINDOW reads of FRAME_ROWS rows,
    REFUSED_OPS_LIMIT operation ids. Over the first two it reads no more until the peer has taken its answers.
    """

    def __init__(
        self, channel: Channel, owner: TargetOwner, memory: Memory, scratch: Scratch, *, us: str, token: bytes
    ):
        super().__init__(channel, "")
        self._owner = owner
        self._memory = memory
        self._scratch = scratch
        self._us = us
        self._token = token
        self._answers: deque[bytes] = deque()
        self._reads: deque[list[memoryview]] = deque()
        self._refused: set[int] = set()

    # --- receiving ---

    def _on_hello(self, hello: Hello, name: str) -> None:
        status = Greeting.WELCOME
        if hello.version != VERSION:
            status = Greeting.VERSION
        elif not hmac.compare_digest(hello.token, self._token):
            status = Greeting.TOKEN
        elif not self._owner.admits(self, name):
            status = Greeting.NAME
        answer = memoryview(pack_hello(self._us, bytes(TOKEN_BYTES), status))
        self._put([answer[:HELLO_BYTES], answer[HELLO_BYTES:]])
        if status is not Greeting.WELCOME:
            # The channel is new and empty, so what little the refusal has goes out now or never.
            self.pump_out(FRAME_BYTES)
            raise ChannelClosed(f"refused {name!r} with protocol version {hello.version}: {status.name.lower()}")
        self.peer = name

    def _accepts(self) -> bool:
        return len(self._answers) < _ANSWERS_LIMIT and len(self._reads) < READ_WINDOW

    def _on_frame(self, frame: Frame, body: memoryview) -> Sequence[memoryview]:
        if frame.kind == Kind.WRITE:
            return self._write(frame, body)
        if frame.kind == Kind.READ:
            self._read(frame, body)
        elif frame.kind == Kind.END:
            self._end(frame, body)
        elif frame.kind == Kind.NOTE:
            self._owner.noted(self.peer, bytes(body))
        else:
            raise WireError(f"frame of kind {frame.kind} from an initiator")
        return ()

    def _write(self, frame: Frame, body: memoryview) -> Sequence[memoryview]:
        rows = unpack_rows(body)
        places, missing = self._memory.views(rows)
        if missing is None and frame.op not in self._refused:
            return places
        if missing is not None and frame.op not in self._refused:
            if len(self._refused) == REFUSED_OPS_LIMIT:
                raise WireError(f"{REFUSED_OPS_LIMIT} operations refused and none of them ended")
            self._refused.add(frame.op)
            self._answers.append(_refusal(frame.op, int(rows[missing, 0])))
        return [self._scratch.view(size) for size in rows[:, 1].tolist()]

    def _on_payload(self, frame: Frame) -> None:
        """Nothing to do: the END that follows in the same channel is answered when all before it is in place."""

    def _read(self, frame: Frame, body: memoryview) -> None:
        rows = unpack_rows(body)
        views, missing = self._memory.views(rows)
        if missing is None:
            head = pack_frame(Frame(Kind.DATA, op=frame.op, value=sum(map(len, views))))
            self._reads.append([memoryview(head), *views])
        else:
            # In the same queue as data: READs are answered in their order.
            self._reads.append([memoryview(_refusal(frame.op, int(rows[missing, 0])))])

    def _end(self, frame: Frame, body: memoryview) -> None:
        status = Status.OK
        if frame.op in self._refused:
            self._refused.remove(frame.op)
            status = Status.EXTENT
        elif len(body):
            self._owner.noted(self.peer, bytes(body))
        self._answers.append(pack_frame(Frame(Kind.DONE, status=status, op=frame.op)))

    # --- sending ---

    def _next_frame(self) -> Sequence[memoryview]:
        if self._answers:
            return [memoryview(self._answers.popleft())]
        return self._reads.popleft() if self._reads else ()


def _refusal(op: int, address: int) -> bytes:
    return pack_frame(Frame(Kind.REFUSED, status=Status.EXTENT, op=op, value=address))
