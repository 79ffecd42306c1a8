"""`lmkv up`: in which order it starts and ends, and that every way to its end leaves no process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from script_bed import Bed, ended, until

from lmkv.errors import ConfigError
from lmkv.up import commands, machine
from lmkv.up.children import STOP_DEADLINE_S, ChildError
from lmkv.up.machine import Machine
from lmkv.up.plan import Plan, Process
from tests.ports import free_port

# --- the order of starting and ending, with shell scripts for processes -----------------------------------------------

READY = {True: "echo i-am-ready", False: 'echo READY > "$LMKV_READY_FILE"'}


class Stubs:
    """A plan of shell scripts. Each notes its start and its end; `more` is run after being ready."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.more: dict[str, str] = {}
        self.before: dict[str, str] = {}
        self.on_term: dict[str, str] = {}

    def process(self, name: str, says: bool) -> Process:
        on_term = self.on_term.get(name, "exit 0")
        script = f"""
            echo {name} >> {self.folder}/started
            trap 'echo {name} >> {self.folder}/ended; {on_term}' TERM
            {self.before.get(name, ":")}
            {READY[says]}
            {self.more.get(name, ":")}
            while :; do sleep 0.02; done"""
        return Process(name, ("sh", "-c", script), f"at-{name}", "i-am-ready\n" if says else "")

    def plan(self) -> Plan:
        engines = tuple(self.process(name, says=False) for name in ("prefill-0", "decode-0"))
        controller, pool, router = ((self.process(name, says=True),) for name in ("controller", "pool", "router"))
        return Plan("http://nowhere", "m", controller, pool, engines, router)

    def run(self, announce: Callable[[], None]) -> int:
        return Machine(self.plan(), self.folder / "run", announce).run()

    def noted(self, what: str) -> list[str]:
        """The two engines come in any order."""
        names = (self.folder / what).read_text().split()
        return ["engine" if name.endswith("-0") else name for name in names]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    monkeypatch.setattr(machine, "router_ready", lambda _: "")
    return Stubs(tmp_path)


