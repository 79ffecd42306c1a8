"""Control addresses: the grammar is narrower than ZeroMQ's, and every way in uses it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from lmkv import poolwire as pw
from lmkv import wire
from lmkv.addresses import PATTERN, check_host, join_address, problem, split_address
from lmkv.config import connector_settings
from lmkv.errors import ConfigError, WireError
from lmkv.ids import EngineName, Incarnation, Rank
from lmkv.pool.settings import node_settings
from lmkv.router.engines import Side, parse_engine

GOOD = (
    "tcp://127.0.0.1:1",
    "tcp://node-7.rack_2.example.com:65535",
    "tcp://[::1]:18100",
    "tcp://[fe80::1%eth0]:18100",
    "tcp://h:5",
)
ZMQ_REFUSES = (
    "x",
    "",
    "tcp://a b:5",
    "tcp://a/b:5",
    "tcp://a:5/",
    "tcp://a:5?x=1",
    "tcp://u@h:5",
    "tcp://*:5",
    "tcp://ä:5",
    "tcp://-a:5",
    "tcp://a:",
    "tcp://a:+5",
    "tcp://a:\u0665",
    "tcp://a\nb:5",
    "tcp://a\0b:5",
    "TCP://a:5",
    "http://h:1",
    "host:18300",
    "tcp://tcp://10.0.0.5:5",
)
ZMQ_TAKES_AND_NEVER_CONNECTS = (
    "tcp://[::1:5",
    "tcp://::1:5",
    "tcp://h:0",
    "tcp://h:65536",
    "tcp://h:99999999",
    "tcp://:5",
    "tcp://a..b:5",
    "tcp://a;b:5",
    "tcp://999.1.1.1:6",
    "tcp://[h]:5",
    "tcp://h:5_0",
    "inproc://x",
    "ipc:///tmp/x",
    f"tcp://{'a' * 300}:5",
)


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(0)


def connects(context: zmq.Context[zmq.Socket[bytes]], address: str) -> bool:
    """ZeroMQ does not refuse it."""
    socket = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.IPV6, 1)
        socket.connect(address)
    except (zmq.ZMQError, ValueError, TypeError, UnicodeError):
        return False
    finally:
        socket.close(0)
    return True


@pytest.mark.parametrize("address", GOOD)
def test_good_addresses_are_taken_everywhere(context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    assert join_address(*split_address(address)) == address and problem(address) == ""
    assert connects(context, address)
    message = wire.Refuse(Incarnation("i"), address, "r")
    assert wire.decode_control(wire.encode(message)) == message


@pytest.mark.parametrize("address", ZMQ_REFUSES + ZMQ_TAKES_AND_NEVER_CONNECTS)
def test_bad_addresses_are_refused_everywhere(address: str) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        split_address(address)
    assert problem(address)
    for setting in ("pool", "controller", "peers"):
        with pytest.raises(ConfigError, match=setting):
            connector_settings({setting: [address]}, {})
    for setting in ("controller", "replicas"):
        with pytest.raises(ConfigError, match=setting):
            node_settings({setting: (address,)}, {})
    with pytest.raises(ConfigError):
        parse_engine(Side.PREFILL, f"http://h:1={address}")


@pytest.mark.parametrize("address", [a for a in ZMQ_REFUSES if a.isprintable()])
def test_what_zeromq_refuses_is_refused(context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    assert not connects(context, address)


HOSTS = st.one_of(
    st.from_regex(r"\A[A-Za-z0-9_.:%\[\]-]{1,20}\Z"),
    st.text(max_size=20),
    st.ip_addresses().map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
)


@given(HOSTS, st.one_of(st.integers(-1, 70000).map(str), st.text(max_size=6)))
def test_whatever_is_taken_zeromq_takes(context: zmq.Context[zmq.Socket[bytes]], host: str, port: str) -> None:
    address = f"tcp://{host}:{port}"
    if not problem(address):
        assert connects(context, address)


@given(st.from_regex(PATTERN))
def test_whatever_a_message_may_carry_zeromq_takes(context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
    if len(address) <= 255:
        assert connects(context, address)


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://0.0.0.0:5", "tcp://[::]:5", "tcp://eth0:0", "tcp://h:0"])
def test_addresses_to_listen_on(address: str) -> None:
    host, port = split_address(address, listen=True)
    assert join_address(host, port) == address


# --- settings ---


def test_pool_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_POOL", "host:18300")
    with pytest.raises(ConfigError, match=r"'pool'.*'host:18300'.*tcp://HOST:PORT"):
        connector_settings({}, {"LMKV_POOL": "host:18300"})


@pytest.mark.parametrize("settings", [connector_settings, node_settings])
def test_advertise_is_a_host(settings: object) -> None:
    assert callable(settings)
    with pytest.raises(ConfigError, match=r"is an address.*without scheme and port: advertise 10\.0\.0\.5"):
        settings({"advertise": "tcp://10.0.0.5"}, {})
    for wrong in ("10.0.0.5:18100", "a b", "0.0.0.0", "a/b", "[::1"):
        with pytest.raises(ConfigError, match="advertise"):
            settings({"advertise": wrong}, {})
    for right, kept in (("10.0.0.5", "10.0.0.5"), ("[fd00::5]", "fd00::5"), ("fd00::5", "fd00::5"), ("h-1.x", "h-1.x")):
        assert settings({"advertise": right}, {}).advertise == kept


@pytest.mark.parametrize("settings", [connector_settings, node_settings])
def test_listening_everywhere_needs_a_host_to_tell(settings: object) -> None:
    assert callable(settings)
    for listen in ("tcp://0.0.0.0:18100", "tcp://*:0", "tcp://[::]:5"):
        with pytest.raises(ConfigError, match="set advertise"):
            settings({"listen": listen}, {})
        assert settings({"listen": listen, "advertise": "h"}, {}).listen == listen
    with pytest.raises(ConfigError, match="listen"):
        settings({"listen": "127.0.0.1:18100"}, {})


def test_check_host_says_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"advertise \[fd00::5\]"):
        check_host("tcp://[fd00::5]:1")


# --- messages ---


def worker(address: str) -> wire.WorkerCard:
    return wire.WorkerCard(Rank(0), address, "tcp", b"", "DRAM", (), 0, 0)


def engine(address: str, worker_address: str = "tcp://h:2") -> wire.EngineCard:
    workers = (worker(worker_address),)
    return wire.EngineCard(EngineName("e"), Incarnation("i"), address, "both", {}, {}, (16,), workers)


def node(address: str, events: str) -> pw.NodeCard:
    return pw.NodeCard("n", Incarnation("i"), address, events, "", b"", 0, 0)


@pytest.mark.parametrize("bad", ["x", "tcp://tcp://10.0.0.5:1", "tcp://h:0", "tcp://[::1:5"])
def test_a_message_with_a_bad_address_cannot_be_read(bad: str) -> None:
    good = "tcp://h:1"
    control = (
        wire.Hello(engine(bad)),
        wire.Welcome(engine(good, bad)),
        wire.Introduce(engine(good), engine(bad)),
        wire.Refuse(Incarnation("i"), bad, "r"),
        wire.PoolName(Incarnation("i"), bad, ""),
    )
    for message in control:
        with pytest.raises(WireError, match=r"expected tcp://HOST:PORT - at `\$"):
            wire.decode_control(wire.encode(message))
    pool = (
        pw.Replicate(node(bad, good), b"", b""),
        pw.Replicate(node(good, bad), b"", b""),
        pw.NodeBeat(node(good, bad), 0, 0, 0, 0),
        pw.MembersAre(1, "c", (pw.Member(node(bad, good), "EXACT", 0.0, 0, 0, 0, False),)),
        pw.Found(1, (pw.Holder(Incarnation("i"), bad, b""),), True),
    )
    for message_of_pool in pool:
        with pytest.raises(WireError, match=r"expected tcp://HOST:PORT - at `\$"):
            pw.decode(pw.encode(message_of_pool))
    with pytest.raises(msgspec.ValidationError):  # as etcd has it
        msgspec.json.decode(msgspec.json.encode(node(bad, good)), type=pw.NodeCard)


def test_a_card_without_events_can_be_read() -> None:
    card = node("tcp://h:1", "")
    answer = pw.StatsAre(1, card, b"")
    assert pw.decode(pw.encode(answer)) == answer


@pytest.mark.parametrize("huge", [1 << 62, (1 << 64) - 1, -(1 << 62)])
def test_a_message_with_a_huge_number_cannot_be_read(huge: int) -> None:
    own, tid = Incarnation("i"), "t"
    bad = (
        wire.Beat(own, huge, 0.0),  # type: ignore[arg-type]
        wire.Grant(own, tid, 1, 0, 5, (huge,), ((1,),), 0.0),  # type: ignore[arg-type]
        wire.Grant(own, tid, 1, 0, 5, (0,), ((huge,),), 0.0),  # type: ignore[arg-type]
        wire.Grant(own, tid, huge, 0, 5, (0,), ((1,),), 0.0),  # type: ignore[arg-type]
        wire.Credit(own, Rank(0), tid, 1, (huge,)),  # type: ignore[arg-type]
        wire.Introduced(huge, own),  # type: ignore[arg-type]
        wire.PoolNodes(huge, ()),  # type: ignore[arg-type]
    )
    for message in bad:
        with pytest.raises(WireError, match="cannot be read"):
            wire.decode_control(wire.encode(message))
    with pytest.raises(WireError, match="cannot be read"):
        note = wire.WriteNote(tid, 1, Rank(0), huge, 0, 0, 1, 0, 1, 1, 1)  # type: ignore[arg-type]
        wire.decode_note(wire.encode(note))
    with pytest.raises(WireError, match="cannot be read"):
        pw.decode(pw.encode(pw.PoolHello(1, own, huge, "n")))  # type: ignore[arg-type]
