"""An eventfd that wakes a poll loop from another thread."""

from __future__ import annotations

import os


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
