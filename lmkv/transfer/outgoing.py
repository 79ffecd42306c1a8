"""What the sender remembers of a transfer, and its limits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf

from lmkv.errors import ConfigError
from lmkv.ids import Epoch, RequestId, TransferId

from .events import Credited, Granted, Peer, PostWrite, Rect, SendCancelled, SendFailed, SendOutcome, SendSeal
from .prompt import Prompt
from .rects import Coverage, cells_of, split_rect


@dataclass(frozen=True, slots=True)
class SenderLimits:
    """`layer_block_bytes[g]` is one block of one layer of group g, `layers[g]` the layers of group g on this rank.

    After PEER_LOST the source of a write that is still in flight may be overwritten. It never counts: its checksum is
    wrong, or its transfer is not sealed (`Granted.all_checked`).
    """

    layer_block_bytes: tuple[int, ...]
    layers: tuple[int, ...]
    max_post_bytes: int = 16 << 20
    max_inflight_bytes: int = 64 << 20
    """To one peer. A single rectangle that is larger goes alone."""
    lease_s: float = 10.0
    """Nothing is posted to a peer that was heard this long ago."""
    hold_s: float = 30.0
    """How long a finished prompt waits for its grant, and a granted one for a peer whose lease is over."""
    early_grant_s: float = 60.0
    """How long what comes before its Offer is kept; a grant as long as its receiver waits, if that is longer."""
    max_early: int = 4096
    tombstone_s: float = 120.0

    def __post_init__(self) -> None:
        if len(self.layer_block_bytes) != len(self.layers):
            raise ConfigError(
                f"layer_block_bytes names {len(self.layer_block_bytes)} groups and layers {len(self.layers)}",
                hint="give one entry a group in both",
            )
        if any(n <= 0 for n in self.layer_block_bytes) or any(n < 0 for n in self.layers):
            raise ConfigError(
                f"bytes must be positive and layers not negative: {self.layer_block_bytes}, {self.layers}"
            )
        times = (self.lease_s, self.hold_s, self.early_grant_s, self.tombstone_s)
        if min(self.max_post_bytes, self.max_inflight_bytes, self.max_early) <= 0 or min(times) <= 0:
            raise ConfigError(f"sender limits must be positive: {self}")

    def rect_bytes(self, rect: Rect) -> int:
        """What `rect` counts in notes and seals, null blocks included."""
        return cells_of(rect) * self.layer_block_bytes[rect.group]

    def granted_cells(self, grant: Granted) -> int:
        return sum(max(0, hi - lo) * n for (lo, hi), n in zip(grant.blocks, self.layers, strict=True))

    def cuts(self, rect: Rect, slot_bytes: int = 0) -> list[Rect]:
        """`rect` in pieces that one post may carry."""
        most = min(self.max_post_bytes, slot_bytes) if slot_bytes else self.max_post_bytes
        return split_rect(rect, self.layer_block_bytes[rect.group], most)


class Phase(IntEnum):
    """A transfer moves to the right only."""

    EARLY = 0
    """Granted, not offered yet."""
    LIVE = 1
    """Offered; rectangles are posted as grant, lease and window allow."""
    ENDING = 2
    """The outcome is known; writes in flight are waited for. Nothing is posted."""
    OVER = 3
    """Finished (or refused before it was offered): a tombstone that answers late messages."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A posted write whose WriteDone has not come."""

    peer: Peer
    epoch: Epoch
    rect: Rect
    bytes: int
    attempt: int
    life: int
    slot: int


@dataclass(frozen=True, slots=True)
class Debt:
    """An answer owed to `peer`: true, and sent, once no write of `epoch` or older is in flight."""

    peer: Peer
    epoch: Epoch
    cancelled: bool
    """SendCancelled, else SendFailed."""


