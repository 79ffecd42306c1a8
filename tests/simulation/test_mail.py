"""What lmkv relies on in ZeroMQ, asked of libzmq and of the network in memory that stands for it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from tests.simulation.mail import VirtualContext
from tests.simulation.network import Network
from tests.simulation.virtual import VirtualClock

DEADLINE_S = 10.0


class _Keeping:
    """A real context that keeps its sockets until `destroy`."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        self._sockets.append(self._context.socket(kind))
        return self._sockets[-1]

    def destroy(self) -> None:
        for socket in self._sockets:
            socket.close(0)
        self._context.term()


class Real:
    """libzmq; each process has a context of its own."""

    def __init__(self) -> None:
        self._contexts: list[_Keeping] = []

    def context(self, process: str = "p") -> Any:
        self._contexts.append(_Keeping())
        return self._contexts[-1]

    def until(self, condition: Callable[[], Any]) -> Any:
        end_s = time.monotonic() + DEADLINE_S
        while not (found := condition()):
            assert time.monotonic() < end_s
            time.sleep(0.002)
        return found

    def rest(self) -> None:
        """Long enough for what is on its way to have come."""
        time.sleep(0.1)

    def close(self) -> None:
        for context in self._contexts:
            context.destroy()


class Virtual:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.network = Network(self.clock, random.Random(1))

    def context(self, process: str = "p") -> Any:
        return VirtualContext(self.network, process, f"host of {process}")

    def until(self, condition: Callable[[], Any]) -> Any:
        end_s = self.clock() + DEADLINE_S
        while not (found := condition()):
            assert self.clock() < end_s
            self.clock.advance(0.001)
            self.network.run()
        return found

    def rest(self) -> None:
        for _ in range(1000):
            self.clock.advance(0.001)
            self.network.run()

    def close(self) -> None:
        """Nothing to end."""


@pytest.fixture(params=[Real, Virtual])
def mail(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


def receive(socket: Any) -> list[bytes] | None:
    try:
        found: list[bytes] = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return found


def bound(context: Any, kind: int = zmq.ROUTER, address: str = "tcp://127.0.0.1:*", **options: int) -> tuple[Any, str]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.bind(address)
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connected(context: Any, address: str, kind: int = zmq.DEALER, **options: Any) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    for name, value in options.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.connect(address)
    return socket


def test_messages_of_one_sender_keep_their_order(mail: Any) -> None:
    router, address = bound(mail.context())
    dealers = [connected(mail.context(f"q{n}"), address) for n in range(3)]
    for i in range(50):
        for n, dealer in enumerate(dealers):
            dealer.send(b"%d %d" % (n, i), zmq.NOBLOCK)
    came: list[list[bytes]] = []
    mail.until(lambda: len(came) == 150 or came.extend(filter(None, [receive(router)])))
    for n in range(3):
        assert [body for _, body in came if body.startswith(b"%d " % n)] == [b"%d %d" % (n, i) for i in range(50)]


def test_an_answer_goes_to_who_asked(mail: Any) -> None:
    router, address = bound(mail.context())
    dealers = [connected(mail.context(f"q{n}"), address) for n in range(3)]
    for n, dealer in enumerate(dealers):
        dealer.send(b"%d" % n)
    for _ in dealers:
        identity, body = mail.until(lambda: receive(router))
        router.send_multipart([identity, b"answer to " + body], zmq.NOBLOCK)
    for n, dealer in enumerate(dealers):
        assert mail.until(lambda dealer=dealer: receive(dealer)) == [b"answer to %d" % n]


def test_an_answer_to_nobody_is_dropped(mail: Any) -> None:
    router, address = bound(mail.context())
    router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)
    dealer = connected(mail.context("q"), address)
    dealer.send(b"x")
    identity, _ = mail.until(lambda: receive(router))
    dealer.close(0)
    mail.rest()
    router.send_multipart([identity, b"x"], zmq.NOBLOCK)


def test_what_is_sent_before_anyone_listens_arrives_later(mail: Any) -> None:
    probe, address = bound(mail.context())
    probe.close(0)
    mail.rest()
    dealer = connected(mail.context("q"), address)
    dealer.send(b"early", zmq.NOBLOCK)
    mail.rest()
    router, _ = bound(mail.context(), address=address)
    assert mail.until(lambda: receive(router))[1] == b"early"


def test_a_full_queue_says_so(mail: Any) -> None:
    probe, address = bound(mail.context())
    probe.close(0)
    mail.rest()
    dealer = connected(mail.context("q"), address, SNDHWM=3)
    for _ in range(3):
        dealer.send(b"x", zmq.NOBLOCK)
    with pytest.raises(zmq.Again):
        dealer.send(b"x", zmq.NOBLOCK)
    assert not int(dealer.getsockopt(zmq.EVENTS)) & zmq.POLLOUT


