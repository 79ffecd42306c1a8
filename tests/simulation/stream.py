"""A device's stream: what a step launches is executed later, in order; fences ask how far it has come."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamFence:
    """A point in the stream, as torch.cuda.Event is one."""

    stream: Stream
    position: int

    def query(self) -> bool:
        """True once everything launched before the point has been executed."""
        return self.stream.executed >= self.position


class Stream:
    """`launched` and `executed` count operations from the start."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self.launched = 0
        self.executed = 0
        self.wake: Callable[[], None] = lambda: None
        """Called when there is something to execute."""

    def launch(self, operation: Callable[[], None]) -> int:
        """Returns the position behind the operation."""
        self._waiting.append(operation)
        self.launched += 1
        self.wake()
        return self.launched

    @property
    def idle(self) -> bool:
        return not self._waiting

    def advance(self, count: int = 1) -> None:
        """Execute up to `count` operations."""
        for _ in range(min(count, len(self._waiting))):
            self._waiting.popleft()()
            self.executed += 1

    def synchronize(self, position: int) -> None:
        """Execute everything before `position`."""
        self.advance(max(0, position - self.executed))

    def fence(self) -> StreamFence:
        return StreamFence(self, self.launched)


class Device:
    """A part of the world that executes a stream, also while its engine waits for something in a hook. Up to three
    operations each `pace_s` at most."""

    def __init__(self, stream: Stream, rnd: random.Random, pace_s: float) -> None:
        self._stream = stream
        self._pace_s = pace_s
        self._rnd = rnd
        self._due_s = 0.0

    def open(self) -> None:
        """Nothing to open."""

    def descriptors(self) -> tuple[int, ...] | None:
        return None

    def end(self) -> None:
        """Nothing to close."""

    def next_s(self, now_s: float) -> float:
        return 3600.0 if self._stream.idle else max(0.0, self._due_s - now_s)

    def turn(self, now_s: float) -> None:
        if now_s >= self._due_s:
            self._stream.advance(self._rnd.randrange(1, 4))
            self._due_s = now_s + self._rnd.random() * self._pace_s
