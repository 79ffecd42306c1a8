"""The contract of a lower tier: pages by object key, kept with what is needed to check them.

Calls block and come from several threads of the node at once; each returns when its work is done. A tier knows nothing
of slots, leases or events: `lmkv.pool.tiering` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lmkv.errors import PoolError
from lmkv.poolwire import Tier


class TierError(PoolError):
    """A tier cannot do what was asked (no space, I/O, unreachable). The page stays where it was."""

    code = "LMKV-P820"


class CorruptError(TierError):
    """What the tier has is not what was put there. It has been thrown away."""

    code = "LMKV-P821"


@dataclass(frozen=True, slots=True)
class PageMeta:
    """`checksums` as in `lmkv.poolwire.Page`: the page's own, made by who computed it. The tier adds its own over what
    it stores (header included), and checks that at each `get`."""

    page_bytes: int
    checksums: tuple[int, ...]


class StoreTier(ABC):
    """`evicted(keys)` is called, from whatever thread, when the tier itself gives pages up for room."""

    tier: ClassVar[Tier]

    @abstractmethod
    def put(self, key: bytes, meta: PageMeta, data: memoryview) -> None:
        """Store a page of `meta.page_bytes`; durable on return (synced, or acknowledged by the store). Storing a key
        that is there replaces it. Raises TierError; then nothing of this key is visible, or the old page still is."""

    @abstractmethod
    def get(self, key: bytes, into: memoryview) -> PageMeta | None:
        """Read a page into `into` (at least page_bytes); None: not there. Raises CorruptError, TierError."""

    @abstractmethod
    def drop(self, keys: Sequence[bytes]) -> int:
        """Forget pages, for good: they do not come back with a restart. Returns how many were there."""

    @abstractmethod
    def drop_namespace(self, namespace: bytes) -> int:
        """All pages whose object key begins so; b"" for everything."""

    @abstractmethod
    def scan(self) -> Iterator[tuple[bytes, PageMeta]]:
        """All that is there, oldest first, as found at opening (what a crash has torn is left out and gone)."""

    @abstractmethod
    def describe(self, namespace: bytes, description: str) -> None:
        """Keep the description of a namespace with its pages. Idempotent."""

    @abstractmethod
    def descriptions(self) -> dict[bytes, str]: ...

    @property
    @abstractmethod
    def used_bytes(self) -> int: ...

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """0: without limit."""

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """Since opening: puts, gets, bytes both ways, evicted, corrupt, torn, …"""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""


Evicted = Callable[[list[bytes]], None]
