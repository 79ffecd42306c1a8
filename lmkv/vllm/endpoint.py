"""The engine endpoint: a thread in the scheduler process that pairs with other engines and answers questions.

It alone owns its Inbox and Outbox. The engine thread talks to it through `pair`, `tell` and the ledger book.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from lmkv import wire
from lmkv.addresses import problem
from lmkv.control.guard import Guard
from lmkv.control.mailbox import Inbox, Letter, Outbox
from lmkv.control.pairing import Action, Answer, Pairing, PairState, ToEngine, ToWorkers
from lmkv.control.runtime import THREADS, Runtime
from lmkv.control.wake import has_mail
from lmkv.obs.ledger import LedgerBook

from .fingerprint import compare, is_direct, is_exact

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
_SEEK_S = 0.1
_WANTED_FOR_S = 60.0
MOST_UNSENT = 4096
MOST_WANTED = 512
"""Addresses that are sought at a time."""


class EngineEndpoint:
    """Binds at construction (raises ConfigError), runs from `start(card)` to `close()`.

    The engine thread uses what stands first. The rest, a `Part`, is the endpoint thread's.
    """

    def __init__(self, listen: str, advertise: str, book: LedgerBook, runtime: Runtime = THREADS) -> None:
        self._runtime = runtime
        self._context = runtime.context()
        self._inbox = Inbox(self._context, listen, advertise)
        self._outbox = Outbox(self._context, clock=runtime.clock)
        self._book = book
        self._lock = threading.Lock()
        self._pairing: Pairing | None = None
        self._wanted: dict[str, float] = {}
        self._to_send: deque[tuple[str, wire.Control]] = deque(maxlen=MOST_UNSENT)
        self._guard = Guard("endpoint", runtime.caught)
        self._is_watched = False
        self._is_over = False
        self._is_closed = False
        self._hear_pool: Callable[[wire.PoolNodes | wire.Parked], None] = lambda message: None
        self._find_trouble: Callable[[], str] = lambda: ""
        self._private = ""
        self._closed = "the digest of the weights is not known yet"
        """Why there is no pairing (yet, or any more)."""
        self._is_refusing = False
        self._runner = runtime.runner("lmkv-endpoint", self)

    @property
    def address(self) -> str:
        return self._inbox.address

    @property
    def unreadable(self) -> int:
        """Messages that could not be read, and were dropped."""
        return self._inbox.unreadable

    def start(self, card: wire.EngineCard, peers: tuple[str, ...], private: str = "") -> None:
        """`private`: why this engine exchanges KV with no other, for whoever asks (Describe)."""
        now_s = self._runtime.clock()
        with self._lock:
            if self._is_closed:
                return
            self._pairing, self._private = Pairing(card, compare), private
            self._wanted = dict.fromkeys(peers, now_s + _WANTED_FOR_S)
            self._runner.start()

    def on_pool(self, hear: Callable[[wire.PoolNodes | wire.Parked], None]) -> None:
        """Before `start`: who hears, on the endpoint's thread, what is told of the pool."""
        self._hear_pool = hear

    def on_describe(self, find_trouble: Callable[[], str]) -> None:
        """Before `start`: what has failed beside the pairs, or ""; asked on the endpoint's thread (Describe)."""
        self._find_trouble = find_trouble

    def refuse_all(self, reason: str) -> None:
        """Instead of `start`, or from then on: this engine pairs with nobody, and tells why to who asks."""
        with self._lock:
            self._refuse_all(reason)

    def _refuse_all(self, reason: str) -> None:
        self._closed, self._is_refusing = reason, True
        self._wanted.clear()

    # --- engine thread ---

    def pair(self, address: str) -> tuple[PairState, str, wire.EngineCard | None]:
        """State of the pair with the engine at `address`; a pending one is (further) sought.

        Before `start` there are no pairs. That is told as a refusal, so that no request waits for it."""
        if self._pairing is None or self._is_refusing:
            return PairState.REFUSED, self._closed, None
        with self._lock:
            state, reason = self._pairing.state(address)
            card = self._pairing.ready_card(address)
            if state is not PairState.READY and (address in self._wanted or len(self._wanted) < MOST_WANTED):
                new = address not in self._wanted
                self._wanted[address] = self._runtime.clock() + _WANTED_FOR_S
                if new:
                    self._runner.wake()
        return state, reason, card

    def pair_number(self, address: str) -> int:
        """Ours of the pair, which grants to that engine carry."""
        if self._pairing is None:
            return 0
        with self._lock:
            return self._pairing.number(address)

    def is_direct(self, card: wire.EngineCard) -> bool:
        """KV of that engine is copied verbatim into our blocks."""
        assert self._pairing is not None
        return is_direct(self._pairing.card, card)

    def is_exact(self, card: wire.EngineCard) -> bool:
        """KV of that engine is what ours would compute."""
        assert self._pairing is not None
        return is_exact(self._pairing.card, card)

    def renew(self, card: wire.EngineCard, private: str) -> None:
        """After `start`: this engine is described by another card from now on, and each pair is judged anew."""
        assert self._pairing is not None
        with self._lock:
            self._private = private
            for action in self._pairing.renew(card):
                self._to_send.append((action.address, action.message))
        self._runner.wake()

    def tell(self, address: str, message: wire.Control) -> None:
        """Send a message that is in no hurry. Too many that nobody sends (no pairing yet, or never) are dropped and
        counted, the oldest first."""
        if len(self._to_send) == MOST_UNSENT:
            self._book.count("tell:dropped")
        self._to_send.append((address, message))
        self._runner.wake()
        if self._is_over:
            self._to_send.clear()

    def close(self) -> None:
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        was_started = self._pairing is not None
        self._runner.stop()
        if not was_started and not was_closed:
            self.end()

    # --- endpoint thread ---

    def open(self) -> None:
        """All is open since construction."""

    def turn(self, now_s: float) -> None:
        while self._to_send:
            address, message = self._to_send.popleft()
            kind = f"send:{type(message).__name__}"
            self._guard.attempt(
                kind,
                lambda address=address, message=message: self._outbox.send(address, message),  # type: ignore[misc]
            )
        for letter in self._inbox.receive():
            kind, sender = type(letter.message).__name__, str(getattr(letter.message, "incarnation", ""))
            self._guard.attempt(
                kind,
                lambda letter=letter: self._take(letter, now_s),  # type: ignore[misc]
                sender=sender,
            )
        self._seek(now_s)
        for kind, count in self._guard.take_counts().items():
            self._book.count(f"failure:{kind}", count)

    def next_s(self, now_s: float) -> float:
        if has_mail(self._inbox.socket):
            return 0.0
        return _SEEK_S if self._wanted else _IDLE_S

    def descriptors(self) -> Sequence[int] | None:
        if self._is_watched:
            return None
        self._is_watched = True
        return [self._inbox.socket.fileno()]

    def end(self) -> None:
        self._is_over = True
        self.refuse_all("this engine's endpoint has ended")
        self._to_send.clear()
        with contextlib.ExitStack() as closing:  # whatever fails, the rest is closed
            closing.callback(self._context.term)
            closing.callback(self._outbox.close)
            closing.callback(self._inbox.close)

    def _seek(self, now_s: float) -> None:
        assert self._pairing is not None
        with self._lock:
            wanted = list(self._wanted.items())
            self._pairing.prune()
        for address, until_s in wanted:
            self._guard.attempt(
                "seek",
                lambda address=address, until_s=until_s: self._seek_one(address, until_s, now_s),  # type: ignore[misc]
                lambda address=address: self._wanted.pop(address, None),  # type: ignore[misc]
                address,
            )
        self._outbox.sweep()

    def _seek_one(self, address: str, until_s: float, now_s: float) -> None:
        assert self._pairing is not None
        with self._lock:
            if now_s > until_s or self._pairing.state(address)[0] is PairState.READY:
                self._wanted.pop(address, None)
                return
            actions = self._pairing.want(address, now_s)
        self._do(actions)

    def _take(self, letter: Letter, now_s: float) -> None:
        pairing, message = self._pairing, letter.message
        assert pairing is not None
        actions: list[Action] = []
        with self._lock:
            match message:
                case wire.Hello() | wire.Welcome() if self._is_refusing:
                    refusal = wire.Refuse(pairing.card.incarnation, pairing.card.address, self._closed)
                    actions = [ToEngine(message.card.address, refusal)]
                case wire.Meet() if self._is_refusing:
                    actions = [Answer(letter.identity, wire.Met(message.token, "", "", self._closed))]
                case wire.Hello():
                    actions = pairing.hello(message.card, message.pair)
                case wire.Welcome():
                    actions = pairing.welcome(message.card, message.pair, message.yours)
                case wire.Refuse():
                    actions = pairing.refuse(message.address, message.reason)
                    logger.error("pairing refused by %s: %s", message.address, message.reason)
                case wire.Introduced():
                    actions = pairing.introduced(message, now_s)
                case wire.Replaced():
                    actions, lost = pairing.replaced(message.rank, message.export)
                    self._wanted |= dict.fromkeys(lost, now_s + _WANTED_FOR_S)
                case wire.Broken():
                    self._refuse_all(message.reason)
                case wire.Meet():
                    actions = self._meet(pairing, message, letter.identity, now_s)
                case wire.PoolNodes() | wire.Parked():
                    self._hear_pool(message)
                case wire.NotNeeded():
                    actions = [ToWorkers(message)]
                case wire.Describe():
                    actions = [Answer(letter.identity, self._description(message.token))]
                case wire.Bury():
                    actions = self._bury(pairing, message, letter.identity)
                case wire.Explain():
                    explained = wire.Explained(message.token, self._book.to_json(message.transfer_id))
                    actions = [Answer(letter.identity, explained)]
                case _:
                    logger.warning("the engine endpoint does not take %s", type(message).__name__)
        self._do(actions)

    def _meet(self, pairing: Pairing, message: wire.Meet, identity: bytes, now_s: float) -> list[Action]:
        """With the lock held. Pair with whoever is at an address, unless it is none, or too many are being sought."""
        wrong = problem(message.address)
        if not wrong and len(self._wanted) >= MOST_WANTED and message.address not in self._wanted:
            wrong = f"this engine already seeks {MOST_WANTED} others"
        if wrong:
            self._book.count("meet:refused")
            return [Answer(identity, wire.Met(message.token, "", "", wrong))]
        actions = pairing.want(message.address, now_s, (identity, message.token))
        if pairing.state(message.address)[0] is PairState.PENDING:
            self._wanted[message.address] = now_s + _WANTED_FOR_S
        return actions

    def _bury(self, pairing: Pairing, message: wire.Bury, identity: bytes) -> list[Action]:
        """The workers are told even if no such peer is known here any more: they remember those they have lost."""
        if pairing.knows(message.incarnation):
            why = f"{message.incarnation} is paired and heard; end it, wait until it is lost, and say it again"
            return [Answer(identity, wire.Buried(message.token, why))]
        gone = wire.Dismiss(message.incarnation, dead=True)
        return [ToWorkers(gone), Answer(identity, wire.Buried(message.token))]

    def _description(self, token: str) -> wire.Description:
        assert self._pairing is not None
        card = self._pairing.card
        trouble = self._closed if self._is_refusing else self._find_trouble()
        peers = tuple((peer.name, peer.incarnation) for peer in self._pairing.ready_peers())
        return wire.Description(
            token, card.name, card.incarnation, card.role, peers, self._book.counts(), self._private, trouble
        )

    def _do(self, actions: list[Action]) -> None:
        assert self._pairing is not None
        for action in actions:
            match action:
                case ToEngine():
                    if isinstance(action.message, wire.Refuse):
                        logger.error("pairing with %s refused: %s", action.address, action.message.reason)
                    self._outbox.send(action.address, action.message)
                case ToWorkers():
                    for worker in self._pairing.card.workers:
                        self._outbox.send(worker.address, action.message)
                case Answer():
                    self._inbox.answer(action.identity, action.message)
