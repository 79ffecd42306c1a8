"""Questions that a node cannot answer at once. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from lmkv import poolwire as pw
from lmkv.poolwire import Ack, Refusal, Tier

from .entry import Entry


@dataclass(slots=True)
class WaitingPin:
    """It waits for pages to come up."""

    identity: bytes
    question: pw.Pin
    run: list[Entry]
    tiers: list[Tier]
    until_s: float
    left: int

    def came_up(self, here: bool) -> None:
        """One page more is decided; one that is not here ends the run when it is pinned."""
        self.left -= 1


@dataclass(slots=True)
class WaitingCommit:
    """It waits for pages to become durable, or for their copies."""

    identity: bytes
    token: int
    refusals: tuple[Refusal, ...]
    until_s: float
    left: int
    wanted: Ack
    kept: bool = True

    def settled(self, kept: bool) -> None:
        """One of what it waits for is decided."""
        self.left -= 1
        self.kept = self.kept and kept

    @property
    def reached(self) -> Ack:
        return self.wanted if self.kept and self.left == 0 else Ack.VOLATILE
