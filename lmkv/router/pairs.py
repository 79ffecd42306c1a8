"""Keeps every (prefill, decode) pair introduced and warm, and knows which pairs are refused.

The router only says Meet to the decode engine; the engines pair themselves. A pair belongs to two incarnations: when
either engine comes back as another, it is introduced anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lmkv.control.client import ControlClient, ControlError
from lmkv.ids import Incarnation

from .engines import Engine, Engines
from .settings import RouterSettings

logger = logging.getLogger(__name__)

MEETINGS_AT_ONCE = 16
REFUSED_AGAIN_S = 10.0


class PairState(StrEnum):
    UNKNOWN = "unknown"
    """Not introduced (any more). May be used: engines also pair on a request's `peer`, only later."""
    READY = "ready"
    REFUSED = "refused"
    """Never used."""


@dataclass(slots=True, eq=False)
class Pair:
    prefill: Engine
    decode: Engine
    state: PairState = PairState.UNKNOWN
    reason: str = "not introduced yet"
    met: tuple[Incarnation | None, Incarnation | None] | None = None
    """Incarnations the state speaks of."""
    look: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, Any]:
        return {
            "prefill": self.prefill.name,
            "decode": self.decode.name,
            "state": self.state,
            "reason": self.reason,
        }


class PairKeeper:
    """`tasks()` are its coroutines, to be run as long as the router lives."""

    def __init__(self, engines: Engines, control: ControlClient, settings: RouterSettings) -> None:
        self.pairs = [Pair(p, d) for p in engines.prefill for d in engines.decode]
        self.ready: frozenset[tuple[str, str]] = frozenset()
        self.refused: frozenset[tuple[str, str]] = frozenset()
        self._engines = engines
        self._control = control
        self._settings = settings
        self._meetings = asyncio.Semaphore(MEETINGS_AT_ONCE)

    def tasks(self) -> Iterable[tuple[str, Any]]:
        for engine in self._engines.all:
            yield f"watch {engine.name}", self._watch(engine)
        for pair in self.pairs:
            yield f"pair {pair.prefill.name} {pair.decode.name}", self._keep(pair)

    async def _watch(self, engine: Engine) -> None:
        """Ask who it is, for ever; wake its pairs when that has changed."""
        while True:
            before = (engine.incarnation, engine.paired_with, engine.control_trouble)
            try:
                seen = await self._control.describe(engine.spec.control, deadline_s=self._settings.control_interval_s)
                engine.incarnation, engine.control_trouble = seen.incarnation, ""
                engine.paired_with = frozenset(incarnation for _, incarnation in seen.peers)
            except ControlError as error:
                engine.control_trouble = str(error)
            if (engine.incarnation, engine.paired_with, engine.control_trouble) != before:
                self._tell(engine, before)
            await asyncio.sleep(self._settings.control_interval_s)

    def _tell(self, engine: Engine, before: tuple[Incarnation | None, frozenset[str], str]) -> None:
        if engine.control_trouble != before[2]:
            logger.info(
                "control plane of %s engine %s: %s", engine.spec.side, engine.name, engine.control_trouble or "answers"
            )
        if engine.incarnation != before[0]:
            logger.info("%s engine %s is incarnation %s", engine.spec.side, engine.name, engine.incarnation)
        for pair in self.pairs:
            if engine in (pair.prefill, pair.decode):
                pair.look.set()

    async def _keep(self, pair: Pair) -> None:
        while True:
            pair.look.clear()
            pause_s = await self._step(pair)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await pair.look.wait()

    async def _step(self, pair: Pair) -> float:
        """Introduce the pair if it needs it; seconds until the next look."""
        now = (pair.prefill.incarnation, pair.decode.incarnation)
        poll_s = self._settings.control_interval_s
        if pair.met is not None and pair.met != now:
            self._set(pair, PairState.UNKNOWN, "an engine came back as another incarnation", None)
        if None in now or pair.prefill.control_trouble or pair.decode.control_trouble:
            return poll_s
        if pair.state is PairState.READY:
            if now[0] in pair.decode.paired_with:
                return poll_s
            self._set(pair, PairState.UNKNOWN, "the decode engine lost its peer", None)
        try:
            async with self._meetings:
                met = await self._control.meet(
                    pair.decode.spec.control, pair.prefill.spec.control, deadline_s=self._settings.meet_timeout_s
                )
        except ControlError as error:
            if pair.state is not PairState.REFUSED:
                self._set(pair, PairState.UNKNOWN, str(error), None)
            return poll_s
        if met.refused:
            self._set(pair, PairState.REFUSED, met.refused, now)
            return REFUSED_AGAIN_S
        # What the decode engine said of its peers is older than this answer; the next description confirms it.
        pair.decode.paired_with |= {met.incarnation}
        self._set(pair, PairState.READY, "", now)
        return poll_s

    def _set(
        self,
        pair: Pair,
        state: PairState,
        reason: str,
        met: tuple[Incarnation | None, Incarnation | None] | None,
    ) -> None:
        if (state, reason) != (pair.state, pair.reason):
            level = logging.WARNING if state is PairState.REFUSED else logging.INFO
            logger.log(level, "pair %s → %s is %s %s", pair.prefill.name, pair.decode.name, state, reason)
        pair.state, pair.reason, pair.met = state, reason, met
        self.ready = self._names(PairState.READY)
        self.refused = self._names(PairState.REFUSED)

    def _names(self, state: PairState) -> frozenset[tuple[str, str]]:
        return frozenset((p.prefill.name, p.decode.name) for p in self.pairs if p.state is state)
