"""What scheduler and workers of one engine tell each other of requests; plain data. metadata.py carries it."""

from __future__ import annotations

from dataclasses import dataclass

from lmkv.ids import Epoch, Incarnation, RequestId, TransferId
from lmkv.transfer.prompt import Prompt


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
    """One prefill request in one step. `cached` was complete before this step's forward, `computed` will be when this
    step's layers are, for whichever request they are computed (see lmkv.vllm.steps.StepWrites)."""

    transfer_id: TransferId
    cached: tuple[BlockRange, ...]
    computed: tuple[BlockRange, ...]
    last: bool
    """The prompt ends with this step."""


@dataclass(frozen=True, slots=True)
class OfferSpec:
    transfer_id: TransferId
    request_id: RequestId
    prompt: Prompt
    report: bool = True
    """The scheduler waits for finished_sending of this request."""


@dataclass(frozen=True, slots=True)
class ExpectSpec:
    """A grant that decode's scheduler has sent."""

    transfer_id: TransferId
    request_id: RequestId
    epoch: Epoch
    incarnation: Incarnation
    pair: int
    """Our number of the pair in which it was granted."""
    blocks: tuple[BlockRange, ...]
    tokens: tuple[int, int] = (0, 0)
    """The granted tokens, half-open."""
    landing: tuple[tuple[int, int], ...] = ()
    """Landing mode: prefill's blocks [lo, hi) that were asked for, by group."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """One rank's end of one receive, or (`outcome` "drained") the end of its quarantine."""

    transfer_id: TransferId
    request_id: RequestId
    outcome: str
    drained: bool
    reason: str
    slots: int = 0
    """Landing slots that go into quarantine with a failed receive, or (negative) come out of it."""


# --- the pool ---


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """Chunks of a request that are complete when this step's layers are. `keys` are the chunk keys from chunk `first`
    on; `blocks` hold their tokens, by transfer group."""

    request_id: RequestId
    namespace: bytes
    first: int
    keys: tuple[bytes, ...]
    blocks: tuple[BlockRange, ...]


@dataclass(frozen=True, slots=True)
class PageSource:
    """A pinned page of one chunk, by transfer group: where it is and what its checksums are."""

    chunk: int
    key: bytes
    node: Incarnation
    lease: int
    until_s: float
    """End of the lease, monotonic clock of this host."""
    offsets: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Tokens [lo, hi) are to be read into `blocks`, from `pages` in the order of their chunks."""

    request_id: RequestId
    namespace: bytes
    tokens: tuple[int, int]
    blocks: tuple[BlockRange, ...]
    pages: tuple[PageSource, ...]
    until_s: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One rank's end of a load: tokens before `good` are right. `reason`: what ended it early, or ""."""

    request_id: RequestId
    good: int
    reason: str
    loaded_bytes: int
    seconds: float
    corrupt: tuple[PageSource, ...] = ()
    """Pages with wrong checksums under a lease that was on."""
