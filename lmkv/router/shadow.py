"""Computes a share of the requests whose KV was loaded once more, afterwards, and compares: the detector of wrong KV.

After the client's answer the decode engine that gave it gets two probes with the same prompt, each for one greedy
token with its logprobs. The first finds the loaded KV in the engine's prefix cache; the second has a fresh salt, so
that nothing is found and the whole prompt is computed. Neither touches the pool.

What is compared is what the prefix cache can hold: whole blocks. The last, partly filled block of a prompt is computed
by both probes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
from dataclasses import dataclass
from typing import Any

import aiohttp
from multidict import CIMultiDict

from lmkv.control.client import ControlClient, ControlError

from .bodies import Kind, Members, probe_body, why_aggregated
from .compare import Found, Loaded, UnreadableError, difference, loaded_of, read_probe, tolerance_for
from .engines import Engine, Engines
from .headers import REQUEST_ID
from .ledger import AttemptEntry, RequestEntry
from .metrics import RouterMetrics
from .settings import RouterSettings
from .upstream import payload

logger = logging.getLogger(__name__)

_SHOWN_BYTES = 300
_UNFIT = frozenset({"batch", "prompt_embeds", "truncate_prompt_tokens", "use_beam_search"})
"""Reasons for one engine alone that also make a probe another prompt than the client's, or more than one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has been answered: what the engines were asked, and where that is written down."""

    kind: Kind
    path: str
    members: Members
    headers: CIMultiDict[str]
    entry: RequestEntry
    attempt: AttemptEntry


class _SkippedError(Exception):
    """Nothing was compared. `why` is a word for the metric."""

    def __init__(self, why: str, said: str = "") -> None:
        super().__init__(said or why)
        self.why = why


