"""A pool node: one thread that owns the arena, the index, the sockets and the data plane; tiers have their own.

Engines write and read the arena themselves, by mapping it or over the data plane; here only control messages pass.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zmq

from lmkv import poolwire as pw
from lmkv.addresses import join_address, split_address
from lmkv.control.etcd import EtcdMembership
from lmkv.control.mailbox import make_context
from lmkv.control.wake import Wake, wait
from lmkv.errors import ConfigError, WireError
from lmkv.ids import Incarnation, Rank, make_incarnation
from lmkv.transport import Completion, PeerLost, Region, Transport, open_transport

from .arena import Arena
from .clients import Clients
from .copying import Copying, Replicas
from .desk import Desk
from .index import PoolIndex, Writer
from .leases import Leases
from .memory import ArenaMemory, give, host_id, listen_for_sharers
from .policy import make_policy
from .publisher import Publisher
from .pushing import Pushing
from .settings import NodeSettings, default_share
from .tiering import Tiering, TierSettings

logger = logging.getLogger(__name__)

TICK_S = 0.25
BUSY_S = 0.001
PACE_S = 0.00001
"""A data plane without descriptors or a thread of its own is polled this often while bytes are moving (UCX takes some
100 kB from a TCP socket with one poll)."""
REMOTE_S = 0.005
"""And so often while its clients do nothing."""
MOST_LETTERS = 512
MOST_MESSAGE_BYTES = 16 << 20

OpenTiers = Callable[[Callable[[pw.Tier, list[bytes]], None]], list[TierSettings]]
"""Gets what a tier calls when it gives pages up."""


class PoolNode:
    """Everything is bound at construction (raises ConfigError, TierError); `run`, on the same thread, until `stop`."""

    def __init__(
        self,
        settings: NodeSettings,
        tiers: OpenTiers = lambda evicted: [],
    ) -> None:
        self._settings = settings
        self._incarnation = make_incarnation(os.urandom(8))
        self._stop = threading.Event()
        self._wake = Wake()
        self._ending = contextlib.ExitStack()
        """Closes what has been opened, the last first."""
        self._ending.callback(self._close_wake)
        self._wake_lock = threading.RLock()  # (a signal's handler runs on the node's own thread)
        self._ended = False
        try:
            self._build(settings, tiers)
        except BaseException:
            self._ending.close()
            raise
        self._beat_s = 0.0
        self._tick_s = 0.0

    def _build(self, settings: NodeSettings, tiers: OpenTiers) -> None:
        self._memory = ArenaMemory.create(settings.capacity, settings.huge)
        self._ending.callback(self._memory.close_fd)
        capacity_bytes = self._memory.capacity_bytes
        self._index = PoolIndex(
            Arena(capacity_bytes), lambda: make_policy(settings.policy), settings.write_lease_s, _fresh()
        )
        counters = self._index.counters
        self._context = make_context()
        self._ending.callback(self._context.destroy, linger=200)
        self._router, host = self._bind()
        self._publisher = Publisher(self._context, host, settings.advertise, self._index)
        self._publisher.beat_to(settings.controller)
        self._listener, share = self._open_share()
        self._sharers: dict[int, tuple[socket.socket, Writer | None]] = {}
        self._transport = self._open_data_plane()
        self._clients = Clients(self._transport, max(10 * settings.beat_s, 5.0), self._client_dead)
        self._tiering: Tiering | None = None  # a tier may evict while it opens
        self._tiering = Tiering(self._index, self._memory, tiers(self._evicted), counters, self._wake.set)
        self._ending.callback(self._tiering.close)
        self._leases = Leases(self._index, counters, int(capacity_bytes * settings.pin_share), _fresh())
        self._copying = Copying(
            self._context,
            self._incarnation,
            settings.name or "pool",
            self._index,
            self._memory,
            self._transport,
            self._clients.scratch,
            self._tiering.visible,
            counters,
        )
        self._ending.callback(self._copying.close)
        self._pushing = Pushing(self._index, self._memory, self._transport, counters)
        self._replicas = Replicas(self._context, settings.replicas)
        self._ending.callback(self._replicas.close)
        self.card = self._card(host, share)
        self._desk = Desk(
            self.card,
            self._index,
            self._leases,
            self._clients,
            self._tiering,
            self._publisher,
            self._send,
            settings.most_lease_s,
            settings.write_lease_s,
            self._copying,
            self._replicas,
            self._pushing,
        )
        self._etcd = EtcdMembership(settings.etcd, settings.etcd_prefix) if settings.etcd else None
        if self._etcd is not None:
            self._ending.callback(self._etcd.withdraw)

    def _card(self, host: str, share: str) -> pw.NodeCard:
        settings = self._settings
        _, port = split_address(self._router.getsockopt_string(zmq.LAST_ENDPOINT), listen=True)
        return pw.NodeCard(
            settings.name or f"pool-{socket.gethostname()}-{port}",
            self._incarnation,
            join_address(settings.advertise or host, port),
            self._publisher.address,
            settings.transport.split(":")[0] if self._transport else "",
            self._transport.export() if self._transport else b"",
            self._memory.address,
            self._memory.capacity_bytes,
            share,
            host_id(),
            prefault=settings.prefault,
        )

    # --- opening ---

    def _bind(self) -> tuple[zmq.Socket[bytes], str]:
        host, port = split_address(self._settings.listen, listen=True)
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 200)
        router.setsockopt(zmq.IPV6, 1)
        router.setsockopt(zmq.RCVHWM, 16384)
        router.setsockopt(zmq.SNDHWM, 16384)
        router.setsockopt(zmq.MAXMSGSIZE, MOST_MESSAGE_BYTES)
        try:
            router.bind(join_address(host, port or "*"))
        except zmq.ZMQError as error:
            router.close()
            raise ConfigError(
                f"cannot listen on {self._settings.listen}: {error}",
                hint="stop what uses it, or choose another --listen",
            ) from error
        return router, host

    def _open_data_plane(self) -> Transport | None:
        if self._settings.transport == "none":
            return None
        transport = open_transport(self._settings.transport, f"lmkv-pool-{self._incarnation}")
        self._ending.callback(transport.abort)
        data = self._memory.data
        transport.register(Region(self._memory.address, self._memory.capacity_bytes, owner=data))
        return transport

    def _open_share(self) -> tuple[socket.socket | None, str]:
        if self._settings.share == "none":
            return None, ""
        path = self._settings.share or default_share(self._incarnation)
        listener = listen_for_sharers(path)
        self._ending.callback(Path(path).unlink, missing_ok=True)
        self._ending.callback(listener.close)
        return listener, path

    # --- life ---

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serves until `stop` and the drain that it starts. Closes everything."""
        assert self._tiering is not None
        try:
            started_s = time.monotonic()
            for store in self._tiering.stores:
                self._desk.namespaces.update(store.descriptions())
            count = self._tiering.adopt()
            if self._tiering.stores:
                logger.info("%d pages found in lower tiers in %.1f s", count, time.monotonic() - started_s)
            if self._etcd is not None:
                self._etcd.register(self.card)
            if self._settings.prefault:
                self._memory.touch_in_background()
            ready()
            self._loop()
        finally:
            self._end()

    def stop(self) -> None:
        """From any thread, or a signal handler: drain, then end."""
        self._stop.set()
        with self._wake_lock:
            if not self._ended:
                self._wake.set()

    def _close_wake(self) -> None:
        with self._wake_lock:
            self._ended = True
            self._wake.close()

    def _loop(self) -> None:
        poller = select.poll()
        fds = [self._router.fileno(), self._wake.fd, *(self._transport.fds() if self._transport else [])]
        if self._listener is not None:
            fds.append(self._listener.fileno())
        for fd in fds:
            poller.register(fd, select.POLLIN)
        more, until_s = False, float("inf")
        while not self._desk.stopping:
            now_s = time.monotonic()
            # What was sent since may have taken the wake-up of what has come (the socket's descriptor tells only once).
            more = more or bool(int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
            waits = (self._desk.next_s(now_s), self._copying.next_s(now_s), self._replicas.next_s(now_s))
            pause_s = 0.0 if more else min(self._pause_s(now_s), *waits)
            ready = {fd for fd, _ in wait(poller, pause_s)}
            self._wake.clear()
            now_s = time.monotonic()
            if self._stop.is_set() and until_s == float("inf"):
                until_s = now_s + self._settings.drain_s
                self._desk.drain(b"", 0, True)
            if now_s > until_s:
                logger.warning("the drain took longer than %g s; ending", self._settings.drain_s)
                return
            self._take_shares(ready, poller, now_s)
            more = self._take_letters(now_s)
            self._take_events()
            self._tend(now_s)

    def is_hurried(self, now_s: float) -> bool:
        """Bytes are moving over the data plane, or expected to."""
        return self._clients.are_moving(now_s)

    def _pause_s(self, now_s: float) -> float:
        """A data plane without descriptors makes progress on a thread of its own (progress=event), or by our polls."""
        data = self._transport
        if data is None:
            return TICK_S
        if data.fds() or getattr(data, "progress", "poll") != "poll":
            return BUSY_S if data.in_flight else TICK_S
        if self.is_hurried(now_s):
            return PACE_S
        return BUSY_S if data.in_flight else REMOTE_S if self._clients.remote else TICK_S

    def _tend(self, now_s: float) -> None:
        assert self._tiering is not None
        self._tiering.collect()
        self._copying.tick(now_s)
        self._replicas.tick(now_s)
        self._desk.settle(now_s)
        if now_s - self._tick_s >= TICK_S:
            self._tick_s = now_s
            self._index.expire(now_s)
            self._leases.expire(now_s)
            self._clients.tick(now_s)
        self._publisher.flush(self._incarnation)
        if now_s - self._beat_s >= self._settings.beat_s:
            self._beat_s = now_s
            self._publisher.sign_of_life(self._incarnation)
            self._publisher.beat(self._beat())

    def _beat(self, leaving: bool = False) -> pw.NodeBeat:
        arena = self._index.used_bytes
        return pw.NodeBeat(
            self.card,
            self._publisher.seq,
            len(self._index),
            arena,
            self._memory.capacity_bytes,
            self._desk.draining,
            leaving,
        )

    # --- what comes in ---

    def _take_letters(self, now_s: float) -> bool:
        """True: there may be more."""
        for _ in range(MOST_LETTERS):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            token = 0
            try:
                if len(frames) != 2:
                    raise WireError(f"a message has 2 frames, not {len(frames)}")
                message = pw.decode(frames[1])
                token = getattr(message, "token", 0)
                self._desk.take(frames[0], message, now_s)
            except WireError as error:
                self._index.counters["unreadable"] += 1
                logger.warning("a message is not taken: %s", error)
                if token:
                    self._send(frames[0], pw.Unreadable(token, error.message))
        return True

    def _send(self, identity: bytes, message: pw.PoolMessage) -> None:
        try:
            self._router.send_multipart([identity, pw.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.debug("an answer was not taken: %s", error)

    def _take_events(self) -> None:
        if self._transport is None:
            return
        for event in self._transport.poll():
            match event:
                case Completion(op, error):
                    self._transport.release(op)
                    ours = self._pushing.completed(op, error) or self._copying.completed(op, error, time.monotonic())
                    if not ours:
                        self._clients.completed(op, error)
                case PeerLost(peer, reason):
                    self._copying.peer_lost(peer, reason)
                    self._clients.lost(peer, reason)

    def _take_shares(self, ready: set[int], poller: select.poll, now_s: float) -> None:
        if self._listener is not None and self._listener.fileno() in ready:
            try:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._sharers[connection.fileno()] = (connection, None)
                poller.register(connection.fileno(), select.POLLIN)
            except OSError as error:
                logger.warning("a process that wanted to map the arena: %s", error)
        for fd in ready & self._sharers.keys():
            connection, writer = self._sharers[fd]
            try:
                told = connection.recv(256)
                if told and writer is None:
                    self._sharers[fd] = (connection, self._share(connection, told, now_s))
                if told:
                    continue
            except BlockingIOError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("a process that wanted to map the arena: %s", error)
            poller.unregister(fd)
            del self._sharers[fd]
            if writer is None:
                connection.close()
            else:
                self._clients.share_ended(writer, connection)

    def _share(self, connection: socket.socket, told: bytes, now_s: float) -> Writer:
        who = json.loads(told)
        writer = (Incarnation(str(who["incarnation"])), Rank(int(who["rank"])))
        give(connection, self._memory)
        self._clients.shared(writer, connection, now_s)
        return writer

    def _client_dead(self, writer: Writer) -> None:
        self._index.writer_dead(*writer)
        self._leases.reader_gone(writer)

    def _evicted(self, tier: pw.Tier, keys: list[bytes]) -> None:
        if self._tiering is not None:
            self._tiering.evicted(tier, keys)

    # --- ending ---

    def _end(self) -> None:
        self._publisher.flush(self._incarnation)
        self._publisher.beat(self._beat(leaving=True))
        for connection, _ in self._sharers.values():
            connection.close()
        self._ending.close()


def _fresh() -> int:
    """A number to count from that another incarnation has hardly come to."""
    return int.from_bytes(os.urandom(6), "little")
