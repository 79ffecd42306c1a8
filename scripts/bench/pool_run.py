"""The rounds of the pool benchmark: nodes, engines, stores, loads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench import client, lmcache
from bench.engines import Engine, EngineSpec, reap_leftovers, stop_all
from bench.errors import BenchError, progress
from bench.netns import DECODE_HOST, PREFILL_HOST, Link
from bench.pool_nodes import Desk, PoolNode
from bench.pool_report import CHUNK, Sample
from bench.prompts import Prompts, model_shape
from bench.stats import median

METHODS = ("plain", "local", "disk", "remote", "object", "lmcache")
LENGTHS = (1025, 2049, 3585)
ANSWER_TOKENS = 8
WARM_TOKENS = 300
LINK_ROUNDS, MOVE_ROUNDS = 15, 15
ENGINE_CORE, NODE_CORE = 0, 1
CAPACITY = "1GiB"
LINK_ENVIRONMENT = {"UCX_TLS": "tcp"}
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked."""

    methods: tuple[str, ...]
    lengths: tuple[int, ...]
    rounds: int
    model: Path
    port: int
    logs: Path
    out: Path | None


@dataclass(slots=True)
class Way:
    """One method: an engine and the node behind it. `tier`: where pages are when they are asked for."""

    name: str
    engine: Engine
    node: PoolNode
    desk: Desk
    tier: str = ""