class Shadows:
    """`draw` for each request, `begin` once a drawn one has been answered, `close` once. All in the serving loop.

    A comparison is a task of its own. It never marks an engine down and is not counted in an engine's load.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        control: ControlClient,
        engines: Engines,
        metrics: RouterMetrics,
        settings: RouterSettings,
        chance: random.Random | None = None,
    ) -> None:
        self._session = session
        self._control = control
        self._engines = engines
        self._metrics = metrics
        self._settings = settings
        self._chance = chance or random.Random()
        self._closed = False
        self.running: set[asyncio.Task[None]] = set()

    def draw(self) -> bool:
        """Whether a new request is to be compared if its KV turns out to be loaded."""
        share = self._settings.shadow_share
        return share > 0 and not self._closed and self._chance.random() < share

    def begin(self, asked: Asked) -> None:
        """Start the comparison, or count why there is none."""
        if self._closed:
            self._end(asked, {"result": "skipped_stopped"})
        elif len(self.running) >= self._settings.shadow_at_once:
            self._end(asked, {"result": "skipped_limit"})
        elif self._is_busy(self._engines[asked.attempt.decode]):
            self._end(asked, {"result": "skipped_busy"})
        else:
            asked.entry.shadow = {"result": "running"}
            name = f"shadow {asked.entry.request_id}"
            task = asyncio.create_task(self._run(asked), name=name)
            self.running.add(task)
            task.add_done_callback(lambda ended: self._ended(asked, ended))

    async def close(self) -> None:
        """Cancel what runs and start nothing any more. Returns once all has ended."""
        self._closed = True
        running = list(self.running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _ended(self, asked: Asked, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        if task.cancelled():
            self._end(asked, {"result": "skipped_stopped"})
        elif (error := task.exception()) is not None:
            logger.error("the shadow of %s failed unexpectedly", asked.entry.request_id, exc_info=error)
            self._end(asked, {"result": "skipped_failed", "why": repr(error)})

    def _end(self, asked: Asked, told: dict[str, Any]) -> None:
        asked.entry.shadow = told
        self._metrics.shadow.labels(told["result"]).inc()

    def _is_busy(self, engine: Engine) -> bool:
        return engine.requests >= self._settings.shadow_busy_requests

    # --- one comparison ---

    async def _run(self, asked: Asked) -> None:
        limit_s = self._settings.shadow_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                told = await self._compare(asked)
        except _SkippedError as skipped:
            told = {"result": f"skipped_{skipped.why}", "why": str(skipped)}
        except UnreadableError as error:
            told = {"result": "skipped_untold", "why": str(error)}
        except (aiohttp.ClientError, ControlError) as error:  # also aiohttp's own time-outs, of connections
            told = {"result": "skipped_failed", "why": str(error) or type(error).__name__}
        except TimeoutError:
            told = {"result": "skipped_deadline", "why": f"not done within {limit_s:g} s"}
        except OSError as error:
            told = {"result": "skipped_failed", "why": str(error) or type(error).__name__}
        self._end(asked, told)
        if told["result"] == "different":
            logger.error("%s", _alarm(asked, told))
        else:
            logger.debug("shadow of %s: %s", asked.entry.request_id, told)

    async def _compare(self, asked: Asked) -> dict[str, Any]:
        """The entry of the ledger. Raises _SkippedError, UnreadableError, ControlError, aiohttp's errors."""
        unfit = why_aggregated(asked.kind, asked.members)
        if unfit in _UNFIT:
            raise _SkippedError("unfit", f"a request with {unfit} has no single prompt to compute again")
        engine = self._engines[asked.attempt.decode]
        loaded = await self._loaded(asked, engine)
        cached = await self._probe(asked, engine, None)
        if cached.cached_tokens <= loaded.lo:
            raise _SkippedError(
                "uncached",
                f"of the tokens {loaded.lo} to {loaded.hi} that were loaded none is in the prefix cache any more "
                f"(it has {cached.cached_tokens})",
            )
        if self._is_busy(engine):
            raise _SkippedError("busy")
        computed = await self._probe(asked, engine, secrets.token_hex(16))
        if computed.prompt != cached.prompt:
            raise _SkippedError("prompt_changed", "the two probes got different prompts: does a template tell time?")
        if computed.cached_tokens:
            raise UnreadableError(f"a probe with a fresh salt found {computed.cached_tokens} tokens in the cache")
        told = self._verdict(loaded, cached, computed)
        if told["result"] == "different":
            told["sources"] = await self._sources(asked, loaded)
        return told

    async def _loaded(self, asked: Asked, engine: Engine) -> Loaded:
        ledger = await self._ledger(asked, engine)
        if ledger is None:
            raise _SkippedError("untold", f"{engine.name} has no ledger of the request")
        loaded = loaded_of(ledger)
        if loaded is None:
            raise _SkippedError("not_loaded", "the engine computed the prompt, or had it")
        return loaded

    async def _ledger(self, asked: Asked, engine: Engine) -> dict[str, Any] | None:
        """What the engine remembers of the answered attempt. Raises ControlError, UnreadableError."""
        name = asked.attempt.transfer_id or asked.attempt.ledger_id
        if name is None:
            return None
        text = await self._control.explain(engine.spec.control, name, deadline_s=self._settings.explain_timeout_s)
        try:
            ledger = json.loads(text) if text else None
        except ValueError as error:
            raise UnreadableError(f"the ledger of {engine.name} is not JSON: {error}") from error
        return ledger if isinstance(ledger, dict) else None

    async def _probe(self, asked: Asked, engine: Engine, salt: str | None) -> Found:
        headers = asked.headers.copy()
        headers[REQUEST_ID] = f"shadow-{secrets.token_hex(12)}"
        body = payload(probe_body(asked.kind, asked.members, salt))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s)
        url = engine.spec.url + asked.path
        async with self._session.post(url, data=body, headers=headers, timeout=timeout, allow_redirects=False) as reply:
            answer = await reply.read()
        if reply.status != 200:
            said = answer[:_SHOWN_BYTES].decode(errors="replace")
            raise _SkippedError("refused", f"{engine.name} answered {reply.status} to a probe: {said}")
        return read_probe(asked.kind, answer)

    def _verdict(self, loaded: Loaded, cached: Found, computed: Found) -> dict[str, Any]:
        tolerance = self._settings.shadow_tolerance or tolerance_for(cached.dtype, cached.kv_dtype)
        apart = difference(cached, computed)
        return {
            "result": "different" if apart > tolerance else "equal",
            "difference": round(apart, 6),
            "tolerance": tolerance,
            "loaded_tokens": [loaded.lo, loaded.hi],
            "compared_tokens": cached.cached_tokens,
            "with_loaded_kv": cached.top(),
            "computed_again": computed.top(),
        }

    async def _sources(self, asked: Asked, loaded: Loaded) -> dict[str, Any]:
        """Who is to be suspected: the prefill engine (and what that loaded itself), and the pages of the pool."""
        sources: dict[str, Any] = {}
        if loaded.pool is not None:
            sources["pool"] = loaded.pool
        if loaded.pushed is not None and asked.attempt.prefill is not None:
            prefill = self._engines[asked.attempt.prefill]
            sources["prefill"] = {"engine": prefill.name, **loaded.pushed}
            try:
                theirs = await self._ledger(asked, prefill) or {}
            except (ControlError, UnreadableError) as error:
                theirs = {"pool": {"trouble": str(error)}}
            if "pool" in theirs:
                sources["prefill"]["pool"] = theirs["pool"]
        return sources


def _alarm(asked: Asked, told: dict[str, Any]) -> str:
    entry, attempt = asked.entry, asked.attempt
    (loaded, loaded_logprob), (computed, computed_logprob) = told["with_loaded_kv"][0], told["computed_again"][0]
    lo, hi = told["loaded_tokens"]
    transfer_id = attempt.transfer_id or attempt.ledger_id
    return (
        f"WRONG KV SUSPECTED: request {entry.request_id}, transfer {transfer_id}, on decode engine {attempt.decode}: "
        f"with the KV of tokens {lo} to {hi} as it was loaded the first token is {loaded} ({loaded_logprob:.4f}), "
        f"computed again it is {computed} ({computed_logprob:.4f}); logprobs differ by {told['difference']:.4f}, more "
        f"than {told['tolerance']:g}. It came from {json.dumps(told['sources'])}. See /explain/{entry.request_id}; "
        f"{attempt.decode} still has this KV in its prefix cache"
    )