def tell_us() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_stages_start_one_after_the_other_and_end_the_other_way(
    stubs: Stubs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stubs.run(tell_us) == 0
    assert stubs.noted("started") == ["controller", "pool", "engine", "engine", "router"]
    assert stubs.noted("ended") == ["router", "engine", "engine", "pool", "controller"]
    told = capsys.readouterr()
    assert told.out == ""
    assert "prefill-0 is ready at at-prefill-0" in told.err
    assert [line.strip()[2:] for line in told.err.splitlines() if "…" in line] == [
        "starting controller",
        "starting pool",
        "starting prefill-0, decode-0",
        "starting router, pairing the engines",
        "stopping router",
        "stopping prefill-0, decode-0",
        "stopping pool",
        "stopping controller",
    ]


def test_handlers_of_signals_are_put_back(stubs: Stubs) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stubs.run(tell_us)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_dies_at_its_start_ends_the_others(stubs: Stubs) -> None:
    other = stubs.folder / "run" / "prefill-0.ready"
    stubs.before["decode-0"] = f"while [ ! -e {other} ]; do sleep 0.02; done; echo no memory left; exit 7"
    with pytest.raises(ChildError, match=r"(?s)decode-0 ended with status 7.*no memory left"):
        stubs.run(lambda: pytest.fail("it was never ready"))
    assert stubs.noted("ended") == ["engine", "pool", "controller"]


def test_one_that_dies_later_ends_the_others(stubs: Stubs) -> None:
    flag = stubs.folder / "die"
    stubs.more["pool"] = f"while [ ! -e {flag} ]; do sleep 0.02; done; echo the disk is full; exit 3"
    with pytest.raises(ChildError, match=r"(?s)pool ended with status 3.*the disk is full"):
        stubs.run(flag.touch)
    assert stubs.noted("ended") == ["router", "engine", "engine", "controller"]


def test_a_signal_while_starting(stubs: Stubs) -> None:
    stubs.before["prefill-0"] = "kill -INT $PPID; sleep 600 & wait"
    assert stubs.run(lambda: pytest.fail("it was never ready")) == machine.INTERRUPTED
    assert "router" not in stubs.noted("started")
    assert stubs.noted("ended")[-2:] == ["pool", "controller"]


def test_told_twice_it_kills(stubs: Stubs) -> None:
    """The pool does not end when it is told to, but has us told again."""
    stubs.on_term["pool"] = "kill -TERM $PPID"
    before_s = time.monotonic()
    assert stubs.run(tell_us) == 0
    assert time.monotonic() - before_s < STOP_DEADLINE_S / 2  # by which it would have been killed anyway
    assert stubs.noted("ended")[-1] == "controller"


def test_two_do_not_share_a_run_folder(stubs: Stubs) -> None:
    def second() -> None:
        with pytest.raises(ConfigError, match="another lmkv up uses the run folder"):
            stubs.run(lambda: None)
        tell_us()

    assert stubs.run(second) == 0


# --- the command, with real services and fake engines -----------------------------------------------------------------


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    bed = Bed(tmp_path)
    (bed.model / "config.json").write_text("{}")
    yield bed
    bed.close()


def up(bed: Bed, port: int, *more: str, **environ: str) -> subprocess.Popen[str]:
    words = ["up", "--model", str(bed.model), "--port", str(port), "--run", str(bed.folder / "run"), *more]
    return bed.start(commands.lmkv(*words), **environ)


WHOLE = ("--engines", "2", "--pool-capacity", "16MiB")
"""Fake engines cannot pair, so they are of both roles."""


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline().strip()
    assert line, process.stderr.read()
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ready_serves_and_a_signal_ends_everything(bed: Bed, number: signal.Signals) -> None:
    port = free_port()
    with ended(up(bed, port, *WHOLE)) as process:
        assert first_line(process) == f"lmkv up ready at http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as answer:
            assert json.load(answer)["data"][0]["id"] == "fake"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")
    assert "✓ stopping controller" in err
    assert "Traceback" not in err
    bed.until_none_left()


def test_json_tells_every_address(bed: Bed) -> None:
    port = free_port()
    with ended(up(bed, port, "--engines", "1", "--json", "--no-pool")) as process:
        told = json.loads(first_line(process))
        process.terminate()
        process.communicate(timeout=20)
    assert told["ready"] == f"http://127.0.0.1:{port}"
    assert told["model"] == "model"
    assert [engine["name"] for engine in told["engines"]] == ["engine-0"]
    assert told["pool"] == told["controller"] == []
    bed.until_none_left()


def test_killed_outright_the_kernel_ends_the_rest(bed: Bed) -> None:
    with ended(up(bed, free_port(), *WHOLE)) as process:
        first_line(process)
        process.kill()
        process.communicate(timeout=20)
    bed.until_none_left()


def test_an_engine_that_dies_is_shown_with_its_last_lines(bed: Bed) -> None:
    with ended(up(bed, free_port(), *WHOLE, FAKE_ENGINE_DIES='"name":"engine-1"')) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (1, "")
    assert "engine-1 ended with status 7" in err
    assert "no memory left for the model" in err
    assert "Traceback" not in err
    bed.until_none_left()


def test_an_engine_that_is_killed_later(bed: Bed) -> None:
    with ended(up(bed, free_port(), "--engines", "1", "--no-pool", FAKE_ENGINE_ALONE="1")) as process:
        first_line(process)
        os.kill(bed.recorded()["pid"], signal.SIGKILL)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "engine-0 ended with status 137" in err
    bed.until_none_left()


def test_a_signal_during_the_start_ends_everything(bed: Bed) -> None:
    with ended(up(bed, free_port(), *WHOLE, FAKE_ENGINE_LOADS_S="60")) as process:
        until(bed.record.exists, "no engine was started")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    bed.until_none_left()


def test_a_taken_port_is_named(bed: Bed) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with ended(up(bed, port)) as process:
            _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.splitlines() == [
        f"LMKV-C106 port {port} on 127.0.0.1 is taken · stop what listens there, or choose another with --port"
    ]
    assert not (bed.folder / "run").exists()


def test_contradicting_options_are_one_line(bed: Bed) -> None:
    with ended(up(bed, 0, "--engines", "1", "--decode", "1")) as process:
        _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1
    assert "--engines stands beside --prefill or --decode" in err
