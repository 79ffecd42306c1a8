"""The stepped gear: a world in one thread and in virtual time. A seed replays exactly."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from lmkv.pool.node import PoolNode
from lmkv.pool.settings import NodeSettings

from .broken import BrokenOps
from .driver import Driver
from .engine import SimEngine
from .faults import Faults
from .load import Load
from .plan import WorldPlan
from .remains import of_engine, of_node
from .result import Result
from .slow import SlowOps
from .standstill import Standstill
from .stream import Device
from .virtual import Process, SteppedRuntime
from .watch import watch
from .witness import Witness

LIMIT_S = 4 * 3600.0
"""Virtual seconds until every request has to have ended: more than the longest deadline."""
DRAIN_S = 900.0
UPDATE_S = 60.0
PROBES = 3
PROBE_EVERY_S = 30.0
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
        self.runtime.network.slowness = plan.slowness
        self.witness = Witness(self.fail, self.events, plan.faults, plan.spoils)
        chance = self._device_chance = random.Random(f"device-{plan.seed}")
        self._device_pace_s = chance.choice([0.004, 0.02, 0.02])
        self.runtime.late = chance.choice([0.0, 0.02, 0.1])
        self._ops = BrokenOps()
        self._slow_ops = SlowOps(chance, plan.slow_ops, self.runtime.run_for)
        self.nodes: list[tuple[Process, PoolNode]] = [self._node(i) for i in range(plan.nodes)]
        self._processes: list[Process] = []
        self.engines: list[SimEngine] = []
        self._dead: list[SimEngine] = []
        kinds = (*plan.prefills, *plan.decodes)
        for i, kind in enumerate(kinds):
            process, engine = self._engine(i, kind)
            self._processes.append(process)
            self.engines.append(engine)
        load = Load(self._rnd, plan)
        p = len(plan.prefills)
        self.driver = Driver(
            self._rnd, self.runtime.clock, self.engines[:p], self.engines[p:], load, self.fail, self.events
        )
        self.driver.wake = self.runtime.process("clients").start_part("driver", self.driver).wake
        if plan.faults:
            Faults(self, self._rnd, self.driver.at, self.driver.last_s, self._ops, plan.spoils)
        self._plan_updates(random.Random(f"updates-{plan.seed}"))

    def _plan_updates(self, rnd: random.Random) -> None:
        """Rolling: the weights of one engine after the other."""
        for _ in range(self.plan.updates):
            start_s = rnd.uniform(self.runtime.clock(), self.driver.last_s)
            for i in rnd.sample(range(len(self.engines)), len(self.engines)):
                start_s += rnd.choice([0.0, 0.05, 0.5])
                self.driver.at(start_s, lambda now_s, i=i: self.engines[i].update(now_s + UPDATE_S))

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
            transport="inproc://",
            name=process.name,
            huge=False,
            prefault=False,
            **self.plan.node,
        )
        # Smaller than what it takes from users, so that pages are evicted all the time.
        settings = settings.model_copy(update={"capacity": self.plan.node_kib << 10})
        node = PoolNode(settings, runtime=process.runtime)
        node.start()
        self.witness.node(process.name, node)
        return process, node

    def _is_in_a_turn(self, process: Process) -> bool:
        return any(self.runtime.is_active(runner) for runner in self.runtime.runners if runner.process is process)

    def restart_engine(self, number: int) -> bool:
        """The engine dies, and another comes to its address. False: it is in the middle of a turn, try later.
        One that has lost power is left alone."""
        process, old = self._processes[number], self.engines[number]
        if self._is_in_a_turn(process) or old.is_dead:
            return old.is_dead
        process.kill()
        old.die()
        self._come_back(number, old.address)
        return True

    def power_off_engine(self, number: int) -> Callable[[], None] | None:
        """Its host is dead, and nobody is told. None: it is in the middle of a turn, try later. Call the result when
        peers notice that their connections have ended; then another engine comes, at another address."""
        process, old = self._processes[number], self.engines[number]
        if self._is_in_a_turn(process) or old.is_dead:
            return None
        process.kill(silent=True)
        old.die()

        def noticed() -> None:
            process.end_planes()
            self._come_back(number, "tcp://127.0.0.1:0")

        return noticed

    def _come_back(self, number: int, address: str) -> None:
        old = self.engines[number]
        self._dead.append(old)
        self._processes[number], new = self._engine(number, old.kind, address)
        self.engines[number] = new
        self.driver.replace(old, new)

    def _engine(self, number: int, kind: Any, listen: str = "tcp://127.0.0.1:0") -> tuple[Process, SimEngine]:
        process = self.runtime.process(f"engine{number}", f"host{number % 2}")
        settings = self.plan.settings | {
            "listen": listen,
            "transport": self.plan.transport,
            "pool": [node.card.address for _, node in self.nodes],
        }
        engine = SimEngine(
            f"{kind.role[3:]}{number}", kind, settings, self._rnd, self.fail, self.events, process.runtime
        )
        watch(engine, self.events)
        self.witness.engine(engine)
        if not (self.plan.faults or self.plan.stands_still):
            Standstill(engine, self.runtime.clock, self.fail)
        engine.wake = process.start_part("engine", engine).wake
        if kind.is_async and not self.plan.stands_still:
            stream = engine.runner.stream
            stream.wake = process.start_part("device", Device(stream, self._device_chance, self._device_pace_s)).wake
        return process, engine

    def fail(self, text: str) -> None:
        self.result.failures.append(f"at {self.runtime.clock():.4f}: {text}")

    # --- a run ---

    def run(self) -> Result:
        """One run; the world is closed after it."""
        started_s = time.perf_counter()
        with self._slow_ops.installed(), self._ops.restoring():
            self._run_to_end()
            if self._is_fine and self.plan.faults and not self.plan.updates:
                self._probe()
            if self._is_fine:
                self.runtime.run_until(lambda: not any(engine.busy for engine in self.engines), DRAIN_S)
                self._find_leaks()
                self.witness.check_sums()
        self._count()
        self.result.requests = self.driver.requests
        self.close()
        self.result.seconds = time.perf_counter() - started_s
        return self.result

    @property
    def _is_fine(self) -> bool:
        return not self.result.failures and not self.result.unended

    def _run_to_end(self) -> None:
        end_s = self.runtime.clock() + LIMIT_S
        while not self.driver.done and not self.result.failures and self.runtime.step(end_s):
            pass
        self.result.unended = 0 if self.result.failures else self.driver.unended

    def _probe(self) -> None:
        """Once all faults are over each pair hands a prompt over, whatever has become of it in between."""
        for process in (*self._processes, *self.node_processes()):
            for plane in process.transports.values():
                plane.faults.corrupt_next = plane.faults.fail_next = 0  # type: ignore[attr-defined]
        p = len(self.plan.prefills)
        missing = [(prefill, decode) for prefill in self.engines[:p] for decode in self.engines[p:]]
        for _ in range(PROBES):
            self.runtime.run_for(PROBE_EVERY_S)
            before = [self._loaded(decode) for _, decode in missing]
            for prefill, decode in missing:
                self.driver.probe(prefill, decode)
                self._run_to_end()
            missing = [pair for pair, count in zip(missing, before, strict=True) if self._loaded(pair[1]) == count]
            if not missing or not self._is_fine:
                break
        for prefill, decode in missing if self._is_fine else ():
            self.fail(f"{prefill.name} hands nothing over to {decode.name} after all faults are over")
        self.events["probed"] += 1

    @staticmethod
    def _loaded(engine: SimEngine) -> int:
        return int(engine.scheduler.connector._scheduler.book.counts().get("receive:loaded", 0))

    def _count(self) -> None:
        for _, node in self.nodes:
            self.events.update({f"node:{name}": n for name, n in node._index.counters.items()})
        for engine in (*self.engines, *self._dead):
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
