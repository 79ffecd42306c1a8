"""Questions to one pool node or controller: a DEALER, tokens, deadlines, callbacks. One thread owns a link.

What a node gives away in an answer that is not awaited any more is given back: slots by taking the question back, pins
by unpinning when the late answer comes. Messages that give slots back may be lost with a connection, so the link also
keeps count of the slots that are still out: `settled` goes to the node with every PoolHello.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import zmq

from lmkv import poolwire as pw
from lmkv.addresses import split_address
from lmkv.control.mailbox import MOST_ANSWER_BYTES
from lmkv.control.wake import has_mail
from lmkv.errors import WireError
from lmkv.poolwire import Refusal

logger = logging.getLogger(__name__)

A = TypeVar("A", bound=pw.PoolMessage)


@dataclass(slots=True)
class _Open:
    question: pw.PoolMessage
    kind: type[pw.PoolMessage]
    done: Callable[[pw.PoolMessage | None], None]
    until_s: float


class Link:
    """`fd` is readable when `receive` may have something to do; call that at least until `next_s` is over as well."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        split_address(address)
        self.address = address
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 100)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MOST_ANSWER_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 4096)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.connect(address)
        self._open: dict[int, _Open] = {}
        # Tokens name questions to the node also after this link: none may be another link's.
        self._next_token = int.from_bytes(entropy(6), "little") + 1
        self._first_token = self._next_token
        self._out: dict[int, set[int]] = {}
        """Reserve questions, the oldest first, with the generations of their slots that may still be written to; empty
        while the answer is awaited."""
        self.unreadable = 0

    @property
    def settled(self) -> tuple[int, int]:
        """[lo, hi): what was reserved by questions with these tokens is committed or given back, and not written to."""
        return self._first_token, next(iter(self._out), self._next_token)

    def void_slots(self) -> None:
        """The node that has lent them is no more."""
        self._out = {token: set() for token in self._out if token in self._open}

    @property
    def fd(self) -> int:
        return int(self._socket.fileno())

    def ask(
        self,
        question: Callable[[int], pw.PoolMessage],
        kind: type[A],
        done: Callable[[A | None], None],
        until_s: float,
    ) -> None:
        """`question(token)` makes the message. `done` gets the answer, or None: refused, lost, or late."""
        token, self._next_token = self._next_token, self._next_token + 1
        message = question(token)
        self._open[token] = _Open(message, kind, done, until_s)  # type: ignore[arg-type]
        if isinstance(message, pw.Reserve):
            self._out[token] = set()
        if not self.tell(message):
            self._open[token].until_s = 0.0

    def forget(self, token: int) -> None:
        """The question is answered otherwise; its answer is late from now on."""
        self._open.pop(token, None)

    def tell(self, message: pw.PoolMessage) -> bool:
        """One-way. False: the queue is full, or the link closed."""
        if isinstance(message, pw.Abandon) and message.drained:
            self._came_back(message.generations)
        if self._socket.closed:
            return False
        try:
            self._socket.send(pw.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    @property
    def has_slots_out(self) -> bool:
        """Something of ours may still be written to what the node has lent."""
        return any(self._out.values())

    def receive(self, now_s: float) -> None:
        """Give out what has come, and give up what is late."""
        while True:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._take(payload)
        for token in [token for token, question in self._open.items() if now_s > question.until_s]:
            late = self._open.pop(token, None)
            if late is not None:
                self._take_back(token, late)
                late.done(None)

    def _came_back(self, generations: tuple[int, ...]) -> None:
        for token, out in list(self._out.items()):
            if out:
                out.difference_update(generations)
                if not out:
                    del self._out[token]

    def _count(self, question: pw.PoolMessage, answer: pw.PoolMessage | None) -> None:
        """Slots are out with a Reserved, and back with a Commit, however that was answered."""
        if isinstance(question, pw.Reserve):
            slots = answer.slots if isinstance(answer, pw.Reserved) else ()
            if out := {slot.generation for slot in slots if slot.refusal is Refusal.NONE}:
                self._out[question.token] = out
            else:
                self._out.pop(question.token, None)
        elif isinstance(question, pw.Commit):
            self._came_back(question.generations)

    def _take_back(self, token: int, late: _Open) -> None:
        q = late.question
        self._count(q, None)
        if isinstance(q, pw.Reserve):
            self.tell(pw.Abandon(q.incarnation, q.rank, q.namespace, q.keys, (), drained=True, question=token))

    def _take(self, payload: bytes) -> None:
        try:
            message = pw.decode(payload)
        except WireError as error:
            self.unreadable += 1
            logger.warning("an answer of %s was dropped: %s", self.address, error)
            return
        question = self._open.pop(getattr(message, "token", 0), None)
        if question is None:  # late
            if isinstance(message, pw.Pinned) and message.lease:
                self.tell(pw.Unpin(message.lease))
            return
        self._count(question.question, message)
        if isinstance(message, pw.Unreadable):
            logger.warning("%s refuses a question: %s", self.address, message.error)
            question.done(None)
        elif isinstance(message, question.kind):
            question.done(message)
        else:
            logger.warning("%s answers with %s", self.address, type(message).__name__)
            question.done(None)

    def next_s(self, now_s: float) -> float:
        """0 also when something has come: what was sent may have taken its wake-up (`fd` tells only once)."""
        if has_mail(self._socket):
            return 0.0
        return max(0.0, min((question.until_s - now_s for question in self._open.values()), default=3600.0))

    def close(self) -> None:
        """Open questions are answered with None. Idempotent."""
        waiting, self._open = self._open, {}
        if not self._socket.closed:
            for token, question in waiting.items():
                self._take_back(token, question)
            self._socket.close()
        for question in waiting.values():
            question.done(None)
