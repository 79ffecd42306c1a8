"""Notices an engine that stands still: it has finished prompts to send and requests to compute, and computes nothing.

Each engine may hold the blocks that the other waits for. Deadlines end that, so no request is lost, but an answer that
comes after two minutes helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.request import RequestStatus

from .engine import SimEngine

STANDSTILL_S = 60.0
"""Finished prompts give way one a second: even a full cache of them has gone long before."""


class Standstill:
    """Follows one engine, step by step. `fail(text)` takes what must never happen."""

    def __init__(self, engine: SimEngine, clock: Callable[[], float], fail: Callable[[str], None]) -> None:
        self._engine = engine
        self._clock = clock
        self._fail = fail
        self._since_s: float | None = None
        schedule = engine.scheduler.schedule

        def watched(*args: Any) -> Any:
            output = schedule(*args)
            self._look(output.total_num_scheduled_tokens)
            return output

        engine.scheduler.schedule = watched  # type: ignore[method-assign]

    def _look(self, tokens: int) -> None:
        now_s = self._clock()
        if tokens or not self._is_held_up():
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        elif now_s - self._since_s > STANDSTILL_S:
            self._fail(f"{self._engine.name}: computes nothing for {now_s - self._since_s:.0f} s, though it could")
            self._since_s = None

    def _is_held_up(self) -> bool:
        scheduler = self._engine.scheduler
        wanting = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        waits = any(request.status in wanting for request in scheduler.requests.values())
        return waits and bool(scheduler.connector._scheduler._prefill.yielding._held)
