"""What is hot, what is copied where, and how much of it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from lmkv.control.follow import CATCHING_UP, EXACT
from lmkv.control.replication import Copy, Replication, ReplicationSettings
from lmkv.errors import ConfigError
from lmkv.ids import Incarnation
from lmkv.poolwire import Holder, Member

from .model import make_card

NAMESPACE = b"n" * 16
SETTINGS = ReplicationSettings(copies=2, heat=4, half_life_s=10, pages_per_s=10, pages_burst=16, again_s=5, entries=64)


def keys(chain: int, count: int = 10) -> bytes:
    """Chains share their first four pages."""
    return b"".join(bytes((0 if i < 4 else chain, i)) + bytes(15) for i in range(count))


def member(name: str, used: int = 0, state: str = EXACT, draining: bool = False) -> Member:
    return Member(make_card(name), state, 0.0, 0, used, 1000, draining)


def holder(name: str, pages: int, of: int = 10) -> Holder:
    return Holder(Incarnation(name), f"tcp://{name}:1", b"\1" * pages + b"\0" * (of - pages))


class Asking:
    def __init__(self, settings: ReplicationSettings = SETTINGS) -> None:
        self.policy = Replication(settings)
        self.members = [member("a", 10), member("b", 500), member("c", 200)]

    def __call__(self, chain: int, *holders: Holder, now_s: float = 0.0) -> Copy | None:
        return self.policy.looked_up(NAMESPACE, keys(chain), holders, lambda: self.members, now_s)


def test_a_hot_run_goes_to_the_roomiest_node_that_has_not_got_it() -> None:
    ask = Asking()
    assert [ask(1, holder("a", 10)) for _ in range(3)] == [None] * 3
    copy = ask(1, holder("a", 10))
    assert copy == Copy(make_card("a"), make_card("c"), keys(1)[: 8 * 17])
    assert ask(1, holder("a", 10)) is None, "ordered already"
    assert ask(1, holder("a", 10), holder("c", 8), now_s=6.0) is None, "there are two now"
    assert ask(1, holder("a", 10), holder("c", 7), now_s=6.0) is not None


def test_conversations_share_the_heat_of_what_they_share() -> None:
    ask = Asking()
    copies = [copy for chain in range(1, 9) if (copy := ask(chain, holder("a", 10)))]
    assert [copy.keys for copy in copies] == [keys(1)[: 4 * 17]]


def test_only_what_is_found_counts_and_a_short_run_is_no_copy() -> None:
    ask = Asking()
    for _ in range(10):
        assert ask(1) is None
    assert len(ask.policy) == 0
    copies = [ask(1, holder("a", 10), holder("b", 3)) for _ in range(4)]
    assert copies[-1] is not None and copies[-1].target.incarnation == "c"


def test_heat_fades() -> None:
    ask = Asking()
    assert [ask(1, holder("a", 10), now_s=20.0 * i) for i in range(20)] == [None] * 20


def test_the_same_is_ordered_again_only_later() -> None:
    ask = Asking()
    times = [t / 2 for t in range(40) if ask(1, holder("a", 10), now_s=t / 2)]
    assert times[0] == 2.0 and all(b - a >= 5 for a, b in itertools.pairwise(times)) and len(times) > 2


def test_the_budget_holds() -> None:
    ask = Asking(dataclasses.replace(SETTINGS, heat=1, again_s=0.001))
    copied = 0
    for i in range(1000):
        copy = ask(i % 200 + 1, holder("a", 10), now_s=i * 0.01)
        copied += len(copy.keys) // 17 if copy else 0
    assert 80 <= copied <= 16 + 10 * 10


@pytest.mark.parametrize(
    "members",
    [
        [member("a")],
        [member("a"), member("b", draining=True), member("c", state=CATCHING_UP), member("d", used=1000)],
        [member("a", state=CATCHING_UP), member("b")],
    ],
)
def test_nowhere_to_copy_from_or_to(members: list[Member]) -> None:
    ask = Asking()
    ask.members = members
    assert [ask(1, holder("a", 10)) for _ in range(10)] == [None] * 10


def test_memory_is_bounded_and_the_hot_stay() -> None:
    ask = Asking(dataclasses.replace(SETTINGS, heat=1000))
    for i in range(2000):
        ask(255, holder("a", 10))
        ask(i % 250 + 1, holder("a", 10))
        assert len(ask.policy) <= SETTINGS.entries
    assert ask.policy._heats[NAMESPACE + keys(255)[7 * 17 : 8 * 17]].value == 2000


@pytest.mark.parametrize("wrong", [{"copies": 0}, {"heat": 0.0}, {"pages_per_s": -1.0}, {"entries": 0}])
def test_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ReplicationSettings(**wrong)  # type: ignore[arg-type]
