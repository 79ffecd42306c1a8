"""Typed names. A bare `int` or `str` never stands for one of these in a signature."""

from __future__ import annotations

from typing import Annotated, NewType

import msgspec

EngineName = NewType("EngineName", str)
"""Chosen by the operator; not unique in time."""

Incarnation = NewType("Incarnation", str)
"""16 hex digits, new at each start of a process tree. Peers remember incarnations, never names."""

TransferId = NewType("TransferId", str)
"""uuid7 as 32 hex digits, made by the router, one per attempt to move one prompt's KV."""

Epoch = NewType("Epoch", Annotated[int, msgspec.Meta(ge=0, le=1 << 28)])
"""Counts the grants of one transfer id; a message of an older epoch is ignored."""

RequestId = NewType("RequestId", str)
"""vLLM's internal request id; has a meaning inside one engine only."""

Rank = NewType("Rank", Annotated[int, msgspec.Meta(ge=-2, le=(1 << 16) - 1)])
"""Worker rank inside an engine. The engine (scheduler) itself is `ENGINE_RANK`."""

ENGINE_RANK = Rank(-1)

# Numbers in messages. Their ranges keep sums and products of them (an address plus a block number times a stride) below
# 2**63, so no arithmetic of a receiver overflows; a message with a number outside cannot be read (WireError).
Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 28)]
"""A block, token, layer, group, slot or sequence number, or a count of them."""
SlotIndex = Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)]
"""A landing slot; -1: none."""
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 32)]
"""Bytes of one block of one layer, or of one slot."""
Total = Annotated[int, msgspec.Meta(ge=0, le=1 << 52)]
"""Bytes of a transfer or of a memory."""
Pointer = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
"""An address in a peer's memory."""
Unsigned = Annotated[int, msgspec.Meta(ge=0)]
"""A checksum of 64 bits."""


def make_transfer_id(unix_ms: int, random_bytes: bytes) -> TransferId:
    """uuid7 (RFC 9562): 48 bits of `unix_ms`, version, 74 random bits out of 10 `random_bytes`."""
    if len(random_bytes) != 10:
        raise ValueError(f"make_transfer_id needs 10 random bytes, got {len(random_bytes)}")
    raw = bytearray(unix_ms.to_bytes(6, "big") + random_bytes)
    raw[6] = 0x70 | (raw[6] & 0x0F)
    raw[8] = 0x80 | (raw[8] & 0x3F)
    return TransferId(raw.hex())


def make_incarnation(random_bytes: bytes) -> Incarnation:
    """An incarnation out of 8 random bytes."""
    if len(random_bytes) != 8:
        raise ValueError(f"make_incarnation needs 8 random bytes, got {len(random_bytes)}")
    return Incarnation(random_bytes.hex())
