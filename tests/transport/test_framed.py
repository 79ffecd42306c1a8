"""The framed protocol over a channel in memory that moves as few bytes at a time as it likes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.errors import ExtentError, PeerLostError, TransportError
from lmkv.transport import Extents, OpId, Region
from lmkv.transport.framed import Channel, ChannelClosed, frames, initiator
from lmkv.transport.framed.initiator import Direction, Initiator, InitiatorOwner, Operation
from lmkv.transport.framed.memory import Memory
from lmkv.transport.framed.target import Scratch, Target, TargetOwner

TOKEN = b"k" * frames.TOKEN_BYTES
ARENA_BYTES = 4096


class Pipe(Channel):
    """One end; `chance` decides how many bytes each call moves. What was sent before `close` still arrives."""

    def __init__(self, chance: random.Random) -> None:
        self.other: Pipe = self
        self.chance = chance
        self.incoming = bytearray()
        self.open = True

    def send(self, buffers: Sequence[memoryview]) -> int:
        if not (self.open and self.other.open):
            raise ChannelClosed("closed")
        taken = b"".join(buffers)[: self.chance.choice((0, 1, 2, 23, 24, 25, 1000))]
        self.other.incoming += taken
        return len(taken)

    def receive(self, buffers: Sequence[memoryview]) -> int:
        if not self.incoming and not self.other.open:
            raise ChannelClosed("closed")
        limit = self.chance.choice((0, 1, 2, 23, 24, 25, 1000))
        moved = 0
        for buffer in buffers:
            part = self.incoming[: min(len(buffer), limit - moved)]
            buffer[: len(part)] = part
            del self.incoming[: len(part)]
            moved += len(part)
            if len(part) < len(buffer):
                break
        return moved

    def close(self) -> None:
        self.open = False


class Side(InitiatorOwner, TargetOwner):
    """Memory and what it has been told."""

    def __init__(self) -> None:
        self.arena = np.zeros(ARENA_BYTES, dtype=np.uint8)
        self.memory = Memory()
        self.memory.add(Region(self.arena.ctypes.data, ARENA_BYTES, owner=self.arena))
        self.ends: dict[OpId, TransportError | None] = {}
        self.notes: list[bytes] = []

    def settled(self, op: OpId, error: TransportError | None) -> None:
        assert op not in self.ends, "a second completion"
        self.ends[op] = error

    def admits(self, target: Target, name: str) -> bool:
        return name == "us"

    def noted(self, name: str, note: bytes) -> None:
        self.notes.append(note)

    def extents(self, rows: Sequence[tuple[int, int]]) -> Extents:
        return Extents.of(*((self.arena.ctypes.data + at, size) for at, size in rows))


class Pair:
    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        ours, theirs = Pipe(chance), Pipe(chance)
        ours.other, theirs.other = theirs, ours
        self.us, self.them = Side(), Side()
        self.initiator = Initiator(ours, self.us, self.us.memory, us="us", peer="them", token=TOKEN)
        self.target = Target(theirs, self.them, self.them.memory, Scratch(), us="them", token=TOKEN)

    def turn(self) -> None:
        self.initiator.pump_out(64)
        self.target.pump_in(64)
        self.target.pump_out(64)
        self.initiator.pump_in(64)

    def run(self, ops: Sequence[OpId]) -> None:
        for _ in range(100_000):
            if all(op in self.us.ends for op in ops) and self.initiator.idle:
                break
            self.turn()
        else:
            raise AssertionError("it does not come to an end")
        for _ in range(200):
            self.turn()


@contextmanager
def small_frames() -> Iterator[None]:
    """Frames so small that operations of hundreds of bytes are cut into many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initiator, "FRAME_BYTES", 100)
        patch.setattr(initiator, "FRAME_ROWS", 3)
        yield


Rows = list[tuple[int, int]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Rows, Rows]:
    """Row sizes, and a place for each on both sides, none overlapping another there."""
    sizes = draw(st.lists(st.integers(0, 250), min_size=1, max_size=8))
    sides = []
    for _ in range(2):
        at, rows = 0, {}
        for i in draw(st.permutations(range(len(sizes)))):
            at += draw(st.integers(0, 30))
            rows[i] = (at, sizes[i])
            at += sizes[i]
        sides.append([rows[i] for i in range(len(sizes))])
    return sides[0], sides[1]


