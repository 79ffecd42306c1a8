"""The router's parts, how they are started and stopped, and the choice of engines for one attempt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import aiohttp
from prometheus_client import generate_latest

from lmkv.control.client import ControlClient
from lmkv.ids import TransferId, make_transfer_id

from .engines import Engine, Engines
from .health import HealthMonitor
from .ledger import Ledger
from .metrics import RouterMetrics
from .pairs import PairKeeper, PairState
from .policy import DECODE_POLICIES, PREFILL_POLICIES, Choice, Snapshot, choose
from .settings import RouterSettings
from .shadow import Shadows

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
        self.in_flight: set[asyncio.Task[object]] = set()
        """The tasks that serve generation requests now."""
        self._idle: asyncio.Event | None = None
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
        self.health = HealthMonitor(self.session, self.settings)
        self.pairs = PairKeeper(self.engines, self.control, self.settings)
        await self.health.revive(self.engines.all)
        for engine in self.engines.all:
            self._spawn(f"health {engine.name}", self.health.run(engine))
        for name, work in self.pairs.tasks():
            self._spawn(name, work)
        self.shadows = Shadows(self.session, self.control, self.engines, self.metrics, self.settings)

    async def stop(self) -> None:
        await self.shadows.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self.control.close()
        await self.session.close()

    def choose(self, aggregated: str, avoid: frozenset[str]) -> Choice:
        engines, pairs = self.engines, self.pairs
        decode = engines.serving()
        if decode and decode[0].is_plain:
            aggregated = aggregated or "decode_plain"
        snapshot = Snapshot(
            prefill=tuple(engine.candidate() for engine in engines.prefill if engine.healthy),
            decode=tuple(engine.candidate() for engine in decode),
            turn=self._turn,
            ready=pairs.ready,
            refused=pairs.refused,
            avoid=avoid,
        )
        self._turn += 1
        return choose(snapshot, self._prefill_policy, self._decode_policy, aggregated)

    def new_transfer_id(self) -> TransferId:
        return make_transfer_id(time.time_ns() // 1_000_000, os.urandom(10))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Counts the running task as a request in flight."""
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.add(task)
        try:
            yield
        finally:
            self.in_flight.discard(task)
            if not self.in_flight and self._idle is not None:
                self._idle.set()

    async def drain(self, drain_s: float, cut_s: float) -> None:
        """Requests in flight finish; after `drain_s` they are cut off, which takes `cut_s` at most."""
        self.draining = True
        self._idle = asyncio.Event()
        await self.shadows.close()
        if self.in_flight:
            logger.info("stopping: %d requests in flight get %g s", len(self.in_flight), drain_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._idle.wait()
        left = set(self.in_flight)
        if left:
            logger.warning("%d requests are cut off", len(left))
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=cut_s)

    def exposition(self) -> bytes:
        """/metrics. What is only a count of now is set here and not with every request."""
        self.metrics.in_flight.set(len(self.in_flight))
        for engine in self.engines.all:
            self.metrics.engine_requests.labels(engine.spec.side, engine.name).set(engine.requests)
            self.metrics.engine_up.labels(engine.spec.side, engine.name).set(engine.healthy)
        for pair in self.pairs.pairs:
            ready = pair.state is PairState.READY
            self.metrics.pair_ready.labels(pair.prefill.name, pair.decode.name).set(ready)
        return generate_latest(self.metrics.registry)

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
