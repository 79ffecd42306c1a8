"""What a process holds, as the kernel sees it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Reading:
    """Resident memory without what is shared with others (bytes), open descriptors, threads."""

    memory_bytes: int
    descriptors: int
    threads: int


def read(pid: int) -> Reading:
    """Raises OSError if there is no such process (any more)."""
    proc = Path("/proc", str(pid))
    _, resident, shared, *_ = (proc / "statm").read_text().split()
    memory_bytes = (int(resident) - int(shared)) * PAGE_BYTES
    return Reading(memory_bytes, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task")))


def settled(pid: int, within_s: float, window_s: float = 2.0, most: Reading | None = None) -> Reading:
    """What it holds once that falls no more: closed connections end on threads of their own, and the deaths of the
    last peers have to be noticed.

    The most of each within a window that is no lower than the window before, at the latest after `within_s`. With
    `most`: the first reading with no more descriptors and threads than that.
    """
    end_s = time.monotonic() + within_s
    before = Reading(0, 1 << 30, 1 << 30)
    while True:
        now = read(pid)
        window_end_s = time.monotonic() + window_s
        while time.monotonic() < window_end_s:
            time.sleep(0.1)
            new = read(pid)
            if most is not None and new.descriptors <= most.descriptors and new.threads <= most.threads:
                return new
            now = Reading(new.memory_bytes, max(now.descriptors, new.descriptors), max(now.threads, new.threads))
        falls = now.descriptors < before.descriptors or now.threads < before.threads
        if time.monotonic() > end_s or (most is None and not falls):
            return now
        before = now
