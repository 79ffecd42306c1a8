"""When finished prompts have to give way, and which."""

from __future__ import annotations

from lmkv.ids import RequestId, TransferId
from lmkv.vllm.yielding import YIELD_S, Yielding

A, B = RequestId("a"), RequestId("b")


def with_two() -> Yielding:
    yielding = Yielding()
    yielding.held(A, TransferId("ta"))
    yielding.held(B, TransferId("tb"))
    return yielding


def step(yielding: Yielding, now_s: float, computes: bool = False, served: bool = False) -> TransferId | None:
    yielding.asked(RequestId("c"))
    if served:
        yielding.served()
    return yielding.chosen({RequestId("d")} if computes else (), (), now_s)


def test_the_newest_gives_way_once_nothing_has_run_for_a_while() -> None:
    yielding = with_two()
    assert step(yielding, 0.0) is None
    assert step(yielding, YIELD_S / 2) is None
    assert step(yielding, YIELD_S) == "tb"
    assert step(yielding, YIELD_S * 1.5) is None, "one at a time"
    assert step(yielding, YIELD_S * 2) == "ta"


def test_all_are_tried_again_when_none_could_give_way() -> None:
    yielding = with_two()
    tried = [step(yielding, i * YIELD_S) for i in range(5)]
    assert tried == [None, "tb", "ta", "tb", "ta"]


def test_what_has_been_freed_is_not_chosen() -> None:
    yielding = with_two()
    step(yielding, 0.0)
    yielding.freed({B, RequestId("of another")})
    assert step(yielding, YIELD_S) == "ta"
    yielding.freed({A})
    assert step(yielding, 9 * YIELD_S) is None


def test_an_engine_that_computes_or_finds_blocks_is_not_stuck() -> None:
    yielding = with_two()
    step(yielding, 0.0)
    assert step(yielding, YIELD_S, computes=True) is None
    assert step(yielding, 2 * YIELD_S) is None, "the time counts from here"
    assert step(yielding, 3 * YIELD_S, served=True) is None
    assert step(yielding, 4 * YIELD_S) is None


def test_an_idle_engine_is_not_stuck() -> None:
    yielding = with_two()
    assert [yielding.chosen((), (), i * YIELD_S) for i in range(3)] == [None, None, None]


def test_a_request_whose_kv_has_come_wants_blocks_although_vllm_does_not_ask_again() -> None:
    """It has a part of its KV from the pool, and finds no block for the rest."""
    yielding, c = with_two(), RequestId("c")
    yielding.loads(c)
    assert [yielding.chosen((), (), i * YIELD_S) for i in range(3)] == [None, None, None], "it loads"
    yielding.loaded({c, RequestId("aborted before")})
    assert [yielding.chosen((), (), i * YIELD_S) for i in range(3, 6)] == [None, "tb", "ta"]
    yielding.loads(c)
    assert [yielding.chosen((), (), i * YIELD_S) for i in range(6, 9)] == [None, None, None], (
        "it loads from elsewhere now"
    )
    yielding.loaded({c})
    yielding.ran({c})
    assert [yielding.chosen((), (), i * YIELD_S) for i in range(9, 12)] == [None, None, None]


def test_a_request_that_is_preempted_again_and_again_does_not_come_forward() -> None:
    """It is the only one that runs, and its blocks never suffice: each second step computes something in vain."""
    yielding, c = with_two(), RequestId("c")
    for i in range(10):
        now_s = i * YIELD_S / 10
        assert yielding.chosen({c}, (), now_s) is None
        assert yielding.chosen((), {c}, now_s) is None
    assert yielding.chosen({c}, (), YIELD_S) == "tb"


def test_a_request_that_was_preempted_once_comes_forward_again() -> None:
    yielding, c = with_two(), RequestId("c")
    yielding.chosen((), {c}, 0.0)
    assert [yielding.chosen({c}, (), i * YIELD_S / 4) for i in range(12)] == [None] * 12


def test_another_request_that_runs_meanwhile_comes_forward() -> None:
    yielding, c, d = with_two(), RequestId("c"), RequestId("d")
    for i in range(30):
        assert yielding.chosen({c, d} if i % 2 else {d}, () if i % 2 else {c}, i * YIELD_S / 10) is None
