#!/usr/bin/env python3
"""LMCache as a baseline: its server in MP mode, vLLM engines with its connector, an environment of its own for both.

Run directly, it measures one thing: engine 1 computes a prompt, LMCache stores it, engine 2 is asked the same prompt.
Needs root, for the network namespace that both live in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This folder's modules belong to `bench`; by itself it would offer this very file as `lmcache`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import aiohttp

from bench import client, stats
from bench.engines import Engine, EngineSpec, reap_leftovers, stop_all
from bench.errors import BenchError, progress
from bench.lmcache_place import ADDRESS, CACHE, NAMESPACE, QUIET, VERSION, Island, environment
from bench.prompts import Prompts

ROOT = Path(__file__).resolve().parents[2]
CHUNK_TOKENS = 256
L1_GB = 2
HEARTBEAT_S = 3600.0
STORE_DEADLINE_S = 20.0
POLL_S = 0.02
WARM_TOKENS = 300
ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ServerSpec(EngineSpec):
    """How to start `lmcache server`. `port` is that of its HTTP side, the engines' requests go to the next one."""

    chunk_tokens: int = CHUNK_TOKENS

    @property
    def request_port(self) -> int:
        return self.port + 1

    def command(self) -> list[str]:
        """The lmcache-driven transfer: the server itself copies from and to the engines' memory. Its own is had at
        once, not grown while it is measured. Engines that are stopped for long keep their registration."""
        inside = ["ip", "netns", "exec", str(self.namespace)]
        pinned = ["taskset", "--cpu-list", str(self.core)]
        server = [str(self.python), "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1"]
        server += ["--port", str(self.request_port), "--http-host", self.host, "--http-port", str(self.port)]
        server += ["--supported-transfer-mode", "lmcache_driven", "--chunk-size", str(self.chunk_tokens)]
        server += ["--l1-size-gb", str(L1_GB), "--no-l1-use-lazy", "--eviction-policy", "LRU"]
        server += ["--worker-reap-timeout-seconds", "0", "--disable-observability"]
        return [*inside, *pinned, *server, *self.extra_arguments]

    def variables(self) -> dict[str, str]:
        return {**EngineSpec.variables(self), "OMP_NUM_THREADS": "1"}


def server_spec(core: int, first_port: int, python: Path, chunk_tokens: int = CHUNK_TOKENS) -> ServerSpec:
    """Takes two ports, the first one and the next."""
    return ServerSpec(
        "lmcache-server",
        Path(),
        core,
        ADDRESS,
        first_port,
        environment=dict(QUIET),
        namespace=NAMESPACE,
        python=python,
        chunk_tokens=chunk_tokens,
    )


def engine_spec(
    name: str, core: int, port: int, model: Path, server: ServerSpec, engine_arguments: tuple[str, ...] = ()
) -> EngineSpec:
    """A vLLM engine beside the server. No heartbeats: an engine that was stopped would take a late answer for a dead
    server, and for a while ask it nothing."""
    extra = {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": server.request_port,
        "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        "lmcache.mp.heartbeat_interval": HEARTBEAT_S,
    }
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    return EngineSpec(
        name,
        model,
        core,
        server.host,
        port,
        transfer,
        dict(QUIET),
        server.namespace,
        engine_arguments,
        server.python,
    )


