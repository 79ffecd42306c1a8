"""Which process that is, so that others on its host can prove that it has ended.

A process id alone proves nothing: it is reused, and means another process in another container. Together with the boot,
the process-id namespace and the time of its start it names one process for ever.
"""

from __future__ import annotations

import os
from pathlib import Path

from .wire import ProcessCard

DRAIN_S = 0.25
REMOTE_DRAIN_S = 150.0
"""From the proof that a process has ended until nothing of it can land: on this host its sockets' bytes have been read
by then; on another its kernel may send on what was queued (Linux gives up orphaned sockets after about 100 s)."""

_PROC = Path("/proc")


def own_process() -> ProcessCard:
    """This process. Its `host` is "" where /proc does not say enough; its end can then not be proved."""
    pid = os.getpid()
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(_PROC / "self/ns/pid")
        started = _state(pid)[1]
    except (OSError, ValueError, IndexError):
        return ProcessCard("", "", pid, 0)
    return ProcessCard(boot, namespace, pid, started)


def is_neighbour(process: ProcessCard) -> bool:
    """It runs, or ran, where this process can look it up: same boot of the same host, same process-id namespace."""
    own = own_process()
    return bool(own.host) and (own.host, own.namespace) == (process.host, process.namespace)


def may_share_host(process: ProcessCard) -> bool:
    """It runs on this host, in whatever container, or it is not known where: it may reach our memory by other ways than
    a connection (CMA, CUDA IPC)."""
    return not process.host or process.host == own_process().host


def has_followed(later: ProcessCard, process: ProcessCard) -> bool:
    """Another process, of the same host, boot and process-id namespace. If it listens where `process` did, that one's
    sockets are closed."""
    here = (process.host, process.namespace) == (later.host, later.namespace)
    return bool(process.host) and here and (process.pid, process.started) != (later.pid, later.started)


def drain_s(process: ProcessCard) -> float:
    """How long what an ended process has sent may still land."""
    return DRAIN_S if is_neighbour(process) else REMOTE_DRAIN_S


def has_ended(process: ProcessCard) -> bool:
    """Proof that the process is gone with its memory and sockets; False also where it cannot be looked up."""
    if not is_neighbour(process) or process.pid <= 0:
        return False
    try:
        state, started = _state(process.pid)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, IndexError):
        return False
    if started != process.started:
        return True  # the number belongs to another process now
    if state not in "ZX":
        return False
    try:  # its first thread has ended: so has the process, unless others of its threads go on
        return len(os.listdir(_PROC / str(process.pid) / "task")) <= 1
    except OSError:
        return False


def _state(pid: int) -> tuple[str, int]:
    """State letter and start time (clock ticks since boot). Raises OSError, ValueError, IndexError."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
