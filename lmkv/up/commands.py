"""Command lines of the processes: engines by the launch scripts (one way to start an engine), the rest by `lmkv`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from lmkv.errors import ConfigError

LOOKUP_MS = "50"
"""On one machine all share the cores: a lookup can be late by a slice of the kernel's scheduler, and each miss costs
seconds of computing."""


def lmkv(*arguments: str) -> list[str]:
    """`lmkv ARGUMENTS` with this interpreter; -P: the folder it is started in is no place to import from."""
    return [sys.executable, "-P", "-c", "from lmkv.cli import main; main()", *arguments]


def launch(role: str, *arguments: str) -> list[str]:
    """The launch script of prefill, decode, engine or plain. Raises ConfigError if it is not on this machine."""
    script = find_script(f"launch_{role}.sh")
    bash = shutil.which("bash")
    if script is None or bash is None:
        what = "bash" if script else f"launch_{role}.sh"
        raise ConfigError(
            f"there is no {what}: engines are started by it",
            hint="run lmkv from its source tree, or put the tree's scripts/ on the PATH",
            code="LMKV-C110",
        )
    return [bash, str(script), *arguments]


def find_script(name: str) -> Path | None:
    """Beside the package in a source tree, else on the PATH (as in the Docker images)."""
    beside = Path(__file__).resolve().parents[2] / "scripts" / name
    if beside.is_file():
        return beside
    found = shutil.which(name)
    return Path(found) if found else None


def engine_environ(place: Mapping[str, str]) -> dict[str, str]:
    """This interpreter for the engine and time for lookups, where the user has set nothing else."""
    return {
        "LMKV_PYTHON": os.environ.get("LMKV_PYTHON", sys.executable),
        "LMKV_LOOKUP_MS": os.environ.get("LMKV_LOOKUP_MS", LOOKUP_MS),
        **place,
    }
