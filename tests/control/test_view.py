"""A node followed step by step: what the view asks, when it is exact, and what it does about each thing that goes
wrong."""

from __future__ import annotations

import pytest

from lmkv import poolwire as pw
from lmkv.control.follow import CATCHING_UP, DEGRADED, EXACT, ViewSettings
from lmkv.control.view import Ask, HangUp, Subscribe, Unsubscribe, View
from lmkv.errors import ConfigError, WireError
from lmkv.poolwire import Snapshot

from .model import ModelNode, make_card

NAMESPACE = b"n" * 16
SETTINGS = ViewSettings(lease_s=3, forget_s=10, lag_s=1, part_s=2, retry_s=0.1, buffer_bytes=3000, snapshots=2, nodes=8)


def key(i: int) -> bytes:
    return NAMESPACE + bytes((i,)) * 16 + b"\0"


class Bench:
    """A view and its clock; `asked` holds the questions that wait, by address."""

    def __init__(self) -> None:
        self.view = View(SETTINGS)
        self.now_s = 100.0
        self.asked: dict[str, Snapshot] = {}
        self.log: list[str] = []

    def act(self) -> None:
        for action in self.view.take_actions():
            self.log.append(f"{type(action).__name__} {action.card.incarnation}")
            match action:
                case Ask(card, question):
                    self.asked[card.address] = question
                case HangUp(card) | Unsubscribe(card):
                    self.asked.pop(card.address, None)
                case Subscribe():
                    pass

    def beat(self, node: ModelNode, *, leaving: bool = False) -> None:
        self.view.beat(node.beat(leaving=leaving), self.now_s)
        self.act()

    def tell(self, *messages: pw.Events) -> None:
        for message in messages:
            self.view.events(message, self.now_s)
        self.act()

    def answer(self, node: ModelNode, parts: int = 100) -> None:
        for _ in range(parts):
            if node.card.address not in self.asked:
                return
            self.view.part(node.answer(self.asked.pop(node.card.address)), self.now_s)
            self.act()

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.view.tick(self.now_s)
        self.act()

    def node(self, name: str, held: int = 3, part_records: int = 2, *, exact: bool = True) -> ModelNode:
        node = ModelNode(make_card(name), part_records)
        node.change([(key(i), 1) for i in range(held)])
        self.beat(node)
        if exact:
            self.tell(node.sign_of_life())
            self.answer(node)
            assert self.state(node) == EXACT
        return node

    def state(self, node: ModelNode) -> str | None:
        members = {m.card.incarnation: m.state for m in self.view.members(self.now_s)}
        return members.get(node.card.incarnation)

    def pages(self, node: ModelNode) -> dict[bytes, int]:
        keys = [key(i) for i in range(20)]
        found = self.view.lookup(NAMESPACE, b"".join(k[16:] for k in keys), least=0)
        tiers = next((h.tiers for h in found if h.incarnation == node.card.incarnation), bytes(20))
        return {k: t for k, t in zip(keys, tiers, strict=True) if t}

    def is_exact(self, node: ModelNode) -> bool:
        return self.state(node) == EXACT and self.pages(node) == node.pages


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_first_snapshot_waits_for_the_subscription(bench: Bench) -> None:
    node = bench.node("a", exact=False)
    assert bench.log == ["Subscribe a"] and bench.state(node) == CATCHING_UP
    bench.tell(node.sign_of_life())
    assert bench.log[-1] == "Ask a"
    other = bench.node("b", exact=False)
    bench.wait(0.1)
    assert bench.log[-1] == "Subscribe b"
    bench.wait(0.15)  # nothing came: it is asked all the same
    assert bench.log[-1] == "Ask b"
    bench.answer(other)
    assert bench.log[-1] == "HangUp b" and bench.is_exact(other)


def test_parts_are_asked_for_one_after_the_other(bench: Bench) -> None:
    node = bench.node("a", held=5, exact=False)
    bench.tell(node.sign_of_life())
    cursors = []
    while node.card.address in bench.asked:
        cursors.append(bench.asked[node.card.address].cursor)
        bench.answer(node, 1)
    assert cursors == [b"", key(1), key(3)] and bench.is_exact(node)


def test_events_between_the_parts_are_kept(bench: Bench) -> None:
    """Of a page that was in the first part; the last part's number is behind them."""
    node = bench.node("a", held=5, exact=False)
    bench.tell(node.sign_of_life())
    bench.answer(node, 1)
    bench.tell(node.change([(key(0), 0), (key(9), 2)]))
    assert bench.state(node) == CATCHING_UP
    bench.answer(node)
    assert bench.is_exact(node) and key(0) not in node.pages


def test_kept_events_may_be_doubled_and_swapped(bench: Bench) -> None:
    node = bench.node("a", held=5, exact=False)
    bench.tell(node.sign_of_life())
    bench.answer(node, 1)
    first, second, third = (node.change([(key(0), tiers)]) for tiers in (2, 3, 4))
    bench.tell(first, third, second, second)
    bench.answer(node)
    assert bench.is_exact(node) and bench.log.count("Ask a") == 3
    late = node.change([(key(0), 5)])
    bench.tell(late, first, third)
    assert bench.is_exact(node) and bench.view.counters["duplicates"] > 0


