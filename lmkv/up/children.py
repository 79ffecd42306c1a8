"""Child processes: started with a log each, watched while they are waited for, and surely ended.

A child that runs one of the launch scripts ends its engine itself on SIGTERM. If this process is killed outright, the
kernel sends each child that SIGTERM (parent-death signal): nothing is left then either.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .progress import Step

STOP_DEADLINE_S = 30.0
"""More than the launch scripts give an engine (LMKV_STOP_TIMEOUT_S) before they kill it."""
KILL_DEADLINE_S = 10.0
LOG_LINES = 20
TAIL_BYTES = 1 << 16
POLL_S = 0.1


class ChildError(Exception):
    """What happened · with which values · what to do."""


class Child:
    """One process, leader of its own group: a Ctrl-C at the terminal reaches only us, and we end it.

    It is ready when its log has `ready_line`; without one, when the launch script has made LMKV_READY_FILE.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        run: Path,
        environ: Mapping[str, str] | None = None,
        ready_line: str = "",
    ) -> None:
        self.name = name
        self.log_path = run / f"{name}.log"
        self.ready_path = run / f"{name}.ready"
        self.ready_path.unlink(missing_ok=True)
        self._ready_line = ready_line
        tied = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        files = {} if ready_line else {"LMKV_READY_FILE": str(self.ready_path)}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*tied, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {}), **files},
                start_new_session=True,
            )

    def check_alive(self) -> None:
        """Raises ChildError with its last log lines if it has ended."""
        status = self.process.poll()
        if status is not None:
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise ChildError(f"{self.name} {how} · its last lines ({self.log_path}):\n{self.log_tail()}")

    def log_tail(self) -> str:
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_LINES:]) or "    (nothing)"

    def is_ready(self) -> bool:
        self.check_alive()
        if not self._ready_line:
            return self.ready_path.exists()
        return self._ready_line in self.log_path.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def hurry(self) -> None:
        """Again told to end: a launch script kills its engine then, anything else is killed."""
        self.signal(signal.SIGKILL if self._ready_line else signal.SIGTERM)


@contextlib.contextmanager
def children() -> Iterator[list[Child]]:
    """A list to put the started ones into; all of them have ended when the block is left, however it is left."""
    started: list[Child] = []
    try:
        yield started
    finally:
        stop(started)


def stop(started: list[Child], hurried: Callable[[], bool] = lambda: False) -> None:
    """Ends all and empties the list. A Ctrl-C meanwhile, or `hurried`, asks them again (`Child.hurry`)."""
    _signal_all(started, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_DEADLINE_S
    while any(child.process.poll() is None for child in started):
        try:
            late_s = time.monotonic() - deadline_s
            if late_s > KILL_DEADLINE_S:
                raise ChildError(f"{[child.name for child in started]} outlive SIGKILL · look at them with ps")
            if late_s >= 0:
                _signal_all(started, signal.SIGKILL)
            elif hurried():
                _hurry_all(started)
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            _hurry_all(started)
    started.clear()


def _signal_all(started: list[Child], number: signal.Signals) -> None:
    for child in started:
        child.signal(number)


def _hurry_all(started: list[Child]) -> None:
    for child in started:
        child.hurry()


def wait_until(
    done: Callable[[], str],
    watched: Sequence[Child],
    deadline_s: float,
    current: Step,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Polls until `done` returns "" (else: what is missing). Raises ChildError when a child ends or time is up.

    `pause` may raise what ends the wait.
    """
    give_up_s = time.monotonic() + deadline_s
    while missing := done():
        for child in watched:
            child.check_alive()
        if time.monotonic() >= give_up_s:
            logs = ", ".join(str(child.log_path) for child in watched)
            raise ChildError(f"{current.title}: not after {deadline_s:.0f} s · missing: {missing} · read {logs}")
        current.note = f"waiting for {missing}"
        pause(POLL_S)
    current.note = ""


def raise_on_sigterm() -> None:
    """SIGTERM and SIGHUP end this process as Ctrl-C does, with its `finally` blocks."""

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
