"""Pairing as a pure machine: which engines this one may exchange KV with, and how they become ready.

    A: want(address) ── Hello{card A} ──▶ B: fingerprints compared; own workers introduced to A (connect, warm)
    A ◀── Welcome{card B} or Refuse ──── B: ready for A
    A: fingerprints compared; own workers introduced to B; ready for B

A Welcome says which number of the pair A has told. If A has lost the pair since, it answers with another Hello.

Everything is idempotent: both may start, messages may repeat. A peer is remembered by incarnation; an address only
leads to the incarnation last seen there. A pair whose worker reports a loss is forgotten, and found again by `want`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from lmkv import wire
from lmkv.errors import CompatError
from lmkv.ids import Incarnation, Rank

HELLO_EVERY_S = 1.0
RETRY_REFUSED_S = 5.0
MOST_PEERS = 2048
MOST_ADDRESSES = 2 * MOST_PEERS
"""Addresses that something is remembered of. Those without a peer are forgotten above that, the oldest first."""


@dataclass(frozen=True, slots=True)
class ToEngine:
    address: str
    message: wire.Control


@dataclass(frozen=True, slots=True)
class ToWorkers:
    message: wire.Control


@dataclass(frozen=True, slots=True)
class Answer:
    identity: bytes
    message: wire.Control


Action = ToEngine | ToWorkers | Answer


class PairState(StrEnum):
    PENDING = "pending"
    READY = "ready"
    REFUSED = "refused"


@dataclass(slots=True)
class _Address:
    """What is known of an address: whom it leads to, when it was last asked, who waits for it."""

    incarnation: Incarnation | None = None
    hello_s: float = float("-inf")
    refused: str = ""
    refused_s: float = float("-inf")
    waiters: list[tuple[bytes, str]] = field(default_factory=list)
    pair: int = 0
    """Our number of the pair: a new one each time that we have lost it."""


@dataclass(slots=True)
class _Peer:
    card: wire.EngineCard
    introduced: set[Rank] = field(default_factory=set)
    pair: int = 0
    """Its number of the pair."""
    ready: bool = False
    owes_welcome: bool = False
    unlike: str = ""
    """Why no KV passes any more, although all is connected: one of both has another card now."""

    @property
    def usable(self) -> bool:
        return self.ready and not self.unlike


class Pairing:
    """`compare(ours, theirs)` raises CompatError when KV must not be exchanged. Not thread-safe."""

    def __init__(self, card: wire.EngineCard, compare: Callable[[wire.EngineCard, wire.EngineCard], None]) -> None:
        self.card = card
        self._compare = compare
        self._addresses: dict[str, _Address] = {}
        self._peers: dict[Incarnation, _Peer] = {}
        self._numbers = itertools.count(1)

    # --- questions ---

    def state(self, address: str) -> tuple[PairState, str]:
        """State of the pair with whoever is at `address`, and the reason if refused."""
        entry = self._addresses.get(address)
        if entry is None:
            return PairState.PENDING, ""
        peer = self._peers.get(entry.incarnation) if entry.incarnation else None
        if peer is not None and peer.usable:
            return PairState.READY, ""
        if peer is not None and peer.unlike:
            return PairState.REFUSED, peer.unlike
        return (PairState.REFUSED, entry.refused) if entry.refused else (PairState.PENDING, "")

    def ready_card(self, address: str) -> wire.EngineCard | None:
        entry = self._addresses.get(address)
        peer = self._peers.get(entry.incarnation) if entry and entry.incarnation else None
        return peer.card if peer is not None and peer.usable else None

    def ready_peers(self) -> list[wire.EngineCard]:
        return [peer.card for peer in self._peers.values() if peer.usable]

    # --- events ---

    def renew(self, card: wire.EngineCard) -> list[ToEngine]:
        """This engine has another card (its weights may have changed): each pair is judged anew, and each peer told,
        so that it does the same. Workers stay connected: what is under way ends as it would have."""
        self.card = card
        for peer in self._peers.values():
            self._judged(peer.card, self._refusal(peer.card))
        addresses = [peer.card.address for peer in self._peers.values()]
        return [ToEngine(address, wire.Hello(card, self.number(address))) for address in addresses]

    def want(self, address: str, now_s: float, waiter: tuple[bytes, str] | None = None) -> list[Action]:
        """Someone needs the engine at `address`. A waiter (identity, token) gets a Met when it is decided."""
        entry = self._entry(address)
        state, reason = self.state(address)
        if state is PairState.REFUSED and now_s - entry.refused_s >= RETRY_REFUSED_S:
            entry.refused, state = "", PairState.PENDING
        if waiter is not None:
            if state is not PairState.PENDING:
                return [self._met(address, waiter, reason)]
            entry.waiters = [*entry.waiters[-15:], waiter]
        if state is PairState.PENDING and now_s - entry.hello_s >= HELLO_EVERY_S:
            entry.hello_s = now_s
            return [ToEngine(address, wire.Hello(self.card, entry.pair))]
        return []

    def knows(self, incarnation: Incarnation) -> bool:
        """It is a peer, or becomes one."""
        return incarnation in self._peers

    def number(self, address: str) -> int:
        """Ours of the pair with the engine at `address`, for grants."""
        entry = self._addresses.get(address)
        return entry.pair if entry is not None else 0

    def hello(self, card: wire.EngineCard, pair: int = 0) -> list[Action]:
        refusal = self._refusal(card)
        known = self._judged(card, refusal)
        if refusal is not None:
            self._note_refusal(card.address, refusal.reason)
            return [ToEngine(card.address, refusal)]
        if known is not None and known.ready and known.pair == pair:
            return [self._welcome(card.address)]
        actions = self._admit(card, pair)
        self._peers[card.incarnation].owes_welcome = True
        return actions

    def welcome(self, card: wire.EngineCard, pair: int = 0, ours: int = 0) -> list[Action]:
        """`ours`: our number of the pair as the other side knows it. We may have lost the pair since it asked: then it
        has to hear the new one, or it would serve no grant of ours."""
        refusal = self._refusal(card)
        if refusal is not None:
            self._judged(card, refusal)
            return [*self._refused_by(card.address, refusal.reason), ToEngine(card.address, refusal)]
        known = self._judged(card, None)
        number = self._entry(card.address).pair
        if ours != number:
            return [ToEngine(card.address, wire.Hello(self.card, number))]
        if known is not None and known.ready and known.pair == pair:
            return self._tell_waiters(card.address, "")
        return self._admit(card, pair)

    def refuse(self, address: str, reason: str) -> list[Action]:
        """The engine at `address` says no. It may have compared with a card that is newer than the one known here."""
        entry = self._addresses.get(address)
        peer = self._peers.get(entry.incarnation) if entry and entry.incarnation else None
        if peer is not None:
            peer.unlike = reason
        return self._refused_by(address, reason)

    def introduced(self, told: wire.Introduced, now_s: float) -> list[Action]:
        """A worker has connected to a peer, could not, or has lost it. What it tells of an older pair is over."""
        peer = self._peers.get(told.incarnation)
        if peer is None or told.ours != self.number(peer.card.address):
            return []
        if told.error:
            reason = f"rank {told.rank}: {told.error}"
            return self._forget(told.incarnation, dead=False, reason=reason, now_s=now_s)
        if told.pair != peer.pair:
            return []
        peer.introduced.add(told.rank)
        if peer.ready or len(peer.introduced) < len(self.card.workers):
            return []
        peer.ready = True
        if peer.unlike:
            return self._tell_waiters(peer.card.address, peer.unlike)
        actions: list[Action] = []
        if peer.owes_welcome:
            actions.append(self._welcome(peer.card.address))
        return actions + self._tell_waiters(peer.card.address, "")

    def replaced(self, rank: Rank, export: bytes) -> tuple[list[Action], list[str]]:
        """A worker's data plane was made anew: all pairs are void. Returns also the addresses to pair with again."""
        workers = tuple(
            msgspec.structs.replace(worker, export=export) if worker.rank == rank else worker
            for worker in self.card.workers
        )
        self.card = msgspec.structs.replace(self.card, workers=workers)
        actions: list[Action] = [ToWorkers(wire.Dismiss(incarnation, dead=False)) for incarnation in self._peers]
        addresses = [peer.card.address for peer in self._peers.values()]
        self._peers.clear()
        for address in addresses:
            entry = self._addresses[address]
            entry.incarnation = None
            entry.hello_s = float("-inf")
            entry.pair = next(self._numbers)
        return actions, addresses

    # --- inside ---

    def _entry(self, address: str) -> _Address:
        entry = self._addresses.get(address)
        if entry is None:
            entry = self._addresses[address] = _Address(pair=next(self._numbers))
        return entry

    def _refusal(self, card: wire.EngineCard) -> wire.Refuse | None:
        if self._is_full(card):
            why = f"engine {self.card.name!r} has {MOST_PEERS} peers already"
            return wire.Refuse(self.card.incarnation, self.card.address, why, "peers")
        try:
            self._compare(self.card, card)
        except CompatError as error:
            return wire.Refuse(self.card.incarnation, self.card.address, str(error), error.field)
        return None

    def _judged(self, card: wire.EngineCard, refusal: wire.Refuse | None) -> _Peer | None:
        """A peer that is known has told this card. Only what must match can have changed: an incarnation's memory and
        addresses stay what they were."""
        peer = self._peers.get(card.incarnation)
        if peer is not None:
            peer.card = msgspec.structs.replace(peer.card, must=card.must)
            peer.unlike = refusal.reason if refusal is not None else ""
        return peer

    def _welcome(self, address: str) -> Action:
        entry = self._addresses[address]
        peer = self._peers.get(entry.incarnation) if entry.incarnation else None
        return ToEngine(address, wire.Welcome(self.card, entry.pair, peer.pair if peer is not None else 0))

    def _admit(self, card: wire.EngineCard, pair: int) -> list[Action]:
        """A new peer, one of which not all workers have told yet, or one that has lost us: what was granted in the old
        pair is void then, and the workers part first."""
        entry = self._entry(card.address)
        actions: list[Action] = []
        if entry.incarnation not in (None, card.incarnation):
            assert entry.incarnation is not None
            self._peers.pop(entry.incarnation, None)
            actions.append(ToWorkers(wire.Dismiss(entry.incarnation, dead=False)))
        known = self._peers.get(card.incarnation)
        if known is not None and (known.pair, known.card) != (pair, card):
            del self._peers[card.incarnation]
            actions.append(ToWorkers(wire.Dismiss(card.incarnation, dead=False)))
        entry.incarnation, entry.refused = card.incarnation, ""
        self._peers.setdefault(card.incarnation, _Peer(card, pair=pair))
        return [*actions, ToWorkers(wire.Introduce(card, self.card, pair, entry.pair))]

    def _forget(self, incarnation: Incarnation, dead: bool, reason: str, now_s: float) -> list[Action]:
        peer = self._peers.pop(incarnation)
        actions: list[Action] = [ToWorkers(wire.Dismiss(incarnation, dead))]
        entry = self._addresses[peer.card.address]
        entry.incarnation, entry.hello_s = None, now_s
        entry.pair = next(self._numbers)
        if not peer.ready:
            actions += self._refused_by(peer.card.address, reason)
            entry.refused_s = now_s
        return actions

    def _note_refusal(self, address: str, reason: str) -> None:
        entry = self._entry(address)
        entry.refused = reason
        entry.refused_s = entry.hello_s

    def _refused_by(self, address: str, reason: str) -> list[Action]:
        self._note_refusal(address, reason)
        return self._tell_waiters(address, reason)

    def _tell_waiters(self, address: str, reason: str) -> list[Action]:
        entry = self._addresses[address]
        waiters, entry.waiters = entry.waiters, []
        return [self._met(address, waiter, reason) for waiter in waiters]

    def _met(self, address: str, waiter: tuple[bytes, str], reason: str) -> Action:
        card = self.ready_card(address)
        name, incarnation = (card.name, card.incarnation) if card else ("", "")
        return Answer(waiter[0], wire.Met(waiter[1], name, incarnation, reason))

    def _is_full(self, card: wire.EngineCard) -> bool:
        """There is no room for this engine, unless it is known or takes the place of another at its address."""
        entry = self._addresses.get(card.address)
        known = card.incarnation in self._peers or (entry is not None and entry.incarnation is not None)
        return len(self._peers) >= MOST_PEERS and not known

    def prune(self) -> None:
        """Forget the oldest addresses that lead to no peer, above MOST_ADDRESSES. To be called after each round of
        events. Waiters there get no answer; they have deadlines."""
        spare = len(self._addresses) - MOST_ADDRESSES
        if spare > 0:
            for address in [a for a, entry in self._addresses.items() if entry.incarnation is None][:spare]:
                del self._addresses[address]
