"""Arithmetic of rectangles (layers × blocks of one group): splitting, clipping, and exact sets of cells.

A *cell* is one block of one layer. Everything here is pure and small; both machines count in it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from .events import Rect

Span = tuple[int, int]
"""[lo, hi) of blocks or of layers."""


def cells_of(rect: Rect) -> int:
    return (rect.layer_hi - rect.layer_lo) * (rect.block_hi - rect.block_lo)


def is_proper(rect: Rect, layers: int) -> bool:
    """Not empty, not negative, and within a group of `layers` layers."""
    return 0 <= rect.layer_lo < rect.layer_hi <= layers and 0 <= rect.block_lo < rect.block_hi


def clip(rect: Rect, blocks: Span) -> Rect | None:
    """The part of `rect` whose blocks lie in `blocks`, None if there is none."""
    lo, hi = max(rect.block_lo, blocks[0]), min(rect.block_hi, blocks[1])
    return Rect(rect.group, rect.layer_lo, rect.layer_hi, lo, hi) if lo < hi else None


def split_rect(rect: Rect, cell_bytes: int, max_bytes: int) -> list[Rect]:
    """Cut into pieces of at most `max_bytes` (but never less than one cell): by layers, then by blocks.

    Pieces are in the order layer, block; together they are `rect`.
    """
    row_bytes = (rect.block_hi - rect.block_lo) * cell_bytes
    if row_bytes <= max_bytes:
        step = max(1, max_bytes // max(1, row_bytes))
        return [
            Rect(rect.group, lo, min(lo + step, rect.layer_hi), rect.block_lo, rect.block_hi)
            for lo in range(rect.layer_lo, rect.layer_hi, step)
        ]
    step = max(1, max_bytes // cell_bytes)
    return [
        Rect(rect.group, layer, layer + 1, lo, min(lo + step, rect.block_hi))
        for layer in range(rect.layer_lo, rect.layer_hi)
        for lo in range(rect.block_lo, rect.block_hi, step)
    ]


def group_rects(rects: Iterable[Rect]) -> list[Rect]:
    """The same cells in as few rectangles as the layer-wise merge gives, ordered by group, layer, block."""
    cover = Coverage()
    for rect in rects:
        cover.add(rect)
    return cover.rects()


class Coverage:
    """A set of cells. Each layer holds its blocks as disjoint runs that do not touch, so chunks of a prompt merge.

    Invariant: a row is a flat ascending list [lo, hi, lo, hi, …]; `cells` is the number of cells in the set.
    """

    __slots__ = ("_rows", "cells")

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], list[int]] = {}
        self.cells = 0

    def add(self, rect: Rect) -> None:
        """The set and `rect`; adding twice changes nothing."""
        lo, hi = rect.block_lo, rect.block_hi
        for layer in range(rect.layer_lo, rect.layer_hi):
            row = self._rows.setdefault((rect.group, layer), [])
            self.cells += (hi - lo) - _length(_inside(row, lo, hi))
            i, j = bisect_left(row, lo), bisect_right(row, hi)
            row[i:j] = [lo] * (i % 2 == 0) + [hi] * (j % 2 == 0)

    def remove(self, rect: Rect) -> None:
        """The set without `rect`; cells that are not in it do not matter."""
        lo, hi = rect.block_lo, rect.block_hi
        for layer in range(rect.layer_lo, rect.layer_hi):
            row = self._rows.get((rect.group, layer))
            if row is None:
                continue
            self.cells -= _length(_inside(row, lo, hi))
            i, j = bisect_left(row, lo), bisect_right(row, hi)
            row[i:j] = [lo] * (i % 2 == 1) + [hi] * (j % 2 == 1)

    def within(self, rect: Rect) -> list[Rect]:
        """The cells of `rect` that are in the set."""
        return _stack(
            rect.group, ((layer, _inside(row, rect.block_lo, rect.block_hi)) for layer, row in self._of(rect))
        )

    def missing(self, rect: Rect) -> list[Rect]:
        """The cells of `rect` that are not in the set."""
        return _stack(
            rect.group, ((layer, _outside(row, rect.block_lo, rect.block_hi)) for layer, row in self._of(rect))
        )

    def covers(self, rect: Rect) -> bool:
        return all(
            _inside(row, rect.block_lo, rect.block_hi) == ((rect.block_lo, rect.block_hi),) for _, row in self._of(rect)
        )

    def rects(self) -> list[Rect]:
        """The whole set, ordered by group, layer, block; neighbouring layers with equal runs are one band."""
        out: list[Rect] = []
        for group in sorted({group for group, _ in self._rows}):
            layers = sorted(layer for g, layer in self._rows if g == group)
            out += _stack(group, ((layer, _pairs(self._rows[group, layer])) for layer in layers))
        return out

    def _of(self, rect: Rect) -> Iterator[tuple[int, list[int]]]:
        for layer in range(rect.layer_lo, rect.layer_hi):
            yield layer, self._rows.get((rect.group, layer), [])


def _pairs(row: list[int]) -> tuple[Span, ...]:
    return tuple(zip(row[::2], row[1::2], strict=True))


def _inside(row: list[int], lo: int, hi: int) -> tuple[Span, ...]:
    """The runs of `row` within [lo, hi)."""
    i, j = bisect_right(row, lo), bisect_left(row, hi)
    bounds = [lo] * (i % 2) + row[i:j] + [hi] * (j % 2)
    return _pairs(bounds)


def _outside(row: list[int], lo: int, hi: int) -> tuple[Span, ...]:
    """The gaps of `row` within [lo, hi)."""
    i, j = bisect_right(row, lo), bisect_left(row, hi)
    bounds = [lo] * (i % 2 == 0) + row[i:j] + [hi] * (j % 2 == 0)
    return _pairs(bounds)


def _length(spans: Iterable[Span]) -> int:
    return sum(hi - lo for lo, hi in spans)


def _stack(group: int, rows: Iterable[tuple[int, tuple[Span, ...]]]) -> list[Rect]:
    """Rows of runs as rectangles: neighbouring layers with equal runs become one band."""
    bands: list[tuple[int, int, tuple[Span, ...]]] = []
    for layer, spans in rows:
        if bands and bands[-1][1] == layer and bands[-1][2] == spans:
            bands[-1] = (bands[-1][0], layer + 1, spans)
        elif spans:
            bands.append((layer, layer + 1, spans))
    return [Rect(group, top, bottom, lo, hi) for top, bottom, spans in bands for lo, hi in spans]
