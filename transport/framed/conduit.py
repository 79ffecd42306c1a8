"""One channel's receiving and sending: what the two roles share.

Receiving walks hello → name → (header → body → payload)*. The places of a payload are followed by the place of the next
header in one call, which saves a system call a frame. Sending stages whole frames while little is staged, so what has
not been staged can still be withdrawn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto

from lmkv.errors import WireError

from .channel import Channel, ChannelClosed
from .frames import (
    HEADER_BYTES,
    HELLO_BYTES,
    Frame,
    Hello,
    body_bytes,
    starts_like_hello,
    unpack_frame,
    unpack_hello,
    unpack_name,
)

_BATCH_BUFFERS = 512
"""Below IOV_MAX (1024)."""

_BATCH_BYTES = 256 << 10
"""Offered to the channel at once. With more, the receiver begins later and the bytes have left the cache by then
(measured over loopback: 2 MiB loses a fifth of the bandwidth); with less, the calls cost."""

_STAGE_BYTES = 1 << 20
"""Frames are staged while fewer bytes wait."""

_FRAME_COST_BYTES = 4096
"""A frame counts as at least this much of a budget: small ones cost Python, not bandwidth."""


class _Stage(Enum):
    HELLO = auto()
    NAME = auto()
    HEADER = auto()
    PARKED = auto()
    """A header is here; it waits until the role accepts it."""
    BODY = auto()
    PAYLOAD = auto()


class Conduit(ABC):
    """A role on a channel. `peer` is the other side's name: given for the initiator, "" until the hello at the target.

    All methods raise ChannelClosed when the channel has ended or the peer breaks the protocol; the transport then drops
    the conduit. Owner thread only.
    """

    def __init__(self, channel: Channel, peer: str) -> None:
        self.channel = channel
        self.peer = peer
        self._head = memoryview(bytearray(max(HELLO_BYTES, HEADER_BYTES)))
        self._stage = _Stage.HELLO
        self._want: deque[memoryview] = deque([self._head[:HELLO_BYTES]])
        self._stage_left_bytes = HELLO_BYTES
        self._body = memoryview(b"")
        self._hello: Hello | None = None
        self._frame = Frame(0)
        self._staged: deque[memoryview] = deque()
        self._staged_bytes = 0

    # --- what a role decides ---

    @abstractmethod
    def _on_hello(self, hello: Hello, name: str) -> None:
        """The other side's hello. Raises ChannelClosed to refuse."""

    @abstractmethod
    def _accepts(self) -> bool:
        """Whether one more frame may be taken in; False leaves it, and all after it, with the channel."""

    @abstractmethod
    def _on_frame(self, frame: Frame, body: memoryview) -> Sequence[memoryview]:
        """A header and its body; returns the places of the payload, none when there is none. Raises WireError."""

    @abstractmethod
    def _on_payload(self, frame: Frame) -> None:
        """The payload of the frame is in place."""

    @abstractmethod
    def _next_frame(self) -> Sequence[memoryview]:
        """Buffers of the next frame to send, or none."""

    # --- receiving ---

    @property
    def greeted(self) -> bool:
        """Whether the other side's hello has been accepted."""
        return self._stage not in (_Stage.HELLO, _Stage.NAME)

    @property
    def wants_receive(self) -> bool:
        return self._stage is not _Stage.PARKED or self._accepts()

    @property
    def wants_send(self) -> bool:
        return bool(self._staged)

    def pump_in(self, budget_bytes: int) -> int:
        """Take in up to about `budget_bytes`; returns what was used of them, 0 when nothing had arrived."""
        used = 0
        try:
            while used < budget_bytes:
                if self._stage is _Stage.PARKED:
                    if not self._accepts():
                        break
                    self._header_taken()
                places, wanted = _front(self._want)
                got = self.channel.receive(places)
                if not got:
                    break
                # Less than wanted is all there was: asking again would only confirm it.
                drained = got < wanted
                _drop(self._want, got)
                used += got
                while got:
                    part = min(got, self._stage_left_bytes)
                    self._stage_left_bytes -= part
                    got -= part
                    if self._stage_left_bytes:
                        self._check_prefix()
                        break
                    used += _FRAME_COST_BYTES
                    self._stage_done()
                if drained:
                    break
        except WireError as error:
            raise ChannelClosed(f"protocol violation: {error.message}") from error
        return used

    def _expect(self, stage: _Stage, *buffers: memoryview) -> None:
        self._stage = stage
        self._want.extend(buffers)
        self._stage_left_bytes = sum(len(b) for b in buffers)

    def _expect_header(self) -> None:
        self._expect(_Stage.HEADER, self._head[:HEADER_BYTES])

    def _check_prefix(self) -> None:
        if self._stage is _Stage.HELLO and not starts_like_hello(self._head[: HELLO_BYTES - self._stage_left_bytes]):
            raise WireError("this is not an lmkv data channel")

    def _stage_done(self) -> None:
        if self._stage is _Stage.HELLO:
            self._hello = unpack_hello(self._head[:HELLO_BYTES])
            self._body = memoryview(bytearray(self._hello.name_bytes))
            self._expect(_Stage.NAME, self._body)
        elif self._stage is _Stage.NAME:
            assert self._hello is not None
            self._on_hello(self._hello, unpack_name(self._body))
            self._expect_header()
        elif self._stage is _Stage.HEADER:
            self._frame = unpack_frame(self._head[:HEADER_BYTES])
            if self._accepts():
                self._header_taken()
            else:
                self._stage = _Stage.PARKED
        elif self._stage is _Stage.BODY:
            self._body_taken()
        else:
            # The place of the next header was queued behind the payload.
            self._stage = _Stage.HEADER
            self._stage_left_bytes = HEADER_BYTES
            self._on_payload(self._frame)

    def _header_taken(self) -> None:
        size = body_bytes(self._frame)
        self._body = memoryview(bytearray(size))
        if size:
            self._expect(_Stage.BODY, self._body)
        else:
            self._body_taken()

    def _body_taken(self) -> None:
        places = self._on_frame(self._frame, self._body)
        if places:
            self._expect(_Stage.PAYLOAD, *places)
            self._want.append(self._head[:HEADER_BYTES])
        else:
            self._expect_header()

    # --- sending ---

    def _put(self, buffers: Sequence[memoryview]) -> None:
        self._staged.extend(buffers)
        self._staged_bytes += sum(len(b) for b in buffers)

    def _stage_frames(self) -> None:
        while self._staged_bytes < _STAGE_BYTES:
            buffers = self._next_frame()
            if not buffers:
                return
            self._put(buffers)

    def pump_out(self, budget_bytes: int) -> int:
        """Hand up to about `budget_bytes` to the channel; returns how many it took."""
        used = 0
        self._stage_frames()
        while self._staged and used < budget_bytes:
            buffers, offered = _front(self._staged)
            taken = self.channel.send(buffers)
            _drop(self._staged, taken)
            self._staged_bytes -= taken
            used += taken
            # Also after the last send of this budget: whether anything is staged tells whether anything is left.
            self._stage_frames()
            if taken < offered:
                break
        return used


def _front(buffers: deque[memoryview]) -> tuple[list[memoryview], int]:
    """The first buffers, up to what is worth offering at once, and their bytes."""
    out: list[memoryview] = []
    size = 0
    for buffer in buffers:
        out.append(buffer)
        size += len(buffer)
        if size >= _BATCH_BYTES or len(out) == _BATCH_BUFFERS:
            break
    return out, size


def _drop(buffers: deque[memoryview], count_bytes: int) -> None:
    """Take `count_bytes` off the front."""
    while count_bytes:
        first = buffers[0]
        size = len(first)
        if size > count_bytes:
            buffers[0] = first[count_bytes:]
            return
        buffers.popleft()
        count_bytes -= size
