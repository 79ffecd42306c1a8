"""What the demo reads out of the router's /explain."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import _ledger

CLOCK_OFFSET_S = 1_700_000_000.0
"""The request arrived at 100.0 s of the engines' monotonic clock."""

EXPLAIN: dict[str, Any] = {
    "mode": "pd",
    "aggregated_why": "",
    "arrived_unix_ms": 1_700_000_100_000,
    "attempts": [
        {"prefill": "p0", "decode": "d0", "trouble": "connection lost", "engines": {"prefill": None, "decode": None}},
        {
            "prefill": "p1",
            "decode": "d1",
            "first_token_ms": 160.0,
            "engines": {
                "prefill": {
                    "arrived_s": 100.01,
                    "ranks": {
                        "0": {
                            "first_post_s": 100.04,
                            "last_computed_s": 100.140,
                            "bytes": 3000,
                            "writes": 3,
                            "sealed_s": 0.0,
                        },
                        "1": {"first_post_s": 100.03, "last_computed_s": 100.145, "bytes": 1000, "writes": 2},
                    },
                },
                "decode": {
                    "prompt_tokens": 1000,
                    "first_token": 128,
                    "ranks": {"0": {"last_landed_s": 100.147}, "1": {"last_landed_s": 100.150}},
                },
            },
        },
    ],
}


def read(**changes: Any) -> _ledger.Story:
    return _ledger.read({**copy.deepcopy(EXPLAIN), **changes}, CLOCK_OFFSET_S)


def test_ranks_are_summed_and_the_outermost_moments_count() -> None:
    story = read()
    assert (story.tokens, story.pushed_bytes, story.writes) == (872, 4000, 5)
    assert story.engines == "p1 → d1"
    assert story.at("prefill.first_post") == pytest.approx(30, abs=0.01)
    assert story.lead_ms == pytest.approx(115, abs=0.01)
    assert story.tail_ms == pytest.approx(5, abs=0.01)
    assert story.handed_over


def test_moments_come_in_their_order_and_unknown_ones_are_left_out() -> None:
    moments = read().moments
    assert [ms for ms, _, _ in moments] == sorted(ms for ms, _, _ in moments)
    assert [name for _, name, _ in moments] == [
        "prefill.arrived",
        "prefill.first_post",
        "prefill.last_computed",
        "decode.last_landed",
        "router.first_token",
    ]


def test_it_is_told_in_lines() -> None:
    text = "\n".join(_ledger.render(read()))
    assert "872 tokens · 0.0 MB · 5 writes" in text
    assert "overlap   yes: the first WRITE was posted 115.0 ms before the last layer was computed" in text
    assert "tail      the last WRITE landed 5.0 ms after" in text


def test_no_overlap_is_said_so() -> None:
    told = copy.deepcopy(EXPLAIN)
    for rank in told["attempts"][-1]["engines"]["prefill"]["ranks"].values():
        rank["first_post_s"] = 100.146
    story = _ledger.read(told, CLOCK_OFFSET_S)
    assert story.summary()["overlap"] is False
    assert any("overlap   no: the first WRITE was posted 1.0 ms after" in line for line in _ledger.render(story))


def test_aggregated_is_no_handover() -> None:
    story = read(mode="aggregated", aggregated_why="no prefill engine is healthy")
    assert not story.handed_over
    assert "trouble   no prefill engine is healthy" in "\n".join(_ledger.render(story))


def test_a_miss_is_no_handover() -> None:
    told = copy.deepcopy(EXPLAIN)
    told["attempts"][-1]["engines"]["decode"]["miss"] = "deadline: 120 s"
    assert not _ledger.read(told, CLOCK_OFFSET_S).handed_over


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"mode": "pd", "attempts": []},
        {"mode": "pd", "attempts": [{"prefill": None, "decode": "d", "engines": {}}]},
        {"mode": "pd", "attempts": [{"engines": {"prefill": {"trouble": "gone"}, "decode": None}}]},
        {"mode": "pd", "attempts": [{"engines": {"prefill": {"ranks": {"0": "?"}}, "decode": {"arrived_s": "?"}}}]},
    ],
)
def test_gaps_are_no_errors(told: dict[str, Any]) -> None:
    story = _ledger.read(told, CLOCK_OFFSET_S)
    assert not story.handed_over
    assert _ledger.render(story)
    assert not _ledger.is_complete(told)


def test_complete_means_both_sides_have_told_their_ranks() -> None:
    assert _ledger.is_complete(EXPLAIN)
