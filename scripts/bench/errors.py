"""What a benchmark says when it cannot go on."""

from __future__ import annotations

import sys
import time


class BenchError(Exception):
    """A benchmark cannot go on; the message says what happened, with which values, and what to do."""


_STARTED_S = time.monotonic()


def progress(message: str) -> None:
    """One line on stderr with the seconds since the start; stdout stays free for the table."""
    print(f"[{time.monotonic() - _STARTED_S:7.1f} s] {message}", file=sys.stderr, flush=True)
