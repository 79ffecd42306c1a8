"""Pool nodes as processes of a benchmark: on one core, in a namespace if they are to be another host's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.netns import Host
from lmkv.control.admin import Admin, AdminError

READY_S = 30.0
STORE_S = 60.0


@dataclass(slots=True)
class PoolNode:
    """`stop` may be called twice. `host`: the namespace that it lives in."""

    address: str
    log_path: Path
    process: subprocess.Popen[bytes]
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        address: str,
        folder: Path,
        *arguments: str,
        core: int = 1,
        host: Host | None = None,
        environment: dict[str, str] | None = None,
    ) -> PoolNode:
        log_path = folder / f"node-{address.rpartition(':')[2]}.log"
        inside = ["ip", "netns", "exec", host.namespace] if host else []
        command = [*inside, "taskset", "--cpu-list", str(core), sys.executable, "-c"]
        command += ["from lmkv.cli import main; main()", "pool", "--listen", address, "--drain-s", "5", *arguments]
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        return cls(address, log_path, process)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
                return
            self.process.kill()
            self.process.wait(10)

    def log_tail(self) -> str:
        return "\n".join(f"    {line}" for line in self.log_path.read_text(errors="replace").splitlines()[-15:])

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise BenchError(f"the pool node at {self.address} has ended:\n{self.log_tail()}")

    async def wait_ready(self) -> None:
        until_s = time.monotonic() + READY_S
        while "lmkv pool ready" not in self.log_path.read_text(errors="replace"):
            self.check_alive()
            if time.monotonic() > until_s:
                raise BenchError(f"the pool node at {self.address} is not ready:\n{self.log_tail()}")
            await asyncio.sleep(0.05)


class Desk:
    """Questions to a node that the benchmark can reach itself."""

    def __init__(self, node: PoolNode) -> None:
        self._node = node
        self._admin = Admin(node.address, deadline_s=5.0)

    def close(self) -> None:
        self._admin.close()

    def stats(self) -> dict[str, Any]:
        self._node.check_alive()
        try:
            told: dict[str, Any] = json.loads(self._admin.stats().stats)
        except AdminError as error:
            raise BenchError(f"{error}\n{self._node.log_tail()}") from None
        return told

    def counter(self, name: str) -> int:
        return int(self.stats()["counters"].get(name, 0))

    def demote(self) -> int:
        return self._admin.demote().pages

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        until_s = time.monotonic() + STORE_S
        while not condition():
            if time.monotonic() > until_s:
                raise BenchError(f"waited {STORE_S:.0f} s for {what}; the node says {self.stats()}")
            await asyncio.sleep(0.02)
