"""A world: engines, pool nodes, clients and faults, run to its end and then examined."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmkv.control.runtime import THREADS
from tests.pool.bed import NodeThread

from .driver import Driver
from .engine import SimEngine
from .load import Load
from .plan import WorldPlan
from .result import Result
from .watch import watch

DRAIN_S = 60.0


class ThreadedWorld:
    """Real threads, ZeroMQ and tcp:// between the parts; engines and clients take turns on this thread."""

    def __init__(self, plan: WorldPlan) -> None:
        self.plan = plan
        self.result = Result(plan)
        self._rnd = random.Random(f"run-{plan.seed}")
        self._folder = Path(tempfile.mkdtemp(prefix="lmkv-world-"))
        self._nodes = [
            NodeThread(self._folder / str(i), None, capacity="8MiB", transport="tcp://127.0.0.1:0")
            for i in range(plan.nodes)
        ]
        pool = [node.node.card.address for node in self._nodes]
        settings = plan.settings | {"transport": "tcp://127.0.0.1:0", "pool": pool}
        self.engines: list[SimEngine] = []
        self._thread = threading.get_ident()
        runtime = replace(THREADS, wait=self._wait)
        for i, kind in enumerate((*plan.prefills, *plan.decodes)):
            name = f"{kind.role[3:]}{i}"
            engine = SimEngine(name, kind, settings, self._rnd, self._fail, self.result.events, runtime)
            watch(engine, self.result.events)
            self.engines.append(engine)
        load = Load(self._rnd, plan)
        p = len(plan.prefills)
        self.driver = Driver(
            self._rnd, time.monotonic, self.engines[:p], self.engines[p:], load, self._fail, self.result.events
        )

    def _wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Devices go on while an engine waits in a hook. They belong to this thread."""
        if threading.get_ident() != self._thread:
            return event.wait(timeout_s)
        until_s = time.monotonic() + timeout_s
        while not event.wait(0.0005) and time.monotonic() < until_s:
            for engine in self.engines:
                engine.runner.stream.advance()
        return event.is_set()

    def _fail(self, text: str) -> None:
        self.result.failures.append(text)

    def run(self, limit_s: float = 120.0) -> Result:
        started_s = time.monotonic()
        parts: list[Any] = [self.driver, *self.engines]
        while not self.driver.done and time.monotonic() - started_s < limit_s:
            self._turns(parts)
            if len(self.result.failures) > 20:
                break
        self.result.unended = sum(len(engine.jobs) for engine in self.engines)
        until_s = time.monotonic() + DRAIN_S
        while any(engine.busy for engine in self.engines) and time.monotonic() < until_s:
            self._turns(self.engines)
        self.result.requests = self.driver.requests
        self._count()
        self._find_leaks()
        self.close()
        self.result.seconds = time.monotonic() - started_s
        return self.result

    def _turns(self, parts: list[Any]) -> None:
        now_s = time.monotonic()
        due = [part for part in parts if part.next_s(now_s) <= 0]
        self._rnd.shuffle(due)
        for part in due:
            part.turn(time.monotonic())
        if not due:
            time.sleep(0.0005)

    def _count(self) -> None:
        for engine in self.engines:
            for name, n in engine.scheduler.connector._scheduler.book.counts().items():
                self.result.events[name] += n

    def _find_leaks(self) -> None:
        for engine in self.engines:
            self.result.leaks += engine.leaks()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for node in self._nodes:
            node.end()
        shutil.rmtree(self._folder, ignore_errors=True)
