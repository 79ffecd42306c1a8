"""`lmkv pool` as an operator meets it: exit statuses, messages, orderly ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer

from lmkv.cli import main
from tests.pool.bed import LMKV, PAGE, ROOT, NodeProcess, User, using

COMMON = ("pool", "--listen", "tcp://127.0.0.1:0", "--capacity", "1MiB")


@pytest.mark.parametrize(
    ("options", "env", "says"),
    [
        (("--capacity", "lots"), {}, "'capacity' has the value 'lots'"),
        (("--capacity", "4KiB"), {}, "'capacity' has the value"),
        (("--policy", "random"), {}, "'policy' has the value 'random'"),
        (("--listen", "127.0.0.1"), {}, "is not a control address"),
        (("--listen", "tcp://203.0.113.1:80"), {}, "cannot listen on"),
        (("--transport", "carrier-pigeon://"), {}, "unknown transport"),
        (("--share", "/proc/no/s", "--transport", "none"), {}, "cannot share the arena at /proc/no/s"),
        (("--controller", "nowhere", "--transport", "none"), {}, "is not a control address"),
        (("--log-level", "loud"), {}, "--log-level 'loud' is unknown"),
        ((), {"LMKV_POOL_CAPACTIY": "1GiB"}, "did you mean 'LMKV_POOL_CAPACITY'?"),
        ((), {"LMKV_POOL_WRITE_LEASE_S": "-1"}, "LMKV_POOL_WRITE_LEASE_S"),
        ((), {"LMKV_POOL_KILL_AT": "lunch:1"}, "is not POINT:COUNT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_the_operator_has_to_correct(
    options: tuple[str, ...],
    env: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert typer.main.get_command(main)([*COMMON, *options], standalone_mode=False) == 2
    told = capsys.readouterr()
    (line,) = told.err.strip().splitlines()
    assert says in line
    assert told.out == ""


def test_a_start_that_fails_ends_the_process(tmp_path: Path) -> None:
    options = ("--share", str(tmp_path / "no" / ("x" * 200)))
    done = subprocess.run([*LMKV, *COMMON, *options], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end(tmp_path: Path, number: int) -> None:
    node = NodeProcess(tmp_path, share=str(tmp_path / "s"))
    user = User(node.address)
    user.store(1)
    node.process.send_signal(number)
    assert node.wait() == 0
    assert not (tmp_path / "s").exists()
    assert "Traceback" not in node.log.read_text()
    user.close()


def test_a_node_can_be_killed_where_a_test_wants(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, env={"LMKV_POOL_KILL_AT": "commit:before:2"})
    user = User(node.address)
    try:
        user.store(1)
        slots = user.reserve([2])
        user.commit_later([2], slots)
        assert node.wait() == -signal.SIGKILL
        user.pump(lambda: not user.access.ready)
    finally:
        user.close()


def test_an_idle_node_sleeps(tmp_path: Path) -> None:
    """Two clients that beat; the node and its sleeping data plane take a few per cent of a core at most."""
    node = NodeProcess(tmp_path, transport="nixl://?progress=event")
    users = [User(node.address), User(node.address)]
    with using(node, *users):
        stat = Path(f"/proc/{node.process.pid}/stat")

        def cpu_s() -> float:
            fields = stat.read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        before_s, started_s = cpu_s(), time.monotonic()
        for user in users:
            user.pump_for(1.0)
        share = (cpu_s() - before_s) / (time.monotonic() - started_s)
        print(f"an idle node takes {100 * share:.1f} % of a core")
        assert share < 0.1


def test_settings_of_the_environment_come_second(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, env={"LMKV_POOL_CAPACITY": "64MiB", "LMKV_POOL_POLICY": "lru"}, capacity="2MiB")
    user = User(node.address)
    with using(node, user):
        assert user.stats()["capacity_bytes"] == 512 * PAGE
