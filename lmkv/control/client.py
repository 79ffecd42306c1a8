"""Questions of an outsider (router, CLI) to engines, over ZeroMQ and asyncio.

An engine's endpoint is a ROUTER; the client holds one DEALER an address. A question carries a token and its answer
repeats it, so answers may come late, twice or in any order. Every question has a deadline. Not thread-safe: a client
belongs to the event loop it was made in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass, field
from typing import TypeVar

import zmq
import zmq.asyncio

from lmkv import wire
from lmkv.addresses import split_address
from lmkv.control.mailbox import MOST_ANSWER_BYTES, MOST_SOCKETS
from lmkv.errors import LmkvError, WireError
from lmkv.ids import Incarnation, TransferId

logger = logging.getLogger(__name__)

MEET_DEADLINE_S = 30.0
"""Pairing connects and warms every rank of both engines: seconds, not milliseconds."""
ASK_DEADLINE_S = 2.0

_Answer = wire.Met | wire.Description | wire.Explained | wire.Buried
_A = TypeVar("_A", wire.Met, wire.Description, wire.Explained, wire.Buried)


class ControlError(LmkvError):
    """An engine's control endpoint did not answer in time, or not what was asked."""

    code = "LMKV-N700"


@dataclass(slots=True)
class _Line:
    """The connection to one address and the questions open on it."""

    socket: zmq.asyncio.Socket
    reader: asyncio.Task[None]
    waiting: dict[str, asyncio.Future[_Answer]] = field(default_factory=dict)


class ControlClient:
    """`close()` ends all connections; questions then open end with their deadline's error."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
        self._lines: dict[str, _Line] = {}
        self.unreadable = 0
        """Answers that could not be read, over all addresses."""

    async def meet(self, address: str, peer_address: str, *, deadline_s: float = MEET_DEADLINE_S) -> wire.Met:
        """Ask the engine at `address` to pair with the one at `peer_address`; returns when that is done or refused."""
        token = secrets.token_hex(8)
        return await self._ask(address, wire.Meet(peer_address, token), token, wire.Met, deadline_s)

    async def describe(self, address: str, *, deadline_s: float = ASK_DEADLINE_S) -> wire.Description:
        token = secrets.token_hex(8)
        return await self._ask(address, wire.Describe(token), token, wire.Description, deadline_s)

    async def explain(self, address: str, transfer_id: TransferId, *, deadline_s: float = ASK_DEADLINE_S) -> bytes:
        """The engine's ledger of one transfer as JSON; b"" if it does not know the transfer (any more)."""
        token = secrets.token_hex(8)
        answer = await self._ask(address, wire.Explain(token, transfer_id), token, wire.Explained, deadline_s)
        return answer.ledger

    async def bury(self, address: str, incarnation: str, *, deadline_s: float = ASK_DEADLINE_S) -> wire.Buried:
        """Tell the engine at `address` that the processes of that incarnation have ended for certain."""
        token = secrets.token_hex(8)
        return await self._ask(address, wire.Bury(token, Incarnation(incarnation)), token, wire.Buried, deadline_s)

    async def close(self) -> None:
        for line in self._lines.values():
            line.reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await line.reader
            line.socket.close(linger=0)
        self._lines.clear()
        self._context.term()

    async def _ask(self, address: str, question: wire.Control, token: str, kind: type[_A], deadline_s: float) -> _A:
        line = self._lines.get(address) or self._connect(address)
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        line.waiting[token] = future
        name = type(question).__name__
        try:
            async with asyncio.timeout(deadline_s):
                await line.socket.send(wire.encode(question))
                answer = await future
        except TimeoutError as error:
            raise ControlError(
                f"the engine at {address} did not answer {name} within {deadline_s:g} s",
                hint="check that it runs with the lmkv connector and that this is its control address",
                code="LMKV-N701",
            ) from error
        finally:
            line.waiting.pop(token, None)
        if not isinstance(answer, kind):
            raise ControlError(f"the engine at {address} answered {name} with {type(answer).__name__}")
        return answer

    def _connect(self, address: str) -> _Line:
        split_address(address)
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, MOST_ANSWER_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        # Without a connection a question waits here and dies with its deadline; else an engine that comes back would
        # be met by every question asked while it was away.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.connect(address)
        reader = asyncio.create_task(self._read(address, socket), name=f"control {address}")
        line = self._lines[address] = _Line(socket, reader)
        return line

    async def _read(self, address: str, socket: zmq.asyncio.Socket) -> None:
        while True:
            payload = await socket.recv()
            try:
                answer = wire.decode_control(payload)
                if not isinstance(answer, _Answer):
                    raise WireError(f"{type(answer).__name__} is not an answer")
            except WireError as error:
                self.unreadable += 1
                logger.warning("an answer from %s was dropped: %s", address, error)
                continue
            future = self._lines[address].waiting.get(answer.token)
            if future is None or future.done():
                logger.debug("%s from %s came after its deadline", type(answer).__name__, address)
            else:
                future.set_result(answer)
