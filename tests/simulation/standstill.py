"""Notices engines that stand still because each holds the blocks that the other waits for.

Deadlines end that, so no request is lost, but an answer that comes after two minutes helps nobody. Prefill that waits
because nobody asks for what it has finished is another thing: decode may have no room for more (`hold_s` bounds it).
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
        self._most: dict[str, int] = {}
        """Tokens that have been computed of each request, at the most: what is preempted is computed again."""
        schedule = engine.scheduler.schedule

        def watched(*args: Any) -> Any:
            output = schedule(*args)
            self._look(self._comes_forward(output))
            return output

        engine.scheduler.schedule = watched

    def _comes_forward(self, output: Any) -> bool:
        """Some request is computed further than ever."""
        requests = self._engine.scheduler.requests
        counts = {r: requests[r].num_computed_tokens for r in output.num_scheduled_tokens}
        further = any(count > self._most.get(r, 0) for r, count in counts.items())
        self._most = {r: most for r, most in self._most.items() if r in requests}
        self._most |= {r: max(count, self._most.get(r, 0)) for r, count in counts.items()}
        return further

    def _look(self, comes_forward: bool) -> None:
        now_s = self._clock()
        if comes_forward or not self._is_held_up():
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        elif now_s - self._since_s > STANDSTILL_S:
            self._fail(f"{self._engine.name}: nothing comes forward for {now_s - self._since_s:.0f} s, though it could")
            self._since_s = None

    def _is_held_up(self) -> bool:
        """It holds finished prompts, has requests to compute, and decode has granted blocks for one of those."""
        scheduler = self._engine.scheduler
        wanting = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        if not scheduler.connector._scheduler._prefill.yielding._held:
            return False
        if not any(request.status in wanting for request in scheduler.requests.values()):
            return False
        loops = [rank.connector._worker._loop for rank in self._engine.runner.ranks]
        return any(t.awaits_prompt for loop in loops for t in loop._sending._machine._transfers.values())
