"""A loop's guard: what one item did wrong ends with the item; what goes wrong every time ends the loop."""

from __future__ import annotations

import logging

import pytest

from lmkv.control.guard import LOGGED, MOST_IN_A_ROW, Guard


def fail() -> None:
    raise RuntimeError("a bug")


def test_a_failure_is_counted_logged_and_dismissed(caplog: pytest.LogCaptureFixture) -> None:
    caught: list[tuple[str, Exception]] = []
    guard = Guard("loop", lambda what, error: caught.append((what, error)))
    dismissed: list[str] = []
    assert guard.attempt("Grant", lambda: None)
    assert not guard.attempt("Grant", fail, lambda: dismissed.append("it"), "peer 7")
    assert dismissed == ["it"]
    assert guard.counts == {"Grant": 1}
    assert [what for what, _ in caught] == ["loop: Grant"]
    (record,) = caplog.records
    assert "Grant from peer 7" in record.getMessage() and record.exc_info is not None
    assert guard.take_counts() == {"Grant": 1}
    assert guard.take_counts() == {}


def test_a_dismissal_may_fail_too() -> None:
    guard = Guard("loop", lambda what, error: None)
    assert not guard.attempt("Grant", fail, fail)
    assert guard.counts == {"Grant": 1, "Grant:dismissal": 1}


def test_the_log_is_not_flooded(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard("loop", lambda what, error: None)
    for _ in range(1000):
        guard.attempt("Grant", fail)
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == LOGGED + 1


def test_work_that_fails_for_good_ends_the_loop() -> None:
    guard = Guard("loop", lambda what, error: None)
    for _ in range(MOST_IN_A_ROW - 1):
        guard.work("tick", fail)
    guard.work("tick", lambda: None)
    for _ in range(MOST_IN_A_ROW - 1):
        guard.work("tick", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        guard.work("tick", fail)


def test_an_interrupt_is_no_failure() -> None:
    guard = Guard("loop", lambda what, error: None)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.attempt("Grant", interrupted)
