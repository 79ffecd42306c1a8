"""Faults of a stepped world, drawn by its seed: slow and lost mail, cut hosts, bad writes, stalls and deaths."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from .broken import BrokenOps
from .virtual import Process, SteppedRuntime

MEET_BADLY = 0.5
"""The chance that connections break while engines meet, drawn for each meeting."""
At = Callable[[float, Callable[[float], None]], None]
"""Runs an action at a time."""


class World(Protocol):
    """What faults are done to."""

    runtime: SteppedRuntime
    events: Counter[str]

    def engine_processes(self) -> list[Process]: ...

    def node_processes(self) -> list[Process]: ...

    def restart_node(self, process: Process) -> None: ...

    def restart_engine(self, number: int) -> bool: ...

    def power_off_engine(self, number: int) -> Callable[[], None] | None: ...


class Faults:
    """`at` is the driver's agenda. `spoils`: bytes may change on their way, which is noticed where all are checked.
    Every fault ends by itself, so that a world can come to rest."""

    def __init__(self, world: World, rnd: random.Random, at: At, until_s: float, ops: BrokenOps, spoils: bool) -> None:
        self._world = world
        self._ops = ops
        self._spoils = spoils
        self._rnd = rnd
        self._at = at
        kinds: list[Callable[[], None]] = [
            self._spoil_writes,
            self._spoil_writes,
            self._hold,
            self._hold,
            self._stall,
            self._slow_mail,
            self._reset,
            self._reset,
            self._cut,
            self._kill_node,
        ]
        if spoils:
            kinds += [self._spoil_writes] * 3
        now_s = world.runtime.clock()
        for _ in range(rnd.randrange(10, 30)):
            kind = rnd.choice(kinds)
            at(rnd.uniform(now_s, until_s), lambda then_s, kind=kind: self._do(kind))
        self._may_meet_badly()
        at(until_s, lambda then_s: self._do(self._part_all))
        more = [self._fail_op, self._break_planes] * 2 + [self._break_planes, self._kill_engine] + [self._power_off] * 3
        for _ in range(rnd.randrange(2, 10)):
            kind = rnd.choice(more)
            at(rnd.uniform(now_s, until_s), lambda then_s, kind=kind: self._do(kind))

    def _do(self, kind: Callable[[], None]) -> None:
        self._world.events[f"fault:{kind.__name__.strip('_')}"] += 1
        kind()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._at(self._world.runtime.clock() + seconds, lambda now_s: action())

    def _planes(self, processes: Iterable[Process] = ()) -> list[Any]:
        """Data planes of these, or of all that live; those of nodes twice."""
        processes = processes or [*self._world.engine_processes(), *self._world.node_processes() * 2]
        return [plane for process in processes for plane in process.transports.values()]

    def _spoil_writes(self) -> None:
        """Some of the coming operations fail, or arrive with a wrong byte."""
        plane = self._rnd.choice(self._planes())
        if self._rnd.random() < 0.6 and self._spoils:
            plane.faults.corrupt_next += self._rnd.randrange(1, 20)
        else:
            plane.faults.fail_next += self._rnd.randrange(1, 4)

    def _hold(self) -> None:
        """What is in flight lands late, cancelled or not."""
        plane = self._rnd.choice(self._planes())
        plane.faults.hold = True

        def end() -> None:
            plane.faults.hold = False

        self._later(self._rnd.uniform(0.01, 1.0), end)

    def _stall(self) -> None:
        """A process gets no turns."""
        processes = [*self._world.engine_processes(), *self._world.node_processes()]
        self._rnd.choice(processes).stall(self._rnd.choice([0.02, 0.2, 1.0, 6.0]))

    def _slow_mail(self) -> None:
        self._flap(self._rnd.uniform(0.1, 1.0), 0.05, self._rnd.choice([0, 10, 40]))

    def _flap(self, seconds: float, slow_s: float, breaks: int) -> None:
        """For so long, part of the mail takes up to `slow_s`, and connections break."""
        faults = self._world.runtime.network.faults
        faults.slow, faults.slow_s = 0.3, slow_s

        def end() -> None:
            faults.slow = 0.0

        self._later(seconds, end)
        for _ in range(breaks):
            self._later(self._rnd.random() * seconds, self._break_mail)

    def _may_meet_badly(self) -> None:
        """Engines are about to meet (again). Connections break, those of the data plane too, between their Hellos,
        which come each second, and the answers."""
        if self._rnd.random() < MEET_BADLY:
            self._meet_badly()

    def _meet_badly(self) -> None:
        seconds = self._rnd.uniform(0.1, 4.0)
        self._flap(seconds, self._rnd.choice([0.05, 1.5]), self._rnd.randrange(4, 40))
        for _ in range(self._rnd.randrange(8)):
            self._later(self._rnd.random() * seconds, self._break_planes)

    def _part_all(self) -> None:
        """The last fault: all engines lose each other, and meet badly. No later one mends what goes wrong then."""
        planes = self._planes(self._world.engine_processes())
        for i, one in enumerate(planes):
            for other in planes[:i]:
                one.break_with(other)
        self._meet_badly()

    def _reset(self) -> None:
        """Connections between two processes break, once or a few times."""
        for _ in range(self._rnd.randrange(1, 4)):
            self._later(self._rnd.random() * 0.3, self._break_mail)

    def _break_mail(self) -> None:
        """Between two processes; some of what is on its way is lost."""
        engines = [process.name for process in self._world.engine_processes()]
        nodes = [process.name for process in self._world.node_processes()]
        if nodes and self._rnd.random() < 0.7:
            one, other = self._rnd.choice(engines), self._rnd.choice(nodes)
        else:
            one, other = self._rnd.sample(engines, 2)
        self._world.runtime.network.reset(one, other)

    def _cut(self) -> None:
        """The two hosts do not reach each other for a while."""
        network = self._world.runtime.network
        network.cut("host0", "host1")

        def heal() -> None:
            network.heal("host0", "host1")
            if self._rnd.random() < 0.5:
                self._break_planes()  # its kernel has given it up meanwhile
            self._may_meet_badly()

        self._later(self._rnd.choice([0.05, 0.5, 3.0, 12.0, 12.0]), heal)

    def _fail_op(self) -> None:
        self._ops.fail_next(self._rnd)

    def _break_planes(self) -> None:
        """A connection of the data plane ends, and both processes live."""
        planes = self._planes() if self._rnd.random() < 0.5 else self._planes(self._world.engine_processes())
        self._rnd.shuffle(planes)
        any(one.break_with(other) for i, one in enumerate(planes) for other in planes[:i] if other is not one)

    def _kill_engine(self) -> None:
        """An engine dies with what it was doing, and another comes to its address."""
        number = self._rnd.randrange(len(self._world.engine_processes()))
        if self._world.restart_engine(number):
            self._may_meet_badly()
        else:
            self._later(0.05, self._kill_engine)

    def _power_off(self) -> None:
        """The host of an engine dies without a word. Connections end when somebody notices."""
        noticed = self._world.power_off_engine(self._rnd.randrange(len(self._world.engine_processes())))
        if noticed is None:
            self._later(0.05, self._power_off)
            return

        def come_back() -> None:
            noticed()
            self._may_meet_badly()

        self._later(self._rnd.choice([1.0, 13.0, 25.0, 25.0]), come_back)

    def _kill_node(self) -> None:
        """A pool node dies and comes back, empty, at its address."""
        nodes = self._world.node_processes()
        if nodes:
            self._world.restart_node(self._rnd.choice(nodes))
