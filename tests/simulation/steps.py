"""One scheduler step as the fake model executes it: what it computes, and what it needs to know for that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .values import States, next_state, prefix_states


class Sequence:
    """The tokens of a request as the device knows them: with async scheduling one ahead of the scheduler. `life` counts
    its preemptions so far."""

    def __init__(self, request_id: str, seed: int, tokens: Iterable[int], life: int) -> None:
        self.request_id = request_id
        self.seed = seed
        self.tokens = list(tokens)
        self.life = life
        self.images: dict[Any, Any] = {}
        """What caches hold for it, by caches: theirs to make."""
        self._states = prefix_states(self.tokens, seed)

    @property
    def states(self) -> States:
        """After each token, uint64 [tokens]."""
        return self._states[: len(self.tokens)]

    def append(self, token: int) -> None:
        place = len(self.tokens)
        if place == len(self._states):
            self._states = np.concatenate([self._states, np.zeros(64, np.uint64)])
        self._states[place] = next_state(token, self.seed, place, int(self._states[place - 1]))
        self.tokens.append(token)


@dataclass(slots=True)
class Piece:
    """Tokens [lo, hi) of a request, computed in one step, in these blocks."""

    sequence: Sequence
    block_ids: NDArray[np.int64]
    lo: int
    hi: int
    sampled: list[int] = field(default_factory=list)

    def written(self, block_tokens: int) -> list[int]:
        """The blocks that it writes to."""
        found: list[int] = self.block_ids[self.lo // block_tokens : -(-self.hi // block_tokens)].tolist()
        return found


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
