"""The controller: members with their beats, a view of their pages, answers to whoever asks. One thread, one poll loop.

It holds nothing that the nodes do not tell it again: any number of controllers run side by side, and one that starts
anew is exact as soon as the nodes have beaten and it has read their snapshots.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter
from dataclasses import dataclass, field

import zmq

from lmkv import poolwire as pw
from lmkv.errors import ConfigError, WireError
from lmkv.ids import make_incarnation

from .etcd import EtcdMembership
from .follow import ViewSettings
from .links import Links
from .mailbox import Inbox, make_context
from .replication import Replication, ReplicationSettings
from .view import Action, Ask, HangUp, Subscribe, Unsubscribe, View
from .wake import Wake

logger = logging.getLogger(__name__)

TICK_S = 0.05
KEYS_MOST = 65536
"""In one Lookup."""
_QUESTIONS = 256
_EVENTS = 512
"""So many messages are read in one turn of the loop, and about so many records, so that nobody waits for long."""
_RECORDS = 32768


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    listen: str = "tcp://127.0.0.1:18400"
    name: str = "controller"
    view: ViewSettings = field(default_factory=ViewSettings)
    replication: ReplicationSettings = field(default_factory=ReplicationSettings)
    etcd: str = ""
    """URL of a member of etcd; empty: nodes make themselves known by their beats alone."""
    etcd_prefix: str = "/lmkv/nodes"


class Controller:
    """Binds at construction (raises ConfigError); `run()` returns after `stop()`, which any thread and a signal
    handler may call; `close()` frees the sockets."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._etcd = EtcdMembership(settings.etcd, settings.etcd_prefix) if settings.etcd else None
        self._context = make_context()
        self._wake = Wake()
        try:
            self._inbox = Inbox(self._context, settings.listen)
        except ConfigError:
            self._wake.close()
            self._context.term()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._inbox.socket, zmq.POLLIN)
        self._poller.register(self._wake.fd, zmq.POLLIN)
        self._links = Links(self._context, self._poller)
        self._in_etcd: dict[str, pw.NodeCard] = {}
        self._replication = Replication(settings.replication) if settings.replication.copies > 1 else None
        self._stopped = False
        self.view = View(settings.view)
        self.counters: Counter[str] = Counter()
        incarnation = make_incarnation(os.urandom(8))
        self.card = pw.NodeCard(settings.name, incarnation, self._inbox.address, "", "", b"", 0, 0)
        self._started_s = time.monotonic()

    @property
    def address(self) -> str:
        return self._inbox.address

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()

    def run(self) -> None:
        if self._etcd is not None:
            self._etcd.watch()
        tick_at_s = 0.0
        more = False
        while not self._stopped:
            wait_s = 0.0 if more else max(0.0, tick_at_s - time.monotonic())
            ready = dict(self._poller.poll(math.ceil(wait_s * 1000)))
            if self._wake.fd in ready:
                self._wake.clear()
            now_s = time.monotonic()
            if self._inbox.socket in ready:
                self._read_inbox(now_s)
            self._read_nodes(ready, now_s)
            if now_s >= tick_at_s:
                self._read_etcd(now_s)
                more = self.view.tick(now_s)
                tick_at_s = now_s + TICK_S
            elif more:
                more = self.view.sweep()
            self._act()

    def close(self) -> None:
        if self._etcd is not None:
            self._etcd.close()
        self._links.close()
        self._inbox.close()
        self._context.term()
        self._wake.close()

    # --- nodes ---

    def _read_nodes(self, ready: dict[object, int], now_s: float) -> None:
        """What is left when the turn's records are used up waits for the next turn."""
        left = _RECORDS
        for events in self._links.events(_EVENTS):
            self.view.events(events, now_s)
            left -= len(events.records) // pw.EVENT_BYTES
            if left <= 0:
                return
        for answer in self._links.answers(ready, 1):
            if not isinstance(answer, pw.SnapshotPart):
                self.counters["strange_answers"] += 1
                logger.warning("a node answered a Snapshot with %s", type(answer).__name__)
                continue
            self.view.part(answer, now_s)
            left -= len(answer.records) // pw.EVENT_BYTES
            if left <= 0:
                return

    def _act(self) -> None:
        for action in self.view.take_actions():
            card = action.card
            try:
                self._do(action)
            except (ConfigError, zmq.ZMQError) as error:
                self.counters["bad_cards"] += 1
                logger.warning("node %s (%s) is not followed: %s", card.name, card.incarnation, error)
                self.view.leave(card.incarnation)

    def _do(self, action: Action) -> None:
        match action:
            case Subscribe(card):
                self._links.subscribe(card)
            case Unsubscribe(card):
                self._links.unsubscribe(card)
            case Ask(card, question):
                if not self._links.send(card, question):
                    self.counters["unsent"] += 1  # the part's deadline sees to it
            case HangUp(card):
                self._links.hang_up(card)

    def _read_etcd(self, now_s: float) -> None:
        """Who is new there joins. Who is there no more goes once it is silent too: etcd alone may have been away."""
        if self._etcd is None:
            return
        cards: dict[str, pw.NodeCard] = {card.incarnation: card for card in self._etcd.cards()}
        for incarnation, card in cards.items():
            if incarnation not in self._in_etcd:
                self.view.join(card, now_s)
        self._in_etcd |= cards
        for incarnation in self._in_etcd.keys() - cards.keys():
            heard_s = self.view.heard_s(self._in_etcd[incarnation].incarnation)
            if heard_s is None or now_s - heard_s > self._settings.view.lease_s:
                self.view.leave(self._in_etcd.pop(incarnation).incarnation, bury=False)

    # --- questions ---

    def _read_inbox(self, now_s: float) -> None:
        for _ in range(_QUESTIONS):
            try:
                frames = self._inbox.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 2:
                    raise WireError(f"a message of the pool has 1 frame behind its sender, got {len(frames) - 1}")
                message = pw.decode(frames[1])
            except WireError as error:
                self.counters["unreadable"] += 1
                logger.warning("dropped: %s", error)
                continue
            answer = self._take(message, now_s)
            if answer is not None:
                self._answer(frames[0], answer)

    def _answer(self, identity: bytes, answer: pw.PoolMessage) -> None:
        try:
            self._inbox.socket.send_multipart([identity, pw.encode(answer)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.counters["unanswered"] += 1
            logger.debug("an answer was not taken: %s", error)

    def _take(self, message: pw.PoolMessage, now_s: float) -> pw.PoolMessage | None:
        """The answer; None: there is none to give."""
        self.counters[type(message).__name__] += 1
        match message:
            case pw.Lookup():
                return self._lookup(message, now_s)
            case pw.NodeBeat():
                self.view.beat(message, now_s)
                return None
            case pw.Members(token):
                return pw.MembersAre(token, self._settings.name, self.view.members(now_s))
            case pw.Stats(token):
                return pw.StatsAre(token, self.card, json.dumps(self.stats(now_s)).encode())
        asked: int | None = getattr(message, "token", None)
        if asked is None:
            self.counters["unexpected"] += 1
            return None
        name = type(message).__name__
        return pw.Unreadable(asked, f"a controller does not take {name}: it answers Members, Lookup and Stats")

    def _lookup(self, question: pw.Lookup, now_s: float) -> pw.PoolMessage:
        if len(question.keys) > KEYS_MOST * pw.PAGE_KEY_BYTES:
            return pw.Unreadable(question.token, f"more than {KEYS_MOST} keys in one Lookup: ask for fewer at a time")
        try:
            holders = self.view.lookup(question.namespace, question.keys, question.least, question.most)
        except WireError as error:
            return pw.Unreadable(question.token, str(error))
        self.counters["hits" if holders else "misses"] += 1
        if self._replication is not None and holders:
            self._replicate(self._replication, question, holders, now_s)
        return pw.Found(question.token, tuple(holders), self.view.exact(now_s))

    def _replicate(self, replication: Replication, question: pw.Lookup, holders: list[pw.Holder], now_s: float) -> None:
        def members() -> tuple[pw.Member, ...]:
            return self.view.members(now_s)

        copy = replication.looked_up(question.namespace, question.keys, holders, members, now_s)
        if copy is None:
            return
        self.counters["replicates"] += 1
        self.counters["replicated_pages"] += len(copy.keys) // pw.PAGE_KEY_BYTES
        self._links.send(copy.target, pw.Replicate(copy.source, question.namespace, copy.keys))

    def stats(self, now_s: float) -> dict[str, object]:
        table = self.view.table
        members = self.view.members(now_s)
        return {
            "kind": "controller",
            "up_s": round(now_s - self._started_s, 3),
            "nodes": len(members),
            "states": dict(Counter(member.state for member in members)),
            "pages": table.pages,
            "holder_sets": table.sets,
            "table_bytes": table.memory_bytes,
            "lost": table.lost,
            "counters": dict(self.counters + self.view.counters),
            "unreadable_from_nodes": self._links.unreadable,
        }
