"""The engine endpoint: a thread in the scheduler process that pairs with other engines and answers questions.

It alone owns its Inbox and Outbox. The engine thread talks to it through `pair`, `tell` and the ledger book.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from lmkv import wire
from lmkv.addresses import problem
from lmkv.control.mailbox import Inbox, Letter, Outbox, make_context
from lmkv.control.pairing import Action, Answer, Pairing, PairState, ToEngine, ToWorkers
from lmkv.control.wake import Wake
from lmkv.obs.ledger import LedgerBook

from .fingerprint import compare, is_direct, is_exact

logger = logging.getLogger(__name__)

_IDLE_S = 1.0
_WANTED_FOR_S = 60.0
MOST_UNSENT = 4096
MOST_WANTED = 512
"""Addresses that are sought at a time."""


class EngineEndpoint:
    """Binds at construction (raises ConfigError), runs from `start(card)` to `close()`."""

    def __init__(self, listen: str, advertise: str, book: LedgerBook) -> None:
        self._context = make_context()
        self._inbox = Inbox(self._context, listen, advertise)
        self._outbox = Outbox(self._context)
        self._book = book
        self._wake = Wake()
        self._lock = threading.Lock()
        self._pairing: Pairing | None = None
        self._wanted: dict[str, float] = {}
        self._to_send: deque[tuple[str, wire.Control]] = deque(maxlen=MOST_UNSENT)
        self._stop = threading.Event()
        self._hear_pool: Callable[[wire.PoolNodes | wire.Parked], None] = lambda message: None
        self._closed = "the digest of the weights is not known yet"
        """Why there is no pairing (yet)."""
        self._thread = threading.Thread(target=self._run, name="lmkv-endpoint", daemon=True)

    @property
    def address(self) -> str:
        return self._inbox.address

    @property
    def unreadable(self) -> int:
        """Messages that could not be read, and were dropped."""
        return self._inbox.unreadable

    def start(self, card: wire.EngineCard, peers: tuple[str, ...]) -> None:
        now_s = time.monotonic()
        with self._lock:
            if self._stop.is_set():
                return
            self._pairing = Pairing(card, compare)
            self._wanted = dict.fromkeys(peers, now_s + _WANTED_FOR_S)
            self._thread.start()

    def on_pool(self, hear: Callable[[wire.PoolNodes | wire.Parked], None]) -> None:
        """Before `start`: who hears, on the endpoint's thread, what is told of the pool."""
        self._hear_pool = hear

    def refuse_all(self, reason: str) -> None:
        """Instead of `start`: this engine pairs with nobody."""
        self._closed = reason

    # --- engine thread ---

    def pair(self, address: str) -> tuple[PairState, str, wire.EngineCard | None]:
        """State of the pair with the engine at `address`; a pending one is (further) sought.

        Before `start` there are no pairs. That is told as a refusal, so that no request waits for it."""
        if self._pairing is None:
            return PairState.REFUSED, self._closed, None
        with self._lock:
            state, reason = self._pairing.state(address)
            card = self._pairing.ready_card(address)
            if state is not PairState.READY and (address in self._wanted or len(self._wanted) < MOST_WANTED):
                new = address not in self._wanted
                self._wanted[address] = time.monotonic() + _WANTED_FOR_S
                if new:
                    self._wake.set()
        return state, reason, card

    def is_direct(self, card: wire.EngineCard) -> bool:
        """KV of that engine is copied verbatim into our blocks."""
        assert self._pairing is not None
        return is_direct(self._pairing.card, card)

    def is_exact(self, card: wire.EngineCard) -> bool:
        """KV of that engine is what ours would compute."""
        assert self._pairing is not None
        return is_exact(self._pairing.card, card)

    def tell(self, address: str, message: wire.Control) -> None:
        """Send a message that is in no hurry. Too many that nobody sends (no pairing yet, or never) are dropped and
        counted, the oldest first."""
        if len(self._to_send) == MOST_UNSENT:
            self._book.count("tell:dropped")
        self._to_send.append((address, message))
        self._wake.set()

    def close(self) -> None:
        with self._lock:
            self._stop.set()
        self._wake.set()
        if self._thread.ident is None:  # never started; a thread that has run has ended what it used
            self._end()
        else:
            self._thread.join(timeout=5)

    # --- endpoint thread ---

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox.socket, zmq.POLLIN)
        poller.register(self._wake.fd, zmq.POLLIN)
        while not self._stop.is_set():
            poller.poll(int((0.1 if self._wanted else _IDLE_S) * 1000))
            self._wake.clear()
            while self._to_send:
                self._outbox.send(*self._to_send.popleft())
            for letter in self._inbox.receive():
                self._take(letter)
            self._seek()
        self._end()

    def _end(self) -> None:
        self._inbox.close()
        self._outbox.close()
        self._context.term()
        self._wake.close()

    def _seek(self) -> None:
        assert self._pairing is not None
        now_s = time.monotonic()
        actions: list[Action] = []
        with self._lock:
            for address, until_s in list(self._wanted.items()):
                if now_s > until_s or self._pairing.state(address)[0] is PairState.READY:
                    del self._wanted[address]
                else:
                    actions += self._pairing.want(address, now_s)
            self._pairing.prune()
        self._outbox.sweep()
        self._do(actions)

    def _take(self, letter: Letter) -> None:
        pairing, message, now_s = self._pairing, letter.message, time.monotonic()
        assert pairing is not None
        actions: list[Action] = []
        with self._lock:
            match message:
                case wire.Hello():
                    actions = pairing.hello(message.card)
                case wire.Welcome():
                    actions = pairing.welcome(message.card)
                case wire.Refuse():
                    actions = pairing.refuse(message.address, message.reason)
                    logger.error("pairing refused by %s: %s", message.address, message.reason)
                case wire.Introduced():
                    actions = pairing.introduced(message.rank, message.incarnation, message.error, now_s)
                case wire.Meet():
                    actions = self._meet(pairing, message, letter.identity, now_s)
                case wire.PoolNodes() | wire.Parked():
                    self._hear_pool(message)
                case wire.NotNeeded():
                    actions = [ToWorkers(message)]
                case wire.Describe():
                    actions = [Answer(letter.identity, self._description(message.token))]
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

    def _description(self, token: str) -> wire.Description:
        assert self._pairing is not None
        card = self._pairing.card
        peers = tuple((peer.name, peer.incarnation) for peer in self._pairing.ready_peers())
        return wire.Description(token, card.name, card.incarnation, card.role, peers, self._book.counts())

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
