"""The rounds of the handover benchmark: start, warm, pause, resume and measure engines and pairs of them."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench import client, report, stats
from bench.busy import busy_core
from bench.engines import Engine, EngineSpec, stop_all
from bench.errors import BenchError, progress
from bench.methods import LOCAL_PLACES, PAIRS, Pair, Place, Settings, pair_specs
from bench.netns import PREFILL_HOST, Link
from bench.prompts import Prompts

ANSWER_TOKENS = 8
WARM_TOKENS = 300
WARM_DEADLINE_S = 60.0
CALIBRATION_TOKENS = 1025
NOISY_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    methods: tuple[str, ...]
    lengths: tuple[int, ...]
    repetitions: int
    link: float | str | None
    push_dispatch: str
    alive: str
    idle_spinners: bool
    settings: Settings
    text: Path
    out: Path | None
    log_folder: Path
    keep_logs: bool

    @property
    def pairs(self) -> list[str]:
        return [method for method in self.methods if method in PAIRS]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Plain vLLM's TTFT for a prompt in milliseconds, with the other core idle and kept busy, and its answer."""

    ttft_ms: float
    busy_ms: float
    text: str


@dataclass(slots=True)
class Bench:
    """One run. Owns its engines and its link; `close` ends them all."""

    options: Options
    prompts: Prompts
    session: aiohttp.ClientSession
    engines: list[Engine] = field(default_factory=list)
    link: Link | None = None
    places: tuple[Place, Place] = LOCAL_PLACES
    samples: list[report.Sample] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _names: int = 0
    _passes: int = 0
    _poller_cpu_s: float = 0.0

    def close(self) -> None:
        if self.engines:
            progress(f"ending {len(self.engines)} engines")
        stop_all(self.engines)
        self.engines.clear()
        if self.link is not None:
            self.link.close()

    def fresh(self, tokens: int) -> list[int]:
        """A prompt that no engine has seen."""
        self._names += 1
        return self.prompts.make(f"warm-{self._names}", tokens)

    def _measured(self, repetition: int, tokens: int) -> list[int]:
        """The same for every method in a round, and new to all of them."""
        return self.prompts.make(f"{self._passes}-{repetition}", tokens)

    async def start(self, *specs: EngineSpec) -> list[Engine]:
        """Side by side, each on its core; then each is warmed with prompts that are long enough (the first forward
        pass of a process in bf16 must not be a short one: the CPU attention may die of SIGILL)."""
        started_s = time.monotonic()
        names = ", ".join(spec.name for spec in specs)
        progress(f"starting {names}")
        engines = []
        for spec in specs:
            engine = Engine(spec, self.options.log_folder)
            self.engines.append(engine)
            engines.append(engine)
        await asyncio.gather(*(engine.wait_ready() for engine in engines))
        for engine in engines:
            engine.pin()
            for tokens in (WARM_TOKENS, WARM_TOKENS, *self.options.lengths):
                await self.ask(engine, self.fresh(tokens))
        memory_gib = sum(engine.memory_bytes() for engine in engines) / 2**30
        progress(f"{names} warm after {time.monotonic() - started_s:.0f} s, {memory_gib:.1f} GiB")
        return engines

    async def ask(self, engine: Engine, prompt: Sequence[int]) -> tuple[float, client.Reply]:
        """TTFT in milliseconds without a handover, and the answer."""
        engine.check_alive()
        started_s = time.perf_counter()
        reply = await client.stream(self.session, engine.spec.url, prompt, ANSWER_TOKENS)
        return (reply.first_token_s - started_s) * 1e3, reply

    async def warm_pair(self, pair: Pair) -> None:
        """Until a handover really moved KV: engines that were stopped for long first have to find each other again."""
        deadline_s = time.monotonic() + WARM_DEADLINE_S
        while True:
            done = await pair.hand_over(self.session, self.fresh(WARM_TOKENS), ANSWER_TOKENS)
            if done.reply.cached_tokens >= WARM_TOKENS - report.BLOCK_TOKENS - 1:
                return
            if time.monotonic() > deadline_s:
                raise BenchError(
                    f"{pair.method} handed nothing over for {WARM_DEADLINE_S:.0f} s: decode computes its prompts itself"
                    f"\n  prefill:\n{pair.prefill.log_tail(10)}\n  decode:\n{pair.decode.log_tail(10)}"
                )
            await asyncio.sleep(0.2)

    async def start_pair(self, method: str) -> Pair:
        prefill, decode = await self.start(*pair_specs(method, self.places, self.options.settings))
        pair = Pair(method, prefill, decode, "concurrent" if method == "lmkv" else "serial")
        await self.warm_pair(pair)
        progress(f"{method} handed its first prompt over")
        if method == "push":
            await self._choose_dispatch(pair)
        for tokens in self.options.lengths:
            await pair.hand_over(self.session, self.fresh(tokens), ANSWER_TOKENS)
        await self._look_for_spinners(pair)
        for engine in pair.engines:
            engine.pause()
        return pair

    async def _look_for_spinners(self, pair: Pair) -> None:
        """Progress threads that spin cost an engine on one core half its speed: counted, and with --spinners idle put
        behind everything else."""
        found = await asyncio.gather(*(engine.spinning_threads() for engine in pair.engines))
        for engine, threads in zip(pair.engines, found, strict=True):
            self.notes.setdefault("spinning_threads", {})[engine.spec.name] = len(threads)
            if self.options.idle_spinners:
                engine.make_idle(threads)

    async def _choose_dispatch(self, pair: Pair) -> None:
        """The faster way of asking a push pair, unless the user has chosen one."""
        if self.options.push_dispatch != "auto":
            pair.dispatch = self.options.push_dispatch
        else:
            times_ms: dict[str, list[float]] = {"serial": [], "concurrent": []}
            for _ in range(3):
                for pair.dispatch, found in times_ms.items():
                    done = await pair.hand_over(self.session, self.fresh(CALIBRATION_TOKENS), ANSWER_TOKENS)
                    found.append(done.ttft_s * 1e3)
            pair.dispatch = min(times_ms, key=lambda name: stats.median(times_ms[name]))
            self.notes["push_dispatch_ttft_ms"] = {name: stats.spread(found) for name, found in times_ms.items()}
            shown = ", ".join(f"{name} {stats.median(found):.0f} ms" for name, found in times_ms.items())
            progress(f"push at {CALIBRATION_TOKENS} tokens: {shown}")
        self.notes["push_dispatch"] = pair.dispatch

    async def measure_plain(self, plain: Engine, repetition: int) -> dict[int, Baseline]:
        plain.resume()
        await self.ask(plain, self.fresh(WARM_TOKENS))
        found = {}
        for tokens in self.options.lengths:
            ttft_ms, reply = await self.ask(plain, self._measured(repetition, tokens))
            if reply.cached_tokens:
                raise BenchError(f"plain vLLM had {reply.cached_tokens} tokens of a new prompt in its cache")
            before_s = _ended_children_cpu_s()
            with busy_core(self.places[1].core):
                busy_ms, _ = await self.ask(plain, self.fresh(tokens))
            self._poller_cpu_s += _ended_children_cpu_s() - before_s
            found[tokens] = Baseline(ttft_ms, busy_ms, reply.text)
        plain.pause()
        return found

    async def measure_pair(self, pair: Pair, repetition: int) -> dict[int, dict[str, Any]]:
        for engine in pair.engines:
            engine.resume()
        await self.warm_pair(pair)
        found = {}
        for tokens in self.options.lengths:
            prompt = self._measured(repetition, tokens)
            sent_bytes = self._sent_bytes()
            done = await pair.hand_over(self.session, prompt, ANSWER_TOKENS)
            sent_bytes = self._sent_bytes() - sent_bytes
            await self.ask(pair.decode, prompt)  # if decode does not keep what it was given, it does from here on
            floor_ms, _ = await self.ask(pair.decode, prompt)
            own_ms, _ = await self.ask(pair.prefill, self.fresh(tokens))
            found[tokens] = {
                "ttft_ms": done.ttft_s * 1e3,
                "own_ms": own_ms,
                "floor_ms": floor_ms,
                "handed_tokens": done.reply.cached_tokens,
                "text": done.reply.text,
                "link_bytes": sent_bytes if self.link is not None else None,
            }
        for engine in pair.engines:
            engine.pause()
        return found

    def _sent_bytes(self) -> int:
        return 0 if self.link is None else self.link.sent_bytes(PREFILL_HOST)

    async def measure(self, plain: Engine, pairs: Sequence[Pair]) -> None:
        """All rounds; the method that goes first changes from round to round."""
        self._passes += 1
        for repetition in range(self.options.repetitions):
            usage = stats.CpuUsage(self._own_cpu_s)
            turn = repetition % (len(pairs) + 1)
            baseline: dict[int, Baseline] = {}
            found: dict[str, dict[int, dict[str, Any]]] = {}
            everyone: list[Pair | None] = [None, *pairs]
            for pair in everyone[turn:] + everyone[:turn]:
                if pair is None:
                    baseline = await self.measure_plain(plain, repetition)
                else:
                    found[pair.method] = await self.measure_pair(pair, repetition)
            for method, by_length in found.items():
                self.samples += [self._sample(method, t, repetition, baseline[t], by_length[t]) for t in by_length]
            self._say_round(repetition, baseline, found)
            share = usage.foreign_share()
            self.notes.setdefault("foreign_cpu_share", []).append(round(share, 3))
            if share > NOISY_SHARE:
                progress(
                    f"other processes used {share:.0%} of the machine in this round: its times are not to be trusted"
                )

    def _own_cpu_s(self) -> float:
        engines_s = sum(sum(engine.thread_cpu_s().values()) for engine in self.engines)
        return engines_s + time.process_time() + self._poller_cpu_s

    @staticmethod
    def _sample(method: str, tokens: int, repetition: int, plain: Baseline, found: dict[str, Any]) -> report.Sample:
        same = found.pop("text") == plain.text
        return report.Sample(method, tokens, repetition, plain.ttft_ms, plain.busy_ms, same_answer=same, **found)

    def _say_round(
        self, repetition: int, baseline: dict[int, Baseline], found: dict[str, dict[int, dict[str, Any]]]
    ) -> None:
        said = []
        for tokens, plain in baseline.items():
            shown = " ".join(f"{method} {by_length[tokens]['ttft_ms']:.0f}" for method, by_length in found.items())
            said.append(f"{tokens}: plain {plain.ttft_ms:.0f} ({plain.busy_ms:.0f}) {shown}")
        progress(f"round {repetition + 1} of {self.options.repetitions}, TTFT in ms · {' · '.join(said)}")


def _ended_children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
