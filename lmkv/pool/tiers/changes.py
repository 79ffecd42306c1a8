"""What can be done to the index of a disk tier, each as one object: rows in a transaction, then the same in memory."""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from .base import PageMeta
from .pages import Pages, Place
from .record import pack_checksums
from .segments import Segment


class Change(ABC):
    """`write` runs inside a transaction that it may share with others, `apply` after its commit, with the lock of
    `Pages` held; `undo` instead, when there was none."""

    committed_point: ClassVar[str] = ""

    @abstractmethod
    def write(self, db: sqlite3.Connection) -> None: ...

    def apply(self, pages: Pages) -> None:  # noqa: B027
        pass

    def undo(self, pages: Pages) -> None:  # noqa: B027
        pass


@dataclass(slots=True)
class PutPage(Change):
    """The page is in its (pending) slot, and synced; let it count."""

    key: bytes
    place: Place
    meta: PageMeta
    key_id: bytes
    committed_point: ClassVar[str] = "spill:indexed"

    def write(self, db: sqlite3.Connection) -> None:
        place = self.place
        db.execute(
            "INSERT INTO pages VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO UPDATE SET segment=excluded.segment, "
            "slot=excluded.slot, generation=excluded.generation, page_bytes=excluded.page_bytes, "
            "checksums=excluded.checksums, key_id=excluded.key_id",
            (
                self.key,
                place.segment.number,
                place.slot,
                place.generation,
                self.meta.page_bytes,
                pack_checksums(self.meta.checksums),
                self.key_id,
            ),
        )

    def apply(self, pages: Pages) -> None:
        pages.put_locked(self.key, self.place)

    def undo(self, pages: Pages) -> None:
        pages.release_locked(self.place.segment, self.place.slot)


@dataclass(slots=True)
class RemovePages(Change):
    """Forget pages: whatever has the key, or only what is of the generation given with it."""

    keys: Mapping[bytes, int | None]
    removed: list[bytes] = field(default_factory=list)
    committed_point: ClassVar[str] = "drop:unindexed"

    def write(self, db: sqlite3.Connection) -> None:
        _delete(db, self.keys)

    def apply(self, pages: Pages) -> None:
        self.removed = [key for key, generation in self.keys.items() if pages.remove_locked(key, generation)]


@dataclass(slots=True)
class RemovePrefix(Change):
    """Forget every page whose key begins so."""

    prefix: bytes
    removed: int = 0
    _keys: list[bytes] = field(default_factory=list)
    committed_point: ClassVar[str] = "drop:unindexed"

    def write(self, db: sqlite3.Connection) -> None:
        end = self.prefix + b"\xff" * 64
        rows = db.execute("SELECT key FROM pages WHERE key BETWEEN ? AND ?", (self.prefix, end))
        self._keys = [key for (key,) in rows]
        db.execute("DELETE FROM pages WHERE key BETWEEN ? AND ?", (self.prefix, end))

    def apply(self, pages: Pages) -> None:
        self.removed = sum(pages.remove_locked(key) for key in self._keys)


@dataclass(slots=True)
class AddSegment(Change):
    segment: Segment

    def write(self, db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO segments VALUES (?, ?, ?)", (self.segment.number, self.segment.slot_bytes, self.segment.slots)
        )

    def apply(self, pages: Pages) -> None:
        pages.add_segment_locked(self.segment)


@dataclass(slots=True)
class RetireSegment(Change):
    """A closing segment ends: `moved` pages are also in pending slots of other segments, and synced; `given_up`
    are not."""

    segment: Segment
    moved: Mapping[bytes, tuple[Place, Place]]
    """From, to."""
    given_up: Mapping[bytes, int]
    removed: list[bytes] = field(default_factory=list)
    committed_point: ClassVar[str] = "compact:switched"

    def write(self, db: sqlite3.Connection) -> None:
        db.executemany(
            "UPDATE pages SET segment=?, slot=? WHERE key=? AND generation=?",
            ((new.segment.number, new.slot, key, old.generation) for key, (old, new) in self.moved.items()),
        )
        _delete(db, self.given_up)
        db.execute("DELETE FROM segments WHERE number=?", (self.segment.number,))

    def apply(self, pages: Pages) -> None:
        for key, (old, new) in self.moved.items():
            if pages.places.get(key) is old:
                used = old.segment.used[old.slot]
                pages.put_locked(key, new)
                new.segment.used[new.slot] = used
            else:
                pages.release_locked(new.segment, new.slot)
        self.removed = [key for key, generation in self.given_up.items() if pages.remove_locked(key, generation)]
        pages.retire_locked(self.segment)

    def undo(self, pages: Pages) -> None:
        for _, new in self.moved.values():
            pages.release_locked(new.segment, new.slot)
        pages.reopen_locked(self.segment)


@dataclass(slots=True)
class Describe(Change):
    namespace: bytes
    description: str

    def write(self, db: sqlite3.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO namespaces VALUES (?, ?)", (self.namespace, self.description))


def _delete(db: sqlite3.Connection, keys: Mapping[bytes, int | None] | Mapping[bytes, int]) -> None:
    rows: Sequence[tuple[bytes, int | None]] = list(keys.items())
    db.executemany("DELETE FROM pages WHERE key=? AND generation=ifnull(?, generation)", rows)
