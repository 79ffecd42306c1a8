"""A simulated engine: vLLM's own scheduler and block manager, lmkv's connector, and a fake model on top of them.

It steps as EngineCore does: one step at a time, or with two batches in flight where scheduling is asynchronous.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from lmkv.control.runtime import THREADS, Runtime

from .connector import SimConnector
from .job import Job
from .kinds import EngineKind, cache_config, vllm_config
from .runner import Rank, Runner, add_layers, block_array
from .steps import Piece, Step

IDLE_S = 0.002
MOST_IDLE_S = 0.25
STEP_S = 0.01
UPDATE_EVERY_S = 0.05


class SimEngine:
    """`fail(text)` takes what must never happen. `events` counts what was met."""

    def __init__(
        self,
        name: str,
        kind: EngineKind,
        settings: dict[str, Any],
        rnd: random.Random,
        fail: Callable[[str], None],
        events: Counter[str],
        runtime: Runtime = THREADS,
    ) -> None:
        SimConnector.runtime = runtime
        self.name = name
        self.kind = kind
        self._rnd = rnd
        self._fail = fail
        self._events = events
        config, caches = vllm_config(kind, {"name": name, **settings}), cache_config(kind)
        add_layers(config)
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(kind.is_v2))
        scheduler = AsyncScheduler if kind.is_async else Scheduler
        self.scheduler = scheduler(
            config,
            caches,
            StructuredOutputManager(config),
            block_size=kind.block_tokens,
            hash_block_size=kind.block_tokens,
            log_stats=False,
        )
        connector = type(self.scheduler.connector)
        self.runner = Runner([Rank(kind, r, config, caches, connector) for r in range(kind.ranks)], self._check)
        metas = {(0, rank.number): rank.connector.get_handshake_metadata() for rank in self.runner.ranks}
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware(metas)
        self._hasher = get_request_block_hasher(kind.block_tokens, sha256)
        self._pool = self.scheduler.kv_cache_manager.block_pool
        self.free_at_start = self._pool.get_num_free_blocks()
        self._watch_frees()
        self._loads: dict[str, tuple[int, int]] = {}
        """Loads under way: tokens [lo, hi)."""
        self._watch_loads()
        self._flying: deque[Step] = deque()
        self._arrivals: deque[Job] = deque()
        self._aborts: list[str] = []
        self.jobs: dict[str, Job] = {}
        self._lives: dict[str, int] = {}
        self._freed: list[int] = []
        self._pause_s = IDLE_S
        self.due_s = 0.0
        self.version = 0
        """Of its weights."""
        self._update_until_s = 0.0
        self.is_dead = False
        self.steps = 0
        self.wake: Callable[[], None] = lambda: None
        """Asks for a turn at once; set by the world."""

    # --- what comes from outside ---

    def add(self, job: Job) -> None:
        if self.is_dead or job.is_given_up:
            self._bury(job)
            return
        self._arrivals.append(job)
        self.due_s = 0.0
        self.wake()

    def update(self, until_s: float) -> None:
        """Replace the weights as soon as all requests have ended; new ones wait. Given up at `until_s`."""
        self._update_until_s = until_s
        self.due_s = 0.0
        self.wake()

    def die(self) -> None:
        """Its process has been killed: its requests end."""
        self.is_dead = True
        for job in [*self.jobs.values(), *self._arrivals]:
            self._bury(job)
        self.jobs.clear()
        self._arrivals.clear()

    def _bury(self, job: Job) -> None:
        job.ended = "died"
        job.on_end(job)

    def abort(self, request_id: str) -> None:
        self._aborts.append(request_id)
        self.due_s = 0.0
        self.wake()

    @property
    def address(self) -> str:
        """Control address of the connector."""
        return str(self.scheduler.connector._scheduler._endpoint.address)

    def next_s(self, now_s: float) -> float:
        return max(0.0, self.due_s - now_s) if self.busy else 3600.0

    @property
    def busy(self) -> bool:
        waiting = bool(self._arrivals or self._flying or self._update_until_s)
        return not self.is_dead and (waiting or self.scheduler.has_requests())

    # --- turns ---

    def open(self) -> None:
        """All is open already."""

    def descriptors(self) -> tuple[int, ...] | None:
        return None

    def end(self) -> None:
        """The world closes it."""

    def turn(self, now_s: float) -> None:
        """Part of a step, as EngineCore takes it."""
        if self._update_until_s:
            self._try_update(now_s)
        if not self._update_until_s:
            self._take_arrivals()
        self._take_aborts()
        most = 2 if self.kind.is_async else 1
        can_schedule = len(self._flying) < most and self.scheduler.has_requests()
        if can_schedule and (not self._flying or self._rnd.random() < 0.7):
            self._schedule(now_s)
        elif self._flying:
            self.runner.stream.advance(self._rnd.randrange(4))
            if not self._flying[0].pieces or self._rnd.random() < 0.6:
                self._finish(now_s)
        if not self.kind.is_async:
            while self._flying:
                self._finish(now_s)

    def _try_update(self, now_s: float) -> None:
        """As vLLM is told to when its weights have been replaced. No if a block is in use."""
        idle = not self._flying and not self.scheduler.has_unfinished_requests()
        if idle and self.scheduler.reset_prefix_cache():
            self.version += 1
            self._events["update"] += 1
            self._update_until_s = 0.0
        elif now_s > self._update_until_s:
            self._events["update_given_up"] += 1
            self._update_until_s = 0.0
        self.due_s = now_s + UPDATE_EVERY_S

    def _take_arrivals(self) -> None:
        while self._arrivals:
            job = self._arrivals.popleft()
            if job.is_given_up:
                self._bury(job)
                continue
            job.version = self.version
            self.jobs[job.request_id] = job
            sampling = SamplingParams(
                max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True, stop_token_ids=list(job.stops)
            )
            if job.params:
                sampling.extra_args = {"kv_transfer_params": job.params}
            self.scheduler.add_request(
                Request(job.request_id, job.prompt, sampling, None, cache_salt=job.salt, block_hasher=self._hasher)
            )

    def _take_aborts(self) -> None:
        for request_id in self._aborts:
            request = self.scheduler.requests.get(request_id)
            if request is None or request.is_finished():
                continue
            self._events[f"abort:{self._phase(request)}"] += 1
            self._end(request_id, "aborted")
            self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)
        self._aborts.clear()

    def _phase(self, request: Any) -> str:
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            return "loading"
        if request.status == RequestStatus.RUNNING:
            flying = any(p.sequence.request_id == request.request_id for step in self._flying for p in step.pieces)
            stage = "prompt" if request.num_computed_tokens < request.num_prompt_tokens else "decoding"
            return f"{stage}_in_flight" if flying else stage
        return "preempted" if request.num_preemptions else "waiting"

    def _schedule(self, now_s: float) -> None:
        waiting = {r.request_id for r in self.scheduler.waiting}
        output = self.scheduler.schedule()
        self.steps += 1
        for request_id in output.preempted_req_ids or ():
            done = self.scheduler.requests[request_id].num_output_tokens or self._was_done(request_id)
            self._events["preempted:after_prompt" if done else "preempted:before_prompt_end"] += 1
            if done and request_id.startswith("p"):
                self._events["preempted:handed_over"] += 1
        step = Step(output, self._pieces(output, waiting), self._take_freed())
        self._same_step_hits(step)
        if self._flying:
            self._events["two_in_flight"] += 1
        self._flying.append(step)
        self.runner.launch(step)
        working = bool(step.pieces)
        self._pause_s = STEP_S if working else min(MOST_IDLE_S, self._pause_s * 1.5)
        self.due_s = now_s + (self._rnd.random() * STEP_S if working or self._flying else self._pause_s)

    def _was_done(self, request_id: str) -> bool:
        return any(
            p.sequence.request_id == request_id and p.hi >= self.scheduler.requests[request_id].num_prompt_tokens
            for step in self._flying
            for p in step.pieces
        )

    def _pieces(self, output: Any, waiting: set[str]) -> list[Piece]:
        pieces = []
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, count in output.num_scheduled_tokens.items():
            request, job = self.scheduler.requests[request_id], self.jobs[request_id]
            fresh = self._lives.get(request_id) != request.num_preemptions or request_id in waiting
            self._lives[request_id] = request.num_preemptions
            sequence = self.runner.sequence(request, job.kv_seed, fresh)
            (table,) = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            before = computed[request_id]
            self._count_loaded(request, before)
            pieces.append(Piece(sequence, block_array(table), before, before + count))
        return pieces

    def _watch_loads(self) -> None:
        """Counts the tokens that vLLM lets the connector load, and those that it need not compute afterwards."""
        connector = self.scheduler.connector
        matched, allocated = connector.get_num_new_matched_tokens, connector.update_state_after_alloc
        local: dict[str, int] = {}
        n = self.kind.block_tokens

        def watched_match(request: Any, computed: int) -> Any:
            local[request.request_id] = computed
            return matched(request, computed)

        def watched_alloc(request: Any, blocks: Any, external: int) -> None:
            computed = local.pop(request.request_id, 0)
            if external:
                self._loads[request.request_id] = (computed, computed + external)
                self.jobs[request.request_id].on_load()
                self._events["load:into_written"] += self._is_written(
                    set(blocks.get_block_ids()[0][computed // n : -(-(computed + external) // n)])
                )
            allocated(request, blocks, external)

        connector.get_num_new_matched_tokens, connector.update_state_after_alloc = watched_match, watched_alloc

    def _count_loaded(self, request: Any, before: int) -> None:
        lo, hi = self._loads.pop(request.request_id, (0, 0))
        if hi and self.jobs[request.request_id].counts:
            self._events["tokens:loadable"] += hi - lo
            # vLLM computes the last token of a prompt again, also if all of it was loaded.
            self._events["tokens:loaded"] += hi - lo if before >= hi - 1 else max(0, before - lo)
            self._events["lost_loads"] += before < hi - 1

    def _is_written(self, block_ids: set[int]) -> bool:
        """A step in flight still writes to one of these blocks, which have been given to another request."""
        pieces = [piece for step in self._flying for piece in step.pieces]
        return any(not block_ids.isdisjoint(piece.written(self.kind.block_tokens)) for piece in pieces)

    def _same_step_hits(self, step: Step) -> None:
        n = self.kind.block_tokens
        written: dict[int, str] = {}
        for piece in step.pieces:
            for block in piece.written(n):
                written[block] = piece.sequence.request_id
        for piece in step.pieces:
            hit = piece.block_ids[: piece.lo // n].tolist()
            self._events["same_step_hit"] += any(
                written.get(block, piece.sequence.request_id) != piece.sequence.request_id for block in hit
            )

    def _finish(self, now_s: float) -> None:
        step = self._flying.popleft()
        output = self.runner.finish(step)
        self._take_aborts()
        outputs = self.scheduler.update_from_output(step.output, output)
        found = output.kv_connector_output
        news = bool(step.pieces) or (found is not None and not found.is_empty())
        if news:
            self._pause_s = IDLE_S
        self.due_s = now_s + (self._rnd.random() * STEP_S if step.pieces else self._pause_s)
        for engine_outputs in outputs.values():
            for one in engine_outputs.outputs:
                job = self.jobs.get(one.request_id)
                if job is None:
                    continue
                job.answer += one.new_token_ids
                if 0 < job.stop_after <= len(job.answer):
                    self.abort(one.request_id)
                if one.finished:
                    self._end(one.request_id, str(one.finish_reason))

    def _end(self, request_id: str, how: str) -> None:
        job = self.jobs.pop(request_id)
        self._loads.pop(request_id, None)
        self._lives.pop(request_id, None)
        job.ended = how
        job.on_end(job)

    # --- blocks ---

    def _watch_frees(self) -> None:
        free = self._pool.free_blocks

        def watched(blocks: Any) -> None:
            blocks = list(blocks)
            free(blocks)
            self._freed += [block.block_id for block in blocks if block.ref_cnt == 0 and block.block_hash is None]

        self._pool.free_blocks = watched

    def _take_freed(self) -> list[int]:
        """Blocks without a user and without a name: whatever they hold is nobody's."""
        freed, self._freed = self._freed, []
        blocks = self._pool.blocks
        return [i for i in set(freed) if blocks[i].ref_cnt == 0 and blocks[i].block_hash is None]

    def _check(self, rank: Rank, piece: Piece, layer: int) -> None:
        sequence = piece.sequence
        request = self.scheduler.requests.get(sequence.request_id)
        alive = request is not None and not request.is_finished() and request.num_preemptions == sequence.life
        if not alive:
            return
        wrong = rank.caches.wrong(layer, piece.block_ids, 0, piece.hi, sequence)
        self._events["blocks_checked"] += -(-piece.hi // self.kind.block_tokens)
        if wrong >= 0:
            block = int(piece.block_ids[wrong // self.kind.block_tokens])
            poison = " (poison)" if rank.caches.is_poison(block) else ""
            self._fail(
                f"{self.name} rank {rank.number} layer {layer}: {sequence.request_id} reads wrong KV{poison} for token "
                f"{wrong} of {len(sequence.tokens)} in block {block}; it computes [{piece.lo}, {piece.hi})"
            )

    def leaks(self) -> list[str]:
        """What has not come back although nothing is under way."""
        found = []
        held = self.free_at_start - self._pool.get_num_free_blocks()
        if held:
            found.append(f"{self.name}: {held} blocks are not free")
        if self.scheduler.requests:
            found.append(f"{self.name}: requests {list(self.scheduler.requests)} are still known")
        return found

    def close(self) -> None:
        for rank in self.runner.ranks:
            rank.close()
        self.scheduler.shutdown()
