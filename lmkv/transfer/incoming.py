"""What the receiver remembers: its limits, one record a grant, one a writer within it, one a peer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

from lmkv.errors import ConfigError
from lmkv.ids import Epoch, RequestId, TransferId

from .events import CancelledCame, Expect, FailedCame, Landed, Peer, ReceiveOutcome, Rect, Sealed
from .rects import Coverage, cells_of

Note = Landed | Sealed | FailedCame | CancelledCame
"""What a writer says about one transfer; may come before the Expect."""

Key = tuple[TransferId, Epoch]
"""One grant. Messages of another epoch of the same transfer never touch it."""


@dataclass(frozen=True, slots=True)
class ReceiverLimits:
    deadline_s: float = 120.0
    """From Expect to LOADED."""
    cancel_grace_s: float = 2.0
    """From the first SendCancel of a failed transfer to Report(FAILED, drained=False)."""
    cancel_resend_s: float = 1.0
    lease_s: float = 10.0
    """A writer that says nothing for so long is taken for silent."""
    early_s: float = 60.0
    max_early: int = 65536
    """Messages (of all transfers together) kept for an Expect that has not come yet."""
    tombstone_s: float = 120.0

    def __post_init__(self) -> None:
        times = (self.deadline_s, self.cancel_resend_s, self.lease_s, self.early_s, self.tombstone_s)
        if min(times) <= 0 or self.max_early <= 0 or self.cancel_grace_s < 0:
            raise ConfigError(f"receiver limits must be positive: {self}")


class Phase(IntEnum):
    """A grant moves to the right only."""

    LOADING = 0
    CANCELLING = 1
    """Failed or abandoned, not reported: writers are being cancelled."""
    QUARANTINED = 2
    """Reported FAILED with drained=False."""
    OVER = 3
    """Reported, and nothing can land any more: a tombstone that counts late messages."""


@dataclass(slots=True)
class Writer:
    """One prefill rank of one grant.

    `drained`: nothing of it can land any more, because it said so, because everything it has sealed has landed, or
    because it is dead. `answered`: it said so.
    """

    peer: Peer
    seqs: set[int] = field(default_factory=set)
    rects: set[Rect] = field(default_factory=set)
    covered: Coverage = field(default_factory=Coverage)
    bytes: int = 0
    seal: tuple[int, int] | None = None
    drained: bool = False
    answered: bool = False

    def land(self, rect: Rect, payload_bytes: int, expected: Coverage) -> str:
        """Count a write; returns what is wrong with it, or "". A rectangle counts once, whatever its seq."""
        if rect in self.rects:
            return ""
        if not expected.covers(rect):
            return f"outside grant: {rect}"
        before = self.covered.cells
        self.covered.add(rect)
        if self.covered.cells - before != cells_of(rect):
            return f"overlap: {rect} was partly written before"
        self.rects.add(rect)
        self.bytes += payload_bytes
        return ""

    def verdict(self, expected: Coverage, payload_bytes: int) -> str | None:
        """None: not all is there yet. "": complete. Else why it can never become complete."""
        if self.seal is None:
            return None
        writes, sealed_bytes = self.seal
        if sealed_bytes != payload_bytes:
            return f"seal: {sealed_bytes} bytes, {payload_bytes} were granted"
        if self.covered.cells < expected.cells and len(self.rects) < writes:
            return None
        if (self.covered.cells, len(self.rects), self.bytes) == (expected.cells, writes, payload_bytes):
            return ""
        return (
            f"count: {len(self.rects)} writes with {self.covered.cells} cells and {self.bytes} bytes have landed, "
            f"{writes} with {expected.cells} and {payload_bytes} were sealed"
        )


@dataclass(slots=True)
class Incoming:
    """One grant."""

    expect: Expect
    expected: Coverage
    writers: dict[Peer, Writer]
    deadline_s: float
    phase: Phase = Phase.LOADING
    outcome: ReceiveOutcome = ReceiveOutcome.LOADED
    reason: str = ""
    also: list[RequestId] = field(default_factory=list)
    """Other requests that came with this transfer id while it was in use: failed, and drained with it."""
    grace_end_s: float = inf
    resend_s: float = inf
    expires_s: float = inf

    @property
    def key(self) -> Key:
        return self.expect.transfer_id, self.expect.epoch

    @property
    def undrained(self) -> list[Writer]:
        return [writer for writer in self.writers.values() if not writer.drained]


@dataclass(slots=True)
class Early:
    """Messages of one grant that came before its Expect."""

    expires_s: float
    notes: list[Note] = field(default_factory=list)


@dataclass(slots=True)
class WriterLife:
    """One prefill rank, whatever it writes. A proven death is remembered for ever (an incarnation dies once, and
    seldom); one that was only cut off may be granted again as soon as it is heard."""

    lease_end_s: float = -inf
    dead: bool = False


@dataclass(slots=True)
class ReceiverCounters:
    duplicates: int = 0
    stray: int = 0
    """Messages of a peer that is no writer of the transfer, or of an epoch that has been replaced."""
    late_writes: int = 0
    """Landed after the transfer had ended or failed."""
    writes_after_cancelled: int = 0
    """Of these, after the writer had said that nothing would land. A note that its Cancelled overtook counts too (the
    bytes of such a write had landed before); anything beyond that is a bug or memory being overwritten."""
    checksum_failures: int = 0
    early_dropped: int = 0
    cancels_sent: int = 0
