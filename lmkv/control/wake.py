"""How a loop waits: for descriptors, for another thread (an eventfd), for less than a millisecond."""

from __future__ import annotations

import os
import select
import threading
import time

import zmq


class Wake:
    """`set()` from any thread, or a signal's handler, makes `fd` readable; the loop's owner calls `clear()`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.RLock()  # (a signal's handler runs on a thread that may hold it)

    def set(self) -> None:
        """Does nothing after `close`."""
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


def wait(poller: select.poll, seconds: float) -> list[tuple[int, int]]:
    """`poller.poll`, which knows whole milliseconds only: a shorter pause is slept, whatever comes meanwhile."""
    if 0 < seconds < 0.001:
        time.sleep(seconds)
        seconds = 0.0
    return poller.poll(max(0.0, seconds) * 1000)


def has_mail(socket: zmq.Socket[bytes]) -> bool:
    """A message waits. To be asked before a wait for the socket's descriptor, which tells of each message only once:
    what was sent since may have taken the wake-up of what has come."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
