"""A view: which node holds which page, made from what the nodes themselves say. It may be late or wrong, never the
truth.

Pure: messages go in, actions come out (`take_actions`), the clock is passed in. Not thread-safe.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np

from lmkv.ids import Incarnation
from lmkv.poolwire import EVENT_BYTES, Events, Holder, Member, NodeBeat, NodeCard, Snapshot, SnapshotPart
from lmkv.wire import PROTOCOL

from . import prints as fingerprints
from .follow import EXACT, Common, Follower, ViewSettings
from .pages import PageTable
from .pending import Pending
from .prints import Prints

logger = logging.getLogger(__name__)

_BURIED = 4096


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Read this node's events."""

    card: NodeCard


@dataclass(frozen=True, slots=True)
class Unsubscribe:
    """This incarnation is over; nothing more to or from it."""

    card: NodeCard


@dataclass(frozen=True, slots=True)
class Ask:
    """Send the question to this node; the answer goes to `View.part`."""

    card: NodeCard
    question: Snapshot


@dataclass(frozen=True, slots=True)
class HangUp:
    """Nothing more to ask of this node for now."""

    card: NodeCard


Action = Subscribe | Unsubscribe | Ask | HangUp


class View:
    """`tick` at least several times a `lease_s`, and again at once while it returns True."""

    def __init__(self, settings: ViewSettings | None = None) -> None:
        self.settings = settings or ViewSettings()
        self.table = PageTable()
        self._pending = Pending(self.table)
        self._common = Common(self._pending, self.settings)
        self.counters: Counter[str] = self._common.counters
        self._followers: dict[Incarnation, Follower] = {}
        self._at: dict[str, Incarnation] = {}
        """By address."""
        self._buried: dict[Incarnation, None] = {}
        """Over for good: replaced at their address, or left. Oldest first."""
        self._tokens = itertools.count(1)
        self._actions: list[Action] = []
        self._asking: set[Incarnation] = set()
        self._inexact: set[Incarnation] = set()
        self._silent_from_s = 0.0
        """Before this nobody can have become DEGRADED."""

    def take_actions(self) -> list[Action]:
        """To be done in this order."""
        actions, self._actions = self._actions, []
        return actions

    # --- nodes ---

    def join(self, card: NodeCard, now_s: float) -> bool:
        """There is such a node. False: it is not followed (its time is over, it speaks another protocol, too many)."""
        known = self._followers.get(card.incarnation)
        if known is not None and (known.card.address, known.card.events) == (card.address, card.events):
            known.card = card
            return True
        if card.incarnation in self._buried:
            self.counters["buried_beats"] += 1
            return False
        if card.protocol != PROTOCOL:
            self.counters["foreign_protocols"] += 1
            return False
        before = self._at.get(card.address, card.incarnation)
        if before in self._followers:
            self.leave(before, bury=before != card.incarnation)
        if len(self._followers) >= self.settings.nodes:
            self.counters["nodes_refused"] += 1
            return False
        logger.info("node %s (%s) at %s joins", card.name, card.incarnation, card.address)
        self._followers[card.incarnation] = Follower(card, self._common, now_s)
        self._at[card.address] = card.incarnation
        self._inexact.add(card.incarnation)
        self._actions.append(Subscribe(card))
        return True

    def leave(self, incarnation: Incarnation, *, bury: bool = True) -> None:
        """Everything of this incarnation goes; what `bury` says never comes back."""
        if bury:
            self._buried[incarnation] = None
            if len(self._buried) > _BURIED:
                del self._buried[next(iter(self._buried))]
        follower = self._followers.pop(incarnation, None)
        if follower is None:
            return
        logger.info("node %s (%s) at %s is gone", follower.card.name, incarnation, follower.card.address)
        if self._at.get(follower.card.address) == incarnation:
            del self._at[follower.card.address]
        follower.end()
        self._settle(follower, None)
        self._actions.append(Unsubscribe(follower.card))

    def beat(self, beat: NodeBeat, now_s: float) -> None:
        if beat.leaving:
            self.leave(beat.card.incarnation)
        elif self.join(beat.card, now_s):
            follower = self._followers[beat.card.incarnation]
            follower.beat(beat, now_s)
            self._settle(follower, now_s)

    def events(self, message: Events, now_s: float) -> None:
        follower = self._followers.get(message.incarnation)
        if follower is None or len(message.records) % EVENT_BYTES or message.first < 1:
            self.counters["strange_events" if follower else "unknown_events"] += 1
            return
        follower.events(message, now_s)
        self._settle(follower, now_s)
        if follower.wants_snapshot(now_s):
            self._start_snapshots(now_s)

    def part(self, part: SnapshotPart, now_s: float) -> None:
        follower = self._followers.get(part.incarnation)
        if follower is None or len(part.records) % EVENT_BYTES:
            self.counters["strange_parts"] += 1
            return
        question = follower.part(part, next(self._tokens), now_s)
        if question is not None:
            self._actions.append(Ask(follower.card, question))
        self._settle(follower, now_s)
        self._start_snapshots(now_s)

    def tick(self, now_s: float) -> bool:
        """Deadlines, and one step of what is swept out; True: there is more of that."""
        for incarnation, follower in list(self._followers.items()):
            follower.tick(now_s)
            self._settle(follower, now_s)
            if now_s - follower.heard_s > self.settings.forget_s:
                self.counters["forgotten"] += 1
                self.leave(incarnation, bury=False)
        self._start_snapshots(now_s)
        self._pending.flush()
        return self.sweep()

    def sweep(self) -> bool:
        self.table.sweep()
        return self.table.unswept

    def _start_snapshots(self, now_s: float) -> None:
        if len(self._asking) >= self.settings.snapshots:
            return
        for incarnation, follower in self._followers.items():
            if follower.wants_snapshot(now_s):
                self._asking.add(incarnation)
                self._actions.append(Ask(follower.card, follower.start(next(self._tokens), now_s)))
                if len(self._asking) >= self.settings.snapshots:
                    return

    def _settle(self, follower: Follower, now_s: float | None) -> None:
        """After anything that may have changed its state (None: it is gone). A snapshot that is over makes room."""
        incarnation = follower.card.incarnation
        if now_s is None or follower.state(now_s) == EXACT:
            self._inexact.discard(incarnation)
        else:
            self._inexact.add(incarnation)
        if incarnation in self._asking and not follower.busy:
            self._asking.discard(incarnation)
            self._actions.append(HangUp(follower.card))

    # --- answers ---

    def members(self, now_s: float) -> tuple[Member, ...]:
        return tuple(follower.member(now_s) for follower in self._followers.values())

    def heard_s(self, incarnation: Incarnation) -> float | None:
        """When it was heard last; None: it is not followed."""
        follower = self._followers.get(incarnation)
        return follower.heard_s if follower else None

    def exact(self, now_s: float) -> bool:
        """There are nodes, and each is EXACT."""
        if now_s > self._silent_from_s:
            self._judge_silence(now_s)
        return bool(self._followers) and not self._inexact

    def _judge_silence(self, now_s: float) -> None:
        for follower in self._followers.values():
            self._settle(follower, now_s)
        lease_s = self.settings.lease_s
        heard = [follower.heard_s for follower in self._followers.values() if now_s - follower.heard_s <= lease_s]
        self._silent_from_s = min(heard, default=now_s) + lease_s

    def lookup(self, namespace: bytes, keys: bytes, least: int = 1, most: int = 0) -> list[Holder]:
        """Nodes whose run from the first key on has at least `least` pages, the longest runs first, at most `most` of
        them (0: all). Raises WireError for what are no keys."""
        self._pending.flush()
        prints = fingerprints.of_keys(namespace, keys)
        if not len(prints) or least > len(prints):
            return []
        return self._holders(prints, least, most)

    def _holders(self, prints: Prints, least: int, most: int) -> list[Holder]:
        values = self.table.find(prints)
        # A run begins with the first page; without that condition any page will do.
        heads = (int(values[0]),) if least > 0 else set(values.tolist())
        held = {member >> 3 for value in heads for member in self.table.members(value)}
        if not held:
            return []
        numbers = [number for number in held if number in self._common.owners]
        owners = [self._common.owners[number] for number in numbers]
        rows = self.table.tiers(values, numbers)
        if least > 1 or len(owners) > 1:
            gaps = rows == 0
            runs = np.where(gaps.any(axis=1), gaps.argmax(axis=1), len(values))
            order = np.argsort(-runs, kind="stable")
            chosen = order[runs[order] >= least][: most if most > 0 else None].tolist()
        else:
            chosen = list(range(len(owners)))
        return [Holder(owners[i].card.incarnation, owners[i].card.address, rows[i].tobytes()) for i in chosen]
