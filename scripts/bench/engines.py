"""vLLM engines as processes of a benchmark: started on one core, paused, resumed and surely ended.

Each engine runs in a session of its own, so a Ctrl-C at the terminal reaches the benchmark alone, and every process of
the engine is found by its session id. An engine that is not being measured is stopped with SIGSTOP: it keeps its state
and takes no CPU time, spinning threads included.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp

from bench.errors import BenchError, progress

READY_DEADLINE_S = 420.0  # the very first start compiles the model: minutes on two cores
STOP_DEADLINE_S = 15.0
OWNER_VARIABLE = "HANDOVER_BENCH_OWNER_PID"
POLL_S = 0.05
SETTLE_S = 2.0
OBSERVE_S = 1.0
SPINNING_SHARE = 0.3
_NICE = os.nice(0)
KV_CACHE_BYTES = 384 * 2**20
ENGINE_BYTES = int(2.7 * 2**30)
"""What one engine takes with the model of the benchmarks, its KV cache included (measured)."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How to start one engine. `kv_transfer` is vLLM's --kv-transfer-config, None for an engine without a connector."""

    name: str
    model: Path
    core: int
    host: str
    port: int
    kv_transfer: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    namespace: str | None = None
    extra_arguments: tuple[str, ...] = ()
    python: Path | None = None
    """The interpreter, None for the one that runs the benchmark."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def command(self) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        pinned = ["taskset", "--cpu-list", str(self.core)]
        python = str(self.python or sys.executable)
        server = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        server += ["--served-model-name", "bench", "--host", self.host, "--port", str(self.port)]
        server += ["--dtype", "bfloat16", "--max-model-len", "4096", "--enable-prompt-tokens-details"]
        server += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
        if self.kv_transfer is not None:
            server += ["--kv-transfer-config", json.dumps(self.kv_transfer)]
        return [*inside, *pinned, *server, *self.extra_arguments]

    def variables(self) -> dict[str, str]:
        ours = {
            "VLLM_CPU_OMP_THREADS_BIND": str(self.core),
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            OWNER_VARIABLE: str(os.getpid()),
        }
        return {**os.environ, **ours, **self.environment}


class Engine:
    """One running engine. Owner: the benchmark's main task; `stop` frees everything and may be called twice."""

    READY_PATH = "/health"

    def __init__(self, spec: EngineSpec, log_folder: Path) -> None:
        self.spec = spec
        if spec.namespace is None:
            _check_port(spec)
        self.log_path = log_folder / f"{spec.name}.log"
        self._log: IO[bytes] = self.log_path.open("wb")
        self._process = subprocess.Popen(
            spec.command(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=spec.variables(),
            start_new_session=True,
            preexec_fn=as_the_user,
        )

    async def wait_ready(self) -> None:
        """Until READY_PATH answers 200; raises when the process ends or the deadline passes."""
        deadline_s = time.monotonic() + READY_DEADLINE_S
        timeout = aiohttp.ClientTimeout(total=2.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                self.check_alive()
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"{self.spec.url}{self.READY_PATH}") as response:
                        if response.status == 200:
                            return
                if time.monotonic() > deadline_s:
                    raise BenchError(
                        f"{self.spec.name} was not ready after {READY_DEADLINE_S:.0f} s\n{self.log_tail()}"
                    )
                await asyncio.sleep(0.25)

    def check_alive(self) -> None:
        code = self._process.poll()
        if code is not None:
            raise BenchError(f"{self.spec.name} ended with code {code}; its last words:\n{self.log_tail()}")

    def log_tail(self, lines: int = 25) -> str:
        text = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in text[-lines:])

    def processes(self) -> list[int]:
        return _session_members(self._process.pid)

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes, 0 where the kernel does not tell."""
        return sum(_pss_bytes(pid) for pid in self.processes())

    def pin(self) -> None:
        """Puts every thread on the engine's core. In-tree NIXL workers move their main thread, the one that computes,
        to the machine's last core: on another "host" of this benchmark, so they are moved back."""
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with contextlib.suppress(ProcessLookupError):
                        os.sched_setaffinity(int(thread), {self.spec.core})

    def thread_cpu_s(self) -> dict[int, float]:
        """CPU seconds that each of its threads has used."""
        return {thread: used_s for pid in self.processes() for thread, used_s in _thread_cpu_s(pid)}

    async def spinning_threads(self) -> list[int]:
        """Threads that keep a core busy while the engine has nothing to do. The engine has to be idle for a while
        first: vLLM's own workers poll for a second after a request before they sleep."""
        await asyncio.sleep(SETTLE_S)
        before, started_s = self.thread_cpu_s(), time.monotonic()
        await asyncio.sleep(OBSERVE_S)
        elapsed_s = time.monotonic() - started_s
        used = self.thread_cpu_s()
        return [thread for thread in used if used[thread] - before.get(thread, 0.0) > SPINNING_SHARE * elapsed_s]

    @staticmethod
    def make_idle(threads: Iterable[int]) -> None:
        """Lets these threads run only while their core has nothing else to do, as if they had a core of their own."""
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.check_alive()
        self._signal(signal.SIGCONT)
        self.pin()

    def ask_to_stop(self) -> None:
        """SIGTERM to the API server, which ends the processes below it."""
        self._signal(signal.SIGCONT)
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """Asks, waits, and sends SIGKILL to what is still there after the deadline."""
        self.ask_to_stop()
        if not _wait_for(self._gone, STOP_DEADLINE_S):
            self._signal(signal.SIGKILL)
            if not _wait_for(self._gone, STOP_DEADLINE_S):
                progress(f"{self.spec.name}: processes {self.processes()} outlive SIGKILL")
        self._log.close()

    def _gone(self) -> bool:
        return self._process.poll() is not None and not self.processes()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def as_the_user() -> None:
    """An engine does not inherit the priority that a benchmark's client may have given itself."""
    os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def _check_port(spec: EngineSpec) -> None:
    """Another server on this port would answer /health for us."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.host, spec.port))
        except OSError as error:
            raise BenchError(f"{spec.host}:{spec.port} is not free ({error}); choose others with --port") from None


def stop_all(engines: Iterable[Engine]) -> None:
    """Ends all of them; asks all first, so that they leave side by side."""
    engines = list(engines)
    for engine in engines:
        engine.ask_to_stop()
    for engine in engines:
        engine.stop()


def reap_leftovers() -> None:
    """Kills engines of an earlier benchmark that died without cleaning up (known by a variable in their environment
    that names the benchmark's process, which is no more)."""
    found = [pid for pid in _all_processes() if _is_orphan(pid)]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if found:
        progress(f"killed {len(found)} processes that an earlier benchmark left behind")
        if not _wait_for(lambda: not any(_is_orphan(pid) for pid in found), STOP_DEADLINE_S):
            raise BenchError(f"processes {found} of an earlier benchmark outlive SIGKILL; end them by hand")


def _is_orphan(pid: int) -> bool:
    prefix = f"{OWNER_VARIABLE}=".encode()
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    owners = [int(entry[len(prefix) :]) for entry in environment if entry.startswith(prefix)]
    return bool(owners) and not Path(f"/proc/{owners[0]}").exists()


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _session_members(session: int) -> list[int]:
    """Processes of a session, zombies left out (a zombie has no more to free than its number)."""
    members = []
    for pid in _all_processes():
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[3]) == session and after_name[0] not in "ZX":
            members.append(pid)
    return members


def _thread_cpu_s(pid: int) -> list[tuple[int, float]]:
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
            found.append((int(thread), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")))
    return found


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _wait_for(condition: Callable[[], bool], deadline_s: float) -> bool:
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(POLL_S)
    return True
