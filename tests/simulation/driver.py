"""The clients and the router of a world: they send each request to its engines, and judge its answer."""

from __future__ import annotations

import heapq
import itertools
import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from .engine import SimEngine
from .job import Job
from .kinds import SHAPE
from .load import Load, RequestPlan
from .values import VOCABULARY, answer

NO_ADDRESSES = ("x", "tcp://10.0.0.5", "tcp://10.0.0.5:99999", "tcp://[::1:80", "tcp://*:5555", "ipc:///tmp/x", "")


GIVEN_UP = 0.9
STOPPING = 0.7
"""Share of answers that may end before their longest length, when one of every STOP_EVERY tokens is sampled."""
STOP_EVERY = 24


def _seed_of(salt: str | None) -> int:
    """KV differs by salt, which a model's does not: so it is seen when KV of one salt is used for another."""
    return zlib.crc32(salt.encode()) if salt else 0


class Driver:
    """A part of the world: `turn` does what is due. `done` once all requests have ended."""

    def __init__(
        self,
        rnd: random.Random,
        clock: Callable[[], float],
        prefills: list[SimEngine],
        decodes: list[SimEngine],
        load: Load,
        fail: Callable[[str], None],
        events: Counter[str],
    ) -> None:
        self.name = "driver"
        self._rnd = rnd
        self._clock = clock
        self._prefills = prefills
        self._decodes = decodes
        self._load = load
        self._fail = fail
        self._events = events
        self._numbers = itertools.count()
        self._waiting: dict[str, tuple[SimEngine, SimEngine, Job]] = {}
        """Decode's halves that have not ended, with the engines of both."""
        self._odd = random.Random(f"odd-{load.seed}")
        self.wake: Callable[[], None] = lambda: None
        """Asks for a turn at once; set by the world."""
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self.unended = 0
        self.requests = 0
        start_s = clock()
        self.last_s = start_s
        """When the last request arrives that does not follow another."""
        for plan in load.requests():
            self.last_s = start_s + plan.at_s
            self.at(self.last_s, lambda now_s, plan=plan: self._arrive(plan, now_s))

    # --- the part ---

    def open(self) -> None:
        """Nothing to open."""

    def descriptors(self) -> tuple[int, ...] | None:
        return None

    def end(self) -> None:
        """Nothing to close."""

    def at(self, when_s: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (when_s, next(self._numbers), action))
        self.wake()

    def next_s(self, now_s: float) -> float:
        return max(0.0, self._agenda[0][0] - now_s) if self._agenda else 3600.0

    def turn(self, now_s: float) -> None:
        while self._agenda and self._agenda[0][0] <= now_s:
            heapq.heappop(self._agenda)[2](now_s)

    @property
    def done(self) -> bool:
        return not self._agenda and not self.unended

    # --- requests ---

    def _arrive(self, plan: RequestPlan, now_s: float) -> None:
        prefill, decode = self._rnd.choice(self._prefills), self._rnd.choice(self._decodes)
        transfer = f"{self._rnd.getrandbits(128):032x}"
        if plan.route == "pd" and self._odd.random() < self._load.odd:
            self._be_odd(plan, transfer, prefill, decode, now_s)
        for sibling in range(plan.siblings):
            self.requests += 1
            number = next(self._numbers)
            if plan.route == "pd":
                self._hand_over(plan, f"{number}-{sibling}", transfer, prefill, decode, sibling == 0, now_s)
            else:
                engine = prefill if plan.route == "prefill" else decode
                unpooled = self._odd.random() < self._load.unpooled
                params = {"lmkv": {"approximate": True}} if unpooled else None
                self._send(engine, self._job(plan, f"{number}", params), plan, plan.abort_s, 0.0, now_s)

    def _be_odd(self, plan: RequestPlan, transfer: str, prefill: SimEngine, decode: SimEngine, now_s: float) -> None:
        """A router that goes wrong: it names an engine that cannot be, or sends a request twice under one id."""
        stays = replace(plan, abort_s=-1.0, turns=0, siblings=1)
        self.requests += 1
        if self._odd.random() < 0.5:
            bad = {"transfer_id": transfer[::-1], "role": "decode", "peer": {"address": self._odd.choice(NO_ADDRESSES)}}
            job = self._job(stays, f"x{next(self._numbers)}", {"lmkv": bad})
            self._events["odd:address"] += 1
            self._send(decode, job, stays, -1.0, 0.0, now_s)
            return
        self._events["odd:id_used_again"] += 1
        later = replace(stays, decode_delay_s=self._odd.choice([0.0, 0.01, 0.3]), prefill_delay_s=0.0)
        plan.counts = later.counts = False
        self._hand_over(
            later, f"{next(self._numbers)}-again", transfer, prefill, decode, self._odd.random() < 0.5, now_s
        )

    def replace(self, old: SimEngine, new: SimEngine) -> None:
        """Another engine has come to the address of one that has died. Most requests of which it had a part are tried
        elsewhere by the router, so their other half is given up; the others come to their deadline."""
        for prefill, decode, job in list(self._waiting.values()):
            if prefill is old and self._odd.random() < GIVEN_UP:
                job.is_given_up = True
                decode.abort(job.request_id)
        for engines in (self._prefills, self._decodes):
            engines[:] = [new if engine is old else engine for engine in engines]

    def probe(self, prefill: SimEngine, decode: SimEngine) -> None:
        """One handover of a fresh prompt."""
        plan = RequestPlan(self._clock(), self._load.fresh(80), 1, "pd", stays=True)
        self._hand_over(
            plan, f"{next(self._numbers)}-probe", f"{self._odd.getrandbits(128):032x}", prefill, decode, True, plan.at_s
        )

    def _hand_over(
        self,
        plan: RequestPlan,
        number: str,
        transfer: str,
        prefill: SimEngine,
        decode: SimEngine,
        first: bool,
        now_s: float,
    ) -> None:
        def params(role: str, peer: SimEngine) -> dict[str, object]:
            return {"lmkv": {"transfer_id": transfer, "role": role, "peer": {"address": peer.address}}}

        # A client that goes takes both halves along; either may also end alone (an error of its engine), and decode's
        # may never be sent (the router has died).
        ends = self._rnd.choice(("pd", "pd", "p", "d", "d", "p-alone")) if plan.abort_s >= 0 else ""
        job = self._job(plan, f"d{number}", params("decode", prefill))
        if first:
            theirs = plan.prefill_prompt or plan.prompt
            half = self._job(replace(plan, max_tokens=1, prompt=theirs), f"p{number}", params("prefill", decode))
            self._send(prefill, half, plan, plan.abort_s if "p" in ends else -1.0, plan.prefill_delay_s, now_s)
        if ends == "p-alone":
            return
        self._waiting[job.request_id] = (prefill, decode, job)
        self._send(decode, job, plan, plan.abort_s if "d" in ends else -1.0, plan.decode_delay_s, now_s)

    def _job(self, plan: RequestPlan, request_id: str, params: dict[str, object] | None) -> Job:
        seed = _seed_of(plan.salt)
        counts = plan.counts and plan.abort_s < 0 and plan.prefill_prompt is None
        job = Job(request_id, list(plan.prompt), plan.max_tokens, params, plan.salt, seed, counts)
        if plan.max_tokens > 2 and self._odd.random() < STOPPING:
            first = self._odd.randrange(STOP_EVERY)
            job.stops = tuple(range(first, VOCABULARY, STOP_EVERY))
        if plan.max_tokens > 2 and self._odd.random() < self._load.stops:
            job.stop_after = self._odd.randrange(1, plan.max_tokens - 1)
        return job

    def _send(
        self, engine: SimEngine, job: Job, plan: RequestPlan, abort_s: float, delay_s: float, now_s: float
    ) -> None:
        self.unended += 1

        def ended(job: Job) -> None:
            self.unended -= 1
            self._events[f"ended:{job.ended}"] += 1
            prefill, *_ = self._waiting.pop(job.request_id, (None,))
            if job.ended == "died" and prefill is not None and self._odd.random() < GIVEN_UP:
                prefill.abort(f"p{job.request_id[1:]}")  # the router tries both halves elsewhere
            if job.ended in ("length", "stop"):
                self._judge(engine, job)
                if plan.turns and not job.request_id.startswith("p"):
                    self._go_on(plan, job)

        job.on_end = ended
        if not plan.stays and self._odd.random() < self._load.impatient:
            job.counts = False
            wait_s = self._odd.random() * self._odd.choice([0.001, 0.01, 0.1])
            job.on_load = lambda: self.at(self._clock() + wait_s, lambda now_s: engine.abort(job.request_id))
        self.at(now_s + delay_s, lambda then_s: engine.add(job))
        if abort_s >= 0:
            self.at(now_s + delay_s + abort_s, lambda then_s: engine.abort(job.request_id))

    def _judge(self, engine: SimEngine, job: Job) -> None:
        heads = SHAPE.heads // engine.kind.ranks
        right = answer(SHAPE, job.prompt, job.max_tokens, heads, job.kv_seed)
        end = next((i for i, token in enumerate(right, 1) if token in job.stops), len(right))
        right = right[:end]
        if job.answer != right:
            self._fail(f"{engine.name}: {job.request_id} answers {job.answer}, right is {right}")

    def _go_on(self, plan: RequestPlan, job: Job) -> None:
        """The next turn of a chat: what was said, and something new."""
        prompt = job.prompt + job.answer + self._load.fresh(self._rnd.randrange(1, 40))
        if len(prompt) > self._load.longest:
            return
        following = replace(plan, prompt=prompt, prefill_prompt=None, turns=plan.turns - 1, abort_s=-1.0, siblings=1)
        pause_s = self._rnd.random() * self._rnd.choice([0.05, 0.5])
        self.unended += 1  # until it arrives

        def arrive(now_s: float) -> None:
            self.unended -= 1
            self._arrive(following, now_s)

        self.at(self._clock() + pause_s, arrive)
