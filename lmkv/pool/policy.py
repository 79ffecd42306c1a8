"""Which page to give up next: a set of keys with an order. No clock, no I/O; one thread at a time.

The caller tells a policy what it holds and what is used, and takes victims from it:

    for key in policy.victims():
        if pinned(key):
            continue
        policy.evicted(key)
        if enough():
            break

A victim that the caller goes past (it is pinned, so it is in use) moves to the far end of its queue. So a pass pays for
what it skips once, and the next one does not meet the same keys again before all others.

A chain of pages is only as good as its unbroken beginning: tell a policy of a chain's pages from the last to the first,
so that ends are given up before beginnings (docs/decisions/0007-eviction-policy.md has the figures).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator

from lmkv.errors import ConfigError

SMALL_SHARE = 0.1
"""Of all bytes; a small queue that has more gives up its pages first."""
PROMOTE_ABOVE = 1
"""A page that was used more often than this in the small queue goes on to the main queue."""
COUNT_MAX = 3
"""Two bits."""


class Policy(ABC):
    @abstractmethod
    def added(self, key: bytes, size: int) -> None:
        """A page of `size` bytes is held from now on. A key that is known keeps its place and changes its size."""

    @abstractmethod
    def touched(self, key: bytes) -> None:
        """A hit. Unknown keys are ignored."""

    @abstractmethod
    def removed(self, key: bytes) -> None:
        """Gone for another reason than a lack of room; nothing of it is remembered. Unknown keys are ignored."""

    @abstractmethod
    def victims(self) -> Iterator[bytes]:
        """In the order of giving up, each key at most once. The set may change meanwhile; what is added or touched
        after the call may be left out. Taking one and not going on changes no order."""

    @abstractmethod
    def evicted(self, key: bytes) -> None:
        """A victim was given up. Unknown keys are ignored."""

    @abstractmethod
    def __len__(self) -> int:
        """Keys held."""


class LRU(Policy):
    """What was not used for longest goes first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, size: int) -> None:
        self._keys.setdefault(key)

    def touched(self, key: bytes) -> None:
        if key in self._keys:
            self._keys.move_to_end(key)

    def removed(self, key: bytes) -> None:
        self._keys.pop(key, None)

    def victims(self) -> Iterator[bytes]:
        skipped: set[bytes] = set()
        while (key := next(iter(self._keys), None)) is not None and key not in skipped:
            yield key
            if key in self._keys:
                self._keys.move_to_end(key)
                skipped.add(key)

    def evicted(self, key: bytes) -> None:
        self.removed(key)

    def __len__(self) -> int:
        return len(self._keys)


class _Queue:
    """First in, first out, of keys with their size and their hits; any key can leave early."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, list[int]] = OrderedDict()
        self.size = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def first(self) -> bytes | None:
        return next(iter(self._entries), None)

    def push(self, key: bytes, size: int) -> None:
        self._entries[key] = [size, 0]
        self.size += size

    def pop(self, key: bytes) -> int:
        size = self._entries.pop(key)[0]
        self.size -= size
        return size

    def requeue(self, key: bytes) -> None:
        self._entries.move_to_end(key)

    def resize(self, key: bytes, size: int) -> None:
        entry = self._entries[key]
        self.size += size - entry[0]
        entry[0] = size

    def hits(self, key: bytes) -> int:
        return self._entries[key][1]

    def count(self, key: bytes, step: int) -> None:
        entry = self._entries[key]
        entry[1] = min(entry[1] + step, COUNT_MAX)


class S3Fifo(Policy):
    """Three queues: new pages pass a small one, and only those used there more than once, or wanted again soon after
    they were given up (their keys are remembered as ghosts), come to the main one, where each hit is worth another
    round. A flood of pages that nobody wants again passes through the small queue alone.

    After Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023, algorithm 1. The capacity is taken
    to be what is held: victims are asked for when there is no room. There are never more ghosts than keys held.
    """

    def __init__(self, small_share: float = SMALL_SHARE, promote_above: int = PROMOTE_ABOVE) -> None:
        self._small_share = small_share
        self._promote_above = promote_above
        self._small = _Queue()
        self._main = _Queue()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def added(self, key: bytes, size: int) -> None:
        known = self._queue_of(key)
        if known is not None:
            known.resize(key, size)
        elif key in self._ghosts:
            del self._ghosts[key]
            self._main.push(key, size)
        else:
            self._small.push(key, size)

    def touched(self, key: bytes) -> None:
        queue = self._queue_of(key)
        if queue is not None:
            queue.count(key, 1)

    def removed(self, key: bytes) -> None:
        self._ghosts.pop(key, None)
        queue = self._queue_of(key)
        if queue is not None:
            queue.pop(key)
            self._trim()

    def victims(self) -> Iterator[bytes]:
        skipped: set[bytes] = set()
        while (key := self._victim(skipped)) is not None:
            yield key
            queue = self._queue_of(key)
            if queue is not None:
                queue.requeue(key)
                skipped.add(key)

    def evicted(self, key: bytes) -> None:
        if key in self._small:
            self._small.pop(key)
            self._ghosts[key] = None
        elif key in self._main:
            self._main.pop(key)
        self._trim()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    @property
    def ghosts(self) -> int:
        """Keys remembered of pages given up."""
        return len(self._ghosts)

    def _queue_of(self, key: bytes) -> _Queue | None:
        if key in self._main:
            return self._main
        return self._small if key in self._small else None

    def _victim(self, skipped: set[bytes]) -> bytes | None:
        """The next to give up, left in its place. What has earned it moves on first."""
        small, main = self._small, self._main
        main_first = small.size < self._small_share * (small.size + main.size)
        order = (self._main_victim, self._small_victim, self._main_victim)[0 if main_first else 1 :]
        return next((key for find in order if (key := find(skipped)) is not None), None)

    def _small_victim(self, skipped: set[bytes]) -> bytes | None:
        while (key := self._small.first) is not None and key not in skipped:
            if self._small.hits(key) <= self._promote_above:
                return key
            self._main.push(key, self._small.pop(key))
        return None

    def _main_victim(self, skipped: set[bytes]) -> bytes | None:
        passed = 0
        while passed < len(self._main) and (key := self._main.first) is not None:
            if key in skipped:
                passed += 1
            elif self._main.hits(key) == 0:
                return key
            else:
                passed = 0
                self._main.count(key, -1)
            self._main.requeue(key)
        return None

    def _trim(self) -> None:
        while self._ghosts and len(self._ghosts) > (1 - self._small_share) * len(self):
            self._ghosts.popitem(last=False)


_POLICIES: dict[str, type[Policy]] = {"s3fifo": S3Fifo, "lru": LRU}


def make_policy(name: str) -> Policy:
    """Raises ConfigError for a name that is none."""
    if name not in _POLICIES:
        raise ConfigError(f"no eviction policy is called {name!r}", hint=f"use one of {', '.join(_POLICIES)}")
    return _POLICIES[name]()
