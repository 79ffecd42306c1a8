"""The one-sided contract on top of two-sided channels: what `tcp` and `ucx` share.

    frames.py      bytes on the wire: hello, header, limits
    channel.py     the seam: ordered bytes in both directions, straight from and into memory
    memory.py      registered memory as sliceable views, with bounds
    conduit.py     one channel's receiving and sending, a budget at a time
    initiator.py   our operations on a peer's memory
    target.py      a peer's operations on our memory
    transport.py   peers, operations and events: `FramedTransport`

A transport that `connect`s opens a channel of its own for its own operations; the accepting side answers on it. So a
pair that moves bytes in both directions has two channels, and each channel has one initiator and one target.
"""

from .channel import Channel, ChannelClosed
from .conduit import Conduit
from .frames import Location
from .transport import FramedTransport

__all__ = ["Channel", "ChannelClosed", "Conduit", "FramedTransport", "Location"]
