"""What the connector's two halves send each other through vLLM's own step messages (same engine, trusted)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmkv.ids import RequestId, TransferId
from lmkv.wire import WorkerCard

from .specs import ExpectSpec, LoadReport, LoadSpec, OfferSpec, Push, RankReport, StoreSpec


@dataclass
class StepMeta(KVConnectorMetadata):
    """Scheduler → workers, every step."""

    offers: list[OfferSpec] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    preempted: list[TransferId] = field(default_factory=list)
    withdrawals: list[tuple[TransferId, str]] = field(default_factory=list)
    yields: list[TransferId] = field(default_factory=list)
    """Finished prompts that are to give way."""
    expects: list[ExpectSpec] = field(default_factory=list)
    abandons: list[TransferId] = field(default_factory=list)
    stores: list[StoreSpec] = field(default_factory=list)
    loads: list[LoadSpec] = field(default_factory=list)
    ended: list[RequestId] = field(default_factory=list)
    """Requests that have ended while they were loaded from the pool."""
    overwritten: list[RequestId] = field(default_factory=list)
    """Preempted requests that had chunks to store."""
    idle: bool = False
    """Nothing is computed in this step."""


@dataclass
class WorkerMeta(KVConnectorWorkerMetadata):
    """Workers → scheduler, in steps that have something to tell."""

    reports: list[RankReport] = field(default_factory=list)
    ledgers: list[dict[str, Any]] = field(default_factory=list)
    loads: list[LoadReport] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    """What the pool's parts have counted, all ranks together."""
    failures: Counter[str] = field(default_factory=Counter)
    """Bugs that the ranks' loops have survived, by kind."""
    broken: str = ""
    """Why a rank moves no KV any more; "" while all do."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMeta:
        assert isinstance(other, WorkerMeta)
        return WorkerMeta(
            self.reports + other.reports,
            self.ledgers + other.ledgers,
            self.loads + other.loads,
            self.counted + other.counted,
            self.failures + other.failures,
            self.broken or other.broken,
        )


@dataclass
class HandshakeMeta(KVConnectorHandshakeMetadata):
    """Worker → scheduler, once: the card without the engine's part, and the layout as the worker found it."""

    card: WorkerCard
    layout: dict[str, str]
    unpooled: str = "no pool is set"
    """Why this rank does not use the pool, or ""."""