@settings(max_examples=150, deadline=None)
@given(tables(), st.sampled_from(Direction), st.binary(max_size=40), st.integers(0, 2**32))
def test_every_byte_arrives_and_no_other_changes(
    table: tuple[Rows, Rows], direction: Direction, note: bytes, seed: int
) -> None:
    with small_frames():
        pair = Pair(seed)
        source, sink = (pair.us, pair.them) if direction is Direction.WRITE else (pair.them, pair.us)
        source.arena[:] = np.random.default_rng(seed).integers(1, 256, ARENA_BYTES)
        expected = np.zeros(ARENA_BYTES, dtype=np.uint8)
        ours, theirs = table
        origins, goals = (ours, theirs) if direction is Direction.WRITE else (theirs, ours)
        for (a, size), (b, _) in zip(origins, goals, strict=True):
            expected[b : b + size] = source.arena[a : a + size]
        op = OpId(1)
        pair.initiator.start(Operation(direction, op, pair.us.extents(ours), pair.them.extents(theirs), note))
        pair.run([op])
        assert pair.us.ends == {op: None}
        assert pair.them.notes == [note] * bool(note)
        assert np.array_equal(sink.arena, expected)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Direction), st.integers(0, 900), st.booleans()), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5)), max_size=4),
    st.integers(0, 2**32),
)
def test_refused_and_cancelled_operations_complete_once_and_leave_the_channel_whole(
    plans: list[tuple[Direction, int, bool]], cancels: list[tuple[int, int]], seed: int
) -> None:
    with small_frames():
        pair = Pair(seed)
        ops = [OpId(i) for i in range(len(plans))]
        for op, (direction, size, lie) in zip(ops, plans, strict=True):
            remote = pair.them.extents([(ARENA_BYTES if lie else 0, size), (0, 5)])
            pair.initiator.start(Operation(direction, op, pair.us.extents([(0, size), (0, 5)]), remote, b"%d" % op))
        for turns, index in cancels:
            for _ in range(turns):
                pair.turn()
            if index < len(ops) and ops[index] not in pair.us.ends:
                pair.initiator.cancel(ops[index])
        pair.run(ops)
        cancelled = {index for _, index in cancels}
        for op, (_, size, lie) in zip(ops, plans, strict=True):
            error = pair.us.ends[op]
            assert (b"%d" % op in pair.them.notes) == (error is None)
            if op not in cancelled:
                assert isinstance(error, ExtentError) if lie and size else error is None
        assert not pair.target._refused
        assert not pair.initiator._reads


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**32))
def test_the_end_of_the_channel_ends_every_operation(turns: int, seed: int) -> None:
    with small_frames():
        pair = Pair(seed)
        ops = [OpId(i) for i in range(4)]
        for op in ops:
            direction = Direction.READ if op % 2 else Direction.WRITE
            rows = [(0, 700)]
            pair.initiator.start(Operation(direction, op, pair.us.extents(rows), pair.them.extents(rows), b"n"))
        for _ in range(turns):
            pair.turn()
        before = dict(pair.us.ends)
        pair.target.channel.close()
        with pytest.raises(ChannelClosed):
            for _ in range(10_000):
                pair.initiator.pump_out(64)
                pair.initiator.pump_in(64)
        pair.initiator.fail("closed")
        assert set(pair.us.ends) == set(ops)
        assert all(pair.us.ends[op] == error for op, error in before.items())
        assert all(e is None or isinstance(e, PeerLostError) for e in pair.us.ends.values())


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=40),
)
def test_memory_finds_a_row_exactly_where_some_region_holds_it(
    regions: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> None:
    arena = np.arange(100, dtype=np.uint8)
    base = arena.ctypes.data
    memory = Memory()
    for at, size in regions:
        memory.add(Region(base + at, size, owner=arena))
    table = np.array([(base + at, size) for at, size in rows], dtype=np.uint64)
    held = [any(r <= at and at + size <= r + n for r, n in regions) for at, size in rows]
    views, missing = memory.views(table)
    assert missing == (held.index(False) if False in held else None)
    assert (memory.locate(table) >= 0).tolist() == held
    if missing is None:
        assert [bytes(v) for v in views] == [arena[at : at + size].tobytes() for at, size in rows]
