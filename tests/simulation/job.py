"""One request at one engine, as its client sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Job:
    """One request at one engine. `answer` grows; `ended` says how it ended."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    params: dict[str, Any] | None = None
    salt: str | None = None
    seed: int = 0
    counts: bool = True
    """Nobody hangs up: what it could load has to be loaded where nothing goes wrong."""
    answer: list[int] = field(default_factory=list)
    version: int = 0
    """The version of the weights that compute it."""
    stops: tuple[int, ...] = ()
    """Tokens that end the answer, as the end of sequence does: with async scheduling the next step is in flight."""
    stop_after: int = 0
    """Its client goes away after so many tokens; 0: it stays."""
    is_given_up: bool = False
    """Its client does not want it any more, if it has not come yet."""
    ended: str = ""
    on_load: Callable[[], None] = lambda: None
    """Its prompt, or a part of it, is to be loaded from elsewhere."""
    on_end: Callable[[Job], None] = lambda job: None

    @property
    def kv_seed(self) -> int:
        """Its KV depends on this besides its tokens."""
        return self.seed + self.version * 7919
