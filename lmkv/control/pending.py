"""What is to be applied to the page table, gathered over messages and nodes: a small batch costs as much as a large
one."""

from __future__ import annotations

import numpy as np

from lmkv.poolwire import EVENT_BYTES

from .pages import PageTable
from .prints import of_records

BATCH_RECORDS = 4096


class Pending:
    """Applied by `flush()`, or when a batch is full. Who reads the table flushes first."""

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._records: list[bytes] = []
        self._numbers: list[int] = []
        self._counts: list[int] = []
        self._waiting = 0

    def number(self) -> int:
        return self._table.number()

    def held(self, number: int) -> int:
        self.flush()
        return self._table.held(number)

    def put(self, number: int, records: bytes) -> None:
        """Whole records."""
        for at in range(0, len(records), BATCH_RECORDS * EVENT_BYTES):
            piece = records[at : at + BATCH_RECORDS * EVENT_BYTES]
            self._records.append(piece)
            self._numbers.append(number)
            self._counts.append(len(piece) // EVENT_BYTES)
            self._waiting += self._counts[-1]
            if self._waiting >= BATCH_RECORDS:
                self.flush()

    def retire(self, number: int) -> None:
        self.flush()
        self._table.retire(number)

    def flush(self) -> None:
        if not self._waiting:
            return
        prints, masks = of_records(b"".join(self._records))
        nodes = np.repeat(np.array(self._numbers, np.uint32), self._counts)
        self._records, self._numbers, self._counts, self._waiting = [], [], [], 0
        self._table.apply(prints, nodes, masks)
