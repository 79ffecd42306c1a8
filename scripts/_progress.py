"""Progress lines for the scripts: what is being done, and for how long already.

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
    started_s: float = field(default_factory=time.monotonic)
    note: str = ""
    done: str = ""
    """Said on the last line, if set."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


@contextmanager
def step(title: str, out: TextIO = sys.stderr) -> Iterator[Step]:
    """Shows `title` with the elapsed time until the block ends. The ticker thread ends with the block."""
    current = Step(title)
    stop = threading.Event()
    live = out.isatty()
    if not live:
        _line(out, f"  … {title}")
    ticker = threading.Thread(target=_tick, args=(current, stop, out, live), name="lmkv-progress", daemon=True)
    ticker.start()
    mark = "✗"
    try:
        yield current
        mark = "✓"
    finally:
        stop.set()
        ticker.join()
        said = f" — {current.done}" if current.done else ""
        _line(out, f"{_clear(live)}  {mark} {title} ({current.elapsed_s:.1f} s){said}")


def _tick(current: Step, stop: threading.Event, out: TextIO, live: bool) -> None:
    turn = 0
    while not stop.wait(0.25 if live else QUIET_S):
        note = f" — {current.note}" if current.note else ""
        if live:
            wheel = _SPINNER[turn % len(_SPINNER)]
            out.write(f"{_clear(live)}  {wheel} {current.title} {current.elapsed_s:.0f} s{note}"[:200])
            out.flush()
        else:
            _line(out, f"  … {current.title} {current.elapsed_s:.0f} s{note}")
        turn += 1


def _clear(live: bool) -> str:
    return "\r\x1b[2K" if live else ""


def _line(out: TextIO, text: str) -> None:
    out.write(text + "\n")
    out.flush()
