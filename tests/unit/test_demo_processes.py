"""The demo against fake engines: every way to its end leaves no process and says why."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from script_bed import SCRIPTS, Bed, ended, until

from tests.ports import free_port


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    bed = Bed(tmp_path)
    yield bed
    bed.close()


@pytest.fixture
def port() -> int:
    return free_port(100, 200, 300, 400, 10100, 10200, 10300, 10400, 10500)


def demo(bed: Bed, port: int, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--model", str(bed.model), "--run", str(bed.folder / "run")]
    return bed.start([*command, "--base-port", str(port)], **environ)


def until_engines_run(bed: Bed) -> None:
    ready = [bed.folder / "run" / f"{role}.ready" for role in ("prefill", "decode")]
    until(lambda: all(path.exists() for path in ready), lambda: f"no engines: {bed.alive()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(bed: Bed, port: int, number: signal.Signals) -> None:
    with ended(demo(bed, port)) as process:
        until_engines_run(bed)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "nothing is left running" in err
    assert "Traceback" not in err
    bed.until_none_left()


def test_a_signal_during_the_start_ends_everything(bed: Bed, port: int) -> None:
    with ended(demo(bed, port, FAKE_ENGINE_LOADS_S="60")) as process:
        until(bed.record.exists, "no engine was started")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    bed.until_none_left()


def test_killed_outright_the_kernel_ends_the_rest(bed: Bed, port: int) -> None:
    with ended(demo(bed, port)) as process:
        until_engines_run(bed)
        process.kill()
        process.communicate(timeout=20)
    bed.until_none_left()


def test_an_engine_that_dies_is_shown_with_its_last_lines(bed: Bed, port: int) -> None:
    with ended(demo(bed, port, FAKE_ENGINE_DIES=f"--port {port + 200}")) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "decode ended with status 7" in err
    assert "no memory left for the model" in err
    assert "Traceback" not in err
    bed.until_none_left()


def test_a_taken_port_is_named(bed: Bed, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 100))
        taken.listen()
        with ended(demo(bed, port)) as process:
            _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert re.search(rf"port {port + 100} on 127.0.0.1 is taken", err)
    bed.until_none_left()


def test_a_missing_model_is_named(bed: Bed) -> None:
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--model", str(bed.folder / "none")]
    with ended(bed.start(command)) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "does not exist · run scripts/fetch_model.py" in err
