"""Keeping the other "host" busy, as the decode engine of a pair does: vLLM polls while a request waits for its KV.

On one machine that costs the prefill engine speed that it would keep on a host of its own (shared caches, clock rate,
or one physical core for both). Plain vLLM beside an idle core does not pay that; beside a busy one it does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from bench.engines import OWNER_VARIABLE, as_the_user

_POLL = "import os\nwhile True: os.sched_yield()"
"""vLLM's engine core and its workers wait for each other like this."""


@contextlib.contextmanager
def busy_core(core: int) -> Iterator[None]:
    """A process polls on `core` meanwhile, and has ended on exit. One that outlives a killed benchmark is ended by the
    next (`reap_leftovers`)."""
    env = {**os.environ, OWNER_VARIABLE: str(os.getpid())}
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _POLL], env=env, preexec_fn=as_the_user)
    try:
        os.sched_setaffinity(process.pid, {core})
        yield
    finally:
        process.kill()
        process.wait()
