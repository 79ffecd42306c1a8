"""Peers that come and vanish leave nothing behind that grows: the short form of `python -m tests.scale.peers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .peers import MOST_BYTES, measure_all

COUNTS = {"engine": 400, "node": 300, "controller": 300, "router": 200}


@pytest.mark.timeout(300)
def test_peers_that_come_and_vanish(tmp_path: Path) -> None:
    found = measure_all(tmp_path, COUNTS)
    problems = [problem for growth in found for problem in growth.problems(MOST_BYTES)]
    assert not problems, [growth.as_dict() for growth in found]
    (engine,) = (growth for growth in found if growth.target == "engine")
    # At least one request for the KV of each peer, which brought nothing; and one for each peer, which ended.
    assert engine.counted["counted"]["failed"] >= COUNTS["engine"]
    assert engine.counted["counted"]["received"] == 0
    assert engine.counted["counted"]["sent"] == COUNTS["engine"]