@dataclass(slots=True)
class PoolBench:
    """Owns everything it starts; `close` ends it all."""

    options: Options
    samples: list[Sample] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _engines: list[Engine] = field(default_factory=list)
    _nodes: list[PoolNode] = field(default_factory=list)
    _desks: list[Desk] = field(default_factory=list)
    _link: Link | None = None
    _session: aiohttp.ClientSession | None = None
    _moto: Any = None
    _lmcache: Any = None
    _prompts: Prompts | None = None
    _warmed: int = 0
    _link_s: list[float] = field(default_factory=list)

    # --- life ---

    async def close(self) -> None:
        stop_all(self._engines)
        for desk in self._desks:
            desk.close()
        for node in self._nodes:
            node.stop()
        if self._lmcache is not None:
            self._lmcache.close()
        if self._link is not None:
            self._link.close()
        if self._moto is not None:
            self._moto.stop()
        if self._session is not None:
            await self._session.close()

    async def run(self) -> None:
        reap_leftovers()
        options = self.options
        self._session = client.connect()
        self._prompts = Prompts(options.model)
        self.notes["kv_bytes_per_token"] = model_shape(options.model).kv_bytes_per_token
        plain = await self._start(EngineSpec("plain", options.model, ENGINE_CORE, "127.0.0.1", options.port))
        plain.pause()
        ways = [way for name in ("local", "remote", "object") if (way := await self._way(name)) is not None]
        if "disk" in options.methods:
            local = next((way for way in ways if way.name == "local"), None)
            if local is None:
                raise BenchError("disk is the local node's lower tier: measure local, too")
            ways.append(Way("disk", local.engine, local.node, local.desk, "DISK"))
        if "lmcache" in options.methods:
            await self._start_lmcache()
        for number in range(options.rounds):
            await self._round(number, plain, ways)
            if "remote" in options.methods:
                self._measure_link()
        stop_all(self._engines)
        self._engines.clear()
        await self._measure_moves()

    async def _start(self, spec: EngineSpec) -> Engine:
        started_s = time.monotonic()
        engine = Engine(spec, self.options.logs)
        self._engines.append(engine)
        await engine.wait_ready()
        engine.pin()
        for tokens in (WARM_TOKENS, WARM_TOKENS, *self.options.lengths):
            await self._ask(engine, self._fresh(tokens))
        progress(f"{spec.name} is warm after {time.monotonic() - started_s:.0f} s")
        return engine

    def _fresh(self, tokens: int) -> list[int]:
        assert self._prompts is not None
        self._warmed += 1
        return self._prompts.make(f"warm-{self._warmed}", tokens)

    async def _ask(self, engine: Engine, prompt: Sequence[int]) -> tuple[float, client.Reply]:
        assert self._session is not None
        engine.check_alive()
        started_s = time.perf_counter()
        reply = await client.stream(self._session, engine.spec.url, prompt, ANSWER_TOKENS)
        return (reply.first_token_s - started_s) * 1e3, reply

    # --- the ways ---

    async def _way(self, name: str) -> Way | None:
        if name not in self.options.methods:
            return None
        index = METHODS.index(name)
        port, control = self.options.port + 10 * index, self.options.port + 10 * index + 5
        host, kv_host, namespace, environment = "127.0.0.1", "127.0.0.1", None, {}
        arguments = ["--capacity", CAPACITY, "--share", str(self.options.logs / f"{name}.sock")]
        node_host, node_environment = None, {}
        address = f"tcp://127.0.0.1:{control + 1}"
        if name == "local":
            arguments += ["--disk", str(self.options.logs / "disk"), "--disk-capacity", "8GiB"]
        elif name == "object":
            arguments += self._object_store()
            node_environment = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
        else:
            self._link = Link(0)
            host, kv_host, namespace = DECODE_HOST.http_address, DECODE_HOST.link_address, DECODE_HOST.namespace
            environment = {**LINK_ENVIRONMENT, "UCX_NET_DEVICES": DECODE_HOST.link_device}
            node_host, node_environment = PREFILL_HOST, {**LINK_ENVIRONMENT}
            node_environment["UCX_NET_DEVICES"] = PREFILL_HOST.link_device
            arguments = ["--capacity", CAPACITY, "--share", "none"]
            address = f"tcp://0.0.0.0:{control + 1}"
            arguments += ["--advertise", PREFILL_HOST.link_address]
        node = PoolNode.start(
            address, self.options.logs, *arguments, core=NODE_CORE, host=node_host, environment=node_environment
        )
        self._nodes.append(node)
        await node.wait_ready()
        seen = f"tcp://{PREFILL_HOST.link_address}:{control + 1}" if node_host else address
        asked = f"tcp://{PREFILL_HOST.http_address}:{control + 1}" if node_host else address
        transfer = {
            "kv_connector": "LmkvConnector",
            "kv_connector_module_path": "lmkv.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"listen": f"tcp://{kv_host}:{control}", "name": name, "pool": seen},
        }
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "LMKV_ON_RESET": "external"}
        spec = EngineSpec(name, self.options.model, ENGINE_CORE, host, port, transfer, environment, namespace)
        node.address = asked
        desk = Desk(node)
        self._desks.append(desk)
        engine = await self._start(spec)
        way = Way(name, engine, node, desk, "OBJECT" if name == "object" else "")
        await self._first_hit(way)
        engine.pause()
        return way

    def _object_store(self) -> list[str]:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        endpoint = "http://{}:{}".format(*self._moto.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/pages", method="PUT")).close()
        return ["--object", "s3://pages/bench", "--object-endpoint", endpoint, "--object-allow-http"]

    async def _first_hit(self, way: Way) -> None:
        """Until a prompt really came from the pool."""
        for _ in range(20):
            sample = await self._measure(way, self._fresh(WARM_TOKENS + CHUNK), 0.0, -1)
            if sample.hit:
                return
        raise BenchError(f"{way.name} loads nothing from its node:\n{way.engine.log_tail(10)}\n{way.node.log_tail()}")

    # --- measuring ---

    async def _round(self, number: int, plain: Engine, ways: list[Way]) -> None:
        assert self._prompts is not None
        turn = number % (len(ways) + 1)
        order: list[Way | None] = [None, *ways]
        plain_ms: dict[int, float] = {}
        found: list[Sample] = []
        for way in order[turn:] + order[:turn]:
            engine = plain if way is None else way.engine
            engine.resume()
            await self._ask(engine, self._fresh(WARM_TOKENS))
            for tokens in self.options.lengths:
                name = "plain" if way is None else way.name
                prompt = self._prompts.make(f"{name}-{number}", tokens)
                if way is None:
                    plain_ms[tokens], _ = await self._ask(engine, prompt)
                else:
                    found.append(await self._measure(way, prompt, 0.0, number))
            engine.pause()
        if self._lmcache is not None:
            found += await self._measure_lmcache(number)
        for s in found:
            self.samples.append(
                Sample(s.method, s.tokens, s.round, plain_ms[s.tokens], s.compute_ms, s.ttft_ms, s.floor_ms,
                       s.cached_tokens, s.same_answer)
            )  # fmt: skip
        longest = max(self.options.lengths)
        shown = " ".join(f"{s.method} {s.ttft_ms:.0f}" for s in found if s.tokens == longest)
        progress(
            f"round {number + 1} of {self.options.rounds}, {longest} tokens, ms: plain {plain_ms[longest]:.0f} {shown}"
        )

    async def _measure(self, way: Way, prompt: list[int], plain_ms: float, number: int) -> Sample:
        assert self._session is not None
        stored = way.desk.counter("commit:visible")
        compute_ms, _ = await self._ask(way.engine, prompt)
        chunks = len(prompt) // CHUNK
        await way.desk.until(
            lambda: way.desk.counter("commit:visible") >= stored + chunks, f"{chunks} chunks in {way.name}"
        )
        if way.tier:
            await way.desk.until(lambda: self._is_below(way), f"all pages in {way.tier}")
            way.desk.demote()
        async with self._session.post(f"{way.engine.spec.url}/reset_prefix_cache") as response:
            if response.status != 200:
                raise BenchError(f"{way.name}: the prefix cache cannot be emptied: {response.status}")
        ttft_ms, again = await self._ask(way.engine, prompt)
        floor_ms, own = await self._ask(way.engine, prompt)
        return Sample(
            way.name, len(prompt), number, plain_ms, compute_ms, ttft_ms, floor_ms, again.cached_tokens,
            again.text == own.text,
        )  # fmt: skip

    @staticmethod
    def _is_below(way: Way) -> bool:
        stats = way.desk.stats()
        return int(stats["counters"].get(f"spill:{way.tier}", 0)) >= int(stats["counters"].get("commit:visible", 0))

    # --- LMCache ---

    async def _start_lmcache(self) -> None:
        """Its own engines and server, all as it is measured by itself (bench/lmcache.py)."""
        assert self._session is not None and self._prompts is not None
        try:
            python = lmcache.environment()
        except BenchError as error:
            progress(f"LMCache is left out: {error}")
            self.notes["lmcache"] = str(error)
            return
        port, model = self.options.port + 50, self.options.model
        server = lmcache.LmcacheServer(NODE_CORE, port, python, self.options.logs)
        self._lmcache = lmcache.Trial(self._session, self._prompts, server, [], [])
        names = ("lmcache-1", "lmcache-2")
        specs = [
            lmcache.engine_spec(name, ENGINE_CORE, port + 2 + i, model, server.server_spec)
            for i, name in enumerate(names)
        ]
        await self._lmcache.start(specs, self.options.logs)
        for tokens in self.options.lengths:
            await self._lmcache.measure("first", tokens)
        self.notes["lmcache"] = lmcache.VERSION

    async def _measure_lmcache(self, number: int) -> list[Sample]:
        assert self._prompts is not None
        found = []
        for tokens in self.options.lengths:
            told = await self._lmcache.measure(f"lmcache-{number}", tokens)
            found.append(
                Sample("lmcache", tokens, number, 0.0, told["computed_ms"], told["loaded_ms"], told["floor_ms"],
                       told["cached_tokens"], told["same_as_own_cache"])
            )  # fmt: skip
        return found

    # --- raw figures ---

    def _measure_link(self) -> None:
        """Plain TCP over the same link, same cores, same bytes; the fastest of all rounds is the limit."""
        size = max(self.options.lengths) // CHUNK * CHUNK * self.notes["kv_bytes_per_token"]
        address = f"{PREFILL_HOST.link_address}:{self.options.port + 59}"
        tail = [address, str(size), str(LINK_ROUNDS)]
        script = str(HERE / "raw_link.py")
        inside = [
            ["ip", "netns", "exec", host.namespace, "taskset", "--cpu-list"] for host in (PREFILL_HOST, DECODE_HOST)
        ]
        sender = subprocess.Popen([*inside[0], str(NODE_CORE), sys.executable, script, "send", *tail])
        try:
            done = subprocess.run(
                [*inside[1], str(ENGINE_CORE), sys.executable, script, "receive", *tail],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        finally:
            sender.kill()
            sender.wait()
        if done.returncode:
            raise BenchError(f"the raw link cannot be measured: {done.stderr[-500:]}")
        self._link_s += [float(line) for line in done.stdout.split()]
        # It takes a connection some rounds to open its window, and the machine is not equally fast always.
        self.notes["link_bytes_per_s"] = size / min(self._link_s)
        self.notes["link_samples_s"] = self._link_s

    async def _measure_moves(self) -> None:
        """Stores and loads without an engine, beside raw NIXL."""
        by_name = {METHODS.index(name): name for name in ("local", "remote")}
        moves: dict[str, float] = {}
        for node in self._nodes:
            name = by_name.get((int(node.address.rpartition(":")[2]) - self.options.port - 6) // 10, "")
            if not name:
                continue
            kind = "map" if name == "local" else "data-plane"
            told = await asyncio.to_thread(self._move, node, kind, name)
            self.notes[f"moves_{name}"] = told
            seconds, size = told["median_s"], told["bytes"]
            moves[f"store_gb_per_s_{name}"] = round(size / seconds["store_s"] / 1e9, 3)
            moves[f"load_gb_per_s_{name}"] = round(size / seconds["load_s"] / 1e9, 3)
            moves[f"pin_us_{name}"] = round(seconds["pin_s"] * 1e6, 1)
            if name == "remote":
                for key, raw, ours in (
                    ("store_vs_nixl", "raw_write_s", "store_s"),
                    ("load_vs_nixl", "raw_read_s", "load_s"),
                    ("load_vs_nixl_write", "raw_write_s", "load_s"),
                ):
                    moves[key] = round(median([s[raw] / s[ours] for s in told["samples"]]), 4)
        self.notes["moves"] = moves

    def _move(self, node: PoolNode, kind: str, name: str) -> dict[str, Any]:
        inside = ["ip", "netns", "exec", DECODE_HOST.namespace] if name == "remote" else []
        address = node.address.replace(PREFILL_HOST.http_address, PREFILL_HOST.link_address)
        environment = {"OMP_NUM_THREADS": "1"}
        if name == "remote":
            environment |= {**LINK_ENVIRONMENT, "UCX_NET_DEVICES": DECODE_HOST.link_device}
        done = subprocess.run(
            [*inside, "taskset", "--cpu-list", str(ENGINE_CORE), sys.executable, str(HERE / "pool_rank.py"),
             address, kind, str(MOVE_ROUNDS)],
            capture_output=True, text=True, timeout=180, env={**os.environ, **environment}, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BenchError(f"stores and loads of {name} cannot be measured: {done.stderr[-1000:]}")
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told
