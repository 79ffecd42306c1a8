#!/usr/bin/env python3
"""What the router costs: CPU a streamed chunk, and what it adds to the first byte, against asking the engine directly.

Fake engines (two processes) stream as vLLM does: role event and first token at once, then a token every few ms. Clients
ask in a closed loop, in turns directly, through a router of this checkout, and through the barest relay that can be
written with the same library (`floor`: one request up, no retries, nothing looked at). Loads:

    dense   a token every 2 ms   32 streams make the router busy: CPU figures
    dense_long                   the same with longer streams: tells the cost of a chunk from that of a request
    paced   a token every 20 ms  32 streams as a loaded engine makes them: first-byte figures

CPU is the router process's own, all threads, system calls included. On a shared machine figures hold within a run only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web
from bench import stats

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 32
START_S = 30.0
STREAM_S = 120.0
GOALS = {"cpu_us_per_chunk": 20.0, "first_byte_added_ms": 1.0}
PROMPT = "the quick brown fox " * 100
TOKEN = b'"content":"tok'


@dataclass(frozen=True)
class Load:
    name: str
    tokens: int
    interval_ms: float


DENSE = Load("dense", 64, 2.0)
DENSE_LONG = Load("dense_long", 512, 2.0)
PACED = Load("paced", 64, 20.0)


@dataclass(frozen=True)
class Way:
    """`pid`: whose CPU is counted."""

    name: str
    url: str
    pid: int | None


@dataclass
class Phase:
    """One load on one way for a few seconds."""

    load: Load
    way: str
    round: int
    first_token_ms: list[float] = field(default_factory=list)
    requests: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def chunks(self) -> int:
        """Writes of the engine: role and first token are one, the end is one."""
        return self.requests * (self.load.tokens + 1)


# --- the fake engine, in a process of its own -------------------------------------------------------------------------


def _chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    body = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps(body | {"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


ROLE = _chunk({"role": "assistant", "content": ""})
WORD = _chunk({"content": "token "})
END = _chunk({"content": ""}, "stop") + b"data: [DONE]\n\n"


async def _generate(request: web.Request) -> web.StreamResponse:
    body = json.loads(await request.read())
    if not body.get("stream"):
        return web.json_response({"choices": [{"message": {"content": "x"}}]})
    interval_s = body["interval_ms"] / 1000
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    await reply.write(ROLE + WORD)
    for _ in range(body["max_tokens"] - 1):
        await asyncio.sleep(interval_s)
        await reply.write(WORD)
    await reply.write(END)
    return reply


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _serve_engine() -> None:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/chat/completions", _generate)
    app.router.add_get("/health", _health)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(json.dumps(runner.addresses[0][1]), flush=True)
    await asyncio.Event().wait()


async def _serve_floor(engine: str) -> None:
    """A relay without anything, of the same library."""

    async def relay(request: web.Request) -> web.StreamResponse:
        async with session.post(engine + request.path_qs, data=await request.read()) as answer:
            reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await reply.prepare(request)
            while chunk := await answer.content.readany():
                await reply.write(chunk)
            await reply.write_eof()
            return reply

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, timeout=timeout
    ) as session:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", relay)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(json.dumps(runner.addresses[0][1]), flush=True)
        await asyncio.Event().wait()


# --- processes --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process of ours and the JSON of its first line; ended in any case."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.terminate()
        try:
            process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(START_S)


def cpu_s(pid: int | None) -> float:
    """Time on a CPU of all threads, to the nanosecond; nothing for nobody."""
    if pid is None:
        return 0.0
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


# --- measuring --------------------------------------------------------------------------------------------------------


async def one_stream(client: aiohttp.ClientSession, url: str, load: Load) -> float:
    """Milliseconds to the first token."""
    body = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    body |= {"max_tokens": load.tokens, "interval_ms": load.interval_ms}
    began_s, first_ms, head, tail = time.perf_counter(), 0.0, b"", b""
    async with client.post(url + "/v1/chat/completions", json=body) as reply:
        async for chunk in reply.content.iter_any():
            if not first_ms:
                head += chunk
                if TOKEN in head:
                    first_ms = (time.perf_counter() - began_s) * 1000
            tail = (tail + chunk)[-64:]
    if reply.status != 200 or not first_ms or not tail.endswith(b"data: [DONE]\n\n"):
        raise SystemExit(f"a stream from {url} is broken: status {reply.status}, it ends in {tail!r}")
    return first_ms


async def run_phase(phase: Phase, way: Way, seconds: float) -> Phase:
    """CLIENTS streams at any time; those begun in time are finished and counted."""
    end_s = time.perf_counter() + seconds
    timeout = aiohttp.ClientTimeout(total=STREAM_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, timeout=timeout
    ) as client:

        async def loop(i: int) -> None:
            await asyncio.sleep(i * phase.load.interval_ms * phase.load.tokens / CLIENTS / 1000)
            while time.perf_counter() < end_s:
                phase.first_token_ms.append(await one_stream(client, way.url, phase.load))
                phase.requests += 1

        began_s, before_s = time.perf_counter(), cpu_s(way.pid)
        await asyncio.gather(*(loop(i) for i in range(CLIENTS)))
        phase.cpu_s, phase.wall_s = cpu_s(way.pid) - before_s, time.perf_counter() - began_s
    return phase


async def until_ready(url: str) -> None:
    async with aiohttp.ClientSession() as client, asyncio.timeout(START_S):
        while True:
            async with client.get(url + "/readyz") as reply:
                state = await reply.json()
            if all(engine["healthy"] for engine in state["engines"]):
                return
            await asyncio.sleep(0.05)


async def idle_cpu_share(router_pid: int, seconds: float) -> float:
    before_s = cpu_s(router_pid)
    await asyncio.sleep(seconds)
    return (cpu_s(router_pid) - before_s) / seconds


async def measure(quick: bool) -> dict[str, Any]:
    seconds, rounds = (2.0, 3) if quick else (5.0, 5)
    with contextlib.ExitStack() as stack:
        _, prefill_port = stack.enter_context(started(__file__, "--engine"))
        _, decode_port = stack.enter_context(started(__file__, "--engine"))
        direct = f"http://127.0.0.1:{decode_port}"
        # Nobody answers at these control addresses: pairing is not what is measured.
        engines = ["--prefill", f"http://127.0.0.1:{prefill_port}=tcp://127.0.0.1:1"]
        engines += ["--decode", f"{direct}=tcp://127.0.0.1:2"]
        command = [str(ROOT / "scripts" / "router.py"), *engines, "--port", "0", "--json", "--log-level", "error"]
        router, ready = stack.enter_context(started(*command))
        floor, floor_port = stack.enter_context(started(__file__, "--floor", direct))
        await until_ready(ready["ready"])
        ways = {
            "direct": Way("direct", direct, None),
            "floor": Way("floor", f"http://127.0.0.1:{floor_port}", floor.pid),
            "router": Way("router", ready["ready"], router.pid),
        }
        for way in ways.values():
            await run_phase(Phase(DENSE, way.name, -1), way, 1.0)
        phases = []
        for number in range(rounds):
            for load in (DENSE, DENSE_LONG, PACED):
                order = list(ways.values())
                for way in order[number % 3 :] + order[: number % 3]:
                    phases.append(await run_phase(Phase(load, way.name, number), way, seconds))
                    print(describe(phases[-1]), file=sys.stderr)
        idle = await idle_cpu_share(router.pid, 2.0)
        load_average = os.getloadavg()[1]
    return {
        "machine": stats.machine() | {"load_average_5_min": round(load_average, 2)},
        "commit": stats.commit(ROOT),
        "settings": {"clients": CLIENTS, "seconds": seconds, "rounds": rounds, "quick": quick},
        "results": [result(phase) for phase in phases],
        "summary": summary(phases) | {"idle_cpu_share": round(idle, 4)},
    }


# --- figures ----------------------------------------------------------------------------------------------------------


def percentile(samples: Sequence[float], percent: int) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


def result(phase: Phase) -> dict[str, Any]:
    return {
        "load": phase.load.name,
        "way": phase.way,
        "round": phase.round,
        "requests": phase.requests,
        "chunks_per_s": round(phase.chunks / phase.wall_s),
        "first_token_ms": {f"p{p}": round(percentile(phase.first_token_ms, p), 3) for p in (50, 90, 99)},
        "cpu_s": round(phase.cpu_s, 4),
        "cpu_us_per_chunk": round(phase.cpu_s / phase.chunks * 1e6, 2),
    }


def describe(phase: Phase) -> str:
    facts = result(phase)
    cpu = f", {facts['cpu_us_per_chunk']} µs CPU a chunk" if phase.cpu_s else ""
    times = facts["first_token_ms"]
    return (
        f"{phase.round} {phase.load.name:10} {phase.way:6} {phase.requests:5} requests,"
        f" first token p50 {times['p50']} p99 {times['p99']} ms{cpu}"
    )


def summary(phases: Sequence[Phase]) -> dict[str, float]:
    """Medians over the rounds; what a way adds is taken within each round."""

    def of(load: Load, way: str) -> list[Phase]:
        return sorted((p for p in phases if p.load is load and p.way == way), key=lambda p: p.round)

    def cpu_us(load: Load, way: str) -> list[float]:
        return [p.cpu_s / p.requests * 1e6 for p in of(load, way)]

    def added_ms(load: Load, way: str, percent: int) -> float:
        pairs = zip(of(load, way), of(load, "direct"), strict=True)
        return stats.median([
            percentile(relayed.first_token_ms, percent) - percentile(direct.first_token_ms, percent)
            for relayed, direct in pairs
        ])  # fmt: skip

    more_chunks = DENSE_LONG.tokens - DENSE.tokens
    flat: dict[str, float] = {}
    for way, prefix in (("router", ""), ("floor", "floor_")):
        short_us, long_us = cpu_us(DENSE, way), cpu_us(DENSE_LONG, way)
        chunk_us = stats.median([(b - a) / more_chunks for a, b in zip(short_us, long_us, strict=True)])
        flat |= {
            f"{prefix}cpu_us_per_chunk": chunk_us,
            f"{prefix}cpu_us_per_request": stats.median(short_us) - chunk_us * DENSE.tokens,
            f"{prefix}dense_cpu_us_per_chunk_all_in": stats.median(short_us) / (DENSE.tokens + 1),
            f"{prefix}paced_cpu_us_per_chunk_all_in": stats.median(cpu_us(PACED, way)) / (PACED.tokens + 1),
            f"{prefix}first_byte_added_ms": added_ms(PACED, way, 50),
            f"{prefix}first_byte_added_p99_ms": added_ms(PACED, way, 99),
            f"{prefix}dense_first_byte_added_ms": added_ms(DENSE, way, 50),
        }
    flat["cpu_per_chunk_vs_floor"] = flat["cpu_us_per_chunk"] / flat["floor_cpu_us_per_chunk"]
    return {name: round(value, 3) for name, value in flat.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--quick", action="store_true", help="under a minute, less exact")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--floor", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that processes started here end
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.engine:
            runner.run(_serve_engine())
            return
        if arguments.floor is not None:
            runner.run(_serve_floor(arguments.floor))
            return
        report = runner.run(measure(arguments.quick))
    for name, value in report["summary"].items():
        goal = f"   (goal ≤ {GOALS[name]}: {'met' if value <= GOALS[name] else 'missed'})" if name in GOALS else ""
        print(f"{name} = {value}{goal}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
