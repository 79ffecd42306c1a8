"""Results on their way from the worker loop to the engine thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .commands import Results


class ResultsBox:
    """`wait` waits for an event for so many seconds (Runtime.wait). `add` is the loop's, `take` the engine thread's."""

    def __init__(self, wait: Callable[[threading.Event, float], bool]) -> None:
        self._wait = wait
        self._lock = threading.Lock()
        self._results = Results()
        self._has_some = threading.Event()

    def add(self, fresh: Results) -> None:
        with self._lock:
            self._results.add(fresh)
            self._has_some.set()

    def take(self, wait_s: float = 0.0) -> Results:
        """What has been added since the last call; waits so long for something."""
        if wait_s:
            self._wait(self._has_some, wait_s)
        with self._lock:
            results, self._results = self._results, Results()
            self._has_some.clear()
        return results

    def release(self) -> None:
        """Nothing will be added any more: nobody waits."""
        self._has_some.set()
