"""ucx://: the framed protocol over UCX, by `ucxx`, for hosts without NIXL. The only module that imports ucxx.

    ucx://[address]?devices=LIST

`address` (127.0.0.1) is one of this host's: UCX then uses the interface that has it. `devices` names UCX's devices
instead ("mlx5_0:1", "eth0,eth1", "all"). Without `devices` the environment's UCX_NET_DEVICES wins over `address`.

ucxx has no one-sided calls, so both sides must poll. Payloads travel as tagged messages, a message a row, straight from
and into place where UCX can. A channel has tags of its own, drawn at random, on the one endpoint to its peer. It begins
with a *knock* on a well-known tag: the target's token, the channel's tag, the initiator's worker address. A
worker address is handed to UCX only when the token is right and its digest fits: UCX aborts the process on a wrong one,
so whoever has been given the export must be trusted.

Endpoints are opened with error handling, so that a peer's death is seen; UCX then leaves out shared memory. ucxx
changes UCX's settings for the whole process and loads a libucp of its own, so it must never share one with NIXL.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import select
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from struct import Struct
from time import monotonic
from typing import Any, ClassVar

from lmkv.errors import ConnectError, SchemeError

from .common import parse_options
from .framed import Channel, ChannelClosed, Conduit, FramedTransport, Location
from .interfaces import interface_of

if _nixl := sorted({"nixl", "nixl_cu12", "nixl_cu13"} & set(sys.modules)):
    raise SchemeError(
        f"ucx:// cannot be loaded: {_nixl[0]} is in this process, and their UCX libraries exclude each other",
        hint="use nixl:// here, or start the process without it",
    )

# ucxx sets variables that its own UCX does not know, and UCX prints a warning for each.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
# Below this UCX sends at once and copies on arrival, above it asks the receiver first. ucxx would set 8 KiB; blocks of
# 16 KiB are three times as fast without the question (measured over loopback).
os.environ.setdefault("UCX_RNDV_THRESH", "65536")

from ucxx import libucxx as _ucxx
from ucxx._lib.arr import Array as _Array

_log = logging.getLogger(__name__)

# These have no base in common; some refusals come as RuntimeError.
_UCX_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(c for n, c in vars(_ucxx).items() if n.startswith("UCX") and isinstance(c, type) and issubclass(c, Exception)),
)

_KNOCK_ERRORS: tuple[type[Exception], ...] = (ConnectError, *_UCX_ERRORS)

_KNOCK_MAGIC = b"LMKVKNOC"
_KNOCK_TAG = int.from_bytes(b"LMKVKNCK", "little")
_KNOCK = Struct("<8s16sQ")
"""Magic, token, tag; the sealed worker address follows."""

_SEAL_BYTES = 16
_KNOCK_BYTES_LIMIT = 4096
_KNOCKS_A_POLL = 64

_WINDOW_MESSAGES = 128
_WINDOW_BYTES = 8 << 20
"""Under way in one direction of a channel; UCX buffers small messages that nobody waits for yet."""

_PROGRESS_A_POLL = 256
_QUIET_LIMIT_S = 0.2
_LINKS_LIMIT = 4096
_EMPTY = b""


class _Link:
    """The endpoint to another worker, shared by all channels to it; lives until it fails or the transport ends.

    One endpoint on each side and no more: UCX pairs the endpoints between two workers in the order of their making, so
    a second one would be paired with a channel of the other direction and end it together with its own.
    """

    def __init__(self, worker: Any, endpoint: Any) -> None:
        self.worker = worker
        self.endpoint = endpoint
        self._farewells: deque[tuple[Any, bytes]] = deque()
        self.kept: list[tuple[Any, object]] = []
        """Requests of closed channels that UCX has not given back, with their buffers."""

    @property
    def alive(self) -> bool:
        return bool(self.endpoint.alive)

    def say(self, message: bytes, tag: int) -> None:
        """Send without a window; raises UCX's errors."""
        while self._farewells and self._farewells[0][0].completed:
            self._farewells.popleft()
        self._farewells.append((self.endpoint.tag_send(_Array(message), _ucxx.UCXXTag(tag)), message))

    def close(self) -> None:
        """Withdraws every receive posted by it. Idempotent."""
        try:
            self.endpoint.close_blocking(period=0, max_attempts=1)
            # An endpoint that had failed before leaves its receives to the worker.
            self.worker.cancel_inflight_requests(period=0, max_attempts=1)
        except _UCX_ERRORS as error:
            _log.debug("closing an endpoint: %s", _text(error))