def test_with_immediate_nothing_waits_for_a_connection(mail: Any) -> None:
    probe, address = bound(mail.context())
    probe.close(0)
    mail.rest()
    dealer = connected(mail.context("q"), address, IMMEDIATE=1)
    with pytest.raises(zmq.Again):
        dealer.send(b"x", zmq.NOBLOCK)
    router, _ = bound(mail.context(), address=address)

    def sent() -> bool:
        try:
            dealer.send(b"y", zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    mail.until(sent)
    assert mail.until(lambda: receive(router))[1] == b"y"


def test_a_successor_at_the_same_address_is_found(mail: Any) -> None:
    first, address = bound(mail.context())
    dealer = connected(mail.context("q"), address)
    dealer.send(b"one")
    mail.until(lambda: receive(first))
    first.close(0)
    mail.rest()
    second, _ = bound(mail.context(), address=address)
    mail.rest()
    dealer.send(b"two")
    other, body = mail.until(lambda: receive(second))
    assert body == b"two"
    second.send_multipart([other, b"answer"], zmq.NOBLOCK)
    assert mail.until(lambda: receive(dealer)) == [b"answer"]


def test_a_lost_connection_is_told(mail: Any) -> None:
    router, address = bound(mail.context())
    dealer = mail.context("q").socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.connect(address)
    dealer.send(b"x")
    mail.until(lambda: receive(router))
    assert not monitor.poll(0)
    router.close(0)
    mail.until(lambda: monitor.poll(0))
    assert recv_monitor_message(monitor, zmq.NOBLOCK)["event"] == zmq.EVENT_DISCONNECTED
    dealer.disable_monitor()
    monitor.close(0)


def test_subscribers_get_what_begins_so(mail: Any) -> None:
    publisher, address = bound(mail.context(), zmq.PUB)
    some = connected(mail.context("q"), address, zmq.SUB, SUBSCRIBE=b"a")
    everything = connected(mail.context("r"), address, zmq.SUB, SUBSCRIBE=b"")
    mail.rest()
    for body in (b"ab", b"b", b"ac"):
        publisher.send(body)
    assert [mail.until(lambda: receive(some)) for _ in range(2)] == [[b"ab"], [b"ac"]]
    assert [mail.until(lambda: receive(everything)) for _ in range(3)] == [[b"ab"], [b"b"], [b"ac"]]
    mail.rest()
    assert receive(some) is None


def test_a_message_has_its_frames(mail: Any) -> None:
    router, address = bound(mail.context())
    dealer = connected(mail.context("q"), address)
    dealer.send_multipart([b"one", b"", b"three"], zmq.NOBLOCK)
    assert mail.until(lambda: receive(router))[1:] == [b"one", b"", b"three"]


def test_one_place_has_one_listener(mail: Any) -> None:
    _, address = bound(mail.context())
    other = mail.context("q").socket(zmq.ROUTER)
    with pytest.raises(zmq.ZMQError):
        other.bind(address)
    other.close(0)


def test_events_tell_of_mail(mail: Any) -> None:
    router, address = bound(mail.context())
    assert not int(router.getsockopt(zmq.EVENTS)) & zmq.POLLIN
    dealer = connected(mail.context("q"), address)
    dealer.send(b"x")
    mail.until(lambda: int(router.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
    assert receive(router) is not None and receive(router) is None


@pytest.mark.parametrize("address", ["x", "tcp://host", "inproc", "tcp://host:port"])
def test_what_is_no_address_is_refused(mail: Any, address: str) -> None:
    socket = mail.context().socket(zmq.DEALER)
    with pytest.raises(zmq.ZMQError):
        socket.connect(address)
    socket.close(0)


# --- what only the virtual network does ---


def test_a_cut_holds_messages_back() -> None:
    mail = Virtual()
    router, address = bound(mail.context("a"))
    dealer = connected(mail.context("b"), address)
    dealer.send(b"1")
    mail.until(lambda: receive(router))
    mail.network.cut("host of a", "host of b")
    dealer.send(b"2")
    mail.rest()
    assert receive(router) is None
    mail.network.heal("host of a", "host of b")
    assert mail.until(lambda: receive(router))[1] == b"2"


def test_a_reset_loses_what_is_on_its_way_and_is_told() -> None:
    lost = 0
    for _ in range(5):
        mail = Virtual()
        router, address = bound(mail.context("a"))
        dealer = mail.context("b").socket(zmq.DEALER)
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(address)
        mail.rest()
        for i in range(9):
            dealer.send(b"%d" % i)
        mail.network.reset("a", "b")
        mail.until(lambda monitor=monitor: monitor.poll(0))
        mail.rest()
        dealer.send(b"after")
        came: list[bytes] = []
        mail.until(
            lambda router=router, came=came: (
                b"after" in came or came.extend(found[1] for found in [receive(router)] if found)
            )
        )
        assert came[:-1] == [b"%d" % i for i in range(len(came) - 1)], "a beginning of what was sent, in order"
        lost += 10 - len(came)
    assert lost > 0


def test_a_silent_death_is_not_told() -> None:
    mail = Virtual()
    _, address = bound(mail.context("a"))
    dealer = mail.context("b").socket(zmq.DEALER)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.connect(address)
    dealer.send(b"1")
    mail.rest()
    mail.network.kill("a", silent=True)
    dealer.send(b"2")
    mail.rest()
    assert not monitor.poll(0)


def test_a_context_with_open_sockets_does_not_end() -> None:
    mail = Virtual()
    context = mail.context()
    socket = context.socket(zmq.DEALER)
    with pytest.raises(AssertionError, match="1 sockets open"):
        context.term()
    socket.close()
    context.term()