class LmcacheServer(Engine):
    """`lmcache server` with the namespace it lives in. Start it before its engines, stop it after them; `stop` may be
    called twice. Paused, resumed and pinned like an engine."""

    READY_PATH = "/healthcheck"

    def __init__(
        self, core: int, first_port: int, python: Path, log_folder: Path, chunk_tokens: int = CHUNK_TOKENS
    ) -> None:
        self._island = Island()
        try:
            self.server_spec = server_spec(core, first_port, python, chunk_tokens)
            super().__init__(self.server_spec, log_folder)
        except BaseException:
            self._island.close()
            raise

    async def stored_chunks(self, session: aiohttp.ClientSession) -> int:
        """Chunks that an engine can load now; those still being written do not count."""
        try:
            async with session.get(f"{self.spec.url}/status") as response:
                l1 = (await response.json())["storage_manager"]["l1_manager"]
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            raise BenchError(f"{self.spec.url}/status: {error!r}; see {self.log_path}") from None
        return int(l1["total_object_count"]) - int(l1["staging_object_count"])

    async def wait_stored(self, session: aiohttp.ClientSession, chunks_before: int, prompt_tokens: int) -> float:
        """Until all complete chunks of a new prompt are there; returns the seconds that took. Call `clear` before L1_GB
        are 80 % full, as evicted chunks are missed here. The engine must not be stopped before this returns."""
        started_s = time.monotonic()
        wanted = chunks_before + prompt_tokens // self.server_spec.chunk_tokens
        while (stored := await self.stored_chunks(session)) < wanted:
            self.check_alive()
            if time.monotonic() - started_s > STORE_DEADLINE_S:
                raise BenchError(f"LMCache has {stored} of {wanted} chunks after {STORE_DEADLINE_S:.0f} s")
            await asyncio.sleep(POLL_S)
        return time.monotonic() - started_s

    async def clear(self, session: aiohttp.ClientSession) -> None:
        """Forgets everything that is stored."""
        async with session.post(f"{self.spec.url}/cache/clear") as response:
            if response.status != 200:
                raise BenchError(f"{response.url} answered {response.status}: {(await response.text())[:500]}")

    def stop(self) -> None:
        super().stop()
        self._island.close()
        _remove_segments_of_the_dead()


def _remove_segments_of_the_dead(folder: Path = Path("/dev/shm")) -> None:
    """An engine's KV cache is moved to shared memory, named after its process; one that was killed leaves it behind."""
    for segment in folder.glob("lmcache_kv_*_*"):
        owner = segment.name.split("_")[2]
        if not Path(f"/proc/{owner}").exists():
            segment.unlink(missing_ok=True)


@dataclass(slots=True)
class Trial:
    """The command's run. Owns the server and both engines; `close` ends them all."""

    session: aiohttp.ClientSession
    prompts: Prompts
    server: LmcacheServer
    engines: list[Engine]
    samples: list[dict[str, Any]]

    def close(self) -> None:
        stop_all(self.engines)
        self.server.stop()

    async def ask(self, engine: Engine, prompt: Sequence[int]) -> tuple[float, client.Reply]:
        engine.check_alive()
        started_s = time.perf_counter()
        reply = await client.stream(self.session, engine.spec.url, prompt, ANSWER_TOKENS)
        return (reply.first_token_s - started_s) * 1e3, reply

    async def start(self, specs: Sequence[EngineSpec], log_folder: Path) -> None:
        """One after the other: they share a core. The first prompt of a process must not be a short one."""
        await self.server.wait_ready()
        self.server.pin()
        for index, spec in enumerate(specs):
            engine = Engine(spec, log_folder)
            self.engines.append(engine)
            await engine.wait_ready()
            engine.pin()
            await self.ask(engine, self.prompts.make(f"warm-{index}", WARM_TOKENS))
            engine.pause()
            progress(f"{spec.name} is warm")

    async def measure(self, name: str, tokens: int) -> dict[str, Any]:
        """One prompt. Each engine has another one before it, so that what a stop made cold is warm again.

        Greedy answers in bfloat16 may flip between computing a whole prompt and its last token alone, without any
        transfer; the answer that engine 1 gives from its own prefix cache tells such a flip from a wrong KV cache."""
        computes, loads = self.engines
        prompt = self.prompts.make(name, tokens)
        await self.server.clear(self.session)
        computes.resume()
        await self._warm(computes, f"{name}-c")
        chunks = await self.server.stored_chunks(self.session)
        computed_ms, computed = await self.ask(computes, prompt)
        stored_s = await self.server.wait_stored(self.session, chunks, tokens)
        _, again = await self.ask(computes, prompt)
        computes.pause()
        loads.resume()
        await self._warm(loads, f"{name}-l")
        loaded_ms, loaded = await self.ask(loads, prompt)
        floor_ms, _ = await self.ask(loads, prompt)
        loads.pause()
        return {
            "tokens": tokens,
            "computed_ms": round(computed_ms, 2),
            "stored_after_answer_ms": round(stored_s * 1e3, 1),
            "loaded_ms": round(loaded_ms, 2),
            "floor_ms": round(floor_ms, 2),
            "cached_tokens": loaded.cached_tokens,
            "same_answer": loaded.text == computed.text,
            "same_as_own_cache": loaded.text == again.text,
        }

    async def _warm(self, engine: Engine, name: str) -> None:
        chunks = await self.server.stored_chunks(self.session)
        await self.ask(engine, self.prompts.make(f"warm-{name}", WARM_TOKENS))
        await self.server.wait_stored(self.session, chunks, WARM_TOKENS)


