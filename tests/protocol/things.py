"""What the simulated world is made of: geometry, requests, writes in flight, granted blocks, messages, ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lmkv.ids import Epoch, Incarnation, Rank, TransferId
from lmkv.transfer import events as ev
from lmkv.transfer.receiver import ReceiverLimits
from lmkv.transfer.sender import Sender, SenderLimits

LAYERS = (2, 1)
CELL_BYTES = (10, 30)
PROMPT = ((0, 4), (0, 3))
CHUNKS = (((0, 2), (0, 1)), ((2, 4), (1, 3)))
SENDER = SenderLimits(CELL_BYTES, LAYERS, max_post_bytes=40, max_inflight_bytes=100)
RECEIVER = ReceiverLimits()
MAX_DELAY_S = 55.0
"""Control messages that are older are lost (they must not outlive what the machines remember of a cancel)."""

Cell = tuple[int, int, int]
DECODE = ev.Peer(Incarnation("decode"), Rank(0))
JUNK = "junk"


def prefill_peer(rank: int) -> ev.Peer:
    return ev.Peer(Incarnation(f"prefill{rank}"), Rank(rank))


def cells(rect: ev.Rect) -> Iterator[Cell]:
    for layer in range(rect.layer_lo, rect.layer_hi):
        for block in range(rect.block_lo, rect.block_hi):
            yield rect.group, layer, block


def plan() -> list[ev.Rect]:
    """The prompt as the engine announces it: by chunk, group, layer."""
    return [
        ev.Rect(group, layer, layer + 1, *chunk[group])
        for chunk in CHUNKS
        for group in range(len(LAYERS))
        for layer in range(LAYERS[group])
    ]


@dataclass
class Job:
    """One request on one prefill rank, as its engine sees it."""

    tid: TransferId
    memory: dict[Cell, str] = field(default_factory=dict)
    step: int = 0
    offered: bool = False
    told_end: bool = False
    """PromptDone or Withdraw has been said."""
    withdrawn: bool = False
    revoked: bool = False
    fenced: bool = False
    """Preempted: the blocks are overwritten as soon as nothing of it is in flight."""
    finished: ev.Finished | None = None


@dataclass
class Flight:
    rank: int
    post: ev.PostWrite
    stamp: dict[Cell, str]
    """What the memory held when the note was made: its checksum."""
    corrupt: bool = False
    """The bytes are damaged on their way."""
    landed: bool = False
    done: str | None = None
    """The error ("" for none) of a completion that has not been delivered to the machine."""


@dataclass
class Region:
    """Decode's blocks of one grant. `closed`: the engine may have given them to somebody else."""

    tid: TransferId
    epoch: Epoch
    blocks: tuple[tuple[int, int], ...]
    memory: dict[tuple[int, Cell], str] = field(default_factory=dict)
    expected: bool = False
    report: ev.Report | None = None
    closed: bool = False

    @property
    def rects(self) -> tuple[ev.Rect, ...]:
        return tuple(ev.Rect(g, 0, LAYERS[g], lo, hi) for g, (lo, hi) in enumerate(self.blocks) if lo < hi)


@dataclass(frozen=True)
class Message:
    """`rank` is the prefill rank it goes to; None: to decode."""

    rank: int | None
    event: ev.SenderEvent | ev.ReceiverEvent
    born_s: float
    control: bool


class PrefillRank:
    def __init__(self, rank: int, limits: SenderLimits) -> None:
        self.rank = rank
        self.into, self.out = f"prefill{rank} <-", f"prefill{rank} ->"
        self.peer = prefill_peer(rank)
        self.machine = Sender(limits)
        self.jobs: dict[TransferId, Job] = {}
        self.alive = True
        self.proven_dead = False
        self.link_broken = False
        self.void: set[tuple[TransferId, Epoch]] = set()
        """Granted before the connection was made anew."""
        self.heard_s = float("-inf")
        self.newest: dict[TransferId, Epoch] = {}
        self.posted: Counter[tuple[TransferId, Epoch, Cell]] = Counter()
        self.failed: Counter[tuple[TransferId, Epoch, Cell]] = Counter()
        self.promised: dict[TransferId, Epoch] = {}
        """Up to which epoch the rank has said that nothing lands any more."""
        self.ended_early: dict[TransferId, float] = {}


RECEIVER_BOUND_S = 170
"""By when everything has ended after healing: deadline + lease + hold, and a little."""
