"""Routes of the router and their small handlers."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

import lmkv
from lmkv.control.client import ControlError
from lmkv.errors import LmkvError
from lmkv.ids import TransferId
from lmkv.wire import PROTOCOL

from .bodies import Kind
from .core import Router
from .headers import REQUEST_ID, check_key, downstream_headers, upstream_headers
from .ledger import AttemptEntry, to_json
from .pairs import PairState
from .proxy import Exchange
from .replies import ClientError, NoEngineError, NotFoundError, UpstreamFailedError, error_response

logger = logging.getLogger(__name__)

ROUTER = web.AppKey("router", Router)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(router: Router) -> web.Application:
    """The application owns the router's start and stop."""
    app = web.Application(client_max_size=router.settings.max_body_bytes, middlewares=[_errors])
    app[ROUTER] = router
    app.cleanup_ctx.append(_life)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/completions", _completion)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/health", _healthz)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/version", _version)
    app.router.add_get("/explain/{id}", _explain)
    return app


async def _life(app: web.Application) -> AsyncIterator[None]:
    await app[ROUTER].start()
    yield
    await app[ROUTER].stop()


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """What a client did wrong in the form it expects, for the small handlers and for paths that do not exist."""
    try:
        return await handler(request)
    except ClientError as error:
        return error_response(error)
    except web.HTTPNotFound:
        return error_response(NotFoundError(f"there is no {request.method} {request.path}"))


async def _chat(request: web.Request) -> web.StreamResponse:
    return await Exchange(request.app[ROUTER], Kind.CHAT, request, _request_id(request)).run()


async def _completion(request: web.Request) -> web.StreamResponse:
    return await Exchange(request.app[ROUTER], Kind.COMPLETION, request, _request_id(request)).run()


def _request_id(request: web.Request) -> str:
    return request.headers.get(REQUEST_ID) or secrets.token_hex(16)


async def _models(request: web.Request) -> web.StreamResponse:
    """As the first decode engine that serves answers it."""
    router = request.app[ROUTER]
    settings = router.settings
    check_key(request.headers, settings.api_key)
    headers = upstream_headers(request.headers, _request_id(request), settings.api_key, settings.engine_api_key)
    timeout = aiohttp.ClientTimeout(total=settings.connect_timeout_s)
    trouble = ""
    for engine in router.engines.serving():
        try:
            async with router.session.get(engine.spec.url + "/v1/models", headers=headers, timeout=timeout) as answer:
                body = await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            trouble = f"{engine.name}: {error or type(error).__name__}"
            engine.look.set()
            continue
        return web.Response(status=answer.status, body=body, headers=downstream_headers(answer.headers, {}))
    if trouble:
        raise UpstreamFailedError(f"no decode engine told its models, the last one: {trouble}")
    raise NoEngineError("no decode engine is healthy", hint="see /readyz of the router")


async def _healthz(request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _readyz(request: web.Request) -> web.Response:
    """Ready means: a generation request can be served now. `warnings` tell what is not as it should be."""
    router = request.app[ROUTER]
    reasons = []
    if router.draining:
        reasons.append("the router is stopping")
    serving = router.engines.serving()
    if not serving:
        reasons.append("no decode engine is healthy")
    warnings = [f"{e.spec.side} engine {e.name} is down: {e.trouble}" for e in router.down(router.engines.all)]
    warnings += [
        f"pair {pair.prefill.name} → {pair.decode.name} is refused: {pair.reason}"
        for pair in router.pairs.pairs
        if pair.state is PairState.REFUSED
    ]
    if serving and serving[0].is_plain:
        warnings.append("no decode engine is healthy: those in which only lmkv is dead compute prompts themselves")
    elif not any(engine.healthy for engine in router.engines.prefill):
        warnings.append("no prefill engine is healthy: decode engines compute prompts themselves")
    body = {
        "ready": not reasons,
        "reasons": reasons,
        "warnings": warnings,
        "engines": [engine.describe() for engine in router.engines.all],
        "pairs": [pair.describe() for pair in router.pairs.pairs],
    }
    return web.json_response(body, status=503 if reasons else 200)


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[ROUTER].exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _version(request: web.Request) -> web.Response:
    return web.json_response({"version": lmkv.__version__, "protocol": PROTOCOL})


async def _explain(request: web.Request) -> web.Response:
    """The router's ledger of a request, each attempt joined with what both engines remember of its transfer."""
    router = request.app[ROUTER]
    check_key(request.headers, router.settings.api_key)
    wanted = request.match_info["id"]
    entry = router.ledger.find(wanted)
    if entry is None:
        raise NotFoundError(
            f"no request or transfer {wanted!r} is known",
            hint=f"the last {router.settings.ledger_requests} requests are (see --ledger-requests)",
        )
    plain = to_json(entry)
    engines = await asyncio.gather(*(_engines_of(router, attempt) for attempt in entry.attempts))
    for attempt, told in zip(plain["attempts"], engines, strict=True):
        attempt["engines"] = told
    return web.json_response(plain)


async def _engines_of(router: Router, attempt: AttemptEntry) -> dict[str, Any]:
    if attempt.ledger_id is not None:
        return {"decode": await _told_by(router, attempt.decode, attempt.ledger_id)}
    if attempt.transfer_id is None or attempt.prefill is None:
        return {}
    sides = {"prefill": attempt.prefill, "decode": attempt.decode}
    told = await asyncio.gather(*(_told_by(router, name, attempt.transfer_id) for name in sides.values()))
    return dict(zip(sides, told, strict=True))


async def _told_by(router: Router, name: str, transfer_id: TransferId) -> Any:
    address = router.engines[name].spec.control
    try:
        ledger = await router.control.explain(address, transfer_id, deadline_s=router.settings.explain_timeout_s)
        return json.loads(ledger) if ledger else None
    except ControlError as error:
        return {"trouble": str(error)}
    except ValueError as error:
        return {"trouble": str(LmkvError(f"the ledger of {name} is not JSON: {error}"))}