async def run(given: argparse.Namespace, log_folder: Path) -> dict[str, Any]:
    """The whole command; leaves no process and no namespace behind, whatever happens."""
    python = environment(given.environment)
    reap_leftovers()
    async with client.connect() as session:
        server = LmcacheServer(1, given.port, python, log_folder, given.chunk)
        trial = Trial(session, Prompts(given.model), server, [], [])
        try:
            names = ("lmcache-1", "lmcache-2")
            ports = (given.port + 2, given.port + 3)
            specs = [
                engine_spec(name, 0, port, given.model, server.server_spec)
                for name, port in zip(names, ports, strict=True)
            ]
            await trial.start(specs, log_folder)
            for tokens in given.lengths:
                await trial.measure("first", tokens)
            for number in range(given.rounds):
                for tokens in given.lengths:
                    trial.samples.append(await trial.measure(f"{number}", tokens))
                    progress(json.dumps(trial.samples[-1]))
        finally:
            trial.close()
    return {
        "benchmark": "lmcache",
        "machine": stats.machine(),
        "versions": {**stats.versions(), "lmcache": VERSION},
        "settings": {"chunk_tokens": given.chunk, "transfer": "lmcache_driven", "model": given.model.name},
        "samples": trial.samples,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument

    def lengths(text: str) -> list[int]:
        found = [int(part) for part in text.split(",")]
        if min(found) < WARM_TOKENS or max(found) > 4000:
            raise argparse.ArgumentTypeError(f"{text}: from {WARM_TOKENS} to 4000 tokens (the context is 4096)")
        return found

    add("--lengths", type=lengths, default="1025,2049,3585", metavar="LIST", help="in tokens (default: %(default)s)")
    add("--rounds", type=int, default=3, metavar="N", help="prompts of each length (default: %(default)s)")
    add("--chunk", type=int, default=CHUNK_TOKENS, metavar="N", help="LMCache's chunk in tokens (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", metavar="DIR")
    add("--environment", type=Path, default=CACHE, metavar="DIR", help="default: %(default)s")
    add("--port", type=int, default=21200, metavar="N", help="first of 4 ports (default: %(default)s)")
    add("--logs", type=Path, metavar="DIR", help="keep the logs there (default: a temporary folder)")
    return parser.parse_args(arguments)


def table(samples: Sequence[dict[str, Any]]) -> str:
    title = "tokens  computed  stored after  loaded by 2  own cache  cached tokens  same answers  same as own cache"
    lines = [f"{title}   (medians, ms)"]
    for tokens in sorted({sample["tokens"] for sample in samples}):
        mine = [sample for sample in samples if sample["tokens"] == tokens]

        def middle(key: str, mine: list[dict[str, Any]] = mine) -> float:
            return stats.median([sample[key] for sample in mine])

        shown = f"{tokens:6} {middle('computed_ms'):9.0f} {middle('stored_after_answer_ms'):13.0f}"
        shown += f" {middle('loaded_ms'):12.0f} {middle('floor_ms'):10.0f} {middle('cached_tokens'):14.0f}"
        for key in ("same_answer", "same_as_own_cache"):
            shown += f" {sum(sample[key] for sample in mine):10} of {len(mine)}"
        lines.append(shown)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    log_folder = given.logs or Path(tempfile.mkdtemp(prefix="bench-lmcache-"))
    log_folder.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        result = asyncio.run(until_signal(run(given, log_folder)))
    except BenchError as error:
        print(f"lmcache: {error}\nLogs: {log_folder}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        progress("stopped by a signal; engines and namespace are gone")
        return 1
    print(table(result["samples"]))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    if given.logs is None:
        shutil.rmtree(log_folder)
    return 0


async def until_signal(work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """A signal cancels the work, whose clean-up then ends the engines; further signals do not disturb it."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


if __name__ == "__main__":
    sys.exit(main())
