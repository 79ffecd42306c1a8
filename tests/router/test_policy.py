"""Choices are pure: a snapshot in, two names out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmkv.router.policy import (
    Candidate,
    Choice,
    Snapshot,
    choose,
    least_prompt_bytes,
    least_requests,
    round_robin,
)

P = tuple(Candidate(f"p{i}") for i in range(3))
D = tuple(Candidate(f"d{i}") for i in range(3))
ALL = frozenset((p.name, d.name) for p in P for d in D)


def pick(snapshot: Snapshot, aggregated: str = "") -> Choice:
    return choose(snapshot, least_prompt_bytes, least_requests, aggregated)


def test_round_robin_takes_turns() -> None:
    assert [round_robin(D, turn)[0].name for turn in range(5)] == ["d0", "d1", "d2", "d0", "d1"]


def test_least_loaded_decode_counts_requests() -> None:
    loaded = (Candidate("d0", 3), Candidate("d1", 1, 10**9), Candidate("d2", 2))
    chosen, why = least_requests(loaded, 0)
    assert chosen.name == "d1"
    assert why == "least-loaded: 1 requests in flight, least of 3"


def test_least_loaded_prefill_weighs_prompts() -> None:
    loaded = (Candidate("p0", 1, 900), Candidate("p1", 5, 500), Candidate("p2", 2, 800))
    assert least_prompt_bytes(loaded, 0)[0].name == "p1"


@pytest.mark.parametrize("policy", [round_robin, least_requests, least_prompt_bytes])
def test_an_idle_system_is_used_evenly(policy: object) -> None:
    counts = Counter(policy(D, turn)[0].name for turn in range(30))  # type: ignore[operator]
    assert set(counts.values()) == {10}


def test_nobody_to_decode() -> None:
    assert pick(Snapshot(P, ())).decode is None


def test_nobody_to_prefill() -> None:
    choice = pick(Snapshot((), D))
    assert (choice.prefill, choice.aggregated) == (None, "no_prefill")
    assert choice.decode is not None


def test_a_reason_to_work_alone_is_kept() -> None:
    choice = pick(Snapshot(P, D), "batch")
    assert (choice.prefill, choice.aggregated) == (None, "batch")


def test_all_pairs_refused() -> None:
    choice = pick(Snapshot(P, D, refused=ALL))
    assert (choice.prefill, choice.aggregated) == (None, "pairs_refused")
    assert choice.decode is not None


def test_warm_pairs_come_first_and_cold_ones_are_better_than_none() -> None:
    for turn in range(6):
        choice = pick(Snapshot(P, D, turn=turn, ready=frozenset({("p2", "d1")})))
        assert (choice.prefill, choice.decode) == ("p2", "d1")
    assert pick(Snapshot(P, D)).prefill is not None


def test_a_retry_goes_elsewhere_if_it_can() -> None:
    for turn in range(6):
        choice = pick(Snapshot(P, D, turn=turn, ready=ALL, avoid=frozenset({"p0", "d0", "p1"})))
        assert choice.prefill == "p2"
        assert choice.decode in {"d1", "d2"}
    only = pick(Snapshot(P[:1], D[:1], avoid=frozenset({"p0", "d0"})))
    assert (only.prefill, only.decode) == ("p0", "d0")


def test_a_retry_prefers_another_decode_engine_over_another_prefill_engine() -> None:
    refused = frozenset({("p1", "d1")})
    choice = pick(Snapshot(P[:2], D[:2], refused=refused, avoid=frozenset({"d0"})))
    assert (choice.prefill, choice.decode) == ("p0", "d1")


names = st.sampled_from(sorted(ALL))


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.sets(st.sampled_from(P)), st.sets(st.sampled_from(D)), st.frozensets(names), st.frozensets(names),
    st.frozensets(st.sampled_from([c.name for c in P + D])), st.integers(0, 100),
)  # fmt: skip
def test_whatever_the_snapshot_the_choice_is_allowed(
    prefill: set[Candidate], decode: set[Candidate], ready: frozenset[tuple[str, str]],
    refused: frozenset[tuple[str, str]], avoid: frozenset[str], turn: int,
) -> None:  # fmt: skip
    snapshot = Snapshot(tuple(prefill), tuple(decode), turn, ready - refused, refused, avoid)
    choice = pick(snapshot)
    assert (choice.decode is None) == (not decode)
    allowed = {(p.name, d.name) for p in prefill for d in decode} - refused
    if choice.prefill is not None:
        assert (choice.prefill, choice.decode) in allowed
        assert choice.prefill_why and choice.decode_why
    elif choice.decode is not None:
        assert not allowed
        assert choice.aggregated
