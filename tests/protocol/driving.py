"""A sender, its clock, and short names for its events and actions."""

from __future__ import annotations

from lmkv.ids import Epoch, Incarnation, Rank, RequestId, TransferId
from lmkv.transfer.events import (
    CancelCame,
    Computed,
    Finished,
    Granted,
    Offer,
    Peer,
    PostWrite,
    Prompt,
    PromptDone,
    Rect,
    SenderAction,
    SenderEvent,
    WriteDone,
)
from lmkv.transfer.sender import Sender, SenderLimits

T, U = TransferId("t"), TransferId("u")
R = RequestId("r")
P = Prompt(b"p" * 16, 64)
D = Peer(Incarnation("d"), Rank(0))
OTHER = Peer(Incarnation("e"), Rank(0))
LIMITS = SenderLimits((10,), (4,), max_post_bytes=80, max_inflight_bytes=160)
ALL = Rect(0, 0, 4, 0, 4)


class Run:
    """A sender and its clock. `go` feeds events and returns all actions."""

    def __init__(self, limits: SenderLimits = LIMITS) -> None:
        self.machine = Sender(limits)
        self.now = 0.0

    def go(self, *events: SenderEvent, at: float | None = None) -> list[SenderAction]:
        self.now = self.now if at is None else at
        return [action for event in events for action in self.machine.handle(event, self.now)]

    def live(self, *rects: Rect, done: bool = True) -> list[SenderAction]:
        computed = [Computed(T, rect) for rect in rects]
        return self.go(Offer(T, R, P), grant(1), *computed, *([PromptDone(T)] if done else []))

    def land(self, *seqs: int, error: str = "") -> list[SenderAction]:
        return self.go(*(WriteDone(T, seq, error) for seq in seqs))


def grant(epoch: int, blocks: tuple[int, int] = (0, 4), peer: Peer = D, tid: TransferId = T) -> Granted:
    return Granted(peer, tid, Epoch(epoch), (blocks,), P)


def cancel(epoch: int, peer: Peer = D, tid: TransferId = T) -> CancelCame:
    return CancelCame(peer, tid, Epoch(epoch))


def posts(actions: list[SenderAction]) -> list[tuple[int, Rect]]:
    return [(a.seq, a.rect) for a in actions if isinstance(a, PostWrite)]


def ends(actions: list[SenderAction]) -> list[str]:
    return [str(a.outcome) for a in actions if isinstance(a, Finished)]


def of(kind: type, actions: list[SenderAction]) -> list[SenderAction]:
    return [a for a in actions if isinstance(a, kind)]
