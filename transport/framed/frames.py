"""What goes over a channel, byte by byte (little endian), and how much of it a peer may make us hold.

A channel starts with a hello in both directions (the initiator's first; the target answers and may refuse):

    magic 8 | version u16 | name_bytes u16 | status u32 | token 16      then name_bytes of UTF-8

The token comes with the target's export: who has not been given the export cannot write. It goes over the wire in
clear, so it keeps strangers and mix-ups out, not an attacker who reads the network.

Then frames: a header, a body whose size the header gives, and for two kinds a payload.

    kind u8 | status u8 | rows u16 | note_bytes u32 | op u64 | value u64

    initiator → target
      WRITE   body: rows of (address u64, bytes u64); payload: the bytes of all rows, in order
      READ    body: rows as above; answered by one DATA or REFUSED, in the order of the READs
      END     the WRITEs of `op` are over; body: its note; answered by DONE
      NOTE    body: a note of its own
    target → initiator
      DATA    payload: `value` bytes, the rows of the oldest unanswered READ
      REFUSED a row of `op` lies outside registered memory; `value` is its address
      DONE    all bytes of `op` are in place, or (status EXTENT) some were refused; sent once, after END

An operation is cut into frames of at most FRAME_BYTES and FRAME_ROWS, so a header never makes a peer allocate more than
`BODY_BYTES_LIMIT`, and operations that share a channel take turns by the frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmkv.errors import WireError

MAGIC = b"LMKVDATA"
VERSION = 1
TOKEN_BYTES = 16

NAME_BYTES_LIMIT = 1024
NOTE_BYTES_LIMIT = 1 << 20
FRAME_ROWS = 1024
FRAME_BYTES = 4 << 20
ROW_BYTES = 16
BODY_BYTES_LIMIT = max(NOTE_BYTES_LIMIT, FRAME_ROWS * ROW_BYTES)

READ_WINDOW = 8
"""READs an initiator may have unanswered on one channel: 32 MiB under way."""

REFUSED_OPS_LIMIT = 4096
"""Operations a target remembers as refused until their END; a peer that needs more is dropped."""

_HELLO = Struct("<8sHHI16s")
_HEADER = Struct("<BBHIQQ")
HELLO_BYTES = _HELLO.size
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    WRITE = 1
    READ = 2
    END = 3
    NOTE = 4
    DATA = 5
    REFUSED = 6
    DONE = 7


class Status(IntEnum):
    OK = 0
    EXTENT = 1


class Greeting(IntEnum):
    """Status of a hello: what the target says to the initiator's."""

    WELCOME = 0
    VERSION = 1
    TOKEN = 2
    NAME = 3


class Location(msgspec.Struct, frozen=True, array_like=True):
    """The back end's part of an export: where to connect, and what to show there."""

    address: bytes
    token: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    version: int
    name_bytes: int
    status: int
    token: bytes


class Frame(NamedTuple):
    """A header. `op` is the initiator's id and means nothing to the target but equality."""

    kind: int
    status: int = 0
    rows: int = 0
    note_bytes: int = 0
    op: int = 0
    value: int = 0


def pack_hello(name: str, token: bytes, status: int = Greeting.WELCOME, version: int = VERSION) -> bytes:
    """Hello and name. Raises WireError when the name is too long to send."""
    raw = name.encode()
    if not raw or len(raw) > NAME_BYTES_LIMIT:
        raise WireError(f"a transport's name has 1 to {NAME_BYTES_LIMIT} bytes, {name[:40]!r}… has {len(raw)}")
    return _HELLO.pack(MAGIC, version, len(raw), status, token) + raw


def starts_like_hello(raw: memoryview) -> bool:
    """Whether the first bytes received can still become a hello; garbage is known at its first wrong byte."""
    seen = bytes(raw[: len(MAGIC)])
    return seen == MAGIC[: len(seen)]


def unpack_hello(raw: memoryview) -> Hello:
    """Raises WireError: no magic, or a name of impossible length. The version is the caller's to judge."""
    magic, version, name_bytes, status, token = _HELLO.unpack(raw)
    if magic != MAGIC:
        raise WireError("not a hello: wrong magic")
    if not 0 < name_bytes <= NAME_BYTES_LIMIT:
        raise WireError(f"hello with a name of {name_bytes} bytes; 1 to {NAME_BYTES_LIMIT} are allowed")
    return Hello(version, name_bytes, status, token)


def unpack_name(raw: memoryview) -> str:
    """Raises WireError unless it is printable UTF-8."""
    try:
        name = bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise WireError(f"hello with an unreadable name: {error}") from error
    if not name.isprintable():
        raise WireError(f"hello with an unprintable name {name!r}")
    return name


def pack_frame(frame: Frame) -> bytes:
    return _HEADER.pack(*frame)


def unpack_frame(raw: memoryview) -> Frame:
    return Frame(*_HEADER.unpack(raw))


def body_bytes(frame: Frame) -> int:
    """How many bytes follow the header. Raises WireError for an unknown kind or a size over the limits."""
    if frame.kind in (Kind.WRITE, Kind.READ):
        if not 0 < frame.rows <= FRAME_ROWS:
            raise WireError(f"frame with {frame.rows} rows; 1 to {FRAME_ROWS} are allowed")
        return frame.rows * ROW_BYTES
    if frame.kind in (Kind.END, Kind.NOTE):
        if frame.note_bytes > NOTE_BYTES_LIMIT or (frame.kind == Kind.NOTE and frame.note_bytes == 0):
            raise WireError(f"note of {frame.note_bytes} bytes; up to {NOTE_BYTES_LIMIT} are allowed")
        return frame.note_bytes
    if frame.kind == Kind.DATA and not 0 < frame.value <= FRAME_BYTES:
        raise WireError(f"data of {frame.value} bytes; 1 to {FRAME_BYTES} are allowed")
    if frame.kind not in (Kind.DATA, Kind.REFUSED, Kind.DONE):
        raise WireError(f"frame of unknown kind {frame.kind}")
    return 0


def pack_rows(rows: NDArray[np.uint64]) -> bytes:
    """(n, 2) of address and bytes."""
    return rows.astype("<u8", copy=False).tobytes()


def unpack_rows(raw: memoryview) -> NDArray[np.uint64]:
    """The (n, 2) table of a WRITE or READ. Raises WireError: an empty row, or more than FRAME_BYTES in all."""
    rows = np.frombuffer(raw, dtype="<u8").reshape(-1, 2).astype(np.uint64, copy=False)
    # As Python integers: their sum cannot wrap around.
    sizes = rows[:, 1].tolist()
    if min(sizes) == 0 or sum(sizes) > FRAME_BYTES:
        raise WireError(f"frame with an empty row or more than {FRAME_BYTES} bytes")
    return rows
