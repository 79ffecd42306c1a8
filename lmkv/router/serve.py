"""Runs the router in this process: listens, announces itself, drains on SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

import uvloop
from aiohttp import web

from lmkv.errors import ConfigError

from .app import make_app
from .core import Router
from .settings import RouterSettings

logger = logging.getLogger(__name__)

_CUT_S = 2.0
"""What is cut off after the drain time gets this long to close its connections to engines."""


def serve(settings: RouterSettings, announce: Callable[[str], None]) -> None:
    """Until told to stop. `announce` gets the URL once requests are accepted. Raises ConfigError."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, announce))


async def _serve(settings: RouterSettings, announce: Callable[[str], None]) -> None:
    router = Router(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        make_app(router), handler_cancellation=True, access_log=None, shutdown_timeout=_CUT_S, handle_signals=False
    )
    await runner.setup()
    try:
        site = await _listen(runner, settings)
        announce(_url(runner))
        await stop.wait()
        await _drain(router, runner, site, settings.drain_s)
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, settings: RouterSettings) -> web.TCPSite:
    site = web.TCPSite(runner, settings.host, settings.port)
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}",
            hint="stop what uses it, or choose another --host or --port",
            code="LMKV-C106",
        ) from error
    return site


def _url(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _drain(router: Router, runner: web.AppRunner, site: web.TCPSite, drain_s: float) -> None:
    """No new connections, and no further request on those there are; then wait for what is in flight."""
    await site.stop()
    if runner.server is not None:
        runner.server.pre_shutdown()
    await router.drain(drain_s, _CUT_S)
