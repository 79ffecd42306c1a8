"""All parts of a world of lmkv in one thread and in virtual time; see the package's text."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from lmkv.control.runtime import START_S, Part, Runtime
from lmkv.transport import Transport, open_transport
from tests.simulation.hosts import Offers, VirtualHost
from tests.simulation.lanes import NEVER_S, Once, SteppedLane
from tests.simulation.mail import VirtualContext
from tests.simulation.network import Network
from tests.simulation.plane import SteppedPlane

logger = logging.getLogger(__name__)

EPOCH_S = 1000.0
"""Time at the start: lmkv takes 0.0 for "has not happened"."""


class VirtualClock:
    """Seconds; only the stepping moves it."""

    def __init__(self) -> None:
        self.now_s = EPOCH_S

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds

    def to(self, time_s: float) -> None:
        self.now_s = max(self.now_s, time_s)


class SteppedRunner:
    """See lmkv.control.runtime.Runner. `run` does not exist here: the stepping gives the turns."""

    def __init__(self, world: SteppedRuntime, process: Process, name: str, part: Part) -> None:
        self.world = world
        self.process = process
        self.name = name
        self.part = part
        self.alive = False
        self.error: BaseException | None = None
        """What has ended it, if something has."""
        self.turns = 0
        self._wanted_s = NEVER_S
        self._late_s = 0.0
        self._woken = False
        self._stopping = False
        self._has_begun = False
        self._watched: Sequence[int] = ()

    # --- as Runner ---

    def start(self, timeout_s: float = START_S) -> None:
        self._has_begun = True
        try:
            self.part.open()
        except BaseException:
            self.part.end()
            raise
        self.alive = True
        self.world.join(self)
        self._plan()

    def run(self, ready: Callable[[], None]) -> None:
        raise NotImplementedError("a stepped part has no thread of its own; use start()")

    def wake(self) -> None:
        self._woken = True
        self.world.expect(self)

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopping = True
        if self.alive and not self.world.is_active(self):
            self._end()

    # --- as the stepping sees it ---

    def due_s(self) -> float:
        """When its next turn is due."""
        return max(0.0 if self._woken else self._wanted_s, self._late_s, self.process.stalled_s)

    def notice(self, time_s: float) -> None:
        """One of its descriptors will be readable."""
        if time_s < self._wanted_s:
            self._wanted_s = time_s
            self.world.expect(self)

    def turn(self) -> None:
        self._woken = False
        self.turns += 1
        try:
            self.part.turn(self.world.clock())
        except Exception as error:
            self.error = error
            logger.exception("%s of %s has failed and ends", self.name, self.process.name)
            self._end()
            if self.world.raises:
                raise
            return
        if self._stopping:
            self._end()
        elif self.alive:
            self._plan()
        if self.world.raises and self.world.caught:
            raise self.world.caught[0][1]

    def _plan(self) -> None:
        world = self.world
        descriptors = self.part.descriptors()
        if descriptors is not None:
            world.watch(self, self._watched, descriptors)
            self._watched = descriptors
        now_s = world.clock()
        if world.late and world.chance.random() < world.late:
            self._late_s = now_s + world.chance.uniform(0.0, world.late_s)
        arrivals = (world.arrival_s(fd) for fd in self._watched)
        self._wanted_s = min(now_s + self.part.next_s(now_s), *arrivals, NEVER_S)
        world.expect(self)

    def _end(self) -> None:
        self.vanish()
        self.part.end()

    def vanish(self) -> None:
        """Without a word."""
        self.alive = False
        self.world.watch(self, self._watched, ())
        self.world.leave(self)


class Process:
    """One virtual process: `runtime` is what its parts are given. `name` is unique among the living."""

    def __init__(self, world: SteppedRuntime, name: str, host: str, life: int) -> None:
        self.world = world
        self.name = name
        self.host = host
        self.stalled_s = 0.0
        self.transports: dict[str, Transport] = {}
        """By name; `faults` of inproc ones may be set."""
        entropy = random.Random(f"{world.seed}/{name}/{life}")
        context: Any = lambda: VirtualContext(world.network, name, host)  # noqa: E731  (typed as zmq's)
        runner: Any = lambda title, part: SteppedRunner(world, self, title, part)  # noqa: E731
        self.runtime = Runtime(
            clock=world.clock,
            context=context,
            transport=self._open_transport,
            entropy=entropy.randbytes,
            runner=runner,
            background=lambda title, function: Once(world, self, title, function),
            lane=lambda title: SteppedLane(world, self, title),
            wait=world.wait,
            caught=world.note_caught,
            host=VirtualHost(world.offers, host, name),
        )

    def _open_transport(self, url: str, name: str) -> Transport:
        if url.startswith("inproc:"):
            made: Transport = SteppedPlane(url, name, self.world.network)
        else:
            made = open_transport(url, name)
        self.transports[name] = made
        return made

    def start_part(self, name: str, part: Part) -> SteppedRunner:
        """Give turns to a part of the test's own (an engine)."""
        runner = SteppedRunner(self.world, self, name, part)
        runner.start()
        return runner

    def stall(self, seconds: float) -> None:
        """Its threads get no turns for so long."""
        self.stalled_s = self.world.clock() + seconds

    def kill(self, silent: bool = False) -> None:
        """As SIGKILL does. `silent`: as loss of power does, which nobody is told of: what goes to it hangs until
        somebody calls `end_planes`."""
        self.world.forget(self)
        self.world.network.kill(self.name, silent)
        if not silent:
            self.end_planes()
            return
        others = {plane.name for other in self.world.processes.values() for plane in other.planes()}
        for plane in self.planes():
            plane.faults.cut = others

    def planes(self) -> list[SteppedPlane]:
        return [transport for transport in self.transports.values() if isinstance(transport, SteppedPlane)]

    def end_planes(self) -> None:
        """Peers are told that their connections to this dead process have ended."""
        for plane in self.planes():
            if not plane.gone:
                plane.faults.dead = True
                plane.abort()
        for other in self.world.processes.values():
            for plane in other.planes():
                plane.notice_death()


