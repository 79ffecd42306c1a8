"""One attempt: a request dispatched to a prefill and a decode engine at the same moment.

`open()` ends with the first real token, a complete answer, or AttemptFailedError; until then nothing has been promised
to the client. Leaving the context closes what is still open of both requests, and a closed connection makes vLLM abort.
"""

from __future__ import annotations

import asyncio
import io
import logging
from dataclasses import dataclass
from types import TracebackType

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from lmkv.errors import RouterError

from .engines import Engine
from .ledger import AttemptEntry, RequestEntry
from .metrics import RouterMetrics
from .settings import RouterSettings
from .sse import Gate, Verdict

logger = logging.getLogger(__name__)

_SHOWN_BYTES = 300
_ONE_WRITE_BYTES = 256 << 10
"""Larger bodies are handed to the socket in pieces, so that other streams go on meanwhile."""


class AttemptFailedError(RouterError):
    """`reason` is a word for metrics. `answer` is set when the engine said something that may be passed on."""

    def __init__(self, reason: str, message: str, answer: Opened | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Upstream:
    """One HTTP request to one engine."""

    engine: Engine
    path: str
    headers: CIMultiDict[str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """An answer that may go to the client: its first bytes, and where the rest comes from (None: that is all)."""

    status: int
    headers: CIMultiDictProxy[str]
    first: bytes
    rest: aiohttp.StreamReader | None


class Attempt:
    """Async context manager; `open()` once inside it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: RouterSettings,
        metrics: RouterMetrics,
        request: RequestEntry,
        entry: AttemptEntry,
        decode: Upstream,
        prefill: Upstream | None,
    ) -> None:
        self._session = session
        self._settings = settings
        self._metrics = metrics
        self._request = request
        self._entry = entry
        self._decode = decode
        self._prefill = prefill
        self._prefill_task: asyncio.Task[None] | None = None
        self._response: aiohttp.ClientResponse | None = None
        self._connect_s = settings.connect_timeout_s

    async def __aenter__(self) -> Attempt:
        self._decode.engine.requests += 1
        if self._prefill is not None:
            self._prefill.engine.requests += 1
            self._prefill.engine.prompt_bytes += self._request.body_bytes
            self._prefill_task = asyncio.create_task(self._run_prefill(self._prefill), name="prefill request")
            self._prefill_task.add_done_callback(self._prefill_done)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The client may go away even now: nothing after the first await must matter to anybody else."""
        self._decode.engine.requests -= 1
        if self._response is not None:
            self._response.close()
        if self._prefill_task is not None:
            self._prefill_task.cancel()
            await asyncio.wait([self._prefill_task], timeout=self._connect_s)

    def _prefill_done(self, task: asyncio.Task[None]) -> None:
        """However it ended, even before it began. The load ends here, not with decode's last token."""
        assert self._prefill is not None
        self._prefill.engine.requests -= 1
        self._prefill.engine.prompt_bytes -= self._request.body_bytes
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the prefill request of %s failed unexpectedly", self._request.request_id, exc_info=error)

    async def open(self, *, stream: bool, echoes: int = 0) -> Opened:
        """Raises AttemptFailedError. A 4xx is an answer, not a failure: another engine would say the same."""
        limit_s = self._settings.first_token_timeout_s if stream else self._settings.response_timeout_s
        name = self._decode.engine.name
        if self._prefill_task is not None:
            # One turn of the loop, in which prefill's request is written: the prompt's computation is what takes time.
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(limit_s):
                self._response = response = await self._post(self._decode, aiohttp.ClientTimeout(
                    total=None, sock_connect=self._connect_s
                ))  # fmt: skip
                self._entry.decode_status = response.status
                self._entry.decode_headers_ms = self._request.now_ms()
                if response.status == 200 and response.content_type == "text/event-stream":
                    return await self._first_token(response, Gate(echoes))
                answer = Opened(response.status, response.headers, await response.read(), None)
        except (aiohttp.ClientError, OSError) as error:
            if _is_deadline(error):
                self._decode.engine.look.set()
                what = "token" if stream else "answer"
                raise AttemptFailedError("deadline", f"{name} gave no {what} within {limit_s:g} s") from error
            self._decode.engine.mark_down(_say(error))
            raise AttemptFailedError("connection", f"the connection to {name} failed: {_say(error)}") from error
        if answer.status >= 500:
            shown = answer.first[:_SHOWN_BYTES].decode(errors="replace")
            raise AttemptFailedError("status", f"{name} answered {answer.status}: {shown}", answer)
        self._entry.first_token_ms = self._request.now_ms()
        return answer

    async def _first_token(self, response: aiohttp.ClientResponse, gate: Gate) -> Opened:
        name = self._decode.engine.name
        while chunk := await response.content.readany():
            verdict = gate.feed(chunk)
            if verdict is Verdict.ERROR and gate.error is not None and not 400 <= gate.error.code < 500:
                raise AttemptFailedError("error_event", f"{name} sent an error event: {gate.error.message}")
            if verdict is not Verdict.HOLD:
                self._entry.first_token_ms = self._request.now_ms()
                return Opened(response.status, response.headers, bytes(gate.held), response.content)
        raise AttemptFailedError("no_token", f"{name} ended its stream before the first token")

    async def _run_prefill(self, upstream: Upstream) -> None:
        """Whatever goes wrong here is decode's to make good: it computes the prompt itself."""
        engine, entry = upstream.engine, self._entry
        started_ms = self._request.now_ms()
        try:
            timeout = aiohttp.ClientTimeout(total=self._settings.response_timeout_s, sock_connect=self._connect_s)
            response = await self._post(upstream, timeout)
            async with response:
                entry.prefill_status = response.status
                body = await response.read()
            entry.prefill_done_ms = self._request.now_ms()
            self._metrics.prefill_s.labels(engine.name).observe((entry.prefill_done_ms - started_ms) / 1000)
            if response.status >= 400:
                self._prefill_failed(
                    engine, "status", f"{response.status}: {body[:_SHOWN_BYTES].decode(errors='replace')}"
                )
        except (aiohttp.ClientError, OSError) as error:
            if _is_deadline(error):
                self._prefill_failed(engine, "deadline", f"no answer within {self._settings.response_timeout_s:g} s")
                engine.look.set()
                return
            self._prefill_failed(engine, "connection", _say(error))
            engine.mark_down(_say(error))

    def _prefill_failed(self, engine: Engine, reason: str, trouble: str) -> None:
        self._entry.prefill_trouble = f"{reason}: {trouble}"
        self._metrics.prefill_failures.labels(engine.name, reason).inc()
        logger.warning("prefill of %s at %s: %s", self._request.request_id, engine.name, self._entry.prefill_trouble)

    async def _post(self, upstream: Upstream, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        return await self._session.post(
            upstream.engine.spec.url + upstream.path,
            data=payload(upstream.body),
            headers=upstream.headers,
            timeout=timeout,
            allow_redirects=False,
        )


def payload(body: bytes) -> bytes | io.BytesIO:
    """A request body as it is given to aiohttp: a large one goes to the socket in pieces."""
    return io.BytesIO(body) if len(body) > _ONE_WRITE_BYTES else body


def _is_deadline(error: BaseException) -> bool:
    """Ours, that is: an answer that is late. A connection that cannot be made in time is a lost connection."""
    return isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError)


def _say(error: BaseException) -> str:
    return str(error) or type(error).__name__
