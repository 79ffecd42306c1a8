"""Proof that a process has ended, and what is no proof."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from lmkv.process import has_ended, is_neighbour, may_share_host, own_process
from lmkv.wire import ProcessCard

SAY = "from lmkv.process import own_process; p = own_process(); print(p.pid, p.started, flush=True); input()"


def child() -> tuple[subprocess.Popen[str], ProcessCard]:
    running = subprocess.Popen([sys.executable, "-c", SAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    pid, started = map(int, running.stdout.readline().split())
    return running, msgspec.structs.replace(own_process(), pid=pid, started=started)


def test_we_are_alive_and_a_neighbour_of_ourselves() -> None:
    own = own_process()
    assert is_neighbour(own) and not has_ended(own) and own.pid == os.getpid() and own.started > 0


@pytest.mark.parametrize("reaped", [False, True])
def test_a_killed_process_has_ended_and_a_stopped_one_has_not(reaped: bool) -> None:
    running, card = child()
    assert not has_ended(card)
    running.send_signal(signal.SIGSTOP)
    assert not has_ended(card)
    running.kill()
    if reaped:
        running.wait()
    end_s = time.monotonic() + 10
    while not has_ended(card):
        assert time.monotonic() < end_s
        time.sleep(0.001)
    running.wait()
    assert has_ended(card)
    running.communicate()


def test_a_reused_number_is_another_process() -> None:
    own = own_process()
    assert has_ended(msgspec.structs.replace(own, started=own.started - 1))


@pytest.mark.parametrize("change", [{"host": "another boot"}, {"namespace": "pid:[1]"}, {"pid": 0}, {"host": ""}])
def test_what_cannot_be_looked_up_is_not_proved(change: dict[str, object]) -> None:
    own = own_process()
    gone = msgspec.structs.replace(own, started=own.started - 1)
    assert not has_ended(msgspec.structs.replace(gone, **change))
    assert not has_ended(ProcessCard())


def test_who_may_reach_our_memory_without_a_connection() -> None:
    own = own_process()
    assert may_share_host(own) and may_share_host(msgspec.structs.replace(own, namespace="another container"))
    assert may_share_host(ProcessCard()), "not known where"
    assert not may_share_host(msgspec.structs.replace(own, host="another boot"))
