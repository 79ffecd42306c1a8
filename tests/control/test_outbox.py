"""Connections of an Outbox: opened on first use, closed when idle or when there are too many."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import zmq

from lmkv import wire
from lmkv.control.mailbox import Inbox, Outbox, make_context, most_connections

LISTEN = "tcp://127.0.0.1:0"
DEADLINE_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = make_context()
    yield made
    made.destroy(0)


def tokens(inbox: Inbox, count: int) -> list[str]:
    """Of the next `count` messages."""
    found: list[str] = []
    end_s = time.monotonic() + DEADLINE_S
    while len(found) < count:
        assert inbox.socket.poll(max(0, int((end_s - time.monotonic()) * 1000))), f"only {found} came"
        found += [str(getattr(letter.message, "token", "")) for letter in inbox.receive()]
    return found


def nowhere(number: int) -> str:
    return f"tcp://127.0.{number >> 8}.{number & 255}:9"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("watch", [False, True])
def test_one_address_after_the_other(context: zmq.Context[zmq.Socket[bytes]], watch: bool) -> None:
    """Without an end of connections ZeroMQ has no more sockets after 1,023 addresses (341 watched), and raises."""
    outbox = Outbox(context, watch, most=50)
    most = 0
    for number in range(1200):
        assert outbox.send(nowhere(number), wire.Describe("t"))
        if number == 200:
            most = descriptors()
    assert len(outbox) == 50 and outbox.crowded_out == 1150 and outbox.dropped == 0
    # Those that were closed last still have their second to say goodbye, on ZeroMQ's own thread.
    end_s = time.monotonic() + DEADLINE_S
    while descriptors() > most + 20:
        assert time.monotonic() < end_s, f"{descriptors()} descriptors, {most} before"
        time.sleep(0.05)
    outbox.close()


def test_an_idle_connection_is_closed_and_opened_again(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    clock = Clock()
    inbox, other = Inbox(context, LISTEN), Inbox(context, LISTEN)
    outbox = Outbox(context, watch=True, idle_s=60, clock=clock)
    outbox.send(inbox.address, wire.Describe("1"))
    clock.now_s += 50
    outbox.send(other.address, wire.Describe("a"))
    assert len(outbox) == 2 and tokens(inbox, 1) == ["1"]
    clock.now_s += 11
    outbox.send(other.address, wire.Describe("b"))
    assert len(outbox) == 1 and outbox.idle_closed == 1
    assert outbox.lost() == [], "what was closed here is not lost"
    outbox.send(inbox.address, wire.Describe("2"))
    assert len(outbox) == 2 and tokens(inbox, 1) == ["2"] and tokens(other, 2) == ["a", "b"]
    clock.now_s += 61
    assert outbox.lost() == [] and len(outbox) == 0, "idle ones end without a message, too"
    outbox.send(other.address, wire.Describe("c"))
    clock.now_s += 61
    outbox.sweep()
    assert len(outbox) == 0 and outbox.idle_closed == 4
    for thing in (outbox, inbox, other):
        thing.close()


def test_the_least_recently_used_makes_room_and_loses_nothing(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    inboxes = [Inbox(context, LISTEN) for _ in range(6)]
    outbox = Outbox(context, watch=True, most=3)
    for number, inbox in enumerate(inboxes):
        assert outbox.send(inbox.address, wire.Describe(str(number)))
        assert outbox.send(inboxes[0].address, wire.Describe("again"))
    assert len(outbox) == 3 and outbox.crowded_out == 3
    assert tokens(inboxes[0], 7) == ["0", *["again"] * 6]
    for number, inbox in list(enumerate(inboxes))[1:]:
        assert tokens(inbox, 1) == [str(number)]
    # The one in use was never closed: its end is seen.
    gone = inboxes[0].address
    inboxes[0].close()
    end_s = time.monotonic() + DEADLINE_S
    while gone not in outbox.lost():
        assert time.monotonic() < end_s
        time.sleep(0.01)
    outbox.close()
    for inbox in inboxes[1:]:
        inbox.close()


def test_sockets_are_short(caplog: pytest.LogCaptureFixture) -> None:
    """The process has none left: old connections make room, and a message that cannot be sent is counted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 12)
    outbox = Outbox(context)
    inbox = Inbox(context, LISTEN)
    for number in range(40):
        assert outbox.send(nowhere(number), wire.Describe("t")) or outbox.dropped
    assert len(outbox) <= 11 and "there is no connecting" in caplog.text
    end_s = time.monotonic() + DEADLINE_S
    while not outbox.send(inbox.address, wire.Describe("last")):  # those that say goodbye still have their sockets
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert tokens(inbox, 1) == ["last"]
    outbox.close()
    inbox.close()
    context.term()


def test_no_address_is_a_dropped_message(
    context: zmq.Context[zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(context)
    for number, address in enumerate(("x", "tcp://tcp://10.0.0.5:1", "tcp://[::1:5", "")):
        assert not outbox.send(address, wire.Describe("t")) and outbox.dropped == number + 1
        assert repr(address) in caplog.text
    assert len(outbox) == 0
    outbox.forget("x")
    outbox.close()


def test_the_limit_follows_the_descriptors_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, plain, watched in ((1024, 128, 64), (64, 64, 64), (1 << 20, 4096, 4096), (-1, 4096, 4096)):
        monkeypatch.setattr("resource.getrlimit", lambda which, soft=soft: (soft, soft))
        assert (most_connections(watch=False), most_connections(watch=True)) == (plain, watched)


def test_a_message_that_is_too_large_ends_its_connection_only(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    from lmkv.control.mailbox import MOST_MESSAGE_BYTES

    inbox = Inbox(context, LISTEN)
    stranger, friend = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket in (stranger, friend):
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(inbox.address)
    stranger.send(wire.encode(wire.Explained("t", b"x" * (MOST_MESSAGE_BYTES + 1))))
    friend.send(wire.encode(wire.Explained("t", b"x" * (MOST_MESSAGE_BYTES - 1000))))
    friend.send(wire.encode(wire.Describe("alive?")))
    assert tokens(inbox, 2) == ["t", "alive?"]
    for socket in (stranger, friend):
        socket.close()
    inbox.close()
