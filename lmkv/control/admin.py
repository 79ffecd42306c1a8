"""A synchronous client for whoever administers nodes and controllers: one question at a time, each with a deadline."""

from __future__ import annotations

import itertools
import secrets
import time
from types import TracebackType
from typing import TypeVar

import zmq

from lmkv.addresses import split_address
from lmkv.errors import PoolError, WireError
from lmkv.ids import Incarnation
from lmkv.poolwire import (
    Demote,
    Drain,
    Drained,
    Drop,
    Dropped,
    Found,
    Keys,
    ListKeys,
    Lookup,
    Members,
    MembersAre,
    PoolMessage,
    Stats,
    StatsAre,
    Unreadable,
    decode,
    encode,
)

from .mailbox import MOST_ANSWER_BYTES

ASK_S = 2.0
DRAIN_S = 120.0

_A = TypeVar("_A", bound=PoolMessage)


class AdminError(PoolError):
    """A node or a controller was asked and did not answer as it should."""

    code = "LMKV-P842"


class Admin:
    """A connection to the node or controller at `address`. Raises ConfigError for what is no address; each question
    raises AdminError. Not thread-safe; `close()`, or use it as a context."""

    def __init__(self, address: str, *, deadline_s: float = ASK_S) -> None:
        split_address(address)
        self.address = address
        self._deadline_s = deadline_s
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MOST_ANSWER_BYTES)
        self._socket.connect(address)
        self._tokens = itertools.count(secrets.randbits(40))

    def __enter__(self) -> Admin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def members(self) -> MembersAre:
        token = next(self._tokens)
        return self._ask(Members(token), token, MembersAre)

    def stats(self) -> StatsAre:
        token = next(self._tokens)
        return self._ask(Stats(token), token, StatsAre)

    def lookup(self, namespace: bytes, keys: bytes, least: int = 1, most: int = 0) -> Found:
        token = next(self._tokens)
        return self._ask(Lookup(token, namespace, keys, least, most), token, Found)

    def list_keys(self, namespace: bytes, after: bytes, limit: int) -> Keys:
        token = next(self._tokens)
        return self._ask(ListKeys(token, namespace, after, limit), token, Keys)

    def drain(self, *, stop: bool, deadline_s: float = DRAIN_S) -> Drained:
        token = next(self._tokens)
        return self._ask(Drain(token, stop), token, Drained, deadline_s)

    def drop(self, namespace: bytes = b"", keys: bytes = b"") -> Dropped:
        token = next(self._tokens)
        return self._ask(Drop(token, namespace, keys), token, Dropped, max(self._deadline_s, DRAIN_S / 4))

    def demote(self, namespace: bytes = b"", keys: bytes = b"") -> Dropped:
        """Copies in memory of pages that a lower tier has."""
        token = next(self._tokens)
        return self._ask(Demote(token, namespace, keys), token, Dropped)

    def _ask(self, question: PoolMessage, token: int, kind: type[_A], deadline_s: float = 0.0) -> _A:
        name = type(question).__name__
        within_s = deadline_s or self._deadline_s
        end_s = time.monotonic() + within_s
        self._socket.send(encode(question), zmq.NOBLOCK)
        while True:
            left_ms = int((end_s - time.monotonic()) * 1000)
            if left_ms <= 0 or not self._socket.poll(left_ms):
                raise AdminError(
                    f"nobody at {self.address} answered {name} within {within_s:g} s",
                    hint="check the address, and that a pool node or controller runs there",
                    code="LMKV-P843",
                )
            try:
                answer = decode(self._socket.recv())
            except WireError as error:
                raise AdminError(
                    f"{self.address} answered {name} with what cannot be read: {error.message}",
                    hint="check that this is a pool node or controller of the same version",
                ) from error
            if getattr(answer, "token", None) != token:
                continue  # to a question whose deadline had passed
            if isinstance(answer, Unreadable):
                raise AdminError(
                    f"{self.address} does not take {name}: {answer.error}",
                    hint="check whether this is the address of a node or of a controller",
                )
            if not isinstance(answer, kind):
                raise AdminError(f"{self.address} answered {name} with {type(answer).__name__}")
            return answer


def nodes_of(controllers: list[str], nodes: list[str]) -> dict[str, Incarnation | None]:
    """Addresses of the nodes that are named, and of those that the controllers know; each once. Raises AdminError."""
    found: dict[str, Incarnation | None] = dict.fromkeys(nodes)
    for controller in controllers:
        with Admin(controller) as admin:
            found |= {member.card.address: member.card.incarnation for member in admin.members().nodes}
    return found
