"""A trace through a pool of so many pages: which tokens are found, by policy, and what could be found at best."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmkv.pool.policy import Policy

PAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """Chunks of a replay: asked for, found as part of an unbroken beginning, found behind a gap (and so of no use), and
    not stored for want of room."""

    asked: int
    hits: int
    stranded: int
    refused: int


class Pool:
    """As a pool node works: a page in use is pinned, and room is made by the policy's victims."""

    def __init__(self, policy: Policy, pages: int) -> None:
        self.policy = policy
        self.pages = pages
        self.held: set[bytes] = set()

    def add(self, key: bytes, pinned: set[bytes]) -> bool:
        if len(self.held) >= self.pages and not self._make_room(pinned):
            return False
        self.held.add(key)
        self.policy.added(key, PAGE_BYTES)
        return True

    def _make_room(self, pinned: set[bytes]) -> bool:
        for key in self.policy.victims():
            if key not in pinned:
                self.policy.evicted(key)
                self.held.remove(key)
                return True
        return False


def replay(chains: Iterable[Sequence[bytes]], pool: Pool, ends_first: bool) -> Found:
    """Each request loads the longest run that is there and stores the rest. `ends_first`: the policy is told of a
    chain's pages from the last to the first."""
    asked = hits = stranded = refused = 0
    for chain in chains:
        run = next((i for i, key in enumerate(chain) if key not in pool.held), len(chain))
        behind = [key in pool.held for key in chain[run:]]
        asked, hits, stranded = asked + len(chain), hits + run, stranded + sum(behind)
        pinned = set(chain[:run])
        for key in reversed(chain) if ends_first else chain:
            if key in pool.held:
                pool.policy.touched(key)
            elif not pool.add(key, pinned):
                refused += 1
    return Found(asked, hits, stranded, refused)


def clairvoyant(chains: Sequence[Sequence[bytes]], pages: int) -> Found:
    """The most hits that any policy can have: gives up, or does not take, what is wanted again last (Belady); of a
    chain the end first. It keeps no key without all before it, so every hit counts."""
    upcoming = _next_uses(chains)
    due: dict[bytes, tuple[int, int]] = {}
    heap: list[tuple[tuple[int, int], bytes]] = []
    asked = hits = 0
    for number, chain in enumerate(chains):
        asked += len(chain)
        for depth, key in enumerate(chain):
            hits += due.pop(key, None) is not None
            use = upcoming[number][depth]
            if use == len(chains):
                continue
            due[key] = (-use, -depth)
            heapq.heappush(heap, (due[key], key))
            while len(due) > pages:
                rank, victim = heapq.heappop(heap)
                if due.get(victim) == rank:
                    del due[victim]
    return Found(asked, hits, 0, 0)


def _next_uses(chains: Sequence[Sequence[bytes]]) -> list[list[int]]:
    """For each chunk of each chain the number of the next request with it; their count where there is none."""
    seen: dict[bytes, int] = {}
    found = []
    for number in range(len(chains) - 1, -1, -1):
        found.append([seen.get(key, len(chains)) for key in chains[number]])
        seen.update(dict.fromkeys(chains[number], number))
    return found[::-1]
