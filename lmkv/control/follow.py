"""Following one node: from its snapshot and its numbered events to exactly what it holds.

    subscribe → Snapshot, part by part, into a number of its own; events meanwhile are kept
              → last part: replay what was kept → synced, events apply as they come
    gap, or behind for too long → a new snapshot; what was known stays listed until that is complete

A *number* is this node's name in the page table for one generation of what it holds (`lmkv.control.pages`). No
sockets, no clock: `now_s` is passed in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lmkv.errors import ConfigError
from lmkv.poolwire import EVENT_BYTES, Events, Member, NodeBeat, NodeCard, Snapshot, SnapshotPart

from .pending import Pending

EXACT = "EXACT"
CATCHING_UP = "CATCHING_UP"
DEGRADED = "DEGRADED"


@dataclass(frozen=True, slots=True)
class ViewSettings:
    lease_s: float = 3.0
    """A node that is not heard for so long is DEGRADED."""
    forget_s: float = 30.0
    """And after this its pages go."""
    lag_s: float = 1.0
    """A beat may be so far ahead of the events it tells of."""
    settle_s: float = 0.2
    """A first snapshot waits so long for a sign that the subscription stands; without it events could slip between."""
    part_s: float = 5.0
    """Deadline of one part of a snapshot."""
    retry_s: float = 0.1
    """Pause after a snapshot failed; doubles up to `retry_most_s`."""
    retry_most_s: float = 5.0
    buffer_bytes: int = 64 << 20
    """Events kept for one node during a snapshot."""
    snapshots: int = 16
    """At a time."""
    nodes: int = 4096
    """More are not followed."""

    def __post_init__(self) -> None:
        for name in ("lease_s", "lag_s", "part_s", "retry_s", "retry_most_s", "buffer_bytes", "snapshots", "nodes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", hint="use a positive number")
        if self.forget_s < self.lease_s:
            raise ConfigError(
                f"forget_s {self.forget_s:g} is below lease_s {self.lease_s:g}", hint="forget later than you degrade"
            )


@dataclass(slots=True)
class _Snapshot:
    """`first_seq`: of the first part; None before it. Events behind it are kept in the order they came."""

    number: int
    token: int
    deadline_s: float
    first_seq: int | None = None
    kept: list[Events] = field(default_factory=list)
    kept_bytes: int = 0


@dataclass(slots=True)
class Common:
    """What the followers of a view share."""

    pending: Pending
    settings: ViewSettings
    counters: Counter[str] = field(default_factory=Counter)
    owners: dict[int, Follower] = field(default_factory=dict)
    """Who has which number; lookups see these numbers only."""


class Follower:
    """One incarnation of a node. `number` is what lookups see. `end()` gives the numbers back."""

    def __init__(self, card: NodeCard, common: Common, now_s: float) -> None:
        self.card = card
        self.heard_s = now_s
        self._pending = common.pending
        self._settings = common.settings
        self._counters = common.counters
        self._owners = common.owners
        self.number = self._pending.number()
        self._owners[self.number] = self
        self._clean = True
        """Nothing was ever put under `number`."""
        self._next: int | None = None
        """The event to come; None: not synced."""
        self._last_seq = 0
        """Of the last event that the node is known to have sent."""
        self._behind_s: float | None = None
        self._snapshot: _Snapshot | None = None
        self._retry_at_s = now_s + self._settings.settle_s
        self._failures = 0
        self._beat: NodeBeat | None = None

    # --- what is known ---

    def state(self, now_s: float) -> str:
        if now_s - self.heard_s > self._settings.lease_s:
            return DEGRADED
        return EXACT if self._next is not None and self._next > self._last_seq else CATCHING_UP

    def member(self, now_s: float) -> Member:
        beat = self._beat
        used, capacity, draining = (beat.used_bytes, beat.capacity_bytes, beat.draining) if beat else (0, 0, False)
        pages = self._pending.held(self.number)
        return Member(self.card, self.state(now_s), max(0.0, now_s - self.heard_s), pages, used, capacity, draining)

    @property
    def busy(self) -> bool:
        """A snapshot is under way."""
        return self._snapshot is not None

    def wants_snapshot(self, now_s: float) -> bool:
        waits = self._next is None and self._snapshot is None and now_s >= self._retry_at_s
        return waits and now_s - self.heard_s <= self._settings.lease_s

    # --- what comes in ---

    def beat(self, beat: NodeBeat, now_s: float) -> None:
        self.heard_s, self._beat = now_s, beat
        self._last_seq = max(self._last_seq, beat.seq)
        self._judge_lag(now_s)

    def events(self, message: Events, now_s: float) -> None:
        self.heard_s = now_s
        if self._next is None:
            self._keep(message, now_s)
        elif self._apply(message):
            self._failures = 0
        else:
            self._lose(now_s)
        self._judge_lag(now_s)

    def part(self, part: SnapshotPart, token: int, now_s: float) -> Snapshot | None:
        """The question for the part after it, with that token; None: it was the last, or not what was asked for."""
        snapshot = self._snapshot
        if snapshot is None or part.token != snapshot.token or part.incarnation != self.card.incarnation:
            self._counters["late_parts"] += 1
            return None
        self.heard_s = now_s
        if snapshot.first_seq is None:
            snapshot.first_seq = part.seq
        self._put(snapshot.number, part.records)
        if part.cursor:
            snapshot.token, snapshot.deadline_s = token, now_s + self._settings.part_s
            return Snapshot(token, part.cursor)
        self._complete(snapshot, snapshot.first_seq, now_s)
        return None

    def tick(self, now_s: float) -> None:
        if self._snapshot is not None and now_s > self._snapshot.deadline_s:
            self._fail("snapshot_timeouts", now_s)
        if self._behind_s is not None and now_s - self._behind_s > self._settings.lag_s:
            self._lose(now_s)

    # --- snapshots ---

    def start(self, token: int, now_s: float) -> Snapshot:
        """Events before this question need not be kept: the answer will contain them."""
        self._counters["snapshots"] += 1
        number = self.number if self._clean else self._pending.number()
        self._snapshot = _Snapshot(number, token, now_s + self._settings.part_s)
        return Snapshot(token, b"")

    def end(self) -> None:
        self._drop_snapshot()
        self._serve(None)

    def _serve(self, number: int | None) -> None:
        """From now on lookups see this; what they saw before goes."""
        del self._owners[self.number]
        self._pending.retire(self.number)
        if number is not None:
            self.number = number
            self._owners[number] = self

    def _keep(self, message: Events, now_s: float) -> None:
        snapshot = self._snapshot
        if snapshot is None:
            if not self._failures:
                self._retry_at_s = now_s
            return
        snapshot.kept.append(message)
        snapshot.kept_bytes += len(message.records) + 200
        if snapshot.kept_bytes > self._settings.buffer_bytes:
            self._fail("overflows", now_s)

    def _complete(self, snapshot: _Snapshot, first_seq: int, now_s: float) -> None:
        """Replay what was kept. Batches may have come twice or in another order, but all have to be there."""
        self._snapshot = None
        if snapshot.number != self.number:
            self._serve(snapshot.number)
        self._clean = False
        self._next = first_seq + 1
        for message in sorted(snapshot.kept, key=lambda kept: kept.first):
            if not self._apply(message):
                self._lose(now_s)
                return
        self._judge_lag(now_s)

    def _fail(self, counter: str, now_s: float) -> None:
        self._counters[counter] += 1
        self._drop_snapshot()
        self._retry(now_s)

    def _drop_snapshot(self) -> None:
        if self._snapshot is not None and self._snapshot.number != self.number:
            self._pending.retire(self._snapshot.number)
        self._snapshot = None

    def _lose(self, now_s: float) -> None:
        self._counters["gaps"] += 1
        self._next = self._behind_s = None
        self._retry(now_s)

    def _retry(self, now_s: float) -> None:
        """At once the first time; then with pauses, until an event comes that fits."""
        settings = self._settings
        pause_s = settings.retry_s * 2 ** (self._failures - 1) if self._failures else 0.0
        self._retry_at_s = now_s + min(pause_s, settings.retry_most_s)
        self._failures = min(self._failures + 1, 30)

    def _judge_lag(self, now_s: float) -> None:
        if self._next is None or self._next > self._last_seq:
            self._behind_s = None
        elif self._behind_s is None:
            self._behind_s = now_s

    # --- events, synced ---

    def _apply(self, message: Events) -> bool:
        """False: events before these are missing."""
        assert self._next is not None
        count = len(message.records) // EVENT_BYTES
        start = message.first - message.cleared
        end = message.first + count
        self._last_seq = max(self._last_seq, end - 1)
        if start > self._next and not message.cleared:
            return False
        if end <= self._next and (count or message.cleared):
            self._counters["duplicates"] += 1
        if end <= self._next:
            return True
        if message.cleared and start >= self._next:
            # Whatever came before: it is gone, so a gap in front does not matter.
            self._serve(self._pending.number())
            self._clean = True
        skip = max(0, self._next - message.first)
        self._put(self.number, message.records[skip * EVENT_BYTES :])
        self._next = end
        return True

    def _put(self, number: int, records: bytes) -> None:
        if records:
            self._counters["records"] += len(records) // EVENT_BYTES
            self._pending.put(number, records)
            self._clean = self._clean and number != self.number
