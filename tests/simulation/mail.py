"""ZeroMQ in memory, in virtual time: the part of its interface that lmkv uses, with delays and faults.

A `Network` joins all processes of a world. Messages between two sockets keep their order, as TCP does; those of
different pairs overtake each other. `VirtualContext` is given out in place of zmq.Context. One thread only.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import random
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import zmq

ANYWHERE = ("*", "0.0.0.0", "::", "")
FIRST_PORT = 20000
FIRST_DESCRIPTOR = 1 << 24
"""Descriptors of virtual sockets are told from real ones by their size."""
Frames = list[bytes]


def _endpoint(address: str) -> tuple[str, int | None]:
    """(host, port) of `tcp://host:port`; port None for `*`. Raises ZMQError as libzmq does."""
    parts = urlsplit(address)
    host, _, port = parts.netloc.rpartition(":")
    if parts.scheme != "tcp" or not host or not (port == "*" or port.isdigit()):
        raise zmq.ZMQError(errno.EINVAL, f"invalid endpoint {address!r}")
    return host.strip("[]"), None if port == "*" else int(port)


@dataclass
class Faults:
    """What goes wrong between processes. Changes concern what is sent from then on."""

    delay_s: tuple[float, float] = (20e-6, 400e-6)
    """Each message takes so long, drawn evenly."""
    slow: float = 0.0
    """Share of messages that take up to `slow_s` instead."""
    slow_s: float = 0.05
    cut: set[frozenset[str]] = field(default_factory=set)
    """Pairs of hosts that do not reach each other; see `Network.cut` and `heal`."""


class Network:
    """What joins the sockets of all processes. `now` tells the virtual time."""

    def __init__(self, now: Callable[[], float], chance: random.Random) -> None:
        self.now = now
        self.faults = Faults()
        self._chance = chance
        self._ports = itertools.count(FIRST_PORT)
        self._numbers = itertools.count()
        self._bound: dict[tuple[str, int], VirtualSocket] = {}
        self._sockets: dict[int, VirtualSocket] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._watches: dict[int, Callable[[], float]] = {}
        self.notice: Callable[[int, float], None] = lambda descriptor, time_s: None
        """Called when a descriptor will be readable from a time on; set by the stepping."""

    # --- time ---

    def pace_s(self) -> float:
        """Between two polls of a data plane that moves bytes."""
        return self._chance.uniform(20e-6, 400e-6)

    def watch(self, due_s: Callable[[], float]) -> int:
        """A descriptor of something that isn't a socket. `due_s` tells from when on it is readable."""
        descriptor = FIRST_DESCRIPTOR + next(self._numbers)
        self._watches[descriptor] = due_s
        return descriptor

    def next_s(self) -> float:
        """When something happens in the network by itself (connections); messages see `arrival_s`."""
        return self._due[0][0] if self._due else float("inf")

    def run(self) -> None:
        """Let happen what is due."""
        while self._due and self._due[0][0] <= self.now():
            heapq.heappop(self._due)[2]()

    def number(self) -> int:
        """One more than the last: orders what happens at one time."""
        return next(self._numbers)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time_s, next(self._numbers), action))

    def delay_s(self) -> float:
        if self.faults.slow and self._chance.random() < self.faults.slow:
            return self._chance.uniform(0, self.faults.slow_s)
        return self._chance.uniform(*self.faults.delay_s)

    def arrival_s(self, descriptor: int) -> float:
        """When the socket with that descriptor is readable; infinity while nothing is on its way."""
        watch = self._watches.get(descriptor)
        if watch is not None:
            return watch()
        socket = self._sockets.get(descriptor)
        return socket.arrival_s if socket is not None else float("inf")

    # --- faults ---

    def cut(self, one: str, other: str) -> None:
        """The hosts do not reach each other. Nothing is lost: it arrives after `heal`, as TCP sends it again."""
        self.faults.cut.add(frozenset((one, other)))

    def heal(self, one: str, other: str) -> None:
        self.faults.cut.discard(frozenset((one, other)))
        for pipe in self._pipes():
            pipe.pump()

    def reset(self, one: str, other: str) -> None:
        """Every connection between sockets of the two processes breaks: some of what was on its way is lost, both
        sides notice, and the connecting side tries again."""
        for pipe in self._pipes():
            if pipe.listener is not None and {pipe.caller.process, pipe.listener.process} == {one, other}:
                pipe.break_off()

    def kill(self, process: str, silent: bool = False) -> None:
        """The process has died: nothing of it is heard any more. `silent`: its host has, so nobody is told either."""
        for socket in [s for s in self._sockets.values() if s.process == process]:
            socket.die(silent)

    def reaches(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.faults.cut

    def survivors(self, flying: int) -> int:
        """Of so many messages on their way when a connection breaks, how many still arrive."""
        return self._chance.randint(0, flying)

    # --- sockets ---

    def _pipes(self) -> Iterator[Pipe]:
        for socket in list(self._sockets.values()):
            yield from list(socket.calls.values())

    def add(self, socket: VirtualSocket) -> int:
        descriptor = FIRST_DESCRIPTOR + next(self._numbers)
        self._sockets[descriptor] = socket
        return descriptor

    def remove(self, socket: VirtualSocket) -> None:
        self._sockets.pop(socket.fileno(), None)
        for place in [place for place, bound in self._bound.items() if bound is socket]:
            del self._bound[place]

    @property
    def open_sockets(self) -> list[VirtualSocket]:
        return list(self._sockets.values())

    def bind(self, socket: VirtualSocket, address: str) -> str:
        host, port = _endpoint(address)
        port = port or next(self._ports)
        place = ("*" if host in ANYWHERE else host, port)
        if place in self._bound:
            raise zmq.ZMQError(zmq.EADDRINUSE)
        self._bound[place] = socket
        shown = "0.0.0.0" if place[0] == "*" else f"[{host}]" if ":" in host else host
        return f"tcp://{shown}:{port}"

    def find(self, address: str) -> VirtualSocket | None:
        host, port = _endpoint(address)
        return self._bound.get((host, port or 0)) or self._bound.get(("*", port or 0))


class Pipe:
    """The connection of a socket that has called connect(address): made, lost, and made again."""

    def __init__(self, caller: VirtualSocket, address: str) -> None:
        self.caller = caller
        self.address = address
        self.listener: VirtualSocket | None = None
        self.identity = b""
        self._network = caller.network
        self._tries = 0
        self._closed = False
        self._silent = False
        """The other host has died: it takes everything and answers nothing."""
        self._waiting: dict[bool, deque[Frames]] = {True: deque(), False: deque()}
        """By direction (True: to the listener), what has not left yet."""
        self._unread = {True: 0, False: 0}
        self._last_s = {True: 0.0, False: 0.0}
        self._try_later(0.0)

    # --- the connection ---

    def _try_later(self, seconds: float) -> None:
        self._network.at(self._network.now() + seconds + self._network.delay_s(), self._try)

    def _try(self) -> None:
        if self._closed or self.listener is not None or self._silent:
            return
        found = self._network.find(self.address)
        if found is None or not self._network.reaches(self.caller.host, found.host):
            first_s, most_s = self.caller.reconnect_s
            self._tries += 1
            self._try_later(min(first_s * 2 ** min(self._tries, 10), max(first_s, most_s)))
            return
        self._tries, self.listener = 0, found
        self.identity = found.answer(self)
        self.pump()

    @property
    def is_up(self) -> bool:
        return self.listener is not None and self._network.reaches(self.caller.host, self.listener.host)

    def break_off(self, lose_all_to_listener: bool = False) -> None:
        """The connection is reset. What the listener still had to say to this caller is gone with it."""
        listener, self.listener = self.listener, None
        if listener is None:
            return
        listener.calls_taken.pop(self.identity, None)
        for outward, receiver in ((True, listener), (False, self.caller)):
            receiver.lose(self, all_of_it=outward and lose_all_to_listener)
            self._unread[outward] = receiver.count(self)
        self._waiting[False].clear()
        if not self._closed:
            self.caller.disconnected(self)
            if self.caller.options.get(zmq.IMMEDIATE):
                self._waiting[True].clear()
            self._try_later(self.caller.reconnect_s[0])

    def go_silent(self) -> None:
        self._silent, self.listener = True, None

    def close(self, linger_ms: int) -> None:
        """By the caller. What waits is sent if it lingers."""
        if linger_ms != 0 and self.is_up:
            self.pump(over_the_mark=True)
        self._closed = True
        listener, self.listener = self.listener, None
        if listener is not None:
            listener.calls_taken.pop(self.identity, None)

    # --- messages ---

    def can_send(self, outward: bool) -> bool:
        sender = self.caller if outward else self.listener
        if sender is None or (outward and self.caller.options.get(zmq.IMMEDIATE) and self.listener is None):
            return False
        mark = int(sender.options.get(zmq.SNDHWM, 1000))
        return mark == 0 or len(self._waiting[outward]) < mark

    def send(self, outward: bool, frames: Frames) -> None:
        self._waiting[outward].append(frames)
        self.pump()

    def pump(self, over_the_mark: bool = False) -> None:
        """Let leave what can."""
        for outward, waiting in self._waiting.items():
            receiver = self.listener if outward else self.caller
            if receiver is None or not self.is_up:
                continue
            mark = int(receiver.options.get(zmq.RCVHWM, 1000))
            while waiting and (over_the_mark or mark == 0 or self._unread[outward] < mark):
                arrival_s = max(self._network.now() + self._network.delay_s(), self._last_s[outward])
                self._last_s[outward] = arrival_s
                self._unread[outward] += 1
                frames = waiting.popleft()
                if receiver.kind == zmq.ROUTER:
                    frames = [self.identity, *frames]
                receiver.take(arrival_s, self, outward, frames)

    def has_read(self, outward: bool) -> None:
        self._unread[outward] -= 1
        self.pump()


class VirtualSocket:
    """See zmq.Socket. `process` and `host` tell where it lives."""

    def __init__(self, network: Network, kind: int, process: str, host: str) -> None:
        self.network = network
        self.kind = kind
        self.process = process
        self.host = host
        self.options: dict[int, Any] = {}
        self.closed = False
        self.last_endpoint = b""
        self.calls: dict[str, Pipe] = {}
        """By address: what we have connected to."""
        self.calls_taken: dict[bytes, Pipe] = {}
        """By identity: who has connected to us."""
        self._prefixes: list[bytes] = []
        self._arrivals: list[tuple[float, int, Pipe, bool, Frames]] = []
        self._monitor: VirtualMonitor | None = None
        self._round = itertools.count()
        self._identities = itertools.count(1)
        self._descriptor = network.add(self)

    # --- as zmq.Socket ---

    def setsockopt(self, option: int, value: Any) -> None:
        if option == zmq.SUBSCRIBE:
            self._prefixes.append(value)
        elif option == zmq.UNSUBSCRIBE:
            self._prefixes.remove(value)
        else:
            self.options[option] = value

    def getsockopt(self, option: int) -> Any:
        if option == zmq.EVENTS:
            self._check()
            can_send = any(pipe.can_send(True) for pipe in self.calls.values())
            return (zmq.POLLIN if self.arrival_s <= self.network.now() else 0) | (zmq.POLLOUT if can_send else 0)
        if option == zmq.LAST_ENDPOINT:
            return self.last_endpoint
        if option == zmq.FD:
            return self.fileno()
        return self.options[option]

    def getsockopt_string(self, option: int) -> str:
        return str(self.getsockopt(option), "utf-8")

    def fileno(self) -> int:
        return self._descriptor

    def bind(self, address: str) -> None:
        self._check()
        self.last_endpoint = self.network.bind(self, address).encode()

    def connect(self, address: str) -> None:
        self._check()
        _endpoint(address)
        self.last_endpoint = address.encode()
        if address not in self.calls:
            self.calls[address] = Pipe(self, address)

    def disconnect(self, address: str) -> None:
        self._check()
        if address not in self.calls:
            raise zmq.ZMQError(errno.ENOENT)
        self.calls.pop(address).close(self._linger_ms)

    def send(self, payload: bytes, flags: int = 0) -> None:
        self.send_multipart([payload], flags)

    def send_multipart(self, frames: Frames, flags: int = 0) -> None:
        """Never waits: raises zmq.Again where zmq would."""
        self._check()
        frames = [bytes(frame) for frame in frames]
        if self.kind == zmq.ROUTER:
            pipe = self.calls_taken.get(frames[0])
            if pipe is not None and pipe.can_send(False):
                pipe.send(False, frames[1:])
            elif self.options.get(zmq.ROUTER_MANDATORY):
                raise zmq.ZMQError(zmq.EHOSTUNREACH) if pipe is None else zmq.Again()
        elif self.kind in (zmq.PUB, zmq.XPUB):
            for pipe in list(self.calls_taken.values()):
                if pipe.caller.wants(frames[0]) and pipe.can_send(False):
                    pipe.send(False, frames)
        else:
            ready = [pipe for pipe in self.calls.values() if pipe.can_send(True)]
            if not ready:
                raise zmq.Again()
            ready[next(self._round) % len(ready)].send(True, frames)

    def recv(self, flags: int = 0) -> bytes:
        (payload,) = self.recv_multipart(flags)
        return payload

    def recv_multipart(self, flags: int = 0) -> Frames:
        """Never waits: raises zmq.Again where zmq would."""
        self._check()
        if self.arrival_s > self.network.now():
            raise zmq.Again()
        _, _, pipe, outward, frames = heapq.heappop(self._arrivals)
        pipe.has_read(outward)
        return frames

    def poll(self, timeout: float | None = None, flags: int = zmq.POLLIN) -> int:
        """Does not wait."""
        return int(self.getsockopt(zmq.EVENTS)) & flags

    def get_monitor_socket(self, events: int) -> VirtualMonitor:
        self._monitor = VirtualMonitor(self.network, events)
        return self._monitor

    def disable_monitor(self) -> None:
        self._monitor = None

    def close(self, linger: int | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        for pipe in list(self.calls_taken.values()):
            if (self._linger_ms if linger is None else linger) != 0:
                pipe.pump(over_the_mark=True)
            pipe.break_off(lose_all_to_listener=True)
        for pipe in self.calls.values():
            pipe.close(self._linger_ms if linger is None else linger)
        self.network.remove(self)

    # --- as the network ---

    def _check(self) -> None:
        if self.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)

    @property
    def _linger_ms(self) -> int:
        return int(self.options.get(zmq.LINGER, -1))

    @property
    def reconnect_s(self) -> tuple[float, float]:
        """(first, most) between two tries to connect."""
        return self.options.get(zmq.RECONNECT_IVL, 100) / 1e3, self.options.get(zmq.RECONNECT_IVL_MAX, 0) / 1e3

    @property
    def arrival_s(self) -> float:
        return self._arrivals[0][0] if self._arrivals else float("inf")

    def wants(self, payload: bytes) -> bool:
        return any(payload.startswith(prefix) for prefix in self._prefixes)

    def answer(self, pipe: Pipe) -> bytes:
        """A caller has connected; returns its identity."""
        identity = pipe.caller.options.get(zmq.IDENTITY) or b"\0" + struct.pack(">I", next(self._identities))
        self.calls_taken[identity] = pipe
        return identity

    def take(self, arrival_s: float, pipe: Pipe, outward: bool, frames: Frames) -> None:
        heapq.heappush(self._arrivals, (arrival_s, self.network.number(), pipe, outward, frames))
        self.network.notice(self._descriptor, arrival_s)

    def count(self, pipe: Pipe) -> int:
        return sum(arrival[2] is pipe for arrival in self._arrivals)

    def lose(self, pipe: Pipe, all_of_it: bool) -> None:
        """The connection has broken: a part of what was on its way does not arrive."""
        now_s = self.network.now()
        flying = sorted(a for a in self._arrivals if a[2] is pipe and (all_of_it or a[0] > now_s))
        lost = flying if all_of_it else flying[self.network.survivors(len(flying)) :]
        self._arrivals = [arrival for arrival in self._arrivals if arrival not in lost]
        heapq.heapify(self._arrivals)

    def disconnected(self, pipe: Pipe) -> None:
        if self._monitor is not None:
            self._monitor.tell(zmq.EVENT_DISCONNECTED, pipe.address)

    def die(self, silent: bool) -> None:
        """Its process has been killed."""
        self.closed = True
        self.network.remove(self)
        for pipe in list(self.calls_taken.values()):
            if silent:
                pipe.go_silent()
            else:
                pipe.break_off(lose_all_to_listener=True)
        for pipe in self.calls.values():
            listener = pipe.listener
            pipe.close(0)
            if listener is not None:
                listener.lose(pipe, all_of_it=False)


class VirtualMonitor:
    """Of `get_monitor_socket`: events as messages."""

    def __init__(self, network: Network, events: int) -> None:
        self._network = network
        self._events = events
        self._told: deque[tuple[float, Frames]] = deque()

    def tell(self, event: int, address: str) -> None:
        if event & self._events:
            body = struct.pack("=hi", event, 0)
            self._told.append((self._network.now() + self._network.delay_s(), [body, address.encode()]))

    def poll(self, timeout: float | None = None) -> int:
        return zmq.POLLIN if self._told and self._told[0][0] <= self._network.now() else 0

    def recv_multipart(self, flags: int = 0) -> Frames:
        if not self.poll():
            raise zmq.Again()
        return self._told.popleft()[1]

    def close(self, linger: int | None = None) -> None:
        self._told.clear()


class VirtualContext:
    """See zmq.Context."""

    def __init__(self, network: Network, process: str, host: str) -> None:
        self._network = network
        self._process = process
        self._host = host
        self._sockets: list[VirtualSocket] = []

    def socket(self, kind: int) -> VirtualSocket:
        socket = VirtualSocket(self._network, kind, self._process, self._host)
        self._sockets = [*(s for s in self._sockets if not s.closed), socket]
        return socket

    def set(self, option: int, value: int) -> None:
        """Limits of a context do not hold here."""

    def term(self) -> None:
        """Fails where zmq would wait for ever."""
        left = [socket for socket in self._sockets if not socket.closed]
        assert not left, f"{self._process} ends its context with {len(left)} sockets open: zmq would hang here"

    def destroy(self, linger: int | None = None) -> None:
        for socket in self._sockets:
            socket.close(linger)
