"""How a loop waits: for descriptors, for another thread (an eventfd), for less than a millisecond."""

from __future__ import annotations

import os
import select
import time


class Wake:
    """`set()` from any thread makes `fd` readable; the loop's owner calls `clear()`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self.fd)


def wait(poller: select.poll, seconds: float) -> list[tuple[int, int]]:
    """`poller.poll`, which knows whole milliseconds only: a shorter pause is slept, whatever comes meanwhile."""
    if 0 < seconds < 0.001:
        time.sleep(seconds)
        seconds = 0.0
    return poller.poll(max(0.0, seconds) * 1000)
