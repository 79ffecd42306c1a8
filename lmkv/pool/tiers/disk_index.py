"""The index of a disk tier: a sqlite database, and one commit for all who ask at the same time.

Whoever comes first leads: it writes the rows of all changes that wait in one transaction, commits (WAL,
synchronous=FULL: the commit itself is on the disk), and lets them count in memory; the others wait for it. What rows
point to was synced before, and a freed slot is not lent before the row that freed it is on the disk.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from lmkv.pool import faults

from .base import PageMeta, TierError
from .changes import Change
from .pages import Pages
from .record import unpack_checksums

INDEX_NAME = "index.sqlite"
SCHEMA_VERSION = 1
COMMIT_WAIT_S = 60.0
BATCH_CHANGES = 256
_SCHEMA = """
CREATE TABLE IF NOT EXISTS tier (version INTEGER NOT NULL, opened INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS segments (number INTEGER PRIMARY KEY, slot_bytes INTEGER NOT NULL, slots INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pages (
    key BLOB PRIMARY KEY, segment INTEGER NOT NULL, slot INTEGER NOT NULL, generation INTEGER NOT NULL,
    page_bytes INTEGER NOT NULL, checksums BLOB NOT NULL, key_id BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS namespaces (namespace BLOB PRIMARY KEY, description TEXT NOT NULL) WITHOUT ROWID;
"""


def connect(directory: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error: it cannot be read, or is damaged."""
    db = sqlite3.connect(directory / INDEX_NAME, isolation_level=None, check_same_thread=False, timeout=COMMIT_WAIT_S)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def count_opening(db: sqlite3.Connection) -> int:
    """How many times this index was opened, this time included. Raises TierError for another version's index."""
    row = db.execute("SELECT version, opened FROM tier").fetchone()
    if row is None:
        db.execute("INSERT INTO tier VALUES (?, 1)", (SCHEMA_VERSION,))
        return 1
    version, opened = row
    if version != SCHEMA_VERSION:
        raise TierError(
            f"the disk tier's index has version {version}, this is version {SCHEMA_VERSION}",
            hint="give this node another directory, or remove this one",
        )
    db.execute("UPDATE tier SET opened=?", (opened + 1,))
    return int(opened) + 1


class _Ticket:
    """A change that waits. `woken`: it is done, or, if it is not, its thread has to lead."""

    __slots__ = ("change", "committed", "done", "error", "woken")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.committed = False
        self.done = False
        self.error: TierError | None = None
        self.woken = threading.Event()

    def fail(self, error: TierError) -> None:
        self.error = self.error or error


class DiskIndex:
    """Owns the connection. Any thread."""

    def __init__(self, db: sqlite3.Connection, directory: Path, pages: Pages) -> None:
        self._db = db
        self._directory = directory
        self._pages = pages
        self._lock = threading.Lock()
        self._queue: deque[_Ticket] = deque()
        self._led = False
        """Somebody leads, or was woken to lead; otherwise the queue is empty."""
        self.commits = 0

    def run(self, change: Change) -> None:
        """Make `change` durable and visible. Raises TierError; then it is undone."""
        ticket = _Ticket(change)
        with self._lock:
            self._queue.append(ticket)
            leads, self._led = not self._led, True
        if leads or self._must_lead(ticket):
            self._lead()
        if ticket.error is not None:
            raise ticket.error

    def scan(self, key_id: bytes) -> Iterator[tuple[bytes, PageMeta]]:
        """Pages under one encryption key (b"": none), in the order of their generations, as they are at the start."""
        with self._reading() as db:
            columns = "key, page_bytes, checksums"
            rows = db.execute(f"SELECT {columns} FROM pages WHERE key_id=? ORDER BY generation", (key_id,))
            for key, page_bytes, checksums in rows:
                yield key, PageMeta(page_bytes, unpack_checksums(checksums))

    def descriptions(self) -> dict[bytes, str]:
        with self._reading() as db:
            return dict(db.execute("SELECT namespace, description FROM namespaces").fetchall())

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees what was committed when it first reads, and holds nobody up. Raises TierError."""
        try:
            with closing(sqlite3.connect(self._directory / INDEX_NAME, check_same_thread=False)) as db:
                yield db
        except sqlite3.Error as error:
            raise TierError(f"the index in {self._directory} cannot be read: {error}") from error

    def close(self) -> None:
        """When nothing runs any more."""
        self._db.close()

    def _must_lead(self, ticket: _Ticket) -> bool:
        """Wait for the end of a change, or for its turn to lead. Raises TierError when the disk does not answer."""
        if not ticket.woken.wait(COMMIT_WAIT_S):
            with self._lock:
                if not ticket.woken.is_set():
                    self._withdraw_locked(ticket)
        return not ticket.done

    def _withdraw_locked(self, ticket: _Ticket) -> None:
        """Raises TierError always."""
        said = f"the disk has not answered for {COMMIT_WAIT_S:.0f} s"
        if ticket not in self._queue:
            raise TierError(f"{said}; whether the change is done is open", hint="look at the disk")
        self._queue.remove(ticket)
        with self._pages.lock:
            ticket.change.undo(self._pages)
        raise TierError(said, hint="look at the disk")

    def _lead(self) -> None:
        """Bring the changes that wait, ours the first of them, to their end; then let the next one lead."""
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH_CHANGES))]
        try:
            self._commit(batch)
        finally:
            self._end(batch)
            with self._lock:
                self._led = bool(self._queue)
                if self._queue:
                    self._queue[0].woken.set()
            for ticket in batch:
                ticket.woken.set()

    def _end(self, batch: Sequence[_Ticket]) -> None:
        with self._pages.lock:
            for ticket in batch:
                if ticket.committed:
                    ticket.change.apply(self._pages)
                else:
                    ticket.fail(TierError("the change was interrupted"))
                    ticket.change.undo(self._pages)
                ticket.done = True

    def _commit(self, batch: Sequence[_Ticket]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for ticket in batch:
                ticket.change.write(self._db)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            wrapped = TierError(f"the index in {self._directory} takes no changes: {error}", hint="is the disk full?")
            for ticket in batch:
                ticket.fail(wrapped)
            self._rollback()
            return
        self.commits += 1
        for ticket in batch:
            ticket.committed = True
            faults.point(ticket.change.committed_point)

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