class SteppedRuntime:
    """The world: its processes, its network, its time. Everything that is drawn comes from `seed`."""

    def __init__(self, seed: int = 0, *, raises: bool = True, traced: int = 0) -> None:
        """`raises`: a part that fails, or has caught a failure, fails the test; otherwise they are kept (`error` of the
        runner, `caught`). `traced`: keep the names of
        so many last turns in `trace`."""
        self.seed = seed
        self.raises = raises
        self.clock = VirtualClock()
        self.chance = random.Random(f"{seed}/turns")
        self.network = Network(self.clock, random.Random(f"{seed}/network"))
        self.offers: Offers = {}
        self.turn_s = (5e-6, 50e-6)
        """A turn takes so long, drawn evenly."""
        self.late = 0.0
        """Share of turns that come up to `late_s` after they were due, as on a host whose cores are taken."""
        self.late_s = 0.03
        self.background_s = 0.02
        """Work in the background begins within this."""
        self.lane_s = 0.005
        """A job of a lane (a page written to disk, or read) takes up to so long."""
        self.trace: deque[tuple[float, str, str]] = deque(maxlen=traced)
        """(time, process, part) of turns."""
        self.caught: list[tuple[str, Exception]] = []
        """Failures that a Guard of lmkv has caught: bugs that real processes survive."""
        self.processes: dict[str, Process] = {}
        self._lives: dict[str, int] = {}
        self._runners: list[SteppedRunner] = []
        self._active: list[SteppedRunner] = []
        self._numbers = itertools.count()
        self._agenda: list[tuple[float, int, SteppedRunner]] = []
        """When somebody is due, by the newest entry of a runner; older ones are skipped."""
        self._ready: list[SteppedRunner] = []
        self._watchers: dict[int, SteppedRunner] = {}
        self.network.notice = self._notice

    def note_caught(self, what: str, error: Exception) -> None:
        self.caught.append((what, error))

    # --- processes ---

    def process(self, name: str, host: str = "host") -> Process:
        """A new process; one that has been killed may come back under its name."""
        assert name not in self.processes, f"a process named {name} lives already"
        self._lives[name] = self._lives.get(name, 0) + 1
        made = self.processes[name] = Process(self, name, host, self._lives[name])
        return made

    def runner(self, process: Process, name: str, part: Part) -> SteppedRunner:
        """A runner for a part of the process."""
        return SteppedRunner(self, process, name, part)

    def forget(self, process: Process) -> None:
        """It has died: its parts get no more turns, and its shared memory is no more offered."""
        self.processes.pop(process.name, None)
        for runner in [runner for runner in self._runners if runner.process is process]:
            runner.vanish()
        for offer in list(self.offers.values()):
            if offer.process == process.name:
                offer.close()
            else:
                offer.client_died(process.name)

    def close(self) -> None:
        """Kill what still lives."""
        for process in list(self.processes.values()):
            process.kill()

    def __enter__(self) -> SteppedRuntime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- turns ---

    def arrival_s(self, descriptor: int) -> float:
        """When the descriptor is readable."""
        if any(offer.descriptor == descriptor and offer.has_news for offer in self.offers.values()):
            return 0.0
        return self.network.arrival_s(descriptor)

    def join(self, runner: SteppedRunner) -> None:
        self._runners.append(runner)

    def leave(self, runner: SteppedRunner) -> None:
        if runner in self._runners:
            self._runners.remove(runner)

    def is_active(self, runner: SteppedRunner) -> bool:
        """It is in a turn now (perhaps waiting)."""
        return runner in self._active

    @property
    def runners(self) -> list[SteppedRunner]:
        return list(self._runners)

    def expect(self, runner: SteppedRunner) -> None:
        """The runner's `due_s` has changed."""
        if runner.alive and runner not in self._active:
            heapq.heappush(self._agenda, (runner.due_s(), next(self._numbers), runner))

    def watch(self, runner: SteppedRunner, before: Sequence[int], now: Sequence[int]) -> None:
        """These descriptors are the runner's."""
        for descriptor in before:
            self._watchers.pop(descriptor, None)
        for descriptor in now:
            self._watchers[descriptor] = runner

    def _notice(self, descriptor: int, time_s: float) -> None:
        runner = self._watchers.get(descriptor)
        if runner is not None:
            runner.notice(time_s)

    def _collect(self) -> None:
        """Runners whose time has come are ready."""
        now_s = self.clock()
        while self._agenda and self._agenda[0][0] <= now_s:
            _, _, runner = heapq.heappop(self._agenda)
            if not runner.alive or runner in self._active or runner in self._ready:
                continue
            if runner.due_s() <= now_s:
                self._ready.append(runner)
            else:  # stalled meanwhile
                self.expect(runner)

    def step(self, until_s: float = NEVER_S) -> bool:
        """One turn of a part that is due, after a jump in time if none is. False: none is due before `until_s`, where
        time has come to (with no end given: nobody will ever be due)."""
        while True:
            self.network.run()
            self._collect()
            self._ready = [r for r in self._ready if r.alive and r not in self._active and r.due_s() <= self.clock()]
            if self._ready:
                runner = self._ready.pop(self.chance.randrange(len(self._ready)))
                self._turn(runner)
                return True
            next_s = min(self._agenda[0][0] if self._agenda else NEVER_S, self.network.next_s())
            if next_s > until_s or next_s == NEVER_S:
                if until_s != NEVER_S:
                    self.clock.to(until_s)
                return False
            self.clock.to(next_s)

    def _turn(self, runner: SteppedRunner) -> None:
        self.trace.append((self.clock(), runner.process.name, runner.name))
        self._active.append(runner)
        self.clock.advance(self.chance.uniform(*self.turn_s))
        try:
            runner.turn()
        finally:
            self._active.pop()
            self.expect(runner)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """The seam for waits: others get turns until the event is set, or virtual time has passed the timeout."""
        return self.run_until(event.is_set, timeout_s)

    def run_until(self, condition: Callable[[], Any], timeout_s: float = 60.0) -> bool:
        """Turns until the condition holds. False: it does not within so many virtual seconds."""
        until_s = self.clock() + timeout_s
        while not condition():
            if self.clock() >= until_s or not self.step(until_s):
                return bool(condition())
        return True

    def run_for(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds)
