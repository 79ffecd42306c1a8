"""Polls each engine's /health, and at once when a connection to it was lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterable

import aiohttp

from .engines import Engine
from .settings import RouterSettings

logger = logging.getLogger(__name__)

SLOW_POLLS = 3
"""A busy API server may be late once or twice; a refused connection counts at once."""
MOST_SAID = 500


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
            trouble, timed_out, is_plain = await self._poll(engine)
            slow = slow + 1 if timed_out else 0
            if not (timed_out and (engine.healthy or engine.is_plain) and slow < SLOW_POLLS):
                self._apply(engine, trouble, is_plain)
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
        for engine, told in zip(engines, await asyncio.gather(*map(self._poll, engines)), strict=True):
            trouble, _, is_plain = told
            self._apply(engine, trouble, is_plain)

    async def _poll(self, engine: Engine) -> tuple[str, bool, bool]:
        """(what is wrong or "", whether it is only slow, whether it serves as a plain engine all the same)."""
        try:
            async with self._session.get(engine.spec.url + "/health", timeout=self._timeout) as response:
                said = lmkv_trouble(await response.read()) if response.status == 503 else ""
                trouble = "" if response.status == 200 else f"/health answers {response.status}"
                return (f"{trouble}: {said}", False, True) if said else (trouble, False, False)
        except TimeoutError:
            return f"/health does not answer within {self._settings.health_timeout_s:g} s", True, False
        except (aiohttp.ClientError, OSError) as error:
            return f"/health: {error or type(error).__name__}", False, False

    def _apply(self, engine: Engine, trouble: str, is_plain: bool) -> None:
        if trouble and (engine.healthy or engine.trouble != trouble):
            logger.warning("%s engine %s is down: %s", engine.spec.side, engine.name, trouble)
        elif not trouble and not engine.healthy:
            logger.info("%s engine %s is up", engine.spec.side, engine.name)
        engine.healthy = not trouble
        engine.is_plain = is_plain
        engine.trouble = trouble


def lmkv_trouble(body: bytes) -> str:
    """What the middleware of an engine (lmkv.vllm.health) says, or "" if it was not the one that spoke."""
    try:
        told = json.loads(body)
    except ValueError:
        return ""
    said = told.get("trouble") if isinstance(told, dict) else None
    return said[:MOST_SAID] if isinstance(said, str) else ""
