"""Progress lines: what is being done, and for how long already.

On a terminal the running step is one line that is rewritten every second; elsewhere (logs, CI) a step prints its start,
a line every `QUIET_S` seconds and its end, so that a log never looks hung.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

QUIET_S = 15.0
_SPINNER = "|/-\\"


@dataclass
class Step:
    """The running step; `note` may be changed at any time and is shown beside the title."""

    title: str
    out: TextIO
    started_s: float = field(default_factory=time.monotonic)
    note: str = ""
    done: str = ""
    """Said on the last line, if set."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def say(self, text: str) -> None:
        """A line of its own, while the step goes on."""
        self.show(f"{_clear(self.out.isatty())}{text}\n")

    def show(self, text: str) -> None:
        """As it is. The ticker does it from a thread of its own."""
        with self._lock:
            self.out.write(text)
            self.out.flush()


@contextmanager
def step(title: str, out: TextIO | None = None) -> Iterator[Step]:
    """Shows `title` with the elapsed time until the block ends, on stderr. The ticker thread ends with the block."""
    current = Step(title, out or sys.stderr)
    stop = threading.Event()
    live = current.out.isatty()
    if not live:
        current.say(f"  … {title}")
    ticker = threading.Thread(target=_tick, args=(current, stop, live), name="lmkv-progress", daemon=True)
    ticker.start()
    mark = "✗"
    try:
        yield current
        mark = "✓"
    finally:
        stop.set()
        ticker.join()
        said = f" — {current.done}" if current.done else ""
        current.say(f"  {mark} {title} ({current.elapsed_s:.1f} s){said}")


def _tick(current: Step, stop: threading.Event, live: bool) -> None:
    turn = 0
    while not stop.wait(0.25 if live else QUIET_S):
        note = f" — {current.note}" if current.note else ""
        if live:
            wheel = _SPINNER[turn % len(_SPINNER)]
            current.show(f"{_clear(live)}  {wheel} {current.title} {current.elapsed_s:.0f} s{note}"[:200])
        else:
            current.say(f"  … {current.title} {current.elapsed_s:.0f} s{note}")
        turn += 1


def _clear(live: bool) -> str:
    return "\r\x1b[2K" if live else ""
