"""A device's stream: what a step launches is executed later, in order; fences ask how far it has come."""

from __future__ import annotations

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

    def launch(self, operation: Callable[[], None]) -> int:
        """Returns the position behind the operation."""
        self._waiting.append(operation)
        self.launched += 1
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
