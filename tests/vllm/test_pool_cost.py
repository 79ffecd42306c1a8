"""When loading is worth it."""

from __future__ import annotations

from lmkv.vllm.pooled.cost import Costs


def test_what_is_not_known_is_tried() -> None:
    costs = Costs()
    assert costs.worth(1000, True)
    costs.loaded(1000, 10.0, True)
    assert costs.worth(1000, True)  # how fast computing is, is not known


def test_the_slower_way_is_left_alone_by_what_it_comes_over() -> None:
    costs = Costs()
    costs.step(1.0, 500)
    costs.step(2.0, 500)
    costs.loaded(100, 1.0, False)
    costs.loaded(5000, 1.0, True)
    assert costs.worth(1000, True) and not costs.worth(1000, False)


def test_a_link_gets_another_chance() -> None:
    costs = Costs()
    costs.step(1.0, 500)
    costs.step(2.0, 500)
    costs.loaded(400, 1.0, False)
    tries = 0
    while not costs.worth(1000, False):
        costs.forgive(False)
        tries += 1
    assert 1 <= tries <= 3


def test_pauses_and_small_steps_do_not_make_an_engine_slow() -> None:
    costs = Costs()
    costs.step(1.0, 500)
    costs.step(2.0, 1)
    costs.step(60.0, 0)
    costs.step(61.0, 500)
    costs.loaded(450, 1.0, True)
    assert not costs.worth(1000, True)  # 500 tokens a second, not fewer
