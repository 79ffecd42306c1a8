"""Names of KV in the pool: namespaces, chunk keys, page keys. Pure.

    namespace   16 bytes over everything that decides what the numbers of a page mean (`Manifest`)
    root        of a chain: over the namespace and the request's salt
    chunk key   16 bytes: H(key of the chunk before ‖ its token ids ‖ extras); equal keys mean equal KV
    free key    16 bytes: H(token ids of the chunk), whatever came before; for any-position reuse
    page key    chunk key ‖ KV group (17 bytes); with the namespace before it an object key (33 bytes)

H is blake2b with 16 bytes of digest: cut or salted hashes would let one tenant make another's key. Token ids are hashed
as little-endian uint32. None of it depends on an engine's block size, process or Python version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError
from .layout import PAGE_VERSION, Geometry

KEY_BYTES = 16
CHUNK_TOKENS = 128
"""Tokens of a chunk unless set: small enough to waste little of a prompt's end, large enough for pages of megabytes."""
_ROOT, _CHUNK, _FREE, _SPACE = b"lmkv-root-1", b"lmkv-chunk-1", b"lmkv-free-1", b"lmkv-space-1"


def _digest(person: bytes, *parts: bytes) -> bytes:
    state = hashlib.blake2b(digest_size=KEY_BYTES, person=person)
    for part in parts:
        state.update(part)
    return state.digest()


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a namespace stands for. Two engines share KV only if all of it is equal.

    `must`: model, weights, dtypes, rope, quantization, … (lmkv.vllm.fingerprint). `groups`: by KV group, the shape of a
    page. `epoch`: "" for weights as they lie on disk; otherwise one engine's own, whose weights cannot be identified or
    may have been replaced since it started (lmkv.vllm.identity).
    """

    must: Mapping[str, str]
    chunk_tokens: int
    groups: tuple[str, ...]
    tenant: str = ""
    epoch: str = ""
    page_version: int = PAGE_VERSION

    def description(self) -> str:
        """Canonical JSON."""
        return json.dumps(
            {
                "must": dict(self.must),
                "chunk_tokens": self.chunk_tokens,
                "groups": list(self.groups),
                "tenant": self.tenant,
                "epoch": self.epoch,
                "page_version": self.page_version,
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    def namespace(self) -> bytes:
        return namespace_of(self.description())


def namespace_of(description: str) -> bytes:
    """The namespace that this description (as `Manifest.description` writes it) belongs to."""
    return _digest(_SPACE, description.encode())


def group_shape(page: Geometry) -> str:
    """What of a group's page goes into the manifest; the same for all ranks and layouts of engines."""
    parts = "+".join(map(str, page.parts))
    return f"{page.dtype}:{page.model_layers}x{page.model_heads}x{page.block_tokens}x{parts}"


def chain_root(namespace: bytes, salt: bytes = b"") -> bytes:
    return _digest(_ROOT, namespace, salt)


def chunk_key(before: bytes, tokens: Sequence[int], extras: Sequence[bytes] = ()) -> bytes:
    """`before`: key of the chunk before, or the root. `extras`: whatever else the chunk's KV depends on (adapter,
    images); each is hashed with its length, so that none can be taken for another's end."""
    parts = [before, _token_bytes(tokens)]
    for extra in extras:
        parts += [len(extra).to_bytes(4, "little"), extra]
    return _digest(_CHUNK, *parts)


def free_key(namespace: bytes, tokens: Sequence[int]) -> bytes:
    """Of a chunk wherever it stands."""
    return _digest(_FREE, namespace, _token_bytes(tokens))


def page_key(chunk: bytes, group: int) -> bytes:
    return chunk + group.to_bytes(1, "little")


def _token_bytes(tokens: Sequence[int]) -> bytes:
    ids = np.asarray(tokens)
    if ids.size and not (ids.dtype.kind in "iu" and ids.min() >= 0 and ids.max() < 1 << 32):
        raise ConfigError(f"token ids are integers from 0 to {(1 << 32) - 1}", hint="other numbers would share a key")
    return ids.astype("<u4").tobytes()


@dataclass(frozen=True, slots=True)
class Extra:
    """Something that chunks from the one with token `first` on, up to before `stop`, depend on. `stop` 0: all that
    follow it (the chain carries it on in any case; a range only keeps what lies behind it from being hashed twice)."""

    first: int
    stop: int
    content: bytes

    def touches(self, lo: int, hi: int) -> bool:
        return self.first < hi and (self.stop == 0 or self.stop > lo)


class Chain:
    """The chunk keys of one growing sequence of tokens. Not thread-safe."""

    def __init__(
        self, namespace: bytes, chunk_tokens: int = CHUNK_TOKENS, salt: bytes = b"", extras: Sequence[Extra] = ()
    ) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens is {chunk_tokens}", hint="give a number from 1 up")
        self.namespace = namespace
        self.chunk_tokens = chunk_tokens
        self.keys: list[bytes] = []
        """Of the full chunks so far."""
        self._last = chain_root(namespace, salt)
        self._extras = tuple(extras)

    def extend(self, tokens: Sequence[int]) -> list[bytes]:
        """`tokens`: the whole sequence, no shorter than before and with the same beginning. Returns all keys."""
        n = self.chunk_tokens
        for index in range(len(self.keys), len(tokens) // n):
            lo, hi = index * n, (index + 1) * n
            # An offset inside the chunk is part of the extra: the same image elsewhere is other KV.
            extras = [
                (extra.first - lo).to_bytes(8, "little", signed=True) + extra.content
                for extra in self._extras
                if extra.touches(lo, hi)
            ]
            self._last = chunk_key(self._last, tokens[lo:hi], extras)
            self.keys.append(self._last)
        return self.keys
