"""The router's parts, how they are started and stopped, and the choice of engines for one attempt."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

import aiohttp

from lmkv.control.client import ControlClient
from lmkv.ids import TransferId, make_transfer_id

from .engines import Engine, Engines
from .health import HealthMonitor
from .ledger import Ledger
from .metrics import RouterMetrics
from .pairs import PairKeeper
from .policy import DECODE_POLICIES, PREFILL_POLICIES, Choice, Snapshot, choose
from .settings import RouterSettings

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 3.0
"""Below vLLM's 5 s: a request must not meet a connection the engine is just closing."""


class Router:
    """`start()` and `stop()` in the loop that serves; everything else in between."""

    def __init__(self, settings: RouterSettings) -> None:
        """Raises ConfigError for bad or repeated engines."""
        self.settings = settings
        self.engines = Engines(settings)
        self.metrics = RouterMetrics()
        self.ledger = Ledger(settings.ledger_requests)
        self.draining = False
        self.in_flight = 0
        self.idle = asyncio.Event()
        """Set while nothing is in flight."""
        self.idle.set()
        self._turn = 0
        self._prefill_policy = PREFILL_POLICIES[settings.prefill_policy or settings.policy]
        self._decode_policy = DECODE_POLICIES[settings.decode_policy or settings.policy]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self.session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Content-Type", "User-Agent"),
        )
        self.control = ControlClient()
        self.health = HealthMonitor(self.session, self.settings, self.metrics)
        self.pairs = PairKeeper(self.engines, self.control, self.settings, self.metrics)
        await self.health.revive(self.engines.all)
        for engine in self.engines.all:
            self._spawn(f"health {engine.name}", self.health.run(engine))
        for name, work in self.pairs.tasks():
            self._spawn(name, work)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self.control.close()
        await self.session.close()

    def choose(self, aggregated: str, avoid: frozenset[str]) -> Choice:
        engines, pairs = self.engines, self.pairs
        snapshot = Snapshot(
            prefill=tuple(engine.candidate() for engine in engines.prefill if engine.healthy),
            decode=tuple(engine.candidate() for engine in engines.decode if engine.healthy),
            turn=self._turn,
            ready=pairs.ready,
            refused=pairs.refused,
            avoid=avoid,
        )
        self._turn += 1
        return choose(snapshot, self._prefill_policy, self._decode_policy, aggregated)

    def new_transfer_id(self) -> TransferId:
        return make_transfer_id(time.time_ns() // 1_000_000, os.urandom(10))

    def entered(self, change: int) -> None:
        """A request came (+1) or went (-1)."""
        self.in_flight += change
        self.metrics.in_flight.set(self.in_flight)
        if self.in_flight:
            self.idle.clear()
        else:
            self.idle.set()

    def down(self, engines: list[Engine]) -> list[Engine]:
        return [engine for engine in engines if not engine.healthy]

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_report)
        self._tasks.append(task)


def _report(task: asyncio.Task[None]) -> None:
    """These tasks run for ever; one that ends by itself is a bug that must be seen."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("task %r died", task.get_name(), exc_info=error)
