"""What became of a world."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .plan import WorldPlan


@dataclass(slots=True)
class Result:
    """`failures` are wrong blocks and answers, `leaks` what has not come back; `events` what was met."""

    plan: WorldPlan
    requests: int = 0
    unended: int = 0
    failures: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not (self.failures or self.leaks or self.unended)
