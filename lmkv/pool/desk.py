"""What a node answers to each message. The node's thread only; no sockets here: answers go out through `send`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from lmkv import poolwire as pw
from lmkv.errors import WireError
from lmkv.hashing import namespace_of
from lmkv.poolwire import Ack, Refusal, Tier

from .clients import Clients
from .faults import point
from .index import Entry, PoolIndex
from .leases import Leases
from .publisher import Publisher
from .tiering import Tiering

logger = logging.getLogger(__name__)

Send = Callable[[bytes, pw.PoolMessage], None]
MOST_LISTED = 10_000


@dataclass(slots=True)
class _Waiting:
    """A pin that waits for pages to come up."""

    identity: bytes
    question: pw.Pin
    run: list[Entry]
    until_s: float
    left: int

    def came_up(self, here: bool) -> None:
        """One page more is decided; one that is not here ends the run when it is pinned."""
        self.left -= 1


class Desk:
    """`stop()` ends the node."""

    def __init__(
        self,
        card: pw.NodeCard,
        index: PoolIndex,
        leases: Leases,
        clients: Clients,
        tiering: Tiering,
        publisher: Publisher,
        send: Send,
        most_lease_s: float,
        write_lease_s: float,
        replicate: Callable[[pw.Replicate], None],
    ) -> None:
        self.card = card
        self.namespaces: dict[bytes, str] = {}
        self.draining = False
        self.stopping = False
        self._index, self._leases, self._clients = index, leases, clients
        self._tiering, self._publisher, self._send = tiering, publisher, send
        self._most_lease_s, self._write_lease_s = most_lease_s, write_lease_s
        self._replicate = replicate
        self._waiting: list[_Waiting] = []
        self._drains: list[tuple[bytes, int, bool]] = []

    def take(self, identity: bytes, message: pw.PoolMessage, now_s: float) -> None:
        """Raises WireError for what cannot be answered; the caller tells the sender."""
        match message:
            case pw.PoolHello():
                self._hello(identity, message, now_s)
            case pw.PoolBeat():
                self._clients.heard(message.incarnation, message.rank, now_s)
            case pw.Declare():
                self._declare(message.namespace, message.description)
            case pw.Reserve():
                self._reserve(identity, message, now_s)
            case pw.Commit():
                self._commit(identity, message, now_s)
            case pw.Abandon():
                for generation in message.generations:
                    self._index.abandon((message.incarnation, message.rank), generation, message.drained)
            case pw.Pin():
                self._pin(identity, message, now_s)
            case pw.Unpin():
                self._unpin(message)
            case pw.Touch():
                for key in self._keys(message.namespace, message.keys):
                    self._index.touch(key)
            case _:
                self._administer(identity, message, now_s)

    def _administer(self, identity: bytes, message: pw.PoolMessage, now_s: float) -> None:
        match message:
            case pw.Drop():
                self._send(identity, pw.Dropped(message.token, self._drop(message)))
            case pw.Drain():
                self.drain(identity, message.token, message.stop)
            case pw.ListKeys():
                self._send(identity, self._list(message))
            case pw.Stats():
                self._send(identity, pw.StatsAre(message.token, self.card, json.dumps(self.stats()).encode()))
            case pw.Snapshot():
                part = self._publisher.snapshot(message, self.card.incarnation, now_s)
                if part is None:
                    raise WireError("the snapshot is not kept any more; begin again")
                self._send(identity, part)
            case pw.Replicate():
                self._replicate(message)
            case _:
                raise WireError(f"a pool node does not take {type(message).__name__}")

    # --- clients ---

    def _hello(self, identity: bytes, message: pw.PoolHello, now_s: float) -> None:
        if message.protocol != self.card.protocol:
            refused = f"this node speaks protocol {self.card.protocol}, {message.name} {message.protocol}"
        else:
            refused = self._clients.hello(message, now_s)
        if not refused:
            for namespace, description in message.namespaces:
                self._declare(namespace, description)
        self._send(identity, pw.PoolWelcome(message.token, self.card, refused))

    def _declare(self, namespace: bytes, description: str) -> None:
        if namespace in self.namespaces:
            return
        if namespace_of(description) != namespace:
            raise WireError(f"namespace {namespace.hex()} is not that of its description")
        self.namespaces[namespace] = description
        for store in self._tiering.stores:
            self._tiering.describe(store, namespace, description)

    # --- writing ---

    def _reserve(self, identity: bytes, message: pw.Reserve, now_s: float) -> None:
        writer = (message.incarnation, message.rank)
        keys = self._keys(message.namespace, message.keys)
        if not self._clients.heard(*writer, now_s):
            raise WireError("say hello first: this node does not know you")
        if message.page_bytes < 1 or not 0 <= message.shard < message.shards <= 1024:
            raise WireError(f"page of {message.page_bytes} bytes, shard {message.shard} of {message.shards}")
        if self.draining:
            slots = [pw.Slot(-1, 0, Refusal.DRAINING)] * len(keys)
        else:
            slots = self._index.reserve(writer, keys, message.page_bytes, message.shards, now_s)
        point("reserve:allocated")
        self._send(identity, pw.Reserved(message.token, tuple(slots), self._write_lease_s))

    def _commit(self, identity: bytes, message: pw.Commit, now_s: float) -> None:
        writer = (message.incarnation, message.rank)
        keys = self._keys(message.namespace, message.keys)
        if not len(keys) == len(message.generations) == len(message.checksums):
            raise WireError(f"{len(keys)} keys, {len(message.generations)} generations, {len(message.checksums)} sums")
        point("commit:before")
        refusals, fresh = [], []
        # A chain is told to the policy from its end, so that ends are given up before beginnings (ADR 7).
        told = list(zip(keys, message.generations, message.checksums, strict=True))
        for key, generation, sums in reversed(told):
            why = self._index.commit(writer, key, generation, message.shard, sums, now_s)
            refusals.append(why)
            entry = self._index.find(key) if why is Refusal.NONE else None
            if entry is not None:
                fresh.append(entry)
        refusals.reverse()
        point("commit:visible")
        for entry in fresh:
            self._tiering.visible(entry)
        done = pw.Committed(message.token, tuple(refusals))
        if message.ack is not Ack.DURABLE or not fresh:
            self._send(identity, done)
            return
        left, reached = len(fresh), []

        def settled(durable: bool) -> None:
            reached.append(durable)
            if len(reached) == left:
                ack = Ack.DURABLE if all(reached) else Ack.VOLATILE
                self._send(identity, pw.Committed(message.token, done.refusals, ack))

        for entry in fresh:
            self._tiering.make_durable(entry, settled)

    # --- reading ---

    def _pin(self, identity: bytes, message: pw.Pin, now_s: float) -> None:
        run = self._index.run(self._keys(message.namespace, message.keys))
        run = run[: self._leases.fits(run)]
        below = [entry for entry in run if Tier.DRAM not in entry.tiers]
        if not below or message.wait_s <= 0:
            self._pinned(identity, message, run, now_s)
            return
        # What is here already must not go while the rest comes up.
        waiting = _Waiting(identity, message, run, now_s + message.wait_s, len(below))
        for entry in run:
            self._index.hold(entry)
        self._waiting.append(waiting)
        for entry in below:
            self._tiering.promote(entry, waiting.came_up)

    def settle(self, now_s: float) -> None:
        """Answer what has waited long enough."""
        for waiting in [w for w in self._waiting if w.left == 0 or now_s > w.until_s]:
            self._waiting.remove(waiting)
            self._pinned(waiting.identity, waiting.question, waiting.run, now_s)
            for entry in waiting.run:
                self._index.release(entry)
        if self._drains and not self._tiering.busy:
            for identity, token, stop in self._drains:
                volatile = sum(1 for entry in self._index.entries() if entry.tiers == Tier.DRAM)
                if identity:
                    self._send(identity, pw.Drained(token, volatile))
                self.stopping = self.stopping or stop
            self._drains.clear()

    def next_s(self, now_s: float) -> float:
        return min((w.until_s - now_s for w in self._waiting), default=3600.0)

    def _pinned(self, identity: bytes, message: pw.Pin, run: list[Entry], now_s: float) -> None:
        here: list[Entry] = []
        for entry in run:
            if entry.condemned or Tier.DRAM not in entry.tiers:
                break
            here.append(entry)
        lease, lease_s = 0, min(message.lease_s, self._most_lease_s)
        if here:
            lease = self._leases.pin((message.incarnation, message.rank), here, lease_s, now_s)
            for entry in reversed(here):  # as above
                self._index.touch(entry.key)
                self._tiering.hit(entry)
        asked = len(message.keys) // pw.PAGE_KEY_BYTES
        why = Refusal.NONE if len(here) == asked else Refusal.BUSY if len(here) < len(run) else Refusal.ABSENT
        self._index.counters["pin:pages"] += len(here)
        self._index.counters["pin:absent"] += asked - len(here)
        pages = tuple(pw.Page(e.offset, e.generation, e.checksums) for e in here)
        size = here[0].page_bytes if here else 0
        below = run[len(here) :]
        below_s = self._tiering.promotion_s(below)
        self._send(identity, pw.Pinned(message.token, lease, lease_s, size, pages, why, len(below), below_s))

    def _unpin(self, message: pw.Unpin) -> None:
        self._leases.unpin(message.lease)
        if message.corrupt:
            keys = self._keys(message.namespace, message.corrupt)
            self._index.counters["corrupt"] += len(keys)
            logger.error("%d pages were found corrupt by a reader, and are dropped", len(keys))
            self._forget(keys)

    # --- administration ---

    def _drop(self, message: pw.Drop) -> int:
        point("drop:before")
        if message.keys:
            keys = self._keys(message.namespace, message.keys)
        else:
            keys = [e.key for e in self._index.entries() if e.key.startswith(message.namespace)]
        count = self._forget(keys)
        if not message.keys:
            self._tiering.dropped_namespace(message.namespace)
        return count

    def _forget(self, keys: list[bytes]) -> int:
        count = sum(self._index.drop(key) for key in keys)
        self._tiering.dropped(keys)
        return count

    def drain(self, identity: bytes, token: int, stop: bool) -> None:
        """`identity` b"": nobody waits for an answer."""
        self.draining = True
        self._tiering.spill_all()
        self._drains.append((identity, token, stop))

    def _list(self, message: pw.ListKeys) -> pw.Keys:
        limit = min(max(message.limit, 1), MOST_LISTED)
        keys = sorted(
            e.key for e in self._index.entries() if e.key > message.after and e.key.startswith(message.namespace)
        )
        records = b"".join(key + bytes((e.tiers,)) for key in keys[:limit] if (e := self._index.find(key)) is not None)
        return pw.Keys(message.token, records, len(keys) > limit)

    def stats(self) -> dict[str, object]:
        return {
            "pages": len(self._index),
            "reserved": self._index.reserved,
            "quarantined_bytes": self._index.quarantined_bytes,
            "pinned_bytes": self._leases.pinned_bytes,
            "leases": len(self._leases),
            "clients": self._clients.names(),
            "draining": self.draining,
            "namespaces": {namespace.hex(): text for namespace, text in self.namespaces.items()},
            "counters": dict(self._index.counters),
            "tiers": {
                str(store.tier.name): {
                    "used_bytes": store.used_bytes,
                    "capacity_bytes": store.capacity_bytes,
                    "counters": store.counters(),
                }
                for store in self._tiering.stores
            },
        }

    def _keys(self, namespace: bytes, keys: bytes) -> list[bytes]:
        if len(namespace) != pw.NAMESPACE_BYTES:
            raise WireError(f"a namespace has {pw.NAMESPACE_BYTES} bytes, not {len(namespace)}")
        return [namespace + key for key in pw.split_keys(keys)]
