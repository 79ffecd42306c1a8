"""Runs a plan: starts its stages, watches them until told to stop or one of its processes ends, ends them."""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lmkv.errors import ConfigError

from .children import POLL_S, Child, ChildError, stop, wait_until
from .plan import Plan, Process
from .probe import router_ready
from .progress import Step, step

ENGINE_DEADLINE_S = float(os.environ.get("LMKV_START_TIMEOUT_S", "1800")) + 60.0
"""The launch scripts give up first, and say why."""
DEADLINE_S = 60.0
INTERRUPTED = 130


class Interrupted(Exception):
    """Told to stop."""


class Told:
    """Counts the signals that ask to stop. Nothing is thrown where they arrive: waits look here."""

    def __init__(self) -> None:
        self.times = 0
        self._heeded = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._count) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.times += 1

    def pause(self, seconds: float) -> None:
        """Raises Interrupted if told to stop."""
        time.sleep(seconds)
        self.check()

    def check(self) -> None:
        if self.times:
            self._heeded = self.times
            raise Interrupted

    def again(self) -> bool:
        """Once more since this was last asked."""
        fresh, self._heeded = self.times > max(1, self._heeded), self.times
        return fresh


class Machine:
    """`run()` once, in the main thread. Afterwards no process of the plan is left."""

    def __init__(self, plan: Plan, run: Path, announce: Callable[[], None]) -> None:
        self._plan = plan
        self._run = run
        self._announce = announce
        self._told = Told()
        self._stages: list[list[Child]] = []

    def run(self) -> int:
        """The exit status: 0 stopped when asked to, 130 while it was still starting. Raises ChildError, ConfigError."""
        with self._told.listening(), _alone_in(self._run):
            ready = False
            try:
                for processes in self._plan.stages:
                    self._start(processes)
                ready = True
                self._announce()
                self._watch()
            except Interrupted:
                return 0 if ready else INTERRUPTED
            finally:
                self._stop()
        raise AssertionError("watching ends with an exception only")

    def _start(self, processes: Sequence[Process]) -> None:
        stage: list[Child] = []
        self._stages.append(stage)
        router = processes is self._plan.router
        engines = processes is self._plan.engines
        what = "router, pairing the engines" if router else _names(processes)
        with step(f"starting {what}") as current:
            for process in processes:
                self._told.check()
                stage.append(Child(process.name, process.command, self._run, dict(process.environ), process.ready_line))
            done = _Ready(current, processes, stage)
            deadline_s = ENGINE_DEADLINE_S if engines else DEADLINE_S
            wait_until(done, self._children(), deadline_s, current, self._told.pause)
            if router:
                ask = functools.partial(router_ready, self._plan.url)
                wait_until(ask, self._children(), DEADLINE_S, current, self._told.pause)
            current.done = ", ".join(process.address for process in processes)

    def _watch(self) -> None:
        while True:
            for child in self._children():
                child.check_alive()
            self._told.pause(POLL_S)

    def _stop(self) -> None:
        """Every stage, whatever becomes of the others."""
        left: list[ChildError] = []
        while self._stages:
            stage = self._stages.pop()
            if not stage:
                continue
            with step(f"stopping {_names(stage)}"):
                try:
                    stop(stage, self._told.again)
                except ChildError as error:
                    left.append(error)
        if left:
            raise left[0]

    def _children(self) -> list[Child]:
        return [child for stage in self._stages for child in stage]


class _Ready:
    """What is missing still; tells each that has become ready once."""

    def __init__(self, current: Step, processes: Sequence[Process], stage: Sequence[Child]) -> None:
        self._current = current
        self._missing = list(zip(processes, stage, strict=True))
        self._tell = len(self._missing) > 1

    def __call__(self) -> str:
        for process, child in list(self._missing):
            if child.is_ready():
                self._missing.remove((process, child))
                if self._tell:
                    self._current.say(
                        f"    {process.name} is ready at {process.address} ({self._current.elapsed_s:.1f} s)"
                    )
        return ", ".join(child.name for _, child in self._missing)


def _names(things: Sequence[Process] | Sequence[Child]) -> str:
    return ", ".join(thing.name for thing in things)


@contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    """Logs and ready files are of one `lmkv up` only. Raises ConfigError."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"the run folder {run} cannot be used: {error.strerror}", hint="give another --run") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another lmkv up uses the run folder {run}", hint="stop it, or give another --run", code="LMKV-C113"
            ) from None
        yield
