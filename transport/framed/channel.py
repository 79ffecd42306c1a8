"""The seam between the framed protocol and what carries it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence


class ChannelClosed(Exception):
    """The other end is gone, or the channel broke. Stays inside the transport, which turns it into PeerLostError."""


class Channel(ABC):
    """Ordered bytes in both directions between two processes. Owned by one conduit, used from the owner thread only.

    Both ends hand over the *same sequence of buffers of the same sizes*: a channel may carry them as a stream or as one
    message a buffer. Buffers are byte views, never empty. No call waits.
    """

    @abstractmethod
    def send(self, buffers: Sequence[memoryview]) -> int:
        """Take bytes from the front; returns how many were taken. What was taken is the channel's: it keeps the
        buffers alive, and the caller leaves their contents alone, until the peer has answered. Raises ChannelClosed."""

    @abstractmethod
    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Fill from the front; returns how many bytes are in place. The next call starts with what is left of the same
        buffers: a channel may already be writing into any of them. Raises ChannelClosed once all that had arrived
        before the end has been handed out."""

    @abstractmethod
    def close(self) -> None:
        """Let go. On return nothing more lands in any buffer handed to `receive`. Idempotent; never raises."""
