"""How a page is stored, on disk and as an object: a header of one block, then the payload.

The header checks itself and the payload, so whoever finds a record knows whether it is whole, and whose. docs/tiers.md
has the bytes; `VERSION` goes up with any change to them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from lmkv.poolwire import OBJECT_KEY_BYTES

from .base import PageMeta, TierError

HEADER_BYTES = 4096
VERSION = 1
MAGIC = b"LMKVPAGE"
MAX_PAGE_BYTES = 1 << 30
_SEALED = 1
_FIXED = struct.Struct("<8sHHIQQ33s3x4s12s16s4x16s")
_CHECKSUMS_AT = _FIXED.size + 8
MAX_CHECKSUMS = (HEADER_BYTES - _CHECKSUMS_AT) // 8


@dataclass(frozen=True, slots=True)
class Seal:
    """How a payload was encrypted; `key_id` names the key without telling it."""

    key_id: bytes
    nonce: bytes
    tag: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """`digest` is of the payload as it is stored, encrypted or not. `generation` rises with each write of a tier."""

    key: bytes
    meta: PageMeta
    generation: int
    digest: bytes
    seal: Seal | None

    @property
    def key_id(self) -> bytes:
        return self.seal.key_id if self.seal is not None else b""


def check_page(key: bytes, meta: PageMeta, data: memoryview) -> memoryview:
    """The page's bytes, if a record can hold them. Raises TierError."""
    if len(key) != OBJECT_KEY_BYTES:
        raise TierError(f"an object key has {OBJECT_KEY_BYTES} bytes, this one {len(key)}")
    if not 0 < meta.page_bytes <= MAX_PAGE_BYTES:
        raise TierError(f"a page of {meta.page_bytes} bytes cannot be stored", hint=f"1 to {MAX_PAGE_BYTES} bytes")
    if len(meta.checksums) > MAX_CHECKSUMS or not all(0 <= each < 1 << 64 for each in meta.checksums):
        raise TierError(
            f"{len(meta.checksums)} checksums cannot be stored", hint=f"at most {MAX_CHECKSUMS} of 64 bits each"
        )
    page = data.cast("B")
    if len(page) < meta.page_bytes:
        raise TierError(f"a page of {meta.page_bytes} bytes was given {len(page)} bytes")
    return page[: meta.page_bytes]


def check_target(into: memoryview, page_bytes: int) -> memoryview:
    """The part of `into` that a page of `page_bytes` fills. Raises TierError."""
    target = into.cast("B")
    if len(target) < page_bytes:
        raise TierError(f"a page of {page_bytes} bytes does not fit into {len(target)} bytes")
    return target[:page_bytes]


def payload_digest(payload: memoryview) -> bytes:
    return xxhash.xxh3_128_digest(payload)


def pack_checksums(checksums: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(checksums)}Q", *checksums)


def unpack_checksums(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(packed) // 8}Q", packed)


def associated(key: bytes, meta: PageMeta) -> bytes:
    """What encryption binds a payload to."""
    return key + meta.page_bytes.to_bytes(8, "little") + pack_checksums(meta.checksums)


def write_header(header: Header, block: memoryview) -> None:
    """Into `block` (HEADER_BYTES). What is encoded passed `check_page`."""
    seal = header.seal if header.seal is not None else Seal(b"", b"", b"")
    count = len(header.meta.checksums)
    _FIXED.pack_into(
        block,
        0,
        MAGIC,
        VERSION,
        _SEALED if header.seal is not None else 0,
        count,
        header.generation,
        header.meta.page_bytes,
        header.key,
        seal.key_id,
        seal.nonce,
        seal.tag,
        header.digest,
    )
    end = _CHECKSUMS_AT + 8 * count
    block[_CHECKSUMS_AT:end] = pack_checksums(header.meta.checksums)
    block[end:HEADER_BYTES] = bytes(HEADER_BYTES - end)
    block[_FIXED.size : _CHECKSUMS_AT] = _own_digest(block)


def read_header(block: memoryview) -> Header | None:
    """None: this is no header, of another version, or damaged."""
    if len(block) < HEADER_BYTES or block[_FIXED.size : _CHECKSUMS_AT] != _own_digest(block):
        return None
    magic, version, flags, count, generation, page_bytes, key, key_id, nonce, tag, digest = _FIXED.unpack_from(block)
    if magic != MAGIC or version != VERSION or count > MAX_CHECKSUMS or not 0 < page_bytes <= MAX_PAGE_BYTES:
        return None
    checksums = unpack_checksums(bytes(block[_CHECKSUMS_AT : _CHECKSUMS_AT + 8 * count]))
    seal = Seal(key_id, nonce, tag) if flags & _SEALED else None
    return Header(key, PageMeta(page_bytes, checksums), generation, digest, seal)


def _own_digest(block: memoryview) -> bytes:
    """Over the whole block but the digest itself."""
    state = xxhash.xxh3_64(block[: _FIXED.size])
    state.update(block[_CHECKSUMS_AT:HEADER_BYTES])
    return state.digest()