def test_a_gap_among_the_kept_ones_starts_again(bench: Bench) -> None:
    node = bench.node("a", held=5, exact=False)
    bench.tell(node.sign_of_life())
    bench.answer(node, 1)
    node.change([(key(0), 0)])
    bench.tell(node.change([(key(1), 0)]))
    while bench.log.count("HangUp a") == 0:
        bench.answer(node, 1)
    assert bench.state(node) == CATCHING_UP and bench.view.counters["gaps"] == 1
    bench.answer(node)
    assert bench.is_exact(node) and bench.view.counters["snapshots"] == 2


def test_a_gap_keeps_the_pages_listed_until_the_new_snapshot_is_complete(bench: Bench) -> None:
    node = bench.node("a", held=4)
    node.change([(key(0), 0), (key(7), 1)])
    bench.tell(node.change([(key(8), 1)]))
    assert bench.state(node) == CATCHING_UP and not bench.view.exact(bench.now_s)
    bench.answer(node, 1)
    assert set(bench.pages(node)) == {key(i) for i in range(4)}
    bench.answer(node)
    assert bench.is_exact(node) and bench.view.exact(bench.now_s)
    while bench.view.tick(bench.now_s):
        pass
    assert bench.view.table.pages == len(node.pages)


def test_parts_overlap_with_what_is_known(bench: Bench) -> None:
    node = bench.node("a")
    two = node.change([(key(0), 3), (key(1), 0)])
    bench.tell(pw.Events(two.incarnation, two.first, two.records[:34]))
    bench.tell(two)
    assert bench.is_exact(node)


def test_cleared_needs_no_snapshot_even_after_a_gap(bench: Bench) -> None:
    node = bench.node("a")
    node.change([(key(5), 1)])  # lost
    bench.tell(node.change([(key(6), 1)], clear=True))
    assert bench.is_exact(node) and bench.view.counters["snapshots"] == 1
    before = node.change([], clear=True)
    bench.tell(before)
    assert bench.is_exact(node) and bench.pages(node) == {}
    bench.tell(node.change([(key(2), 1)]), before)
    assert bench.is_exact(node) and bench.pages(node) == {key(2): 1}
    both = node.change([(key(3), 1), (key(4), 1)], clear=True)
    bench.tell(pw.Events(both.incarnation, both.first, both.records[:34], cleared=True), both)
    assert bench.is_exact(node)


def test_a_sign_of_life_shows_lost_events(bench: Bench) -> None:
    node = bench.node("a")
    node.change([(key(5), 1)])
    bench.tell(node.sign_of_life())
    assert bench.state(node) == CATCHING_UP
    bench.answer(node)
    assert bench.is_exact(node)


def test_a_beat_is_ahead_of_its_events(bench: Bench) -> None:
    node = bench.node("a")
    events = node.change([(key(5), 1)])
    bench.beat(node)
    assert bench.state(node) == CATCHING_UP
    bench.tell(events)
    assert bench.is_exact(node)
    bench.wait(1.5)
    assert bench.view.counters["snapshots"] == 1
    node.change([(key(6), 1)])  # these never come
    bench.beat(node)
    bench.wait(0.9)
    assert bench.view.counters["snapshots"] == 1
    bench.wait(0.2)
    bench.answer(node)
    assert bench.is_exact(node) and bench.view.counters["snapshots"] == 2


def test_too_many_kept_events_start_again_with_pauses(bench: Bench) -> None:
    node = bench.node("a", held=9, exact=False)
    bench.tell(node.sign_of_life())
    bench.answer(node, 1)
    for _ in range(20):
        bench.tell(node.change([(key(1), 1)]))
    assert bench.view.counters["overflows"] == 1
    assert bench.log.count("HangUp a") == 1 and bench.log[-1] == "Ask a"  # at once the first time
    bench.answer(node, 1)
    for _ in range(20):
        bench.tell(node.change([(key(1), 1)]))
    assert bench.view.counters["overflows"] == 2 and bench.log[-1] == "HangUp a"
    bench.wait(0.11)
    bench.answer(node)
    assert bench.is_exact(node)


def test_no_answer(bench: Bench) -> None:
    node = bench.node("a", exact=False)
    bench.tell(node.sign_of_life())
    lost = node.answer(bench.asked[node.card.address])
    for _ in range(2):
        bench.wait(1.1)
        bench.beat(node)
    assert bench.view.counters["snapshot_timeouts"] == 1 and bench.log[-1] == "Ask a"
    bench.view.part(lost, bench.now_s)
    bench.act()
    assert bench.view.counters["late_parts"] == 1 and bench.state(node) == CATCHING_UP
    bench.answer(node)
    assert bench.is_exact(node)


def test_a_part_that_comes_twice_counts_once(bench: Bench) -> None:
    node = bench.node("a", held=5, exact=False)
    bench.tell(node.sign_of_life())
    part = node.answer(bench.asked.pop(node.card.address))
    bench.view.part(part, bench.now_s)
    bench.view.part(part, bench.now_s)
    bench.act()
    assert bench.view.counters["late_parts"] == 1
    bench.answer(node)
    assert bench.is_exact(node)


