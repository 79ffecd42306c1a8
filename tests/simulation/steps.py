"""One scheduler step as the fake model executes it: what it computes, and what it needs to know for that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .values import States, prefix_states


@dataclass(slots=True)
class Sequence:
    """The tokens of a request as the device knows them: with async scheduling one ahead of the scheduler."""

    request_id: str
    seed: int
    tokens: list[int]
    states: States
    life: int
    """Preemptions so far."""

    @classmethod
    def begin(cls, request_id: str, seed: int, tokens: list[int], life: int) -> Sequence:
        return cls(request_id, seed, list(tokens), prefix_states(tokens, seed), life)

    def append(self, token: int) -> None:
        more = prefix_states([token], self.seed, len(self.tokens), int(self.states[-1]))
        self.tokens.append(token)
        self.states = np.concatenate([self.states, more])


@dataclass(slots=True)
class Piece:
    """Tokens [lo, hi) of a request, computed in one step, in these blocks."""

    sequence: Sequence
    block_ids: NDArray[np.int64]
    lo: int
    hi: int
    sampled: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """`position` is the stream's behind the step's last operation."""

    output: Any
    pieces: list[Piece]
    freed: list[int]
    """Blocks that were free when the step was scheduled and hold nothing any more."""
    position: int = 0
    results: list[Any] = field(default_factory=list)
    """KVConnectorOutput of each rank."""
