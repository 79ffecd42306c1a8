"""What the engine thread tells the worker loop, and what it takes back."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from lmkv.ids import RequestId, TransferId

from .specs import ExpectSpec, LoadReport, LoadSpec, OfferSpec, Push, RankReport, StoreSpec


class Fence(Protocol):
    """A point in the device's stream (torch.cuda.Event); host memory needs none."""

    def query(self) -> bool:
        """True once everything before the point has been executed."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Cached blocks of these pushes are complete in all layers, once the fence (the end of all earlier steps) has
    passed."""

    pushes: tuple[Push, ...]
    fence: Fence | None
    time_s: float


@dataclass(frozen=True, slots=True)
class LayersDone:
    """Layers [lo, hi) of `group` have been computed for the step's pushes, once the fence has passed."""

    pushes: tuple[Push, ...]
    group: int
    lo: int
    hi: int
    fence: Fence | None
    time_s: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """All layers of the step have been announced."""

    pushes: tuple[Push, ...]


@dataclass(frozen=True, slots=True)
class Offered:
    offers: tuple[OfferSpec, ...]


@dataclass(frozen=True, slots=True)
class Withdrawn:
    withdrawals: tuple[tuple[TransferId, str], ...]


@dataclass(frozen=True, slots=True)
class Yielded:
    """The engine can compute nothing: this finished prompt gives way if another one is waited for (`ev.Yield`)."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Expected:
    expects: tuple[ExpectSpec, ...]


@dataclass(frozen=True, slots=True)
class Abandoned:
    transfer_ids: tuple[TransferId, ...]


@dataclass(frozen=True, slots=True)
class Preempted:
    """Blocks of these transfers are about to be overwritten; `drained` is set when nothing reads them any more.

    `gave_up`: the engine could wait no longer (`WorkerLoop.revoke`), and the transfers fail for good.
    """

    transfer_ids: tuple[TransferId, ...]
    gave_up: bool = False
    drained: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class BlockHold:
    """The engine's word that the blocks of one StoreSpec stay as they are until it is reported as packed.

    `revoked` is set by the engine thread when it can wait no longer (Overwritten timed out), before the blocks are
    overwritten. The loop looks at it after it has read the blocks: not set then, it has read what the store is named
    after; set, what it has read may be anything and is thrown away.
    """

    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """Chunks that this step has completed, in all layers, once the fence has passed. One hold a spec."""

    specs: tuple[StoreSpec, ...]
    holds: tuple[BlockHold, ...]
    fence: Fence | None


@dataclass(frozen=True, slots=True)
class Loading:
    """These may be written to once the fence has passed: an earlier step may still write what was in their blocks."""

    specs: tuple[LoadSpec, ...]
    fence: Fence | None


@dataclass(frozen=True, slots=True)
class Ended:
    """These requests have ended while they were loaded from the pool."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class Overwritten:
    """Blocks of these requests are about to be overwritten; `drained` is set when no store reads them any more."""

    request_ids: tuple[RequestId, ...]
    drained: threading.Event = field(default_factory=threading.Event)


Fenced = Ready | LayersDone | Stored | Loading
"""Commands that wait for the device; those behind them wait too, so that the order of steps is kept."""

Command = (
    Ready | LayersDone | StepDone | Offered | Withdrawn | Yielded | Expected | Abandoned | Preempted
    | Stored | Loading | Ended | Overwritten
)  # fmt: skip


@dataclass(slots=True)
class Results:
    """Taken by the engine thread at the end of a step."""

    sent: list[RequestId] = field(default_factory=list)
    reports: list[RankReport] = field(default_factory=list)
    ledgers: list[dict[str, object]] = field(default_factory=list)
    loads: list[LoadReport] = field(default_factory=list)
    packed: list[RequestId] = field(default_factory=list)
    """One entry for each StoreSpec whose blocks are read no more."""
    counted: Counter[str] = field(default_factory=Counter)
    """By the pool, since the last time."""
    failures: Counter[str] = field(default_factory=Counter)
    """Bugs that the loop has survived since the last time, by kind."""

    def __bool__(self) -> bool:
        """There is something."""
        return bool(
            self.sent or self.reports or self.ledgers or self.loads or self.packed or self.counted or self.failures
        )

    def add(self, more: Results) -> None:
        self.sent += more.sent
        self.reports += more.reports
        self.ledgers += more.ledgers
        self.loads += more.loads
        self.packed += more.packed
        self.counted += more.counted
        self.failures += more.failures


def split(command: Command) -> list[Command]:
    """One command for each request or transfer, where it is of several that have nothing to do with each other."""
    match command:
        case Offered(offers):
            return [Offered((offer,)) for offer in offers]
        case Withdrawn(withdrawals):
            return [Withdrawn((withdrawal,)) for withdrawal in withdrawals]
        case Expected(expects):
            return [Expected((expect,)) for expect in expects]
        case Abandoned(tids):
            return [Abandoned((tid,)) for tid in tids]
        case Stored(specs, holds, fence):
            return [Stored((spec,), (hold,), fence) for spec, hold in zip(specs, holds, strict=True)]
        case Loading(loads, fence):
            return [Loading((load,), fence) for load in loads]
        case Ended(request_ids):
            return [Ended((request_id,)) for request_id in request_ids]
        case _:
            return [command]
