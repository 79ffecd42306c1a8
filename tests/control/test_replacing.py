"""A data plane made anew for whoever has lent memory for too long: who is told of it, and when."""

from __future__ import annotations

from typing import Any

import pytest

from lmkv.control.replacing import Replacing
from lmkv.errors import StateError
from lmkv.process import REMOTE_DRAIN_S
from lmkv.transport import OpId, PeerId


class Plane:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self.can = True

    def replace(self, name: str) -> tuple[list[OpId], list[PeerId]]:
        if not self.can:
            raise StateError("cannot be made anew")
        self._log.append(f"replace {name}")
        return [OpId(1), OpId(2)], [PeerId("a"), PeerId("b")]

    def export(self) -> bytes:
        return b"export"


class Lends:
    """Operation 1 is the first one's probe."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log
        self.late: list[str] = []

    def overdue(self, now_s: float) -> list[str]:
        return self.late

    def is_probe(self, op: OpId) -> bool:
        return self.name == "first" and op == 1

    def replaced(self, export: bytes) -> None:
        self._log.append(f"{self.name} {export.decode()}")
        self.late = []


@pytest.mark.parametrize("which", [0, 1])
def test_whoever_is_overdue_all_are_told(which: int) -> None:
    log: list[str] = []
    plane: Any = Plane(log)
    lenders = [Lends("first", log), Lends("second", log)]
    replacing = Replacing(
        plane,
        lenders,
        lambda: "new",
        lambda peer, reason: log.append(f"lost {peer}"),
        lambda op, error, now_s: log.append(f"end {op} at {now_s:g}"),
    )
    replacing.tick(0.0)
    assert log == []
    lenders[which].late = ["somebody"]
    replacing.tick(1.0)
    assert log == ["replace new", "lost a", "lost b", "first export", "second export"]
    replacing.tick(REMOTE_DRAIN_S)
    assert len(log) == 5, "what was in flight may still land elsewhere"
    replacing.tick(1.0 + REMOTE_DRAIN_S)
    replacing.tick(2.0 + REMOTE_DRAIN_S)
    assert log[5:] == [f"end 2 at {1.0 + REMOTE_DRAIN_S:g}"]


def test_a_data_plane_that_cannot_be_replaced_is_left_alone() -> None:
    log: list[str] = []
    plane: Any = Plane(log)
    plane.can = False
    lender = Lends("first", log)
    lender.late = ["somebody"]
    replacing = Replacing(plane, [lender], lambda: "new", lambda *_: None, lambda *_: None)
    replacing.tick(0.0)
    plane.can = True
    replacing.tick(1.0)
    assert log == [] and lender.late
