"""A pool node: one thread that owns the arena, the index, the sockets and the data plane; tiers have their own.

Engines write and read the arena themselves, by mapping it or over the data plane; here only control messages pass.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Sequence

import msgspec
import zmq

from lmkv import poolwire as pw
from lmkv.control.etcd import EtcdMembership
from lmkv.control.guard import Guard
from lmkv.control.host import Connection, Offer
from lmkv.control.replacing import Replacing
from lmkv.control.runtime import START_S, THREADS, Runtime
from lmkv.control.wake import has_mail
from lmkv.errors import TransportError, WireError
from lmkv.ids import Incarnation, Rank, make_incarnation
from lmkv.transport import Completion, Event, OpId, PeerLost, Region, Transport

from .arena import Arena
from .clients import Clients
from .copying import Copying, Replicas
from .desk import Desk
from .index import PoolIndex, Writer
from .leases import Leases
from .memory import ArenaMemory
from .opening import bind, card_of
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

OpenTiers = Callable[[Callable[[pw.Tier, list[bytes]], None]], list[TierSettings]]
"""Gets what a tier calls when it gives pages up."""


class PoolNode:
    """Everything is bound at construction (raises ConfigError, TierError). `run`, on the same thread, or `start`, then
    until `stop`. The rest is a `Part`."""

    def __init__(
        self,
        settings: NodeSettings,
        tiers: OpenTiers = lambda evicted: [],
        runtime: Runtime = THREADS,
    ) -> None:
        self._settings = settings
        self._runtime = runtime
        self._incarnation = make_incarnation(runtime.entropy(8))
        self._stop = threading.Event()
        self._runner = runtime.runner("lmkv-pool", self)
        self._ending = contextlib.ExitStack()
        """Closes what has been opened, the last first."""
        self._guard = Guard("pool node", runtime.caught)
        self._is_watched = False
        self._has_more = False
        self._end_s = float("inf")
        """The drain at the end is given up then."""
        try:
            self._build(settings, tiers)
        except BaseException:
            self._ending.close()
            self._runner.stop()
            raise
        self._beat_s = 0.0
        self._tick_s = 0.0

    def _build(self, settings: NodeSettings, tiers: OpenTiers) -> None:
        self._memory = ArenaMemory.create(settings.capacity, settings.huge)
        self._ending.callback(self._memory.close_fd)
        capacity_bytes = self._memory.capacity_bytes
        self._index = PoolIndex(
            Arena(capacity_bytes), lambda: make_policy(settings.policy), settings.write_lease_s, self._fresh()
        )
        counters = self._index.counters
        self._context = self._runtime.context()
        self._ending.callback(self._context.destroy, linger=200)
        self._router, host, port = bind(self._context, settings.listen)
        self._publisher = Publisher(self._context, host, settings.advertise, self._index)
        self._publisher.beat_to(settings.controller)
        self._sharers: dict[Connection, Writer] = {}
        self._offer, share = self._open_share()
        self._transport = self._open_data_plane()
        silent_s = max(10 * settings.beat_s, 5.0)
        self._clients = Clients(
            self._transport, silent_s, self._client_gone, self._index.may_be_written, settings.quarantine_s
        )
        self._tiering: Tiering | None = None  # a tier may evict while it opens
        opened, wake = tiers(self._evicted), self._runner.wake
        self._tiering = Tiering(self._index, self._memory, opened, counters, wake, self._runtime)
        self._ending.callback(self._tiering.close)
        self._leases = Leases(self._index, counters, int(capacity_bytes * settings.pin_share), self._fresh())
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
            self._runtime,
        )
        self._ending.callback(self._copying.close)
        self._pushing = Pushing(self._index, self._memory, self._transport, counters)
        self._replicas = Replicas(self._context, settings.replicas, self._runtime)
        self._ending.callback(self._replicas.close)
        identity, events = self._runtime.host.identity(), self._publisher.address
        self.card = card_of(
            settings, self._incarnation, host, port, events, self._transport, self._memory, share, identity
        )
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
        self._replacing = self._open_replacing()
        self._etcd = EtcdMembership(settings.etcd, settings.etcd_prefix) if settings.etcd else None
        if self._etcd is not None:
            self._ending.callback(self._etcd.withdraw)

    # --- opening ---

    def _open_data_plane(self) -> Transport | None:
        if self._settings.transport == "none":
            return None
        transport = self._runtime.transport(self._settings.transport, f"lmkv-pool-{self._incarnation}")
        self._ending.callback(transport.abort)
        data = self._memory.data
        transport.register(Region(self._memory.address, self._memory.capacity_bytes, owner=data))
        return transport

    def _open_replacing(self) -> Replacing | None:
        if self._transport is None:
            return None
        return Replacing(
            self._transport,
            [self._clients],
            lambda: f"lmkv-pool-{self._incarnation}-{self._runtime.entropy(4).hex()}",
            self._copying.peer_lost,
            self._completed,
        )

    def _open_share(self) -> tuple[Offer | None, str]:
        if self._settings.share == "none":
            return None, ""
        path = self._settings.share or default_share(self._incarnation)
        memory = self._memory
        offer = self._runtime.host.offer(path, memory.fd, memory.capacity_bytes, self._joined, self._left)
        self._ending.callback(offer.close)
        return offer, path

    # --- life ---

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serves on this thread until `stop` and the drain that it starts. Closes everything."""
        self._runner.run(ready)

    def start(self, timeout_s: float = START_S) -> None:
        """Serves elsewhere, see `Runner.start`."""
        self._runner.start(timeout_s)

    def stop(self) -> None:
        """From any thread, or a signal handler: drain, then end."""
        self._stop.set()
        self._runner.wake()

    def open(self) -> None:
        assert self._tiering is not None
        started_s = self._runtime.clock()
        for store in self._tiering.stores:
            self._desk.namespaces.update(store.descriptions())
        count = self._tiering.adopt()
        if self._tiering.stores:
            logger.info("%d pages found in lower tiers in %.1f s", count, self._runtime.clock() - started_s)
        if self._etcd is not None:
            self._etcd.register(self.card)
        if self._settings.prefault:
            self._runtime.background("lmkv-arena", self._memory.touch)

    def turn(self, now_s: float) -> None:
        if self._stop.is_set() and self._end_s == float("inf"):
            self._end_s = now_s + self._settings.drain_s
            self._desk.drain(b"", 0, True)
        if now_s > self._end_s:
            logger.warning("the drain took longer than %g s; ending", self._settings.drain_s)
            self._runner.stop()
            return
        if self._offer is not None:
            self._guard.work("share", self._offer.turn)
        self._has_more = self._take_letters(now_s)
        self._take_events(now_s)
        self._tend(now_s)
        if self._desk.stopping:
            self._runner.stop()

    def next_s(self, now_s: float) -> float:
        if self._has_more or has_mail(self._router):
            return 0.0
        waits = (self._desk.next_s(now_s), self._copying.next_s(now_s), self._replicas.next_s(now_s))
        return min(self._pause_s(now_s), *waits)

    def descriptors(self) -> Sequence[int] | None:
        if self._is_watched:
            return None
        self._is_watched = True
        offer = [self._offer.descriptor] if self._offer is not None else []
        return [self._router.fileno(), *offer, *(self._transport.fds() if self._transport is not None else [])]

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
        self._guard.work("tiers", self._tiering.collect)
        self._guard.work("copies", lambda: self._copying.tick(now_s))
        self._guard.work("replicas", lambda: self._replicas.tick(now_s))
        self._guard.work("waiting", lambda: self._desk.settle(now_s))
        if now_s - self._tick_s >= TICK_S:
            self._tick_s = now_s
            self._guard.work("expiry", lambda: self._expire(now_s))
        for kind, count in self._guard.take_counts().items():
            self._index.counters[f"failure:{kind}"] += count
        self._publisher.flush(self._incarnation)
        if now_s - self._beat_s >= self._settings.beat_s:
            self._beat_s = now_s
            self._publisher.sign_of_life(self._incarnation)
            self._publisher.beat(self._beat())

    def _expire(self, now_s: float) -> None:
        self._index.expire(now_s)
        self._leases.expire(now_s)
        self._clients.tick(now_s)
        self._replace_data_plane(now_s)

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
            try:
                if len(frames) != 2:
                    raise WireError(f"a message has 2 frames, not {len(frames)}")
                message = pw.decode(frames[1])
            except WireError as error:
                self._refuse(frames[0], 0, error.message)
                continue
            self._guard.attempt(
                type(message).__name__,
                lambda frames=frames, message=message: self._take_letter(frames[0], message, now_s),  # type: ignore[misc]
                lambda frames=frames, message=message: self._refuse(  # type: ignore[misc]
                    frames[0], getattr(message, "token", 0), "the node could not handle it; its log has more"
                ),
                str(getattr(message, "incarnation", "")),
            )
        return True

    def _take_letter(self, identity: bytes, message: pw.PoolMessage, now_s: float) -> None:
        try:
            self._desk.take(identity, message, now_s)
        except WireError as error:
            self._refuse(identity, getattr(message, "token", 0), error.message)

    def _refuse(self, identity: bytes, token: int, why: str) -> None:
        self._index.counters["unreadable"] += 1
        logger.warning("a message is not taken: %s", why)
        if token:
            self._send(identity, pw.Unreadable(token, why))

    def _send(self, identity: bytes, message: pw.PoolMessage) -> None:
        try:
            self._router.send_multipart([identity, pw.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.debug("an answer was not taken: %s", error)

    def _take_events(self, now_s: float) -> None:
        if self._transport is None:
            return
        events: list[Event] = []
        transport = self._transport
        self._guard.work("poll", lambda: events.extend(transport.poll()))
        for event in events:
            self._guard.attempt(
                type(event).__name__,
                lambda event=event: self._take_event(transport, event, now_s),  # type: ignore[misc]
            )

    def _take_event(self, transport: Transport, event: Event, now_s: float) -> None:
        match event:
            case Completion(op, error):
                transport.release(op)
                self._completed(op, error, now_s)
            case PeerLost(peer, reason):
                self._copying.peer_lost(peer, reason)
                self._clients.lost(peer, reason)

    def _completed(self, op: OpId, error: TransportError | None, now_s: float) -> None:
        if not (self._pushing.completed(op, error) or self._copying.completed(op, error, now_s)):
            self._clients.completed(op, error)

    def _replace_data_plane(self, now_s: float) -> None:
        """If a client has kept slots in quarantine for too long. All others learn of it with their next hello."""
        if self._transport is None or self._replacing is None:
            return
        name = self._transport.name
        self._replacing.tick(now_s)
        if self._transport.name != name:
            self._index.counters["data_plane:replaced"] += 1
            self._copying.replaced()
            self.card = self._desk.card = msgspec.structs.replace(self.card, export=self._transport.export())

    def _joined(self, connection: Connection, told: bytes) -> None:
        """Raises ValueError, KeyError or TypeError for what nobody of ours says."""
        who = json.loads(told)
        writer = (Incarnation(str(who["incarnation"])), Rank(int(who["rank"])))
        self._sharers[connection] = writer
        self._clients.shared(writer, connection, self._runtime.clock())

    def _left(self, connection: Connection) -> None:
        self._clients.share_ended(self._sharers.pop(connection), connection)

    def _client_gone(self, writer: Writer, is_dead: bool) -> None:
        self._index.writer_dead(*writer)
        if is_dead:
            self._leases.reader_gone(writer)

    def _evicted(self, tier: pw.Tier, keys: list[bytes]) -> None:
        if self._tiering is not None:
            self._tiering.evicted(tier, keys)

    # --- ending ---

    def end(self) -> None:
        self._publisher.flush(self._incarnation)
        self._publisher.beat(self._beat(leaving=True))
        self._ending.close()

    def _fresh(self) -> int:
        """A number to count from that another incarnation has hardly come to."""
        return int.from_bytes(self._runtime.entropy(6), "little")
