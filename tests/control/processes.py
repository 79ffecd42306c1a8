"""`lmkv …`, called and as a process."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Sequence

from click.testing import Result
from typer.testing import CliRunner

from lmkv.cli import main

COMMAND = [sys.executable, "-c", "from lmkv.cli import main; main()"]


def lmkv(*arguments: str) -> Result:
    """A command in this process, to its end: `exit_code`, `stdout`, `stderr`."""
    return CliRunner().invoke(main, arguments)


class Serving:
    """A started `lmkv controller`; `address` is what its ready line says."""

    def __init__(self, *arguments: str, ready: Sequence[str] = ("--json",)) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "controller", *arguments, *ready], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 30)[0], "no ready line"
        self.line = self.process.stdout.readline()
        self.address = json.loads(self.line)["ready"] if "--json" in ready else self.line.split()[-1]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)

    def end(self) -> tuple[int, str]:
        self.process.terminate()
        _, err = self.process.communicate(timeout=10)
        return self.process.returncode, err
