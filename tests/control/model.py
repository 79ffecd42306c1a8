"""A node as data: what it holds, what it would publish, and how it answers Snapshot."""

from __future__ import annotations

from collections.abc import Iterable

from lmkv.ids import Incarnation
from lmkv.poolwire import EVENT_BYTES, Events, NodeBeat, NodeCard, Snapshot, SnapshotPart


def make_card(incarnation: str, address: str = "", events: str = "", name: str = "n") -> NodeCard:
    address = address or f"tcp://{incarnation}:1"
    return NodeCard(name, Incarnation(incarnation), address, events or f"{address}1", "tcp", b"", 0, 0)


class ModelNode:
    """`pages` maps object keys to tiers. `part_records`: of a snapshot's part."""

    def __init__(self, card: NodeCard, part_records: int = 4) -> None:
        self.card = card
        self.pages: dict[bytes, int] = {}
        self.seq = 0
        self.part_records = part_records

    def change(self, changes: Iterable[tuple[bytes, int]], *, clear: bool = False) -> Events:
        """Tiers 0: gone."""
        records = list(changes)
        if clear:
            self.pages.clear()
            self.seq += 1
        first = self.seq + 1
        for key, tiers in records:
            self.pages.pop(key, None)
            if tiers:
                self.pages[key] = tiers
        self.seq += len(records)
        return Events(self.card.incarnation, first, b"".join(k + bytes((t,)) for k, t in records), clear)

    def sign_of_life(self) -> Events:
        return Events(self.card.incarnation, self.seq + 1, b"")

    def beat(self, *, leaving: bool = False) -> NodeBeat:
        return NodeBeat(self.card, self.seq, len(self.pages), len(self.pages) * 100, 10_000, leaving=leaving)

    def answer(self, question: Snapshot) -> SnapshotPart:
        """The cursor is the last key of the part, so pages may come and go between the parts."""
        keys = sorted(key for key in self.pages if key > question.cursor)
        part = keys[: self.part_records]
        records = b"".join(key + bytes((self.pages[key],)) for key in part)
        cursor = part[-1] if len(keys) > len(part) else b""
        return SnapshotPart(question.token, self.card.incarnation, self.seq, records, cursor)


def records_of(pages: dict[bytes, int]) -> bytes:
    made = b"".join(key + bytes((tiers,)) for key, tiers in pages.items())
    assert len(made) == len(pages) * EVENT_BYTES
    return made
