"""What the connector's two halves send each other through vLLM's own step messages (same engine, trusted)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmkv.ids import Epoch, Incarnation, RequestId, TransferId
from lmkv.wire import WorkerCard


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Blocks [lo, lo + len(ids)) of the request in transfer group `group`; `ids` are this engine's block ids."""

    group: int
    lo: int
    ids: tuple[int, ...]

    @property
    def hi(self) -> int:
        return self.lo + len(self.ids)


@dataclass(frozen=True, slots=True)
class Push:
    """One prefill request in one step: `cached` is complete already, `computed` will be when this step's layers are."""

    transfer_id: TransferId
    cached: tuple[BlockRange, ...]
    computed: tuple[BlockRange, ...]
    last: bool
    """The prompt ends with this step."""


@dataclass(frozen=True, slots=True)
class OfferSpec:
    transfer_id: TransferId
    request_id: RequestId
    report: bool = True
    """The scheduler waits for finished_sending of this request."""


@dataclass(frozen=True, slots=True)
class ExpectSpec:
    """A grant that decode's scheduler has sent."""

    transfer_id: TransferId
    request_id: RequestId
    epoch: Epoch
    incarnation: Incarnation
    blocks: tuple[BlockRange, ...]
    tokens: tuple[int, int] = (0, 0)
    """The granted tokens, half-open."""
    landing: tuple[tuple[int, int], ...] = ()
    """Landing mode: prefill's blocks [lo, hi) that were asked for, by group."""


@dataclass
class StepMeta(KVConnectorMetadata):
    """Scheduler → workers, every step."""

    offers: list[OfferSpec] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    preempted: list[TransferId] = field(default_factory=list)
    withdrawals: list[tuple[TransferId, str]] = field(default_factory=list)
    expects: list[ExpectSpec] = field(default_factory=list)
    abandons: list[TransferId] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's end of one receive, or (`outcome` "drained") the end of its quarantine."""

    transfer_id: TransferId
    request_id: RequestId
    outcome: str
    drained: bool
    reason: str


@dataclass
class WorkerMeta(KVConnectorWorkerMetadata):
    """Workers → scheduler, in steps that have something to tell."""

    reports: list[RankReport] = field(default_factory=list)
    ledgers: list[dict[str, Any]] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMeta:
        assert isinstance(other, WorkerMeta)
        return WorkerMeta(self.reports + other.reports, self.ledgers + other.ledgers)


@dataclass
class HandshakeMeta(KVConnectorHandshakeMetadata):
    """Worker → scheduler, once: the card without the engine's part, and the layout as the worker found it."""

    card: WorkerCard
    layout: dict[str, str]
