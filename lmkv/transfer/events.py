"""Events and actions of the two machines. `handle(event, now_s) -> list[action]`; the shell performs the actions.

A *rectangle* is layers × blocks of one KV cache group: the unit in which KV becomes complete, is posted and counted.
Layer indices count the layers of that group on this rank, in model order; block indices count from the start of the
request (block i holds tokens [i*n, (i+1)*n)).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId

from .prompt import Prompt


@dataclass(frozen=True, slots=True)
class Peer:
    """One worker rank of one incarnation of an engine."""

    incarnation: Incarnation
    rank: Rank


@dataclass(frozen=True, slots=True)
class Rect:
    group: int
    layer_lo: int
    layer_hi: int
    block_lo: int
    block_hi: int


# --- events both machines take ---


@dataclass(frozen=True, slots=True)
class Heard:
    """A Beat of the peer arrived: every lease of the pair is renewed from now."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerGone:
    """`dead`: its process is proven to be gone, and what it had sent is drained; it never comes back.

    `fenced`: nothing that it was granted or had posted until now can land any more, but it may come back and be granted
    again. Neither: it is only silent, and may still write.
    """

    peer: Peer
    dead: bool
    fenced: bool = False


MOST_DEAD = 4096
"""A machine remembers as many dead peers for good; the others it forgets as it forgets the silent."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; deadlines are examined."""


# --- prefill side ---


@dataclass(frozen=True, slots=True)
class Offer:
    """The engine has taken a request whose KV is to be pushed. May come after its Grant."""

    transfer_id: TransferId
    request_id: RequestId
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Computed:
    """The KV of `rect` is complete in memory (or was found in the prefix cache)."""

    transfer_id: TransferId
    rect: Rect


@dataclass(frozen=True, slots=True)
class PromptDone:
    """Every rectangle of the prompt has been announced by Computed."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Withdraw:
    """The engine cannot finish this request (abort, error, preemption without resumption)."""

    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """The request's blocks are being overwritten though writes may be in flight: the transfer fails for good.

    The shell tells it before any WriteDone that it has not seen before the overwriting began.
    """

    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, slots=True)
class Yield:
    """The engine lacks blocks: this finished prompt ends if it has no grant, or waits for landing slots, and one that
    is not computed has a grant (and perhaps these slots)."""

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Preempted:
    """The engine takes the request's blocks away and will compute it again (Computed and PromptDone come again).

    What was computed and not posted is forgotten. The blocks may be overwritten only when `Sender.in_flight(tid)` is 0.
    """

    transfer_id: TransferId


@dataclass(frozen=True, slots=True)
class Granted:
    """A Grant arrived. `blocks[g]` = [first, last) request blocks of group g that the grant covers.

    `prompt` is decode's. `slot_bytes` > 0: landing mode. Nothing is posted without a slot (Credited), and no post is
    larger than one.
    """

    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    blocks: tuple[tuple[int, int], ...]
    prompt: Prompt
    slot_bytes: int = 0
    wait_s: float = 0.0
    """Decode waits this long for the transfer, so its offer may come as late."""
    all_checked: bool = True
    """The receiver verifies a checksum of every write. Otherwise what is in flight must not count: the seal waits until
    every write is done, and a transfer that is revoked before has no seal."""


@dataclass(frozen=True, slots=True)
class Credited:
    """Landing mode: the receiver lends these slots to this transfer, for one write each."""

    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NotNeededCame:
    transfer_id: TransferId
    reason: str


@dataclass(frozen=True, slots=True)
class CancelCame:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class WriteDone:
    """The Completion of write `seq`: `error` is empty if it landed.

    After an error the write's note has not been and will not be delivered, unless the connection is lost with it: then
    nothing that is posted to this peer later can land either. The one retry relies on this.
    """

    transfer_id: TransferId
    seq: int
    error: str = ""


# --- prefill side: actions ---


@dataclass(frozen=True, slots=True)
class PostWrite:
    """Post `rect` to `peer` with a WriteNote of `seq`. Answer with WriteDone, also when it cannot be posted.

    The note's `payload_bytes` are `SenderLimits.rect_bytes(rect)`, null blocks included: both sides count cells. A rect
    of null blocks only has no extents: send its note alone.
    """

    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    seq: int
    rect: Rect
    slot: int = -1
    """Where it lands in landing mode; -1: in the granted blocks."""
    attempt: int = 0
    """1: the rectangle's first write has failed."""


@dataclass(frozen=True, slots=True)
class SendSeal:
    """`writes` are distinct rectangles: a retried write is the same rectangle under a new seq, and counts once."""

    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    writes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class SendFailed:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    reason: str
    landed_bytes: int


@dataclass(frozen=True, slots=True)
class SendCancelled:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch


class SendOutcome(StrEnum):
    SENT = "sent"
    NOT_NEEDED = "not_needed"
    CANCELLED = "cancelled"
    WITHDRAWN = "withdrawn"
    FAILED = "failed"
    PEER_LOST = "peer_lost"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Finished:
    """This rank no longer reads the request's blocks: the shell reports finished_sending for an offered request.

    Exactly one per Offer. `request_id` is None for a transfer that ended before it was offered; should its Offer come
    after all, that is answered by a Finished of its own.
    """

    transfer_id: TransferId
    request_id: RequestId | None
    outcome: SendOutcome
    reason: str


# --- decode side ---


@dataclass(frozen=True, slots=True)
class Expect:
    """Blocks were granted. `writers` are the prefill ranks that write to this rank.

    `rects` are what has to be covered, each cell by every writer (ranks write disjoint head ranges; with one writer:
    by it); `payload_bytes` is what one writer has to deliver, null blocks included.
    """

    transfer_id: TransferId
    request_id: RequestId
    epoch: Epoch
    writers: tuple[Peer, ...]
    rects: tuple[Rect, ...]
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Landed:
    """A WriteNote arrived. `fault`: what is wrong with the bytes ("is corrupt"), or ""."""

    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    seq: int
    rect: Rect
    payload_bytes: int
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Sealed:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    writes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class FailedCame:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch
    reason: str


@dataclass(frozen=True, slots=True)
class CancelledCame:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Abandon:
    """The engine no longer wants it (client gone). Blocks stay held until the Report."""

    transfer_id: TransferId


# --- decode side: actions ---


@dataclass(frozen=True, slots=True)
class SendCancel:
    peer: Peer
    transfer_id: TransferId
    epoch: Epoch


class ReceiveOutcome(StrEnum):
    LOADED = "loaded"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class Report:
    """Exactly one per Expect. FAILED with `drained=False`: the blocks must be quarantined until Drained.

    ABANDONED is reported only once drained.
    """

    transfer_id: TransferId
    request_id: RequestId
    outcome: ReceiveOutcome
    drained: bool
    reason: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Drained:
    """After Report(drained=False): nothing can land in those blocks any more."""

    transfer_id: TransferId
    request_id: RequestId
    epoch: Epoch


SenderEvent = (
    Offer
    | Computed
    | PromptDone
    | Withdraw
    | Revoke
    | Yield
    | Preempted
    | Granted
    | Credited
    | NotNeededCame
    | CancelCame
    | WriteDone
    | Heard
    | PeerGone
    | Tick
)
SenderAction = PostWrite | SendSeal | SendFailed | SendCancelled | Finished
ReceiverEvent = Expect | Landed | Sealed | FailedCame | CancelledCame | Abandon | Heard | PeerGone | Tick
ReceiverAction = SendCancel | Report | Drained
