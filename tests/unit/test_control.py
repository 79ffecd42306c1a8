"""Mailboxes over real sockets, settings, wire, ids, ledgers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from lmkv import wire
from lmkv.config import connector_settings
from lmkv.control.mailbox import Inbox, Outbox, split_address
from lmkv.control.wake import Wake
from lmkv.errors import ConfigError, WireError
from lmkv.ids import Incarnation, Rank, TransferId, make_incarnation, make_transfer_id
from lmkv.obs.ledger import LEDGERS, LedgerBook


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Fails when a socket was left open: the context could not be ended."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    ended = threading.Thread(target=context.term)
    ended.start()
    ended.join(10)
    assert not ended.is_alive(), "a socket was left open"


def test_letters_and_answers(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    inbox, outbox = Inbox(context, "tcp://127.0.0.1:0"), Outbox(context)
    asker = context.socket(zmq.DEALER)
    asker.connect(inbox.address)
    assert outbox.send(inbox.address, wire.Dismiss(Incarnation("x"), dead=True))
    assert inbox.socket.poll(2000)
    assert [letter.message for letter in inbox.receive()] == [wire.Dismiss(Incarnation("x"), dead=True)]
    asker.send(wire.encode(wire.Describe("t")))
    assert inbox.socket.poll(2000)
    (letter,) = inbox.receive()
    assert inbox.answer(letter.identity, wire.Explained("t", b"{}"))
    assert wire.decode_control(asker.recv()) == wire.Explained("t", b"{}")
    assert inbox.answer(b"nobody", wire.Explained("t", b"")) in (True, False)
    asker.close(0)
    outbox.close()
    inbox.close()


def test_garbage_is_counted_and_dropped(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    inbox = Inbox(context, "tcp://127.0.0.1:0")
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect(inbox.address)
    stranger.send(b"\xff\xfe")
    stranger.send_multipart([b"", b"two"])
    stranger.send(wire.encode(wire.Describe("t")))
    letters = []
    while not letters:
        assert inbox.socket.poll(2000)
        letters = inbox.receive()
    assert letters[0].message == wire.Describe("t") and inbox.unreadable == 2
    stranger.close()
    inbox.close()


def test_a_broken_connection_is_seen(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    inbox, outbox = Inbox(context, "tcp://127.0.0.1:0"), Outbox(context, watch=True)
    address = inbox.address
    outbox.send(address, wire.Describe("t"))
    assert inbox.socket.poll(2000)
    assert outbox.lost() == []
    inbox.close()
    gone: list[str] = []
    for _ in range(200):
        gone += outbox.lost()
        if gone:
            break
        threading.Event().wait(0.01)
    assert gone == [address]
    outbox.close()


def test_a_full_queue_is_counted_not_waited_for(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    outbox = Outbox(context)
    message = wire.Explained("t", b"x" * 10)
    sent = sum(outbox.send("tcp://127.0.0.1:1", message) for _ in range(20000))
    assert sent < 20000 and outbox.dropped == 20000 - sent
    outbox.close()


def test_a_taken_port_says_so(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    inbox = Inbox(context, "tcp://127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"cannot listen.*choose another port"):
        Inbox(context, inbox.address)
    inbox.close()


@pytest.mark.parametrize("address", ["", "tcp://host", "http://h:1", "tcp://h:x", "h:1", "tcp://:5"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        split_address(address)


def test_ipv6_address() -> None:
    assert split_address("tcp://[::1]:5") == ("::1", 5)


def test_wake_is_seen_once() -> None:
    wake = Wake()
    wake.set()
    wake.set()
    poller = zmq.Poller()
    poller.register(wake.fd, zmq.POLLIN)
    assert poller.poll(0)
    wake.clear()
    wake.clear()
    assert not poller.poll(0)
    wake.close()


def test_settings_precedence_and_errors() -> None:
    assert connector_settings({"lease_s": 3}, {}).lease_s == 3
    for extra, environ, text in (
        ({"lisen": "x"}, {}, "did you mean 'listen'"),
        ({"lease_s": 0}, {}, "lease_s"),
        ({}, {"LMKV_LEASE": "1"}, "did you mean 'LMKV_LEASE_S'"),
    ):
        with pytest.raises(ConfigError, match=text):
            connector_settings(extra, environ)
    assert connector_settings({}, {"LMKV_ROUTER_PORT": "1"}).lease_s == 10


def test_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_LEASE_S", "7")
    assert connector_settings({"lease_s": 3}, {}).lease_s == 7


@given(st.binary(max_size=200))
def test_decoders_raise_only_wire_errors(payload: bytes) -> None:
    for decode in (wire.decode_control, wire.decode_note):
        try:
            decode(payload)
        except WireError:
            continue


def test_messages_survive_the_wire() -> None:
    note = wire.WriteNote(TransferId("t"), 1, Rank(0), 3, 0, 0, 5, 2, 9, 1 << 40, (1 << 64) - 1)
    assert wire.decode_note(wire.encode(note)) == note
    grant = wire.Grant(Incarnation("i"), TransferId("t"), 1, 128, 300, (1,), ((5, 6),), 1.5)
    assert wire.decode_control(wire.encode(grant)) == grant


def test_ids() -> None:
    tid = make_transfer_id(0x0123456789AB, bytes(10))
    assert tid == "0123456789ab70008000000000000000" and len(make_incarnation(bytes(8))) == 16
    for bad in (lambda: make_transfer_id(0, b""), lambda: make_incarnation(b"")):
        with pytest.raises(ValueError, match="random bytes"):
            bad()


def test_the_ledger_is_bounded() -> None:
    book = LedgerBook()
    for i in range(LEDGERS + 10):
        book.update(TransferId(str(i)), n=i)
    assert book.to_json(TransferId("0")) == b""
    book.add_rank(TransferId("20"), {"rank": 1, "bytes": 5})
    assert json.loads(book.to_json(TransferId("20")))["ranks"] == {"1": {"rank": 1, "bytes": 5}}
    book.count("x", 2)
    assert book.counts() == {"x": 2}


def test_import_is_light_and_quick() -> None:
    """`import lmkv` costs under 100 ms and loads neither torch nor nixl (the best of five cold processes)."""
    code = (
        "import sys,time; t=time.perf_counter(); import lmkv; d=time.perf_counter()-t;"
        "assert not {'torch','nixl','zmq','numpy'} & set(sys.modules); print(d)"
    )
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert min(times) < 0.1
