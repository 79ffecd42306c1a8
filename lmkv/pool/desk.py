"""What a node answers to each message. The node's thread only; no sockets here: answers go out through `send`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from lmkv import poolwire as pw
from lmkv.errors import WireError
from lmkv.hashing import namespace_of
from lmkv.poolwire import Ack, Refusal, Tier

from .clients import Clients
from .copying import Copying, Replicas
from .faults import point
from .index import Entry, PoolIndex
from .leases import Leases
from .publisher import Publisher
from .pushing import Pushing
from .tiering import Tiering
from .waiting import WaitingCommit, WaitingPin

logger = logging.getLogger(__name__)

Send = Callable[[bytes, pw.PoolMessage], None]
MOST_LISTED = 10_000
MOST_KEYS = 65536
MOST_SHARDS = 1024
MOST_NAMESPACES = 65536
MOST_WAITING = 4096
"""Pins, commits and drains that wait at a time, of each kind."""
MOST_WAIT_S = 600.0
"""A commit waits no longer for its promise."""


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
        copying: Copying,
        replicas: Replicas,
        pushing: Pushing,
    ) -> None:
        self.card = card
        self.namespaces: dict[bytes, str] = {}
        self.draining = False
        self.stopping = False
        self._index, self._leases, self._clients = index, leases, clients
        self._tiering, self._publisher, self._send = tiering, publisher, send
        self._most_lease_s, self._write_lease_s = most_lease_s, write_lease_s
        self._copying, self._replicas, self._pushing = copying, replicas, pushing
        self._pins: list[WaitingPin] = []
        self._commits: list[WaitingCommit] = []
        self._drains: list[tuple[bytes, int, bool]] = []

    def take(self, identity: bytes, message: pw.PoolMessage, now_s: float) -> None:
        """Raises WireError for what cannot be answered; the caller tells the sender."""
        if isinstance(message, pw.Reserve | pw.Commit | pw.Fetch):
            self._clients.moves(message.incarnation, message.rank, now_s)
        match message:
            case pw.PoolHello():
                self._hello(identity, message, now_s)
            case pw.Declare():
                self._declare(message.namespace, message.description)
            case pw.Reserve():
                self._reserve(identity, message, now_s)
            case pw.Commit():
                self._commit(identity, message, now_s)
            case pw.Abandon():
                self._abandon(message)
            case pw.Pin():
                self._pin(identity, message, now_s)
            case pw.Fetch():
                self._fetch(identity, message)
            case pw.Unpin():
                self._unpin(message)
            case pw.Touch():
                self._touch(self._keys(message.namespace, message.keys))
            case _:
                self._administer(identity, message, now_s)

    def _administer(self, identity: bytes, message: pw.PoolMessage, now_s: float) -> None:
        match message:
            case pw.Drop():
                self._drop(identity, message)
            case pw.Demote():
                keys = self._keys(message.namespace, message.keys) if message.keys else None
                chosen = keys if keys is not None else self._index.keys(message.namespace)
                self._send(identity, pw.Dropped(message.token, sum(self._index.demote(key) for key in chosen)))
            case pw.Drain():
                if len(self._drains) >= MOST_WAITING:
                    raise WireError(f"{MOST_WAITING} drains are waited for already")
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
                self._replicate(identity, message, now_s)
            case _:
                raise WireError(f"a pool node does not take {type(message).__name__}")

    # --- clients ---

    def _hello(self, identity: bytes, message: pw.PoolHello, now_s: float) -> None:
        if message.protocol != self.card.protocol:
            refused = f"this node speaks protocol {self.card.protocol}, {message.name} {message.protocol}"
        else:
            refused = self._clients.hello(message, now_s)
        if not refused:
            self._index.settle((message.incarnation, message.rank), *message.settled)
            for namespace, description in message.namespaces:
                self._declare(namespace, description)
        # Whoever it is: what is not being written is not written later.
        writing = self._pushing.recall(message.incarnation, message.rank, message.fetches)
        self._send(identity, pw.PoolWelcome(message.token, self.card, refused, writing))

    def _declare(self, namespace: bytes, description: str) -> None:
        if namespace in self.namespaces:
            return
        if len(self.namespaces) >= MOST_NAMESPACES:
            raise WireError(f"this node knows {MOST_NAMESPACES} namespaces already")
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
        if not self._clients.can_write(writer):
            raise WireError("map the arena, or say hello with an export: there is no way for you to write")
        if message.page_bytes < 1 or not 0 <= message.shard < message.shards <= MOST_SHARDS:
            raise WireError(f"page of {message.page_bytes} bytes, shard {message.shard} of {message.shards}")
        if self.draining:
            slots = [pw.Slot(-1, 0, Refusal.DRAINING)] * len(keys)
            self._index.counters["reserve:draining"] += len(keys)
        else:
            slots = self._index.reserve(
                writer, keys, message.page_bytes, message.shards, message.shard, now_s, message.token
            )
        point("reserve:allocated")
        self._send(identity, pw.Reserved(message.token, tuple(slots), self._write_lease_s))

    def _abandon(self, message: pw.Abandon) -> None:
        writer = (message.incarnation, message.rank)
        if message.question:
            self._index.take_back(writer, self._keys(message.namespace, message.keys), message.question)
        for generation in message.generations:
            self._index.abandon(writer, generation, message.drained)

    def _commit(self, identity: bytes, message: pw.Commit, now_s: float) -> None:
        writer = (message.incarnation, message.rank)
        keys = self._keys(message.namespace, message.keys)
        if not len(keys) == len(message.generations) == len(message.checksums):
            raise WireError(f"{len(keys)} keys, {len(message.generations)} generations, {len(message.checksums)} sums")
        point("commit:before")
        refusals, fresh = [], []
        # From the last to the first: the end of a chain is to be evicted before its beginning.
        whole = list(zip(keys, message.generations, message.checksums, strict=True))
        for key, generation, sums in reversed(whole):
            why = self._index.commit(writer, key, generation, message.shard, sums, now_s)
            refusals.append(why)
            entry = self._index.find(key) if why is Refusal.NONE else None
            if entry is not None:
                fresh.append(entry)
        point("commit:visible")
        refusals.reverse()
        fresh.reverse()
        for entry in fresh:
            self._tiering.visible(entry)
        if message.ack is Ack.VOLATILE or not fresh or len(self._commits) >= MOST_WAITING:
            self._send(identity, pw.Committed(message.token, tuple(refusals)))
            return
        until_s = now_s + min(_seconds("wait_s", message.wait_s), MOST_WAIT_S)
        waiting = WaitingCommit(identity, message.token, tuple(refusals), until_s, len(fresh), message.ack)
        self._commits.append(waiting)
        if message.ack is Ack.REPLICATED:
            self._copy_out(message.namespace, fresh, until_s, waiting)
            return
        for entry in fresh:
            self._tiering.make_durable(entry, waiting.settled)

    def _copy_out(self, namespace: bytes, fresh: list[Entry], until_s: float, waiting: WaitingCommit) -> None:
        """By every replica; without one there is no copy."""
        waiting.left = len(self._replicas)
        waiting.kept = waiting.left > 0
        keys = b"".join(entry.key[pw.NAMESPACE_BYTES :] for entry in fresh)
        self._replicas.ask(self.card, namespace, keys, until_s, waiting.settled)

    # --- reading ---

    def _touch(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            self._index.touch(key)

    def _pin(self, identity: bytes, message: pw.Pin, now_s: float) -> None:
        wait_s = min(_seconds("wait_s", message.wait_s), self._most_lease_s)
        _seconds("lease_s", message.lease_s)
        run = self._index.run(self._keys(message.namespace, message.keys))
        tiers = [entry.tiers for entry in run]
        below = [entry for entry in run[: self._leases.fits(run)] if Tier.DRAM not in entry.tiers]
        waiting = WaitingPin(identity, message, run, tiers, now_s + wait_s, len(below))
        if not below or not wait_s or len(self._pins) >= MOST_WAITING:
            self._pinned(waiting, now_s)
            return
        # What is here already must not go while the rest comes up.
        for entry in run:
            self._index.hold(entry)
        self._pins.append(waiting)
        for entry in below:
            self._tiering.promote(entry, waiting.came_up)

    def settle(self, now_s: float) -> None:
        """Answer what has waited long enough."""
        for pin in [w for w in self._pins if w.left == 0 or now_s > w.until_s]:
            self._pins.remove(pin)
            self._pinned(pin, now_s)
            for entry in pin.run:
                self._index.release(entry)
        for commit in [w for w in self._commits if w.left == 0 or now_s > w.until_s]:
            self._commits.remove(commit)
            self._send(commit.identity, pw.Committed(commit.token, commit.refusals, commit.reached))
        if self._drains and not self._tiering.busy:
            for identity, token, stop in self._drains:
                volatile = sum(1 for entry in self._index.entries() if entry.tiers == Tier.DRAM)
                if identity:
                    self._send(identity, pw.Drained(token, volatile))
                self.stopping = self.stopping or stop
            self._drains.clear()

    def next_s(self, now_s: float) -> float:
        ends_s = [pin.until_s for pin in self._pins] + [commit.until_s for commit in self._commits]
        return min(ends_s, default=now_s + 3600.0) - now_s

    def _pinned(self, waiting: WaitingPin, now_s: float) -> None:
        message, run = waiting.question, waiting.run
        fits = self._leases.fits(run)
        here: list[Entry] = []
        for entry in run[:fits]:
            if entry.condemned or Tier.DRAM not in entry.tiers:
                break
            here.append(entry)
        asked = len(message.keys) // pw.PAGE_KEY_BYTES
        why = Refusal.NONE
        if len(here) < asked:
            why = Refusal.ABSENT if len(here) == len(run) else Refusal.FULL if len(here) == fits else Refusal.BUSY
            self._index.counters[f"pin:{why.name.lower()}"] += asked - len(here)
        lease, lease_s = 0, min(message.lease_s, self._most_lease_s)
        if here:
            self._clients.moves(message.incarnation, message.rank, now_s)
            lease = self._leases.pin((message.incarnation, message.rank), here, lease_s, now_s)
            self._touch([entry.key for entry in here])
            for entry in here:
                self._tiering.hit(entry)
        self._index.counters["pin:pages"] += len(here)
        pages = tuple(
            pw.Page(e.offset, e.generation, e.checksums, _best(tiers), e.page_bytes)
            for e, tiers in zip(here, waiting.tiers, strict=False)
        )
        size = here[0].page_bytes if here else 0
        below = run[len(here) :]
        below_s = self._tiering.promotion_s(below)
        pinned = pw.Pinned(message.token, lease, lease_s, size, pages, why, len(below), below_s)
        self._send(waiting.identity, pinned)

    def _fetch(self, identity: bytes, message: pw.Fetch) -> None:
        client = self._clients.find(message.incarnation, message.rank)
        peer = client.transport_id if client is not None else None
        keys = self._keys(message.namespace, message.keys)
        held = self._leases.pinned(message.lease)
        self._pushing.take(message, keys, list(held), peer, lambda answer: self._send(identity, answer))

    def _unpin(self, message: pw.Unpin) -> None:
        pinned = self._leases.pinned(message.lease)
        if message.corrupt:
            keys = set(self._keys(message.namespace, message.corrupt))
            # Only what was held: the bytes of a page that went meanwhile prove nothing.
            wrong = [e.key for e in pinned if e.key in keys and self._index.find(e.key) is e]
            if wrong:
                self._index.counters["corrupt"] += len(wrong)
                logger.error("%d pages were found corrupt by a reader, and are dropped", len(wrong))
                self._forget(wrong)
        self._leases.unpin(message.lease)

    # --- administration ---

    def _replicate(self, identity: bytes, message: pw.Replicate, now_s: float) -> None:
        def copied(pages: int) -> None:
            if message.token:
                self._send(identity, pw.Replicated(message.token, pages))

        self._copying.take(message, copied, now_s)

    def _drop(self, identity: bytes, message: pw.Drop) -> None:
        """Answered when the pages are gone from the tiers too, for good."""
        point("drop:before")
        count = 0

        def dropped() -> None:
            self._send(identity, pw.Dropped(message.token, count))

        if message.keys:
            keys = self._keys(message.namespace, message.keys)
            count = sum(self._index.drop(key) for key in keys)
            self._tiering.dropped(keys, dropped)
        else:
            count = sum(self._index.drop(key) for key in self._index.keys(message.namespace))
            self._tiering.dropped_namespace(message.namespace, dropped)

    def _forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self._index.drop(key)
        self._tiering.dropped(keys)

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
            "capacity_bytes": self.card.arena_bytes,
            "used_bytes": self._index.used_bytes,
            "reserved": self._index.reserved,
            "quarantined_bytes": self._index.quarantined_bytes,
            "pinned_bytes": self._leases.pinned_bytes,
            "leases": len(self._leases),
            "waiting": len(self._pins) + len(self._commits),
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
        if len(keys) > MOST_KEYS * pw.PAGE_KEY_BYTES:
            raise WireError(f"more than {MOST_KEYS} keys in one message")
        return [namespace + key for key in pw.split_keys(keys)]


def _best(tiers: Tier) -> Tier:
    """The quickest of them."""
    return next(tier for tier in (Tier.DRAM, Tier.DISK, Tier.OBJECT) if tier in tiers)


def _seconds(name: str, value: float) -> float:
    """Raises WireError for what is no duration (NaN would never be over)."""
    if not 0.0 <= value < float("inf"):
        raise WireError(f"{name} is {value}")
    return value
