"""tcp://: our own data channel over sockets, for hosts without NIXL; needs nothing that is not installed.

    tcp://[host[:port]]?advertise=host&give_up_s=20

Listens on `host` (127.0.0.1) and `port` (0: any free one). Where `host` is a wildcard, `advertise` says by which
address peers reach this one. IPv6 addresses go in brackets.

Payloads go from the writer's memory to the socket and from the socket to their place, without a copy in between. A peer
must have been given the export (its token) to connect; nothing is encrypted, so keep it inside a private network.

Unlike NIXL, closing a connection fences it: after PeerLost or abort nothing more lands. A peer whose *host* is cut off
or without power is lost after `give_up_s` without an answer of its kernel, whether something was in flight or not; and
one that has read nothing for so long of what was sent to it. Each side gives up its own channels, and with them what
the other sends.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import ClassVar
from urllib.parse import urlsplit

from lmkv.errors import ConfigError, ConnectError

from .common import int_option, parse_options
from .framed import Channel, ChannelClosed, Conduit, FramedTransport, Location

_log = logging.getLogger(__name__)

_BACKLOG = 128
_ACCEPTS_A_POLL = 64
_ACCEPT_PAUSE_S = 1.0
_EVENTS_A_POLL = 256
_GIVE_UP_S = 20
"""Longer than leases and signs of life: who is only silent is found by those first, and may come back."""
_SYN_RETRIES = 3
"""About 15 s until an address that never answers is given up."""

_NOT_NOW = frozenset({errno.EAGAIN, errno.EINPROGRESS, errno.EALREADY, errno.EINTR})


class TcpChannel(Channel):
    """A non-blocking stream socket, possibly still connecting. Owns the socket, which breaks when the other kernel has
    not answered for `give_up_s`: probes tell where nothing is in flight, the user timeout where something is."""

    def __init__(self, sock: socket.socket, give_up_s: int = _GIVE_UP_S) -> None:
        pause_s = max(1, give_up_s // 4)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, give_up_s * 1000)
        self.socket = sock

    def send(self, buffers: Sequence[memoryview]) -> int:
        try:
            return self.socket.sendmsg(buffers)
        except OSError as error:
            if error.errno in _NOT_NOW:
                return 0
            raise ChannelClosed(_text(error)) from error

    def receive(self, buffers: Sequence[memoryview]) -> int:
        try:
            count_bytes = self.socket.recvmsg_into(buffers)[0]
        except OSError as error:
            if error.errno in _NOT_NOW:
                return 0
            raise ChannelClosed(_text(error)) from error
        if not count_bytes:
            raise ChannelClosed("the connection was closed")
        return count_bytes

    def close(self) -> None:
        try:
            self.socket.close()
        except OSError as error:
            # The descriptor is gone all the same; the kernel only passes on what the connection had suffered.
            _log.debug("close: %s", error)


class TcpTransport(FramedTransport):
    """See the module's text and FramedTransport's."""

    scheme: ClassVar[str] = "tcp"

    def __init__(self, name: str, netloc: str = "", options: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError (address or option), ConnectError (cannot listen there)."""
        super().__init__(name)
        options = options or {}
        parse_options(self.scheme, "", options, ("advertise", "give_up_s"))
        self._give_up_s = int_option(self.scheme, options, "give_up_s", _GIVE_UP_S, 2, 3600)
        host, port = _host_and_port(netloc)
        self._listener = _listen(host or "127.0.0.1", port)
        bound_host, self.port = self._listener.getsockname()[:2]
        self.host = options.get("advertise", bound_host)
        if self.host in ("0.0.0.0", "::"):
            self._listener.close()
            raise ConfigError(f"tcp://{netloc} listens everywhere", hint="add ?advertise= and the address for peers")
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ringing = False
        self._accept_again_s = 0.0
        self._conduits: dict[int, tuple[Conduit, int]] = {}
        """By descriptor, with the epoll mask in force."""
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._bell, select.EPOLLIN)

    def fds(self) -> list[int]:
        self._open()
        return [self._epoll.fileno()]

    def _address(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()

    def _dial(self, location: Location) -> Channel:
        try:
            host, port = _host_and_port(location.address.decode())
        except (UnicodeDecodeError, ConfigError) as error:
            raise ConnectError(f"the export has an unreadable address {location.address[:80]!r}") from error
        sock = None
        try:
            family, address = _resolve(host, port)
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYN_RETRIES)
            code = sock.connect_ex(address)
            if code and code not in _NOT_NOW:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            if sock is not None:
                sock.close()
            raise ConnectError(f"{host}:{port} cannot be reached: {_text(error)}", hint="is that engine up?") from error
        return TcpChannel(sock, self._give_up_s)

    # --- readiness ---

    def _ready(self) -> Iterable[Conduit]:
        if self._accept_again_s and monotonic() > self._accept_again_s:
            self._accept_again_s = 0.0
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        out = []
        for fd, _ in self._epoll.poll(0, _EVENTS_A_POLL):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._conduits:
                out.append(self._conduits[fd][0])
        return out

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_POLL):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                # No descriptor or memory left. The listener stays readable, so it is left alone for a while.
                _log.warning("%s: accept: %s", self.name, _text(error))
                self._epoll.modify(self._listener.fileno(), 0)
                self._accept_again_s = monotonic() + _ACCEPT_PAUSE_S
                return
            self._accepted(TcpChannel(sock, self._give_up_s), f"{address[0]}:{address[1]}")

    def _attached(self, conduit: Conduit) -> None:
        fd = _fd(conduit)
        mask = select.EPOLLIN | select.EPOLLOUT if conduit.wants_send else select.EPOLLIN
        self._epoll.register(fd, mask)
        self._conduits[fd] = (conduit, mask)

    def _served(self, conduit: Conduit) -> None:
        fd = _fd(conduit)
        mask = (select.EPOLLIN if conduit.wants_receive else 0) | (select.EPOLLOUT if conduit.wants_send else 0)
        if self._conduits[fd][1] != mask:
            self._epoll.modify(fd, mask)
            self._conduits[fd] = (conduit, mask)

    def _detached(self, conduit: Conduit) -> None:
        fd = _fd(conduit)
        self._epoll.unregister(fd)
        del self._conduits[fd]

    def _wake(self, work: bool) -> None:
        if work == self._ringing:
            return
        self._ringing = work
        if work:
            os.eventfd_write(self._bell, 1)
        else:
            os.eventfd_read(self._bell)

    def _shutdown(self) -> None:
        self._listener.close()
        self._epoll.close()
        os.close(self._bell)


def _fd(conduit: Conduit) -> int:
    assert isinstance(conduit.channel, TcpChannel)
    return conduit.channel.socket.fileno()


def _text(error: OSError) -> str:
    return error.strerror or str(error)


def _host_and_port(netloc: str) -> tuple[str, int]:
    """Raises ConfigError. No host gives ""; no port gives 0."""
    try:
        parts = urlsplit(f"//{netloc}")
        host, port = parts.hostname or "", parts.port or 0
    except ValueError as error:
        raise ConfigError(f"tcp address {netloc!r}: {error}") from error
    if parts.username is not None or parts.path or parts.query or parts.fragment:
        raise ConfigError(f"tcp address {netloc!r} is not host:port")
    return host, port


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, address  # type: ignore[return-value]  # AF_INET or AF_INET6: both have text and port first


def _listen(host: str, port: int) -> socket.socket:
    sock = None
    try:
        family, address = _resolve(host, port)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise ConnectError(f"cannot listen on {host}:{port}: {_text(error)}") from error
    return sock
