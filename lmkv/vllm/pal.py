"""What a worker knows of its peers: engines, their ranks, and how one can be lost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from lmkv import wire
from lmkv.process import DRAIN_S
from lmkv.transfer.events import Peer
from lmkv.transport import PeerId

from .meeting import Meeting

AGAIN_S = 1.0
"""Between two looks at a peer, or two tries of what it has not answered."""


class Loss(Enum):
    """How a peer is lost; lmkv.vllm.peers says what proves which."""

    SILENT = auto()
    FENCED = auto()
    DEAD = auto()


@dataclass(slots=True)
class Engine:
    """An engine that we were introduced to, and how our rank deals with it."""

    introduction: wire.Introduce
    meeting: Meeting
    introduced_s: float

    @property
    def card(self) -> wire.EngineCard:
        return self.introduction.card

    @property
    def pair(self) -> int:
        """Its number of the pair: older grants are void, newer ones wait for their introduction."""
        return self.introduction.pair

    @property
    def ours(self) -> int:
        """Our own number of the pair."""
        return self.introduction.ours


@dataclass(slots=True)
class Pal:
    """One of its ranks that we are connected to."""

    engine: Engine
    worker: wire.WorkerCard
    peer: Peer
    transport_id: PeerId
    serial: int
    """Numbers our connection to it: each introduction has another."""
    heard_s: float
    ready: bool = False
    """It has been warmed."""
    confirmed: bool = False
    """The connection has reached it in the pair that we know: see lmkv.vllm.warming."""
    beat_s: float = 0.0
    echo_s: float = 0.0
    echo_heard_s: float = 0.0
    clock_offset_s: float = 0.0
    round_trip_s: float = float("inf")
    suspected: bool = False
    probe_s: float = 0.0
    parted_s: float = 0.0
    looked_s: float = 0.0
    claimed: bool = False
    """The control plane says that its process has ended."""
    ended_s: float = 0.0
    """When its process was proven to have ended, and how long to wait from then on."""
    drain_s: float = DRAIN_S

    @property
    def name(self) -> str:
        return f"{self.engine.card.name!r} rank {self.peer.rank}"
