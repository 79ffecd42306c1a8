"""One rank's record of one transfer: moments and sums, filled by the worker loop, sent on as a plain dict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lmkv.ids import Rank, TransferId


@dataclass(slots=True)
class SendTrace:
    """Prefill. Moments are monotonic seconds, 0.0 where it did not happen."""

    transfer_id: TransferId
    rank: Rank
    offered_s: float = 0.0
    granted_s: float = 0.0
    first_computed_s: float = 0.0
    last_computed_s: float = 0.0
    first_post_s: float = 0.0
    last_post_s: float = 0.0
    sealed_s: float = 0.0
    last_done_s: float = 0.0
    finished_s: float = 0.0
    writes: int = 0
    extents: int = 0
    bytes: int = 0
    retries: int = 0
    outcome: str = ""
    reason: str = ""
    clock_offset_s: float = 0.0
    """The peer's monotonic clock minus ours, as the heartbeats measured it."""


@dataclass(slots=True)
class ReceiveTrace:
    """Decode."""

    transfer_id: TransferId
    rank: Rank
    expected_s: float = 0.0
    first_landed_s: float = 0.0
    last_landed_s: float = 0.0
    sealed_s: float = 0.0
    reported_s: float = 0.0
    writes: int = 0
    bytes: int = 0
    checksum_s: float = 0.0
    convert_s: float = 0.0
    """Taking KV out of landing slots."""
    outcome: str = ""
    reason: str = ""
    clock_offset_s: float = 0.0


def facts(trace: SendTrace | ReceiveTrace) -> dict[str, Any]:
    return asdict(trace)