class UcxChannel(Channel):
    """Four tags between two workers: data and farewell, in both directions. `side` is 0 for who opened it, else 1."""

    def __init__(self, link: _Link, ourselves: Any, tag: int, side: int) -> None:
        """`ourselves` is an endpoint to our own worker. Raises UCX's errors."""
        self._link = link
        self._ourselves = ourselves
        self._send_tag = _ucxx.UCXXTag(tag + side)
        self._receive_tag = _ucxx.UCXXTag(tag + (1 - side))
        self._farewell_tag = tag + 2 + side
        self._sending: deque[tuple[Any, memoryview]] = deque()
        self._sending_bytes = 0
        self._receiving: deque[tuple[Any, memoryview]] = deque()
        self._their_farewell_tag = _ucxx.UCXXTag(tag + 2 + (1 - side))
        # ucxx does not keep buffers alive: whoever posts one holds it until the request has completed.
        self._farewell_place = bytearray(1)
        self._farewell = link.endpoint.tag_recv(_Array(self._farewell_place), self._their_farewell_tag)
        self._withdrawals: list[tuple[Any, bytes]] = []
        self._closed = False
        self.moved = False
        """Whether anything moved since the transport looked: then there may be more at once."""

    def send(self, buffers: Sequence[memoryview]) -> int:
        taken = 0
        try:
            self._sent()
            for buffer in buffers:
                if len(self._sending) >= _WINDOW_MESSAGES or self._sending_bytes >= _WINDOW_BYTES:
                    break
                self._sending.append((self._link.endpoint.tag_send(_Array(buffer), self._send_tag), buffer))
                self._sending_bytes += len(buffer)
                taken += len(buffer)
        except _UCX_ERRORS as error:
            raise ChannelClosed(_text(error)) from error
        self.moved |= taken > 0
        return taken

    def _sent(self) -> None:
        """Forget what has left; raises UCX's error if one could not."""
        while self._sending and self._sending[0][0].completed:
            request, buffer = self._sending.popleft()
            self._sending_bytes -= len(buffer)
            request.check_error()

    def receive(self, buffers: Sequence[memoryview]) -> int:
        taken = 0
        try:
            self._sent()
            # The front of `buffers` has been posted by earlier calls.
            for buffer in buffers[len(self._receiving) : _WINDOW_MESSAGES]:
                request = self._link.endpoint.tag_recv(_Array(buffer), self._receive_tag)
                self._receiving.append((request, buffer))
            while self._receiving and self._receiving[0][0].completed:
                request, buffer = self._receiving[0]
                request.check_error()
                self._receiving.popleft()
                taken += len(buffer)
        except _UCX_ERRORS as error:
            if not taken:
                raise ChannelClosed(_text(error)) from error
        if not taken and not self._link.alive:
            raise ChannelClosed("the connection ended: its process is dead or has closed")
        if not taken and self._farewell.completed:
            raise ChannelClosed("the peer closed the channel")
        self.moved |= taken > 0
        return taken

    def close(self) -> None:
        """As the contract. Waits, for moments, for what UCX is in the middle of."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._link.alive:
                self._link.say(b"\0", self._farewell_tag)
                self._withdraw()
            else:
                self._link.close()
        except _UCX_ERRORS as error:
            _log.debug("closing a channel: %s", _text(error))
            self._link.close()
        self._settle()

    def _withdraw(self) -> None:
        """Complete our own receives with empty messages from ourselves: ucxx cannot cancel one by one."""
        pending = [self._receive_tag] * len(self._receiving) + [self._their_farewell_tag]
        self._withdrawals = [(self._ourselves.tag_send(_Array(_EMPTY), tag), _EMPTY) for tag in pending]

    def _settle(self) -> None:
        # Once a link is known to be stuck, its other channels do not wait for the same thing again.
        deadline = monotonic() + (0.0 if self._link.kept else _QUIET_LIMIT_S)
        pending: deque[tuple[Any, object]] = deque(
            [*self._receiving, (self._farewell, self._farewell_place), *self._withdrawals, *self._sending]
        )
        self._receiving.clear()
        self._sending.clear()
        while pending:
            if pending[0][0].completed:
                pending.popleft()
            elif monotonic() > deadline:
                # In the middle of a large transfer whose other side is stuck, or has gone without a word.
                _log.error("UCX did not give back %d requests of a closed channel", len(pending))
                self._link.kept.extend(pending)
                break
            else:
                self._link.worker.progress_once()


class UcxTransport(FramedTransport):
    """See the module's text and FramedTransport's."""

    scheme: ClassVar[str] = "ucx"

    def __init__(self, name: str, netloc: str = "", options: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError (address or option), SchemeError (UCX does not start)."""
        super().__init__(name)
        options = options or {}
        parse_options(self.scheme, "", options, ("devices",))
        config = {}
        if "devices" in options:
            config["NET_DEVICES"] = options["devices"]
        elif "UCX_NET_DEVICES" not in os.environ:
            config["NET_DEVICES"] = interface_of(netloc or "127.0.0.1")
        try:
            features = (_ucxx.Feature.TAG, _ucxx.Feature.WAKEUP)
            self._context = _ucxx.UCXContext(config, feature_flags=features)
            self._worker = _ucxx.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
            self._worker.init_blocking_progress_mode()
            self._sealed_address = _seal(self._worker.address.tobytes())
            self._links: dict[bytes, _Link] = {}
            self._ourselves = self._link(self._sealed_address)
        except _UCX_ERRORS as error:
            raise SchemeError(f"UCX does not start: {_text(error)}", hint="look at UCX_TLS and devices") from error
        self._knock_tag = _ucxx.UCXXTag(_KNOCK_TAG)
        self._knocks: deque[tuple[Any, bytearray]] = deque()
        self._conduits: dict[Conduit, UcxChannel] = {}
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ringing = False
        self._epoll = select.epoll()
        self._epoll.register(self._bell, select.EPOLLIN)
        self._epoll.register(self._worker.epoll_file_descriptor, select.EPOLLIN)

    def fds(self) -> list[int]:
        self._open()
        return [self._epoll.fileno()]

    def _address(self) -> bytes:
        return self._sealed_address

    # --- opening and accepting ---------------------------------------------------------------------------------------

    def _dial(self, location: Location) -> Channel:
        tag = secrets.randbits(62) << 2
        knock = _KNOCK.pack(_KNOCK_MAGIC, location.token, tag) + self._sealed_address
        try:
            link = self._link(location.address)
            link.say(knock, _KNOCK_TAG)
            return UcxChannel(link, self._ourselves.endpoint, tag, 0)
        except _UCX_ERRORS as error:
            raise ConnectError(f"the peer cannot be reached: {_text(error)}", hint="is that engine up?") from error

    def _link(self, sealed_address: bytes) -> _Link:
        """Raises ConnectError, UCX's errors. UCX aborts the process on an address that is not one, hence the seal."""
        link = self._links.get(sealed_address)
        if link is None or not link.alive:
            address = _ucxx.UCXAddress.create_from_buffer(bytearray(_unseal(sealed_address)))
            endpoint = self._worker.create_endpoint_from_worker_address(address, endpoint_error_handling=True)
            link = self._links[sealed_address] = _Link(self._worker, endpoint)
        return link

    def _take_knocks(self) -> None:
        for _ in range(_KNOCKS_A_POLL):
            probe = self._worker.tag_probe(self._knock_tag, remove=True)
            if not probe.matched:
                break
            # Also what is too long must be received, or UCX keeps it; it ends in an error that says it was cut off.
            raw = bytearray(max(1, min(probe.length, _KNOCK_BYTES_LIMIT)))
            self._knocks.append((self._worker.tag_recv_with_handle(_Array(raw), probe), raw))
        while self._knocks and self._knocks[0][0].completed:
            request, raw = self._knocks.popleft()
            try:
                request.check_error()
                self._answer(bytes(raw))
            except _KNOCK_ERRORS as error:
                _log.warning("%s: dropped a knock of %d bytes: %s", self.name, len(raw), _text(error))

    def _answer(self, knock: bytes) -> None:
        """Raises ConnectError, UCX's errors."""
        if len(knock) < _KNOCK.size:
            raise ConnectError("too short")
        magic, token, tag = _KNOCK.unpack_from(knock)
        if magic != _KNOCK_MAGIC or not hmac.compare_digest(token, self._token):
            raise ConnectError("not a knock, or not with our token")
        if tag % 4 or len(self._links) >= _LINKS_LIMIT:
            raise ConnectError(f"tag {tag:#x}, {len(self._links)} links")
        self._accepted(UcxChannel(self._link(knock[_KNOCK.size :]), self._ourselves.endpoint, tag, 1), f"tag {tag:#x}")

    # --- readiness ----------------------------------------------------------------------------------------------------

    def _ready(self) -> Iterable[Conduit]:
        for _ in range(_PROGRESS_A_POLL):
            if not self._worker.progress_once():
                break
        self._take_knocks()
        for address, link in [(a, k) for a, k in self._links.items() if not k.alive]:
            link.close()
            del self._links[address]
        return list(self._conduits)

    def _attached(self, conduit: Conduit) -> None:
        assert isinstance(conduit.channel, UcxChannel)
        self._conduits[conduit] = conduit.channel

    def _served(self, conduit: Conduit) -> None:
        """Nothing to do: every conduit is looked at in every poll."""

    def _detached(self, conduit: Conduit) -> None:
        del self._conduits[conduit]

    def _wake(self, work: bool) -> None:
        for channel in self._conduits.values():
            work |= channel.moved
            channel.moved = False
        # UCX's descriptor tells only of what happens after arming, and cannot be armed while something has.
        ring = work or not self._worker.arm()
        if ring == self._ringing:
            return
        self._ringing = ring
        if ring:
            os.eventfd_write(self._bell, 1)
        else:
            os.eventfd_read(self._bell)

    def _shutdown(self) -> None:
        self._epoll.close()
        os.close(self._bell)
        self._knocks.clear()
        for link in self._links.values():
            link.close()
        self._links.clear()
        # They go with their last references, the worker before its context.
        del self._ourselves
        del self._worker
        del self._context


def _seal(address: bytes) -> bytes:
    return blake2b(address, digest_size=_SEAL_BYTES).digest() + address


def _unseal(sealed: bytes) -> bytes:
    """Raises ConnectError unless this is a worker address as its owner gave it out."""
    address = sealed[_SEAL_BYTES:]
    if not address or _seal(address) != sealed:
        raise ConnectError(f"{len(sealed)} bytes of UCX address are damaged")
    return address


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
