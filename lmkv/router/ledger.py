"""What the router did with each request, for /explain. Bounded: the oldest entries are forgotten."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any

import msgspec

from lmkv.ids import TransferId


class AttemptEntry(msgspec.Struct):
    """One dispatch. Times are ms after the request's arrival; None: it did not come to that."""

    transfer_id: TransferId | None
    prefill: str | None
    decode: str
    prefill_why: str
    decode_why: str
    dispatched_ms: float
    prefill_status: int | None = None
    prefill_done_ms: float | None = None
    prefill_trouble: str = ""
    decode_status: int | None = None
    decode_headers_ms: float | None = None
    first_token_ms: float | None = None
    trouble: str = ""
    """Why the attempt failed; empty if its answer went to the client."""
    ledger_id: TransferId | None = None
    """Name of decode's ledger for an attempt without a transfer that was drawn for a shadow check."""


class RequestEntry(msgspec.Struct):
    number: int
    """Of the router's requests; ids may repeat."""
    request_id: str
    endpoint: str
    arrived_unix_ms: int
    body_bytes: int
    arrived_s: float
    """Monotonic; the zero of all times here."""
    mode: str = "none"
    """"pd", "aggregated", or "none" while nobody was asked."""
    aggregated_why: str = ""
    streamed: bool = False
    attempts: list[AttemptEntry] = []
    status: int | None = None
    first_byte_ms: float | None = None
    finished_ms: float | None = None
    sent_bytes: int = 0
    outcome: str = "in flight"
    shadow: dict[str, Any] | None = None
    """What computing it again has shown, if it was drawn for that; see lmkv.router.shadow."""

    def now_ms(self) -> float:
        return round((time.monotonic() - self.arrived_s) * 1000, 3)


class Ledger:
    """Found by request id (the latest of that id) and by any of its transfer ids."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._entries: OrderedDict[int, RequestEntry] = OrderedDict()
        self._by_id: dict[str, int] = {}
        self._next = 0

    def open(self, request_id: str, endpoint: str, body_bytes: int) -> RequestEntry:
        number, self._next = self._next, self._next + 1
        entry = RequestEntry(number, request_id, endpoint, time.time_ns() // 1_000_000, body_bytes, time.monotonic())
        self._entries[number] = entry
        self._by_id[request_id] = number
        while len(self._entries) > self._max_requests:
            self._forget(self._entries.popitem(last=False)[1])
        return entry

    def add(self, entry: RequestEntry, attempt: AttemptEntry) -> None:
        """`entry` is of this ledger; it may have been forgotten meanwhile."""
        entry.attempts.append(attempt)
        if attempt.transfer_id is not None and entry.number in self._entries:
            self._by_id[attempt.transfer_id] = entry.number

    def find(self, any_id: str) -> RequestEntry | None:
        number = self._by_id.get(any_id)
        return None if number is None else self._entries[number]

    def _forget(self, entry: RequestEntry) -> None:
        for known in (entry.request_id, *(a.transfer_id for a in entry.attempts if a.transfer_id is not None)):
            if self._by_id.get(known) == entry.number:
                del self._by_id[known]


def to_json(entry: RequestEntry) -> dict[str, Any]:
    """Without the field that means nothing outside this process."""
    plain: dict[str, Any] = msgspec.to_builtins(entry)
    del plain["arrived_s"]
    return plain
