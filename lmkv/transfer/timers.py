"""Alarms for machines without a clock: a heap that may ring early, never late."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K")


class Timers(Generic[K]):
    """One alarm a key. The owner computes deadlines; a deadline that moved later is found out when the alarm rings.

    Invariant kept by the owner: after every change that can move a key's deadline earlier it calls `arm`.
    """

    __slots__ = ("_at", "_heap", "_order")

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = 0

    def arm(self, key: K, when_s: float | None) -> None:
        """Ring for `key` at `when_s` or earlier; None and later times than the one set change nothing."""
        if when_s is None:
            return
        current = self._at.get(key)
        if current is not None and current <= when_s:
            return
        self._at[key] = when_s
        self._order += 1
        heappush(self._heap, (when_s, self._order, key))

    def due(self, now_s: float) -> list[K]:
        """The keys whose time has come, earliest first; their alarms are off until armed again."""
        keys: list[K] = []
        while self._heap and self._heap[0][0] <= now_s:
            when_s, _, key = heappop(self._heap)
            if self._at.get(key) == when_s:
                del self._at[key]
                keys.append(key)
        return keys

    def next_s(self) -> float | None:
        """When `due` has something to give at the earliest."""
        while self._heap and self._at.get(self._heap[0][2]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None
