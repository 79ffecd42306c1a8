"""The real runtime: a part on a thread of its own."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from lmkv.control.runtime import THREADS, ThreadRunner
from lmkv.control.wake import Wake

QUICK_S = 10.0
"""Less than this is no wait for `next_s`, which is an hour here."""


class Part:
    """Takes its turns when told to. `acts` are what a turn does, one after the other."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.acts: list[Callable[[], None]] = []
        self.fds: Sequence[int] | None = []
        self.turned = threading.Event()
        self.runner = ThreadRunner("part", self)

    def open(self) -> None:
        self.log.append(f"open on {threading.current_thread().name}")

    def turn(self, now_s: float) -> None:
        assert abs(now_s - time.monotonic()) < QUICK_S
        self.log.append("turn")
        if self.acts:
            self.acts.pop(0)()
        self.turned.set()

    def next_s(self, now_s: float) -> float:
        return 3600.0

    def descriptors(self) -> Sequence[int] | None:
        fds, self.fds = self.fds, None
        return fds

    def end(self) -> None:
        self.log.append("end")


@pytest.fixture
def part() -> Iterator[Part]:
    made = Part()
    yield made
    made.runner.stop()
    assert not made.runner.alive


def test_a_part_is_opened_turned_and_ended_on_its_thread(part: Part) -> None:
    part.runner.start()
    assert part.runner.alive
    part.runner.wake()
    assert part.turned.wait(QUICK_S)
    part.runner.stop()
    assert part.log[0] == "open on part" and part.log[-1] == "end" and part.log.count("end") == 1
    part.runner.wake()  # harmless


def test_a_descriptor_gives_a_turn_also_one_that_came_later(part: Part) -> None:
    first, second = Wake(), Wake()
    part.fds = [first.fd]
    part.runner.start()
    part.acts = [first.clear, second.clear]
    first.set()
    assert part.turned.wait(QUICK_S)
    part.turned.clear()
    part.acts.insert(0, lambda: setattr(part, "fds", [second.fd]))
    part.runner.wake()
    assert part.turned.wait(QUICK_S)
    part.turned.clear()
    second.set()
    assert part.turned.wait(QUICK_S)
    part.runner.stop()
    first.close()
    second.close()


def test_what_opening_raises_is_raised_where_it_is_started(part: Part) -> None:
    def fail() -> None:
        raise ValueError("no")

    part.open = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no"):
        part.runner.start()
    assert part.log == ["end"]


def test_a_part_may_stop_itself(part: Part) -> None:
    part.acts = [part.runner.stop]
    part.runner.wake()
    part.runner.run(lambda: part.log.append("ready"))
    assert part.log == [f"open on {threading.current_thread().name}", "ready", "turn", "end"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_part_that_fails_ends(part: Part, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    part.acts = [fail]
    part.runner.start()
    part.runner.wake()
    part.runner._thread.join(QUICK_S)
    assert not part.runner.alive and part.log[-1] == "end"
    assert "part has failed" in caplog.text


def test_a_runner_that_was_never_started_keeps_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    runner = ThreadRunner("part", Part())
    runner.stop()
    assert runner._wake.fd == -1
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the part's own runner


def test_the_real_runtime_waits_for_events() -> None:
    event = threading.Event()
    assert not THREADS.wait(event, 0.001)
    event.set()
    assert THREADS.wait(event, 0.001)


def test_a_wake_that_is_closed_does_nothing() -> None:
    wake = Wake()
    wake.set()
    poller = select.poll()
    poller.register(wake.fd, select.POLLIN)
    assert poller.poll(0)
    wake.close()
    wake.set()
    wake.close()
