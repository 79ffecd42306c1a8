"""Runs the scripts against the fake engine and finds every process that they leave. Not a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
DEADLINE_S = 20.0


class Bed:
    """A folder, a fake Python, and an environment whose mark every process started from here inherits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir()
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_engine.py"} "$@"\n')
        self.python.chmod(0o755)
        self.record = folder / "record.json"
        self.mark = uuid.uuid4().hex
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("LMKV_", "VLLM_", "HF_"))}
        self.environ = plain | {
            "TEST_BED_MARK": self.mark,
            "LMKV_PYTHON": str(self.python),
            "LMKV_STOP_TIMEOUT_S": "1",
            "FAKE_ENGINE_RECORD": str(self.record),
        }

    def start(self, command: list[str], **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, role: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        script = ["bash", str(SCRIPTS / f"launch_{role}.sh"), "--model", str(self.model), *arguments]
        return self.start(script, **environ)

    def recorded(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.record.read_text())
        return told

    def alive(self) -> dict[int, str]:
        """Processes with our mark that run (zombies do not)."""
        wanted = f"TEST_BED_MARK={self.mark}".encode()
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (process / "stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and wanted in (process / "environ").read_bytes().split(b"\0"):
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")[:120]
        return found

    def until_none_left(self) -> None:
        until(lambda: not self.alive(), lambda: f"still running: {self.alive()}")

    def close(self) -> None:
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Its pipes are closed when the block is left; a process that then still runs is killed."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(done: Callable[[], object], what: Callable[[], str] | str, deadline_s: float = DEADLINE_S) -> None:
    give_up_s = time.monotonic() + deadline_s
    while not done():
        if time.monotonic() >= give_up_s:
            raise AssertionError(what if isinstance(what, str) else what())
        time.sleep(0.02)
