"""Sets of cells against a plain set, cutting, and alarms."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.transfer.events import Rect
from lmkv.transfer.rects import Coverage, cells_of, clip, group_rects, is_proper, split_rect
from lmkv.transfer.timers import Timers

from .things import Cell, cells

SPAN = st.tuples(st.integers(0, 7), st.integers(1, 4)).map(lambda t: (t[0], t[0] + t[1]))
RECTS = st.builds(lambda g, layers, blocks: Rect(g, *layers, *blocks), st.integers(0, 1), SPAN, SPAN)


def flat(rects: list[Rect]) -> list[Cell]:
    return [cell for rect in rects for cell in cells(rect)]


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), RECTS), max_size=10), RECTS)
def test_coverage_is_a_set_of_cells(steps: list[tuple[str, Rect]], probe: Rect) -> None:
    cover, model = Coverage(), set[Cell]()
    for how, rect in steps:
        getattr(cover, how)(rect)
        model = model | set(cells(rect)) if how == "add" else model - set(cells(rect))
    asked = set(cells(probe))
    assert cover.cells == len(model)
    for found, right in (
        (cover.rects(), model),
        (cover.within(probe), asked & model),
        (cover.missing(probe), asked - model),
    ):
        assert len(flat(found)) == len(set(flat(found))) == len(right) and set(flat(found)) == right
    assert cover.covers(probe) == (asked <= model)


@settings(max_examples=200)
@given(RECTS, st.integers(1, 9), st.integers(1, 200))
def test_split_keeps_order_and_bounds(rect: Rect, cell_bytes: int, limit: int) -> None:
    pieces = split_rect(rect, cell_bytes, limit)
    assert flat(pieces) == list(cells(rect))
    assert all(cells_of(piece) * cell_bytes <= max(limit, cell_bytes) for piece in pieces)


def test_chunks_and_layers_merge() -> None:
    pieces = [Rect(0, layer, layer + 1, lo, lo + 2) for lo in (2, 0) for layer in range(3)]
    assert group_rects(pieces) == [Rect(0, 0, 3, 0, 4)]


def test_clip_and_proper() -> None:
    rect = Rect(0, 0, 1, 2, 6)
    assert clip(rect, (3, 9)) == Rect(0, 0, 1, 3, 6) and clip(rect, (6, 9)) is None and clip(rect, (4, 4)) is None
    assert is_proper(rect, 1) and not is_proper(Rect(0, 0, 2, 0, 1), 1) and not is_proper(Rect(0, 0, 1, 1, 1), 1)


def test_timers_ring_early_but_never_late() -> None:
    timers: Timers[str] = Timers()
    timers.arm("a", 5.0)
    timers.arm("a", 9.0)
    timers.arm("b", None)
    timers.arm("c", 7.0)
    timers.arm("c", 6.0)
    assert timers.next_s() == 5.0
    assert timers.due(4.9) == [] and timers.due(6.5) == ["a", "c"] and timers.due(100.0) == []
    assert timers.next_s() is None
