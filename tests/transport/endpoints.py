"""Proxies of `peer_process`: an end in a process of its own, or on a thread where a back end cannot cross processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from peer_process import serve

from lmkv import errors

REPLY_TIMEOUT_S = 30.0


class Endpoint:
    """One end. `call` runs a command there and raises the typed error it raised."""

    name: str
    address: int
    arena_bytes: int
    export: bytes

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.events: list[tuple[Any, ...]] = []

    def described(self, description: dict[str, Any]) -> None:
        """Take in the reply to `open`."""
        self.__dict__.update(description)

    def send(self, command: str, **arguments: object) -> None:
        self.pipe.send((command, arguments))

    def reply(self, timeout_s: float = REPLY_TIMEOUT_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"no reply in {timeout_s} s")
        kind, value, text = (*self.pipe.recv(), "")[:3]
        if kind == "ok":
            return value
        if kind == "error":
            raise getattr(errors, value)(text)
        raise RuntimeError(value)

    def call(self, command: str, **arguments: object) -> Any:
        self.send(command, **arguments)
        return self.reply()

    def rows(self, *offsets_sizes: tuple[int, int]) -> np.ndarray:
        """A table of extents from (offset in the arena, bytes)."""
        return np.array([(self.address + at, size, 0) for at, size in offsets_sizes], dtype=np.uint64).reshape(-1, 3)

    def blocks(self, indices: np.ndarray, block_bytes: int) -> np.ndarray:
        """A table of extents from block numbers."""
        table = np.zeros((len(indices), 3), dtype=np.uint64)
        table[:, 0] = self.address + indices.astype(np.uint64) * np.uint64(block_bytes)
        table[:, 1] = block_bytes
        return table

    def fetch(self) -> list[tuple[Any, ...]]:
        """All events so far."""
        self.events += self.call("events", since=len(self.events))
        return self.events

    def wait(self, wanted: Callable[[tuple[Any, ...]], bool], timeout_s: float = 20.0) -> tuple[Any, ...]:
        """The first event that fits; fetches until the deadline."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for event in self.fetch():
                if wanted(event):
                    return event
        raise AssertionError(f"not seen at {self.name} in {timeout_s} s; last events: {self.events[-5:]}")

    def completion(self, op: int, timeout_s: float = 20.0) -> tuple[Any, ...]:
        return self.wait(lambda e: e[0] == "completion" and e[1] == op, timeout_s)

    def note(self, payload: bytes, timeout_s: float = 20.0) -> tuple[Any, ...]:
        return self.wait(lambda e: e[0] == "note" and e[2] == payload, timeout_s)

    def lost(self, peer: str, timeout_s: float = 20.0) -> tuple[Any, ...]:
        return self.wait(lambda e: e[0] == "lost" and e[1] == peer, timeout_s)

    def run(self, command: str, peer: str, local: np.ndarray, remote: np.ndarray, note: bytes = b"") -> None:
        """Write or read, wait for success, release."""
        op = self.call(command, peer=peer, local=local, remote=remote, note=note)
        done = self.completion(op)
        assert done[2] == "", done
        self.call("release", op=op)

    def stop(self) -> None:
        """As SIGSTOP."""
        raise NotImplementedError

    def resume(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        """As SIGKILL."""
        raise NotImplementedError

    def end(self) -> None:
        """Clean up, in whatever state it is."""
        raise NotImplementedError


class ProcessEndpoint(Endpoint):
    def __init__(self, env: dict[str, str], prefix: tuple[str, ...] = ()) -> None:
        ours, theirs = Pipe()
        script = str(Path(__file__).with_name("peer_process.py"))
        self.process = subprocess.Popen(
            [*prefix, sys.executable, script, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, **env},
        )
        theirs.close()
        super().__init__(ours)

    def stop(self) -> None:
        """Returns when every thread has stopped: the signal alone only asks for it."""
        self.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + REPLY_TIMEOUT_S
        while any(state != "T" for state in self._thread_states()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.process.pid} does not stop")

    def _thread_states(self) -> list[str]:
        tasks = Path(f"/proc/{self.process.pid}/task")
        return [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def end(self) -> None:
        self.kill()
        self.pipe.close()


class ThreadEndpoint(Endpoint):
    def __init__(self) -> None:
        ours, theirs = Pipe()
        self.thread = threading.Thread(target=serve, args=(theirs,), daemon=True)
        self.thread.start()
        super().__init__(ours)

    def stop(self) -> None:
        self.call("fault", name="stall", value=True)

    def resume(self) -> None:
        self.call("fault", name="stall", value=False)

    def kill(self) -> None:
        self.call("fault", name="dead", value=True)

    def end(self) -> None:
        self.call("stop_serving")
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.pipe.close()
