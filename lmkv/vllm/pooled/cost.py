"""Whether loading is quicker than computing, from how long both have taken. Engine thread."""

from __future__ import annotations

WEIGHT = 0.25
"""Of a new measurement."""
LEAST_TOKENS = 64
"""Smaller steps say little about how fast a prompt is computed."""


class Costs:
    """Rates in tokens a second, by what pages come over; 0: not measured yet."""

    def __init__(self) -> None:
        self._compute = 0.0
        self._load: dict[bool, float] = {}
        self._step: tuple[float, int] | None = None

    def step(self, now_s: float, tokens: int) -> None:
        """A step with so many tokens begins; the one before has ended, if it was just before."""
        if self._step is not None and self._step[1] >= LEAST_TOKENS and now_s > self._step[0]:
            rate = self._step[1] / (now_s - self._step[0])
            # An engine that has paused between two steps seems slow: the quicker measurement counts.
            self._compute = max(rate, self._compute + WEIGHT * (rate - self._compute))
        self._step = (now_s, tokens) if tokens else None

    def loaded(self, tokens: int, seconds: float, mapped: bool) -> None:
        """So many tokens came in that time, from mapped memory or over the data plane."""
        if tokens <= 0 or seconds <= 0:
            return
        rate, before = tokens / seconds, self._load.get(mapped, 0.0)
        self._load[mapped] = rate if not before else before + WEIGHT * (rate - before)

    def worth(self, tokens: int, mapped: bool) -> bool:
        """Loading that many tokens is not known to be slower than computing them."""
        load = self._load.get(mapped, 0.0)
        return not load or not self._compute or tokens / load <= tokens / self._compute

    def forgive(self, mapped: bool) -> None:
        """What was too slow is tried again now and then: a link may have become quicker."""
        load = self._load.get(mapped, 0.0)
        if load:
            self._load[mapped] = load * (1 + WEIGHT / 2)