def test_few_snapshots_at_a_time(bench: Bench) -> None:
    nodes = [bench.node(name, exact=False) for name in "abcd"]
    bench.tell(*(node.sign_of_life() for node in nodes))
    assert len(bench.asked) == 2
    bench.answer(nodes[0])
    assert len(bench.asked) == 2
    for node in nodes:
        bench.answer(node)
    assert all(bench.is_exact(node) for node in nodes)


def test_silence(bench: Bench) -> None:
    node, other = bench.node("a"), bench.node("b")
    for _ in range(4):
        bench.wait(1)
        bench.beat(other)
    assert bench.state(node) == DEGRADED and bench.pages(node) == node.pages
    assert not bench.view.exact(bench.now_s)
    bench.tell(node.change([(key(9), 1)]))
    assert bench.is_exact(node) and bench.view.counters["snapshots"] == 2
    for _ in range(11):
        bench.wait(1)
        bench.beat(other)
    assert bench.state(node) is None and bench.pages(node) == {} and bench.view.exact(bench.now_s)
    bench.beat(node)  # it was only away
    bench.wait(0.3)
    bench.answer(node)
    assert bench.is_exact(node)


def test_the_silent_are_not_asked(bench: Bench) -> None:
    node = bench.node("a", exact=False)
    bench.wait(3.5)
    bench.wait(1)
    assert bench.state(node) == DEGRADED and "Ask a" not in bench.log


def test_another_incarnation_at_the_address(bench: Bench) -> None:
    first = bench.node("a")
    second = ModelNode(make_card("b", first.card.address))
    second.change([(key(9), 1)])
    bench.beat(second)
    assert bench.state(first) is None and bench.pages(first) == {}
    assert bench.log[-2:] == ["Unsubscribe a", "Subscribe b"]
    bench.beat(first)  # late, on its way since before
    assert bench.state(first) is None and bench.view.counters["buried_beats"] == 1
    bench.tell(first.sign_of_life())
    assert bench.view.counters["unknown_events"] == 1
    bench.wait(0.3)
    bench.answer(second)
    assert bench.is_exact(second)


def test_leaving(bench: Bench) -> None:
    node = bench.node("a")
    bench.beat(node, leaving=True)
    assert bench.state(node) is None and bench.pages(node) == {} and not bench.view.exact(bench.now_s)
    bench.beat(node)
    assert bench.state(node) is None
    while bench.view.tick(bench.now_s):
        pass
    assert bench.view.table.pages == 0


def test_who_is_not_followed(bench: Bench) -> None:
    for number in range(8):
        assert bench.view.join(make_card(f"n{number}"), bench.now_s)
    assert not bench.view.join(make_card("n9"), bench.now_s)
    assert bench.view.counters["nodes_refused"] == 1
    foreign = pw.NodeCard("f", make_card("f").incarnation, "tcp://f:1", "tcp://f:2", "tcp", b"", 0, 0, protocol=0)
    assert not bench.view.join(foreign, bench.now_s) and bench.view.counters["foreign_protocols"] == 1


def test_what_makes_no_sense_is_counted(bench: Bench) -> None:
    node = bench.node("a")
    incarnation = node.card.incarnation
    bench.tell(pw.Events(incarnation, 0, b""), pw.Events(incarnation, 4, b"x"))
    bench.view.part(pw.SnapshotPart(1, incarnation, 1, b"x", b""), bench.now_s)
    assert (bench.view.counters["strange_events"], bench.view.counters["strange_parts"]) == (2, 1)
    assert bench.is_exact(node)


def test_lookups(bench: Bench) -> None:
    few, many = bench.node("few", 2), bench.node("many", 5)
    keys = b"".join(key(i)[16:] for i in range(6))
    found = bench.view.lookup(NAMESPACE, keys)
    assert [(h.incarnation, h.address, h.tiers) for h in found] == [
        ("many", many.card.address, b"\1\1\1\1\1\0"),
        ("few", few.card.address, b"\1\1\0\0\0\0"),
    ]
    assert [h.incarnation for h in bench.view.lookup(NAMESPACE, keys, least=3)] == ["many"]
    assert [h.incarnation for h in bench.view.lookup(NAMESPACE, keys, most=1)] == ["many"]
    assert bench.view.lookup(NAMESPACE, keys, least=7) == []
    assert bench.view.lookup(NAMESPACE, b"") == []
    assert bench.view.lookup(b"m" * 16, keys) == []
    assert bench.view.lookup(NAMESPACE, key(9)[16:] + keys) == []
    with pytest.raises(WireError):
        bench.view.lookup(NAMESPACE, b"x")


@pytest.mark.parametrize("wrong", [{"lease_s": 0.0}, {"snapshots": 0}, {"lease_s": 5.0, "forget_s": 4.0}])
def test_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ViewSettings(**wrong)  # type: ignore[arg-type]
