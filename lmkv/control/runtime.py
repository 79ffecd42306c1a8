"""What a part of lmkv needs from the process around it: time, threads, sockets, waiting, randomness.

A `Part` is written as turns of a loop and knows nothing of threads. `THREADS` gives each part a daemon thread that
polls its descriptors between turns. Tests give another `Runtime`, which drives all parts from one thread in virtual
time (tests/simulation).
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import zmq

from lmkv.transport import Transport, open_transport

from .host import Host, ThisHost
from .mailbox import make_context
from .wake import Wake, wait

logger = logging.getLogger(__name__)

START_S = 120.0
"""`Runner.start` waits this long for a part to open."""


class Part(Protocol):
    """A loop, given one turn at a time. Every method is called by the runner, on the one thread that owns the part."""

    def open(self) -> None:
        """Before the first turn. What it raises, `Runner.start` raises; `end` is called all the same."""

    def turn(self, now_s: float) -> None:
        """One pass: take what has come, do what is due, tell what has ended. Never waits."""

    def next_s(self, now_s: float) -> float:
        """Seconds until the next turn, unless a descriptor becomes readable or someone calls `wake` before."""

    def descriptors(self) -> Sequence[int] | None:
        """File descriptors whose readability wants a turn; None: the same as before."""

    def end(self) -> None:
        """After the last turn: closes what the part owns."""


class Runner(Protocol):
    """Gives a part its turns, from `start` to `stop`."""

    @property
    def alive(self) -> bool:
        """The part is open, and gets turns."""

    def start(self, timeout_s: float = START_S) -> None:
        """Returns once the part is open. Raises what its `open` raises, TimeoutError when that takes too long."""

    def run(self, ready: Callable[[], None]) -> None:
        """Instead of `start`: turns are given on the calling thread, until `stop`. `ready` is called once open."""

    def wake(self) -> None:
        """From any thread, or a signal's handler: the part gets a turn at once."""

    def stop(self, timeout_s: float = 5.0) -> None:
        """No more turns; waits for the part's end, unless called in a turn of the part itself."""


class Lane(Protocol):
    """Does jobs beside everything else: one at a time, in the order in which they came."""

    def submit(self, job: Callable[..., Any], /, *args: Any) -> Any:
        """Any thread."""

    def shutdown(self, wait: bool = True) -> None:
        """Returns once all jobs are done."""


def _start_thread(name: str, function: Callable[[], None]) -> None:
    threading.Thread(target=function, name=name, daemon=True).start()


@dataclass(frozen=True)
class Runtime:
    """One process as its parts see it. The defaults are the real ones."""

    clock: Callable[[], float] = time.monotonic
    """Seconds; it never goes back."""
    context: Callable[[], zmq.Context[zmq.Socket[bytes]]] = make_context
    """A new ZeroMQ context."""
    transport: Callable[[str, str], Transport] = open_transport
    """A new data plane, of (url, name)."""
    entropy: Callable[[int], bytes] = os.urandom
    """So many random bytes, for incarnations, tokens and names."""
    runner: Callable[[str, Part], Runner] = field(default_factory=lambda: ThreadRunner)
    """Makes the runner of a part, of (name, part)."""
    background: Callable[[str, Callable[[], None]], None] = _start_thread
    """Runs a function once, beside everything else, of (name, function)."""
    lane: Callable[[str], Lane] = lambda name: ThreadPoolExecutor(1, thread_name_prefix=name)
    """A new lane, of its name."""
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait
    """Waits for an event for so many seconds; False when it was not set by then. Every wait of an engine
    thread, and of a lane."""
    caught: Callable[[str, Exception], None] = lambda what, error: None
    """Told of every failure that a `Guard` has caught and logged; a test may want to fail then."""
    host: Host = field(default_factory=ThisHost)
    """The machine, and memory that its processes share."""


class ThreadRunner:
    """A part on a thread of its own, which polls the part's descriptors between its turns."""

    def __init__(self, name: str, part: Part) -> None:
        self._name = name
        self._part = part
        self._wake = Wake()
        self._stopping = threading.Event()
        self._has_begun = False
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self, timeout_s: float = START_S) -> None:
        self._has_begun = True
        self._thread.start()
        self._opened.result(timeout_s)

    def run(self, ready: Callable[[], None]) -> None:
        self._has_begun = True
        try:
            self._part.open()
            ready()
            self._loop()
        finally:
            self._end()

    def wake(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        elif not self._has_begun:
            self._wake.close()

    def _run(self) -> None:
        try:
            self._part.open()
        except BaseException as error:  # noqa: BLE001  (raised on the thread that starts us)
            self._end()
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        try:
            self._loop()
        except Exception:
            logger.exception("%s has failed and ends", self._name)
            raise
        finally:
            self._end()

    def _end(self) -> None:
        try:
            self._part.end()
        finally:
            self._wake.close()

    def _loop(self) -> None:
        part, poller = self._part, select.poll()
        poller.register(self._wake.fd, select.POLLIN)
        watched: Sequence[int] = ()
        while not self._stopping.is_set():
            descriptors = part.descriptors()
            if descriptors is not None:
                for fd in watched:
                    poller.unregister(fd)
                for fd in descriptors:
                    poller.register(fd, select.POLLIN)
                watched = descriptors
            wait(poller, part.next_s(time.monotonic()))
            self._wake.clear()
            part.turn(time.monotonic())


THREADS = Runtime()
"""The real one."""
