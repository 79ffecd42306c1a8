"""Membership in a real etcd (Debian: apt-get install etcd-server), and in none."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lmkv.control.controller import ControllerSettings
from lmkv.control.etcd import EtcdError, EtcdMembership, _Any
from lmkv.control.follow import EXACT
from lmkv.errors import ConfigError
from tests.ports import free_port

from .fake_node import FakeNode
from .model import make_card
from .test_controller import QUICK, Running, keys, pages, until

PREFIX = "/lmkv/test"


class Etcd:
    """One member, started again on the same data after `kill`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self._peer = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        peer = f"http://127.0.0.1:{self._peer}"
        options = {
            "data-dir": str(self._folder), "listen-client-urls": self.url, "advertise-client-urls": self.url,
            "listen-peer-urls": peer, "initial-advertise-peer-urls": peer, "initial-cluster": f"default={peer}",
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["etcd", *(f"--{name}={value}" for name, value in options.items())],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "ETCD_UNSUPPORTED_ARCH": "arm64"},
        )  # fmt: skip
        until(self.answers, "etcd is up", 30)

    def answers(self) -> bool:
        try:
            EtcdMembership(self.url, PREFIX)._call("kv/range", {"key": "AA=="}, _Any)
        except EtcdError:
            return False
        return True

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd here (Debian: apt-get install etcd-server)")
    etcd = Etcd(tmp_path / "etcd")
    yield etcd
    etcd.kill()


@pytest.fixture
def clients() -> Iterator[list[EtcdMembership]]:
    made: list[EtcdMembership] = []
    yield made
    for client in made:
        client.close()


def test_come_and_go(etcd: Etcd, clients: list[EtcdMembership]) -> None:
    watcher, first, second, third = (EtcdMembership(etcd.url, PREFIX, ttl_s=2) for _ in range(4))
    clients += [watcher, first, second, third]
    card = make_card("a" * 16)
    first.register(card)
    until(lambda: first.registered, "registered")
    watcher.watch()
    until(lambda: watcher.cards() == [card], "what was there before is listed")
    other = make_card("b" * 16)
    second.register(other)
    until(lambda: watcher.cards() == [card, other], "the watch tells", 2.0)
    second.withdraw()
    until(lambda: watcher.cards() == [card], "withdrawn", 1.5)
    # Somebody else's keys do no harm: beside ours, and under our prefix.
    for key in (PREFIX + "x", PREFIX + "/x"):
        third._call("kv/put", {"key": base64.b64encode(key.encode()).decode(), "value": "AA=="}, _Any)
    third.register(other)
    until(lambda: watcher.cards() == [card, other], "the rest is listed")
    # A node that dies says nothing: its lease ends it. The one that lives on keeps its own.
    third.close()
    until(lambda: watcher.cards() == [card], "the lease has run out", 8.0)
    assert first.registered


def test_an_outage(etcd: Etcd, clients: list[EtcdMembership]) -> None:
    watcher, node = EtcdMembership(etcd.url, PREFIX), EtcdMembership(etcd.url, PREFIX, ttl_s=2)
    clients += [watcher, node]
    card = make_card("a" * 16)
    node.register(card)
    watcher.watch()
    until(lambda: watcher.cards() == [card], "listed")
    etcd.kill()
    until(lambda: not watcher.connected, "noticed")
    assert watcher.cards() == [card]
    etcd.start()
    until(lambda: watcher.connected, "connected again")
    # Its lease may have run out meanwhile; it comes back by itself.
    until(lambda: node.connected and watcher.cards() == [card], "listed again", 15)
    late = make_card("b" * 16)
    clients.append(EtcdMembership(etcd.url, PREFIX))
    clients[-1].register(late)
    until(lambda: late in watcher.cards(), "the watch works again", 6)


def test_a_lost_lease_is_taken_again(etcd: Etcd, clients: list[EtcdMembership]) -> None:
    watcher, node = EtcdMembership(etcd.url, PREFIX), EtcdMembership(etcd.url, PREFIX, ttl_s=2)
    clients += [watcher, node]
    card = make_card("a" * 16)
    node.register(card)
    watcher.watch()
    until(lambda: watcher.cards() == [card], "listed")
    node._call("lease/revoke", {"ID": node._lease}, _Any)
    until(lambda: watcher.cards() == [], "gone")
    until(lambda: watcher.cards() == [card], "back")


def test_a_controller_finds_nodes_there(etcd: Etcd, clients: list[EtcdMembership]) -> None:
    """The node beats to nobody: its card is in etcd, and its signs of life are its events."""
    running = Running(ControllerSettings("tcp://127.0.0.1:0", "c0", QUICK, etcd=etcd.url, etcd_prefix=PREFIX))
    node = FakeNode(pages=pages(0, 10))
    registration = EtcdMembership(etcd.url, PREFIX, ttl_s=2)
    clients.append(registration)
    try:
        registration.register(node.card)
        until(lambda: running.states() == {node.incarnation: EXACT}, "exact")
        node.put(pages(10, 1))
        until(lambda: running.holders(keys(10, 1)), "events come")
        registration.withdraw()
        # Silent as well, it is gone; while it is heard it stays.
        until(lambda: running.controller._etcd is not None and not running.controller._etcd.cards(), "withdrawn")
        assert running.states() == {node.incarnation: EXACT}
        node.close()
        until(lambda: running.states() == {}, "gone", QUICK.forget_s - 0.2)
    finally:
        node.close()
        running.close()


def test_nobody_there(clients: list[EtcdMembership]) -> None:
    client = EtcdMembership(f"http://127.0.0.1:{free_port()}", PREFIX)
    clients.append(client)
    with pytest.raises(EtcdError, match="does not answer"):
        client._call("kv/range", {}, _Any)
    client.watch()
    client.register(make_card("a" * 16))
    assert client.cards() == [] and not client.registered
    client.withdraw()
    assert not [t for t in threading.enumerate() if t.name.startswith("etcd")]


class Odd(BaseHTTPRequestHandler):
    """Answers, but not as etcd does."""

    said = (200, b"[]")

    def do_POST(self) -> None:
        self.send_response(self.said[0])
        self.end_headers()
        self.wfile.write(self.said[1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("said", [(200, b"[]"), (200, b"<html>"), (404, b"no such path"), (200, b"{}")])
def test_what_is_no_etcd(clients: list[EtcdMembership], said: tuple[int, bytes]) -> None:
    server = HTTPServer(("127.0.0.1", 0), type("Said", (Odd,), {"said": said}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = EtcdMembership(f"http://127.0.0.1:{server.server_port}", PREFIX)
        clients.append(client)
        with pytest.raises(EtcdError, match=str(server.server_port)):
            client._watch()
        client._card = make_card("a" * 16)
        with pytest.raises(EtcdError):
            client._keep_alive()
    finally:
        server.shutdown()
        server.server_close()


def test_several_members_take_turns(etcd: Etcd, clients: list[EtcdMembership]) -> None:
    client = EtcdMembership(f"http://127.0.0.1:{free_port()}, {etcd.url}", PREFIX)
    clients.append(client)
    client.register(make_card("a" * 16))
    until(lambda: client.registered, "the second answers")


@pytest.mark.parametrize("url", ["", "etcd:2379", "http://", "http://x:port", "tcp://x:1"])
def test_addresses(url: str) -> None:
    with pytest.raises(ConfigError, match="etcd"):
        EtcdMembership(url, PREFIX)