@dataclass(slots=True)
class Outgoing:
    """One transfer. `taken` are the cells of the current grant that are queued or posted; `queued` counts the queued
    rectangles."""

    transfer_id: TransferId
    born_s: float
    phase: Phase = Phase.EARLY
    request_id: RequestId | None = None
    prompt: Prompt | None = None
    """The offer's; None until it comes."""
    life: int = 0
    """Counts preemptions: a write of an older life cannot be retried."""
    computed: Coverage = field(default_factory=Coverage)
    prompt_done_s: float | None = None
    grant: Granted | None = None
    taken: Coverage = field(default_factory=Coverage)
    queued: int = 0
    waiting: deque[Rect] = field(default_factory=deque)
    slots: deque[int] = field(default_factory=deque)
    """Landing mode: rectangles without a slot (they count as queued), and slots without a rectangle."""
    flights: dict[int, Flight] = field(default_factory=dict)
    next_seq: int = 0
    writes: int = 0
    bytes: int = 0
    """Distinct rectangles posted in this epoch, and their bytes: what the seal says."""
    landed_bytes: int = 0
    sealed: bool = False
    outcome: SendOutcome | None = None
    reason: str = ""
    stuck_s: float = inf
    """When to stop waiting for writes to a peer that has cancelled, and so accepts nothing, but is alive."""
    cancelled: dict[Peer, Epoch] = field(default_factory=dict)
    debts: dict[Debt, str] = field(default_factory=dict)
    expires_s: float = inf

    def begin_epoch(self, grant: Granted) -> None:
        """Start over towards `grant`; writes of older epochs that are in flight stay in flight."""
        self.grant = grant
        self.taken = Coverage()
        self.waiting.clear()
        self.slots.clear()
        self.queued = self.writes = self.bytes = self.landed_bytes = 0
        self.sealed = False

    def begin_life(self) -> None:
        """Preempted: nothing is computed any more. What has been posted has been; see `give_back` for the rest."""
        self.life += 1
        self.computed = Coverage()
        self.prompt_done_s = None

    def give_back(self, rect: Rect, slot: int) -> None:
        """A rectangle that was taken and not posted may be taken again, and its slot be used for another."""
        self.taken.remove(rect)
        if slot >= 0:
            self.slots.append(slot)

    def foreign(self) -> str:
        """Why the grant is not for the prompt that was offered; "" when it is, or while one of the two is missing.

        Nothing is posted before both are there: what is computed counts only once it is offered.
        """
        return self.prompt.differs(self.grant.prompt) if self.prompt is not None and self.grant is not None else ""

    def takes(self, event: Credited) -> bool:
        """The slots are for the grant that is being served."""
        grant = self.grant
        return (
            grant is not None and self.phase < Phase.ENDING and (grant.peer, grant.epoch) == (event.peer, event.epoch)
        )

    def post(self, rect: Rect, size: int, attempt: int, slot: int) -> PostWrite:
        """The next write. A retry is the same rectangle under a new seq, so that the seal stays right."""
        assert self.grant is not None, "only what is granted is posted"
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        self.flights[seq] = Flight(self.grant.peer, self.grant.epoch, rect, size, attempt, self.life, slot)
        if attempt == 0:
            self.writes += 1
            self.bytes += size
        return PostWrite(self.grant.peer, self.transfer_id, self.grant.epoch, seq, rect, slot, attempt)

    def verdict(self, limits: SenderLimits) -> str | None:
        """None: not everything is announced or posted yet. "": all granted cells are posted. Else why never."""
        if self.grant is None or self.prompt_done_s is None:
            return None
        granted = limits.granted_cells(self.grant)
        if self.taken.cells != granted:
            return f"incomplete: {self.taken.cells} of {granted} granted cells were computed"
        return None if self.queued else ""

    def giving_way(self) -> tuple[SendOutcome, str] | None:
        """Outcome and reason if it ends because its blocks are wanted: its prompt is computed, and no grant, or no
        landing slot, has come. None: it does not give way."""
        if self.prompt_done_s is None:
            return None
        if self.grant is None:
            return SendOutcome.EXPIRED, "no grant came, and its blocks were wanted"
        if self.waiting and not self.flights:
            return SendOutcome.FAILED, "no landing slot came, and its blocks were wanted"
        return None

    @property
    def awaits_prompt(self) -> bool:
        """Its receiver holds blocks for it, and its prompt is not computed (any more)."""
        return self.grant is not None and self.prompt_done_s is None and self.phase < Phase.ENDING

    @property
    def may_seal(self) -> bool:
        """Nothing is in flight that would count without having been seen to complete."""
        return self.grant is not None and (self.grant.all_checked or not self.flights)

    def seal(self) -> SendSeal:
        """Says what the receiver has to count; a retry after it changes nothing in it."""
        assert self.grant is not None, "only what is granted is sealed"
        self.sealed = True
        return SendSeal(self.grant.peer, self.transfer_id, self.grant.epoch, self.writes, self.bytes)

    def is_current(self, flight: Flight) -> bool:
        return self.grant is not None and flight.peer == self.grant.peer and flight.epoch == self.grant.epoch

    def may_land(self, peer: Peer, epoch: Epoch) -> bool:
        """Can anything of `epoch` or older still land at `peer`?"""
        return any(flight.peer == peer and flight.epoch <= epoch for flight in self.flights.values())

    def payable(self) -> list[Debt]:
        """The answers that have become true."""
        return [debt for debt in self.debts if not self.may_land(debt.peer, debt.epoch)]

    def answer(self, debt: Debt) -> SendCancelled | SendFailed:
        """The debt is paid by this."""
        reason = self.debts.pop(debt)
        if debt.cancelled:
            return SendCancelled(debt.peer, self.transfer_id, debt.epoch)
        current = self.grant is not None and (self.grant.peer, self.grant.epoch) == (debt.peer, debt.epoch)
        return SendFailed(debt.peer, self.transfer_id, debt.epoch, reason, self.landed_bytes if current else 0)

    def refusal(self, event: Granted) -> Debt | None:
        """What a grant is owed that comes when the transfer is ending or over; None: it needs no (other) answer."""
        if event.epoch <= self.cancelled.get(event.peer, -1):
            return Debt(event.peer, event.epoch, True)
        known = self.grant is not None and self.grant.peer == event.peer and event.epoch <= self.grant.epoch
        if known and (self.phase is Phase.ENDING or self.outcome is SendOutcome.SENT):
            return None
        return Debt(event.peer, event.epoch, False)

    def deadline_s(self, limits: SenderLimits, lease_end_s: float) -> float | None:
        """When something has to happen if nothing else does; `lease_end_s` is the granted peer's."""
        match self.phase:
            case Phase.EARLY:
                return self.born_s + max(limits.early_grant_s, self.grant.wait_s if self.grant is not None else 0.0)
            case Phase.OVER:
                return None if self.flights else self.expires_s
        if self.grant is None:
            return None if self.prompt_done_s is None else self.prompt_done_s + limits.hold_s
        return min(lease_end_s + limits.hold_s, self.stuck_s)

    def forget_cells(self) -> None:
        self.computed = Coverage()
        self.taken = Coverage()


@dataclass(slots=True)
class SenderCounters:
    posts: int = 0
    posted_bytes: int = 0
    retries: int = 0
    write_errors: int = 0
    stray: int = 0
    """Events about nothing known: late, duplicate, or of another peer."""
    early_refused: int = 0
    """Grants and cancels that came before their Offer and found the buffer full: not answered, not remembered."""

    def add_post(self, size: int) -> None:
        self.posts += 1
        self.posted_bytes += size
