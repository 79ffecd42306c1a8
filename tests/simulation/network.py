"""What joins the sockets of a stepped world: connections, delays and faults. See mail.py for the sockets."""

from __future__ import annotations

import errno
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import zmq

if TYPE_CHECKING:
    from tests.simulation.mail import VirtualSocket

ANYWHERE = ("*", "0.0.0.0", "::", "")
FIRST_PORT = 20000
FIRST_DESCRIPTOR = 1 << 24
"""Descriptors of virtual sockets are told from real ones by their size."""
Frames = list[bytes]


def endpoint(address: str) -> tuple[str, int | None]:
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
        self.slowness = 1.0
        """Of data planes: how many times as long bytes take."""
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
        return self._chance.uniform(20e-6, 400e-6) * self.slowness

    def unlike(self) -> float:
        """How many times as long bytes take over one process's link as over the fastest."""
        return self._chance.choice([1.0, 1.0, 1.0, 8.0, 30.0])

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
        host, port = endpoint(address)
        port = port or next(self._ports)
        place = ("*" if host in ANYWHERE else host, port)
        if place in self._bound:
            raise zmq.ZMQError(zmq.EADDRINUSE)
        self._bound[place] = socket
        shown = "0.0.0.0" if place[0] == "*" else f"[{host}]" if ":" in host else host
        return f"tcp://{shown}:{port}"

    def find(self, address: str) -> VirtualSocket | None:
        host, port = endpoint(address)
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
