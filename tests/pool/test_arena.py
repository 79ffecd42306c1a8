"""Slots of the arena against a list of who has which bytes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmkv.errors import ConfigError
from lmkv.pool.arena import Arena, class_bytes

KIB = 1 << 10
SIZES = (1, 4 * KIB, 4 * KIB + 1, 12 * KIB, 40 * KIB, 200 * KIB)


class Machine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 130).map(lambda k: k * 4 * KIB + 100), slab=st.sampled_from((8, 64, 1 << 16)))
    def open(self, capacity: int, slab: int) -> None:
        self.arena = Arena(capacity, slab * KIB)
        self.slots: dict[int, int] = {}

    @rule(size=st.sampled_from(SIZES))
    def allocate(self, size: int) -> None:
        offset = self.arena.allocate(size)
        if offset is None:
            # Nothing is refused that an empty arena could take.
            assert self.slots or class_bytes(size) > self.arena.capacity_bytes
            return
        size = class_bytes(size)
        assert offset % 4096 == 0
        assert offset >= 0 and offset + size <= self.arena.capacity_bytes
        assert all(offset + size <= other or other + taken <= offset for other, taken in self.slots.items())
        self.slots[offset] = size

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.slots)))
        self.arena.free(offset)
        del self.slots[offset]
        with pytest.raises(KeyError):
            self.arena.free(offset)

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def a_whole_slab_freed_makes_room_for_a_smaller_class(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.slots)))
        size, slab = self.slots[offset], self.arena.slab(offset)
        for neighbour in list(self.arena.neighbours(offset)):
            assert self.arena.slab(neighbour) == slab
            assert self.slots.pop(neighbour) == size
            self.arena.free(neighbour)
        assert offset not in self.slots
        again = self.arena.allocate(4 * KIB)
        assert again is not None
        self.slots[again] = 4 * KIB

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "arena"):
            return
        assert self.arena.used_bytes == sum(self.slots.values())
        counts: dict[int, int] = {}
        for size in self.slots.values():
            counts[size] = counts.get(size, 0) + 1
        assert self.arena.classes == counts
        if not self.slots:
            assert self.arena._holes == [(0, self.arena.capacity_bytes)]  # one again

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        for offset in list(self.slots):
            self.arena.free(offset)
        self.slots.clear()
        self.adds_up()


TestArena = Machine.TestCase


def test_slots_of_a_slab_lie_side_by_side() -> None:
    arena = Arena(1 << 20)
    assert [arena.allocate(8 * KIB) for _ in range(8)] == [i * 8 * KIB for i in range(8)]
    arena.free(8 * KIB)
    arena.free(24 * KIB)
    assert arena.allocate(8 * KIB) == 8 * KIB, "the lowest first"


def test_a_full_arena_says_so_and_takes_again_what_was_freed() -> None:
    arena = Arena(16 * 4 * KIB)
    offsets = [arena.allocate(4 * KIB) for _ in range(16)]
    assert None not in offsets and arena.allocate(1) is None
    arena.free(5 * 4 * KIB)
    assert arena.allocate(1) == 5 * 4 * KIB


def test_a_page_larger_than_a_slab_has_one_of_its_own() -> None:
    arena = Arena(1 << 20, slab_bytes=64 * KIB)
    assert arena.allocate(300 * KIB) == 0
    assert arena.allocate(300 * KIB) == 300 * KIB
    assert arena.allocate(600 * KIB) is None


def test_a_class_that_is_given_up_leaves_its_room_to_another() -> None:
    arena = Arena(1 << 20)
    small = [arena.allocate(4 * KIB) for _ in range(256)]
    assert arena.allocate(512 * KIB) is None
    for offset in small:
        assert offset is not None
        arena.free(offset)
    assert arena.allocate(1 << 20) == 0


@pytest.mark.parametrize("capacity", [0, 4095])
def test_an_arena_holds_a_page_at_least(capacity: int) -> None:
    with pytest.raises(ConfigError, match="holds no page"):
        Arena(capacity)
