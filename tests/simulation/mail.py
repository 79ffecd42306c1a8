"""ZeroMQ in memory, in virtual time: the part of its interface that lmkv uses.

`VirtualContext` is given out in place of zmq.Context; its sockets are joined by a `Network`. Messages between two
sockets keep their order, as with TCP; those of different pairs overtake each other. One thread only.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import struct
from collections import deque
from typing import Any

import zmq

from tests.simulation.network import Frames, Network, Pipe, endpoint


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
        endpoint(address)
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
