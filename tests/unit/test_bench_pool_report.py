"""From the pool benchmark's samples to its named figures."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench.pool_report import Sample, cells, summary


def sample(method: str, ttft_ms: float, floor_ms: float) -> Sample:
    return Sample(method, 3585, 0, 9000.0, 9100.0, ttft_ms, floor_ms, 3584, same_answer=True)


def test_the_comparison_with_lmcache_is_of_what_each_adds_to_a_held_prompt() -> None:
    found = summary(cells([sample("local", 80.0, 55.0), sample("lmcache", 150.0, 50.0)]), {})
    assert found["overhead_vs_lmcache_3500"] == 0.25
    assert found["ttft_speedup_local_3500"] == 112.5


def test_without_lmcache_there_is_no_comparison() -> None:
    assert "overhead_vs_lmcache_3500" not in summary(cells([sample("local", 80.0, 55.0)]), {})
