"""The way of one generation request: read, attempt until a first token, then forward bytes.

Nothing, not even a status line, goes to the client before an attempt has opened: up to then another attempt on other
engines is invisible to it. After that bytes are forwarded unread.
"""

from __future__ import annotations

import asyncio
import logging
import time

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from . import bodies
from .bodies import Kind, Members
from .core import Router
from .headers import REQUEST_ID, TRANSFER_ID, check_key, downstream_headers, upstream_headers
from .ledger import AttemptEntry, RequestEntry
from .policy import Choice
from .replies import (
    BodyTimeoutError,
    BodyTooLargeError,
    ClientError,
    NoEngineError,
    StreamBrokenError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    error_event,
    error_response,
)
from .shadow import Asked
from .upstream import Attempt, AttemptFailedError, Opened, Upstream

logger = logging.getLogger(__name__)


class Exchange:
    """One client request. `run()` once."""

    def __init__(self, router: Router, kind: Kind, request: web.Request, request_id: str) -> None:
        self._router = router
        self._kind = kind
        self._request = request
        self._request_id = request_id
        self._reply: web.StreamResponse | None = None
        """Set as soon as something has gone to the client."""
        self._drawn = router.shadows.draw()
        self._members: Members = {}
        self._headers: CIMultiDict[str] = CIMultiDict()
        """What the engines are asked with, for a comparison afterwards."""

    async def run(self) -> web.StreamResponse:
        router = self._router
        entry = router.ledger.open(self._request_id, self._request.path, self._request.content_length or 0)
        with router.serving():
            try:
                reply = await self._answer(entry)
                entry.status = reply.status
                return reply
            except ClientError as error:
                entry.status, entry.outcome = error.status, str(error)
                return error_response(error, {REQUEST_ID: self._request_id})
            except asyncio.CancelledError:
                self._note_abort(entry)
                raise
            finally:
                entry.finished_ms = entry.now_ms()
                if self._drawn and entry.status == 200 and entry.outcome == "answered":
                    router.shadows.begin(
                        Asked(self._kind, self._request.path, self._members, self._headers, entry, entry.attempts[-1])
                    )
                router.metrics.requests.labels(self._kind, entry.mode, str(entry.status or "none")).inc()

    async def _answer(self, entry: RequestEntry) -> web.StreamResponse:
        settings = self._router.settings
        check_key(self._request.headers, settings.api_key)
        body = await self._read_body()
        entry.body_bytes = len(body)
        members = bodies.parse(body)
        unfit = bodies.why_aggregated(self._kind, members) or ""
        entry.streamed = bodies.wants_stream(members)
        headers = upstream_headers(self._request.headers, self._request_id, settings.api_key, settings.engine_api_key)
        if self._drawn:
            self._members, self._headers = members, headers
        failed: list[AttemptFailedError] = []
        avoid: set[str] = set()
        for _ in range(settings.retries + 1):
            choice = await self._choose(unfit, avoid, failed)
            attempt = self._make_attempt(entry, members, choice, headers)
            async with attempt:
                try:
                    opened = await attempt.open(stream=entry.streamed, echoes=bodies.held_echoes(self._kind, members))
                except AttemptFailedError as error:
                    failed.append(error)
                    avoid.update(name for name in (choice.prefill, choice.decode) if name is not None)
                    self._note_failure(entry, error)
                else:
                    return await self._forward(entry, opened)
        return self._give_up(entry, failed)

    async def _read_body(self) -> bytes:
        settings = self._router.settings
        try:
            async with asyncio.timeout(settings.idle_timeout_s):
                return await self._request.read()
        except TimeoutError as error:
            raise BodyTimeoutError(
                f"the body did not come within {settings.idle_timeout_s:g} s", hint="send it faster, or smaller"
            ) from error
        except web.HTTPRequestEntityTooLarge as error:
            limit = settings.max_body_bytes
            raise BodyTooLargeError(
                f"the body is larger than {limit} bytes", hint="send less, or raise --max-body-bytes"
            ) from error

    async def _choose(self, unfit: str, avoid: set[str], failed: list[AttemptFailedError]) -> Choice:
        """Raises NoEngineError, with the last failure's words if there was one."""
        router = self._router
        choice = router.choose(unfit, frozenset(avoid))
        if choice.decode is None and failed:
            # The only decode engine was marked down by this very request: a poll tells whether it is really gone.
            await router.health.revive(router.down(router.engines.all))
            choice = router.choose(unfit, frozenset(avoid))
        if choice.decode is None:
            after = f" after {len(failed)} attempts, the last of which failed: {failed[-1].message}" if failed else ""
            raise NoEngineError(f"no decode engine is healthy{after}", hint="see /readyz of the router")
        return choice

    def _make_attempt(
        self, entry: RequestEntry, members: Members, choice: Choice, headers: CIMultiDict[str]
    ) -> Attempt:
        router, path = self._router, self._request.path_qs
        assert choice.decode is not None
        decode = router.engines[choice.decode]
        ledger_id = None
        if choice.prefill is None:
            entry.mode, entry.aggregated_why, transfer_id = "aggregated", choice.aggregated, None
            router.metrics.aggregated.labels(choice.aggregated).inc()
            ledger_id = router.new_transfer_id() if self._drawn else None
            to_decode = Upstream(decode, path, headers, bodies.aggregated_body(members, ledger_id))
            to_prefill = None
        else:
            entry.mode, entry.aggregated_why, transfer_id = "pd", "", router.new_transfer_id()
            prefill = router.engines[choice.prefill]
            to_decode = Upstream(decode, path, headers, bodies.decode_body(members, transfer_id, prefill.spec.control))
            to_prefill = Upstream(
                prefill, path, headers, bodies.prefill_body(members, transfer_id, decode.spec.control)
            )
        attempt = AttemptEntry(
            transfer_id, choice.prefill, choice.decode, choice.prefill_why, choice.decode_why, entry.now_ms()
        )
        attempt.ledger_id = ledger_id
        router.ledger.add(entry, attempt)
        return Attempt(router.session, router.settings, router.metrics, entry, attempt, to_decode, to_prefill)

    def _note_failure(self, entry: RequestEntry, error: AttemptFailedError) -> None:
        attempt = entry.attempts[-1]
        attempt.trouble = f"{error.reason}: {error.message}"
        self._router.metrics.retries.labels(attempt.decode, error.reason).inc()
        logger.warning("attempt %d of %s failed: %s", len(entry.attempts), self._request_id, error.message)

    def _give_up(self, entry: RequestEntry, failed: list[AttemptFailedError]) -> web.StreamResponse:
        """The last engine's own words if it had any, else ours. Raises ClientError."""
        last = failed[-1]
        entry.outcome = f"failed: {last.message}"
        if last.answer is not None:
            return web.Response(
                status=last.answer.status, body=last.answer.first, headers=self._own_headers(entry, last.answer)
            )
        kind = UpstreamTimeoutError if last.reason == "deadline" else UpstreamFailedError
        raise kind(f"{len(failed)} attempts failed before the first token, the last one: {last.message}")

    def _own_headers(self, entry: RequestEntry, opened: Opened) -> CIMultiDict[str]:
        own = {REQUEST_ID: self._request_id}
        if (transfer_id := entry.attempts[-1].transfer_id) is not None:
            own[TRANSFER_ID] = transfer_id
        return downstream_headers(opened.headers, own)

    async def _forward(self, entry: RequestEntry, opened: Opened) -> web.StreamResponse:
        headers = self._own_headers(entry, opened)
        entry.first_byte_ms = entry.now_ms()
        self._router.metrics.first_byte_s.labels(self._kind).observe(entry.first_byte_ms / 1000)
        if opened.rest is None:
            entry.sent_bytes, entry.outcome = len(opened.first), "answered"
            return web.Response(status=opened.status, body=opened.first, headers=headers)
        reply = self._reply = web.StreamResponse(status=opened.status, headers=headers)
        try:
            await reply.prepare(self._request)
            await reply.write(opened.first)
            entry.sent_bytes = len(opened.first)
            trouble = await self._pump(entry, opened.rest, reply)
            if trouble:
                await self._break_off(entry, reply, trouble)
            else:
                entry.outcome = "answered"
            await reply.write_eof()
        except (aiohttp.ClientConnectionResetError, ConnectionResetError):
            self._note_abort(entry)
        return reply

    async def _pump(self, entry: RequestEntry, rest: aiohttp.StreamReader, reply: web.StreamResponse) -> str:
        """Forward until the end; what broke, or "". The client's going away is raised, not returned."""
        idle_s = self._router.settings.idle_timeout_s
        # Re-arming a timer costs more than forwarding a chunk; an eighth of the limit is precise enough.
        rearm_s = idle_s / 8
        writing = False
        rearm_at_s = time.monotonic() + rearm_s
        try:
            async with asyncio.timeout(idle_s) as guard:
                loop = asyncio.get_running_loop()
                while chunk := await rest.readany():
                    writing = True
                    await reply.write(chunk)
                    writing = False
                    entry.sent_bytes += len(chunk)
                    now_s = time.monotonic()
                    if now_s >= rearm_at_s:
                        guard.reschedule(loop.time() + idle_s)
                        rearm_at_s = now_s + rearm_s
        except TimeoutError as error:
            if writing:
                raise ConnectionResetError(f"the client took nothing for {idle_s:g} s") from error
            return f"idle: nothing came for {idle_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            if writing:
                raise
            return f"connection: {error or type(error).__name__}"
        return ""

    async def _break_off(self, entry: RequestEntry, reply: web.StreamResponse, trouble: str) -> None:
        decode = self._router.engines[entry.attempts[-1].decode]
        reason, _, said = trouble.partition(": ")
        self._router.metrics.stream_breaks.labels(decode.name, reason).inc()
        entry.outcome = f"broken after {entry.sent_bytes} bytes: {trouble}"
        if reason == "connection":
            decode.mark_down(said)
        logger.warning("the stream of %s from %s broke: %s", self._request_id, decode.name, trouble)
        reply.force_close()
        await reply.write(error_event(StreamBrokenError(f"the stream from engine {decode.name} broke: {said}")))

    def _note_abort(self, entry: RequestEntry) -> None:
        """The client went away, or the drain time ran out."""
        if self._router.draining:
            entry.outcome = "cut off: the router stopped"
            return
        when = "streaming" if self._reply is not None else "waiting"
        entry.outcome = f"the client went away while {when}"
        self._router.metrics.client_aborts.labels(when).inc()
