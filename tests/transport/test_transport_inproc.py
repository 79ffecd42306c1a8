"""The faults of inproc://, one by one, polled by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from lmkv.errors import ConfigError, ConnectError, ExtentError, PeerLostError, StateError, TransportError
from lmkv.transport import Completion, Event, Extents, Notification, PeerLost, Region
from lmkv.transport.inproc import InprocTransport

PIECE_BYTES = 1024
SIZE_BYTES = 4096


class End:
    def __init__(self, name: str) -> None:
        self.memory = np.zeros(SIZE_BYTES, dtype=np.uint8)
        self.transport = InprocTransport(name, options={"piece_bytes": str(PIECE_BYTES)})
        self.transport.register(Region(self.memory.ctypes.data, SIZE_BYTES, owner=self.memory))
        self.faults = self.transport.faults

    def all(self) -> Extents:
        return Extents.of((self.memory.ctypes.data, SIZE_BYTES))


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    one, other = End("one"), End("other")
    one.transport.connect(other.transport.export())
    other.transport.connect(one.transport.export())
    one.memory[:] = np.arange(SIZE_BYTES) % 251
    yield one, other
    for end in (one, other):
        end.transport.abort()


def write(one: End, other: End, note: bytes = b"") -> int:
    return one.transport.write(other.transport.name, one.all(), other.all(), note)


def polls(end: End, count: int) -> list[Event]:
    return [event for _ in range(count) for event in end.transport.poll()]


def test_a_write_moves_a_piece_a_poll(ends: tuple[End, End]) -> None:
    one, other = ends
    op = write(one, other, b"done")
    assert polls(one, 3) == []
    assert (other.memory[: 3 * PIECE_BYTES] == one.memory[: 3 * PIECE_BYTES]).all()
    assert not other.memory[3 * PIECE_BYTES :].any()
    assert polls(other, 1) == []
    assert polls(one, 1) == [Completion(op, None)]
    assert polls(other, 1) == [Notification(one.transport.name, b"done")]


def test_held_bytes_land_after_the_cancel(ends: tuple[End, End]) -> None:
    one, other = ends
    one.faults.hold = True
    op = write(one, other, b"late")
    one.transport.cancel(op)
    assert polls(one, 20) == []
    assert not other.memory.any()
    one.faults.hold = False
    assert polls(one, 4) == [Completion(op, None)]
    assert (other.memory == one.memory).all()
    assert polls(other, 1) == [Notification(one.transport.name, b"late")]


def test_holding_also_catches_what_has_begun(ends: tuple[End, End]) -> None:
    one, other = ends
    op = write(one, other)
    polls(one, 1)
    one.faults.hold = True
    polls(one, 5)
    assert not other.memory[PIECE_BYTES:].any()
    one.transport.cancel(op)
    one.faults.hold = False
    assert polls(one, 3) == [Completion(op, None)]


def test_a_cancel_stops_the_rest_and_sends_no_note(ends: tuple[End, End]) -> None:
    one, other = ends
    op = write(one, other, b"never")
    polls(one, 1)
    one.transport.cancel(op)
    (done,) = polls(one, 1)
    assert isinstance(done, Completion)
    assert isinstance(done.error, TransportError)
    assert (done.op, polls(one, 5), polls(other, 5)) == (op, [], [])
    assert not other.memory[PIECE_BYTES:].any()


def test_a_stalled_target_takes_bytes_but_gives_no_completion(ends: tuple[End, End]) -> None:
    one, other = ends
    other.faults.stall = True
    op = write(one, other, b"woken")
    assert polls(one, 20) == []
    assert (other.memory == one.memory).all()
    assert polls(other, 5) == []
    other.faults.stall = False
    assert polls(one, 1) == [Completion(op, None)]
    assert polls(other, 1) == [Notification(one.transport.name, b"woken")]


def test_a_stalled_writer_does_nothing(ends: tuple[End, End]) -> None:
    one, other = ends
    op = write(one, other)
    one.faults.stall = True
    assert polls(one, 5) == []
    assert not other.memory.any()
    one.faults.stall = False
    assert polls(one, 4) == [Completion(op, None)]


@pytest.mark.parametrize("how", ["dead", "abort"])
def test_a_lost_peer_fails_its_operations_first(ends: tuple[End, End], how: str) -> None:
    one, other = ends
    ops = [write(one, other), write(one, other)]
    other_export = other.transport.export()
    polls(one, 1)
    if how == "dead":
        other.faults.dead = True
    else:
        other.transport.abort()
    landed = other.memory.copy()
    *done, lost = polls(one, 5)
    assert [(event.op, type(event.error)) for event in done if isinstance(event, Completion)] == [
        (op, PeerLostError) for op in ops
    ]
    assert isinstance(lost, PeerLost)
    assert lost.peer == other.transport.name
    assert (other.memory == landed).all()
    with pytest.raises(StateError):
        write(one, other)
    with pytest.raises(ConnectError):
        one.transport.connect(other_export)


def test_an_idle_peer_that_dies_is_reported_and_refused(ends: tuple[End, End]) -> None:
    one, other = ends
    other.faults.dead = True
    with pytest.raises(PeerLostError):
        write(one, other)
    with pytest.raises(PeerLostError):
        one.transport.notify(other.transport.name, b"x")
    (lost,) = polls(one, 3)
    assert isinstance(lost, PeerLost)


@pytest.mark.parametrize("side", [0, 1])
def test_cut_off_heals_without_loss(ends: tuple[End, End], side: int) -> None:
    one, other = ends
    ends[side].faults.cut.add(ends[1 - side].transport.name)
    op = write(one, other, b"data")
    one.transport.notify(other.transport.name, b"note")
    one.transport.cancel(op)
    assert polls(one, 10) == polls(other, 10) == []
    assert not other.memory.any()
    ends[side].faults.cut.clear()
    polls(one, 1)
    assert polls(other, 1) == [Notification(one.transport.name, b"note")]
    polls(one, 3)
    assert polls(other, 1) == [Notification(one.transport.name, b"data")]


def test_delay_failure_and_corruption_hit_the_operations_counted(ends: tuple[End, End]) -> None:
    one, other = ends
    one.faults.delay_polls = 3
    op = write(one, other)
    one.faults.delay_polls = 0
    assert polls(one, 3) == []
    assert not other.memory.any()
    assert polls(one, 4) == [Completion(op, None)]

    one.faults.fail_next = 1
    failing, fine = write(one, other, b"bad"), write(one, other, b"good")
    done = {event.op: event.error for event in polls(one, 6) if isinstance(event, Completion)}
    assert isinstance(done[failing], TransportError)
    assert done[fine] is None
    assert polls(other, 1) == [Notification(one.transport.name, b"good")]

    one.faults.corrupt_next = 1
    write(one, other)
    polls(one, 4)
    assert np.flatnonzero(other.memory != one.memory).tolist() == [0]
    write(one, other)
    polls(one, 4)
    assert (other.memory == one.memory).all()


def test_reordered_notes(ends: tuple[End, End]) -> None:
    one, other = ends
    other.faults.reorder_notes = True
    for note in (b"1", b"2", b"3"):
        one.transport.notify(other.transport.name, note)
    assert [event.payload for event in polls(other, 1) if isinstance(event, Notification)] == [b"3", b"2", b"1"]


def test_the_target_checks_for_itself(ends: tuple[End, End]) -> None:
    _, other = ends
    late = np.zeros(64, dtype=np.uint8)
    liar = End("liar")
    other.transport.connect(liar.transport.export())
    # An export that claims a region the target never registered.
    claimed = InprocTransport("claims")
    claimed.register(Region(late.ctypes.data, 64, owner=late))
    forged = claimed.export().replace(b"claims", b"other")
    forged = forged.replace(b"\xa6other", b"\xa5other")
    claimed.close()
    liar.transport.connect(forged)
    op = liar.transport.write(
        other.transport.name, Extents.of((liar.memory.ctypes.data, 64)), Extents.of((late.ctypes.data, 64))
    )
    (done,) = polls(liar, 1)
    assert isinstance(done, Completion)
    assert done.op == op
    assert isinstance(done.error, ExtentError)
    liar.transport.abort()


def test_names_and_options() -> None:
    end = End("taken")
    with pytest.raises(StateError):
        InprocTransport("taken")
    for netloc, options in (("host", {}), ("", {"speed": "9"}), ("", {"piece_bytes": "0"}), ("", {"piece_bytes": "x"})):
        with pytest.raises(ConfigError):
            InprocTransport("fresh", netloc, options)
    end.transport.close()
    InprocTransport("taken").close()
