"""Work beside everything else, in the stepped gear: Runtime.background and Runtime.lane."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

NEVER_S = float("inf")

if TYPE_CHECKING:
    from tests.simulation.virtual import Process, SteppedRuntime


class Once:
    """A Part that calls a function in its first turn."""

    def __init__(self, world: SteppedRuntime, process: Process, name: str, function: Callable[[], None]) -> None:
        self._function = function
        self._due_s = world.clock() + world.chance.uniform(0.0, world.background_s)
        self._runner = world.runner(process, name, self)
        self._runner.start()

    def open(self) -> None:
        """Nothing to open."""

    def turn(self, now_s: float) -> None:
        if now_s >= self._due_s:
            self._runner.stop()
            self._function()

    def next_s(self, now_s: float) -> float:
        return max(0.0, self._due_s - now_s)

    def descriptors(self) -> Sequence[int] | None:
        return None

    def end(self) -> None:
        """Nothing to close."""


class SteppedLane:
    """See lmkv.control.runtime.Lane: a Part that does one job a turn, each some time after it came."""

    def __init__(self, world: SteppedRuntime, process: Process, name: str) -> None:
        self._world = world
        self._jobs: deque[tuple[float, Callable[[], Any]]] = deque()
        self._runner = world.runner(process, name, self)
        self._runner.start()

    def submit(self, job: Callable[..., Any], /, *args: Any) -> None:
        due_s = self._world.clock() + self._world.chance.uniform(0.0, self._world.lane_s)
        self._jobs.append((due_s, lambda: job(*args)))
        self._runner.wake()

    def shutdown(self, wait: bool = True) -> None:
        while self._jobs:
            self._jobs.popleft()[1]()
        self._runner.stop()

    def open(self) -> None:
        """Nothing to open."""

    def turn(self, now_s: float) -> None:
        if self._jobs and self._jobs[0][0] <= now_s:
            self._jobs.popleft()[1]()

    def next_s(self, now_s: float) -> float:
        return max(0.0, self._jobs[0][0] - now_s) if self._jobs else NEVER_S

    def descriptors(self) -> Sequence[int] | None:
        return None

    def end(self) -> None:
        """Nothing to close."""
