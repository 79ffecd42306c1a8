"""Keeps one bad message, command or event from ending the loop that serves all others.

This is the only place of lmkv that catches what nobody expected. What is expected (LmkvError) is handled where it
happens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 100
"""A loop whose own work (a `tick`) fails so often without success between is broken, and ends."""
LOGGED = 10
"""So many failures of a kind are logged with their tracebacks, then every thousandth."""


def _ignore() -> None:
    """Nothing is to be dismissed."""


class Guard:
    """One for each loop, used by its thread alone. `caught(what, error)`: told of each failure (`Runtime.caught`).

    `counts` counts failures by kind; `take_counts` hands over those since the last time.
    """

    def __init__(self, loop: str, caught: Callable[[str, Exception], None]) -> None:
        self.counts: Counter[str] = Counter()
        self._loop = loop
        self._caught = caught
        self._untold: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()

    def attempt(
        self, kind: str, handle: Callable[[], object], dismiss: Callable[[], object] = _ignore, sender: str = ""
    ) -> bool:
        """Handle one item. When that fails, `dismiss` sees to it that nobody waits for the item; False."""
        try:
            handle()
        except Exception as error:  # noqa: BLE001  (a bug, met by one item: the others are served on)
            self._note(kind, sender, error)
        else:
            return True
        try:
            dismiss()
        except Exception as error:  # noqa: BLE001  (the same bug, met again)
            self._note(f"{kind}:dismissal", sender, error)
        return False

    def work(self, kind: str, handle: Callable[[], object]) -> None:
        """The loop's own work, tried again with its next turn. Raises what it raises once it fails for good."""
        if self.attempt(kind, handle):
            self._in_a_row.pop(kind, None)
            return
        self._in_a_row[kind] += 1
        if self._in_a_row[kind] >= MOST_IN_A_ROW:
            handle()

    def take_counts(self) -> Counter[str]:
        counts, self._untold = self._untold, Counter()
        return counts

    def _note(self, kind: str, sender: str, error: Exception) -> None:
        self.counts[kind] += 1
        self._untold[kind] += 1
        if self.counts[kind] <= LOGGED or self.counts[kind] % 1000 == 0:
            origin = f" from {sender}" if sender else ""
            logger.error("%s: %s%s has failed and is dropped", self._loop, kind, origin, exc_info=error)
        self._caught(f"{self._loop}: {kind}", error)
