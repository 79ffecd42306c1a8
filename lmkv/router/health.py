"""Polls each engine's /health, and at once when a connection to it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import aiohttp

from .engines import Engine
from .settings import RouterSettings

logger = logging.getLogger(__name__)

SLOW_POLLS = 3
"""A busy API server may be late once or twice; a refused connection counts at once."""


class HealthMonitor:
    """`run(engine)` is a task an engine. An engine becomes healthy by a poll only."""

    def __init__(self, session: aiohttp.ClientSession, settings: RouterSettings) -> None:
        self._session = session
        self._settings = settings
        self._timeout = aiohttp.ClientTimeout(total=settings.health_timeout_s)

    async def run(self, engine: Engine) -> None:
        pause_s = self._settings.health_interval_s
        slow = 0
        while True:
            trouble, timed_out = await self._poll(engine)
            slow = slow + 1 if timed_out else 0
            if not (timed_out and engine.healthy and slow < SLOW_POLLS):
                self._apply(engine, trouble)
            pause_s = (
                self._settings.health_interval_s
                if engine.healthy or timed_out
                else min(pause_s * 2, max(self._settings.health_backoff_s, self._settings.health_interval_s))
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await engine.look.wait()
                    pause_s = self._settings.health_interval_s
            engine.look.clear()

    async def revive(self, engines: Iterable[Engine]) -> None:
        """Poll these now, all at once, and return with their health known: a retry has nobody else to go to."""
        engines = list(engines)
        for engine, (trouble, _) in zip(engines, await asyncio.gather(*map(self._poll, engines)), strict=True):
            self._apply(engine, trouble)

    async def _poll(self, engine: Engine) -> tuple[str, bool]:
        """(what is wrong or "", whether it is only slow)."""
        try:
            async with self._session.get(engine.spec.url + "/health", timeout=self._timeout) as response:
                await response.read()
                return ("" if response.status == 200 else f"/health answers {response.status}"), False
        except TimeoutError:
            return f"/health does not answer within {self._settings.health_timeout_s:g} s", True
        except (aiohttp.ClientError, OSError) as error:
            return f"/health: {error or type(error).__name__}", False

    def _apply(self, engine: Engine, trouble: str) -> None:
        if trouble and (engine.healthy or engine.trouble != trouble):
            logger.warning("%s engine %s is down: %s", engine.spec.side, engine.name, trouble)
        elif not trouble and not engine.healthy:
            logger.info("%s engine %s is up", engine.spec.side, engine.name)
        engine.healthy = not trouble
        engine.trouble = trouble
