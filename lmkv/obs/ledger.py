"""Ledgers: what happened to each transfer, by whom it was seen, in monotonic seconds of that host.

One dict a transfer and engine; ranks of the engine add theirs under `ranks`. Kept for the last `LEDGERS` transfers.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, OrderedDict
from typing import Any

from lmkv.ids import TransferId

LEDGERS = 2048


class LedgerBook:
    """Thread-safe: the engine thread writes, the endpoint thread answers questions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[TransferId, dict[str, Any]] = OrderedDict()
        self.counters: Counter[str] = Counter()

    def update(self, transfer_id: TransferId, **facts: Any) -> None:
        with self._lock:
            self._entry(transfer_id).update(facts)

    def add_rank(self, transfer_id: TransferId, facts: dict[str, Any]) -> None:
        """A rank's own record; a later one of the same rank replaces it."""
        with self._lock:
            ranks = self._entry(transfer_id).setdefault("ranks", {})
            ranks[str(facts["rank"])] = facts

    def count(self, name: str, n: int = 1) -> None:
        with self._lock:
            self.counters[name] += n

    def counts(self) -> dict[str, int]:
        with self._lock:
            return dict(self.counters)

    def to_json(self, transfer_id: TransferId) -> bytes:
        """b"" for a transfer that is not known (any more)."""
        with self._lock:
            entry = self._entries.get(transfer_id)
            return json.dumps(entry).encode() if entry is not None else b""

    def _entry(self, transfer_id: TransferId) -> dict[str, Any]:
        entry = self._entries.get(transfer_id)
        if entry is None:
            entry = self._entries[transfer_id] = {"transfer_id": transfer_id}
            if len(self._entries) > LEDGERS:
                self._entries.popitem(last=False)
        return entry
