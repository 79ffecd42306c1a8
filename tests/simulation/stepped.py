"""The stepped gear: a world in one thread and in virtual time. A seed replays exactly."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from lmkv.pool.node import PoolNode
from lmkv.pool.settings import NodeSettings

from .driver import Driver
from .engine import SimEngine
from .faults import Faults
from .load import Load
from .plan import WorldPlan
from .remains import of_engine, of_node
from .result import Result
from .stream import Device
from .virtual import Process, SteppedRuntime
from .watch import watch
from .witness import Witness

LIMIT_S = 900.0
"""Virtual seconds until every request has to have ended: more than the longest deadline."""
DRAIN_S = 900.0
SETTLE_S = 240.0
"""Until everything has come back: more than the longest time that something is remembered which never came."""


class SteppedWorld:
    """One engine a process; node i lives on the host of decode engine i, whose engines map its arena."""

    def __init__(self, plan: WorldPlan) -> None:
        self.plan = plan
        self.result = Result(plan)
        self.events: Counter[str] = self.result.events
        self._rnd = random.Random(f"run-{plan.seed}")
        self.runtime = SteppedRuntime(plan.seed)
        self.witness = Witness(self.fail, self.events, strict=not plan.faults)
        chance = self._device_chance = random.Random(f"device-{plan.seed}")
        self.runtime.late = chance.choice([0.0, 0.02, 0.1])
        self._devices_stand_still = chance.random() < 0.25
        """While their engine waits in a hook, so that it waits in vain: as a device does that hangs for a while."""
        self.nodes: list[tuple[Process, PoolNode]] = [self._node(i) for i in range(plan.nodes)]
        self._processes: list[Process] = []
        self.engines: list[SimEngine] = []
        kinds = (*plan.prefills, *plan.decodes)
        for i, kind in enumerate(kinds):
            self.engines.append(self._engine(i, kind))
        load = Load(self._rnd, plan)
        p = len(plan.prefills)
        self.driver = Driver(
            self._rnd, self.runtime.clock, self.engines[:p], self.engines[p:], load, self.fail, self.events
        )
        self.driver.wake = self.runtime.process("clients").start_part("driver", self.driver).wake
        if plan.faults:
            Faults(self, self._rnd, self.driver.at, self.driver.last_s)

    def engine_processes(self) -> list[Process]:
        return self._processes

    def node_processes(self) -> list[Process]:
        return [process for process, _ in self.nodes]

    def restart_node(self, process: Process) -> None:
        """The node dies, and another comes to its address."""
        number = self.node_processes().index(process)
        address = self.nodes[number][1].card.address
        process.kill()
        self.nodes[number] = self._node(number, address)

    def _node(self, number: int, listen: str = "tcp://127.0.0.1:0") -> tuple[Process, PoolNode]:
        process = self.runtime.process(f"node{number}", f"host{number}")
        settings = NodeSettings(
            listen=listen,
            capacity=f"{self.plan.node_kib}KiB",
            transport="inproc://",
            name=process.name,
            huge=False,
            prefault=False,
        )
        node = PoolNode(settings, runtime=process.runtime)
        node.start()
        self.witness.node(process.name, node)
        return process, node

    def _engine(self, number: int, kind: Any) -> SimEngine:
        process = self.runtime.process(f"engine{number}", f"host{number % 2}")
        self._processes.append(process)
        settings = self.plan.settings | {
            "transport": self.plan.transport,
            "pool": [node.card.address for _, node in self.nodes],
        }
        engine = SimEngine(
            f"{kind.role[3:]}{number}", kind, settings, self._rnd, self.fail, self.events, process.runtime
        )
        watch(engine, self.events)
        self.witness.engine(engine)
        engine.wake = process.start_part("engine", engine).wake
        if kind.is_async and not self._devices_stand_still:
            stream = engine.runner.stream
            stream.wake = process.start_part("device", Device(stream, self._device_chance)).wake
        return engine

    def fail(self, text: str) -> None:
        self.result.failures.append(f"at {self.runtime.clock():.4f}: {text}")

    # --- a run ---

    def run(self) -> Result:
        """One run; the world is closed after it."""
        started_s = time.perf_counter()
        end_s = self.runtime.clock() + LIMIT_S
        while not self.driver.done and not self.result.failures and self.runtime.step(end_s):
            pass
        self.result.unended = 0 if self.result.failures else self.driver.unended
        if not self.result.failures and not self.result.unended:
            self.runtime.run_until(lambda: not any(engine.busy for engine in self.engines), DRAIN_S)
            self._find_leaks()
            self.witness.check_sums()
        self._count()
        self.result.requests = self.driver.requests
        self.close()
        self.result.seconds = time.perf_counter() - started_s
        return self.result

    def _count(self) -> None:
        for engine in self.engines:
            for name, n in engine.scheduler.connector._scheduler.book.counts().items():
                self.events[name] += n

    def _find_leaks(self) -> None:
        until_s = self.runtime.clock() + SETTLE_S
        while (leaks := self._held()) and self.runtime.clock() < until_s:
            self.runtime.run_for(5.0)
        self.result.leaks += leaks

    def _held(self) -> list[str]:
        found = [text for engine in self.engines for text in of_engine(engine)]
        return found + [text for process, node in self.nodes for text in of_node(process.name, node)]

    def close(self) -> None:
        self.runtime.close()
