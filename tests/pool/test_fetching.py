"""Memory lent to nodes that write into it: what ends the loan, and what does not."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from lmkv import poolwire as pw
from lmkv.ids import Incarnation, Rank
from lmkv.pool.fetching import LOOK_EVERY_S, RECALL_S, Fetching
from lmkv.pool.pushing import Pushing
from lmkv.process import DRAIN_S, REMOTE_DRAIN_S, own_process
from lmkv.transport import Extents, OpId, PeerId
from lmkv.wire import ProcessCard

US = (Incarnation("u" * 16), Rank(0))
OLD, NEW = Incarnation("a" * 16), Incarnation("b" * 16)
PEER = PeerId("node")
FAR = ProcessCard("another host", "pid:[1]", 7, 7)
CONTAINER = msgspec.structs.replace(own_process(), namespace="pid:[1]")
NOBODY = ProcessCard()


class Questions:
    """A link that answers what the test answers."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[pw.Fetch, Callable[[Any], None]]] = {}

    def ask(self, question: Callable[[int], Any], kind: type, done: Callable[[Any], None], until_s: float) -> None:
        token = 100 + len(self.open)
        self.open[token] = question(token), done
        assert until_s == float("inf")

    def forget(self, token: int) -> None:
        self.open.pop(token, None)

    def answer(self, token: int, error: str = "") -> None:
        self.open.pop(token)[1](pw.Fetched(token, error))


class Bench:
    def __init__(self, process: ProcessCard) -> None:
        self.link = Questions()
        self.now_s = 100.0
        self.fetching = Fetching(self.link, US, 3)  # type: ignore[arg-type]
        self.card = pw.NodeCard("n", OLD, "tcp://127.0.0.1:1", "", "nixl", b"", 0, 0, process=process)

    def ask(self) -> tuple[OpId, int]:
        op = self.fetching.ask(self.card, PEER, 1, b"n" * 16, [b"k" * 17], (0, 64), Extents.of((4096, 64)), self.now_s)
        return op, max(self.link.open)

    def welcome(self, incarnation: Incarnation = OLD, writing: tuple[int, ...] | None = (), **card: Any) -> None:
        """As NodeAccess does it with the answer to its hello."""
        asked = self.fetching.doubtful(incarnation, self.now_s)
        found = msgspec.structs.replace(self.card, incarnation=incarnation, **card)
        self.fetching.heard(pw.PoolWelcome(1, found, "", writing), asked, self.now_s)

    def run(self, seconds: float) -> list[tuple[OpId, str]]:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.05
            self.fetching.tick(self.now_s)
        return self.ended()

    def ended(self) -> list[tuple[OpId, str]]:
        return [(op, type(error).__name__ if error else "") for op, error in self.fetching.take()]


@pytest.fixture(params=[FAR, CONTAINER, NOBODY, own_process()], ids=["far", "container", "nobody", "near"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


def test_an_answer_ends_a_fetch(bench: Bench) -> None:
    first, second = bench.ask(), bench.ask()
    bench.link.answer(first[1])
    bench.link.answer(second[1], "no lease")
    assert bench.ended() == [(first[0], ""), (second[0], "TransportError")]
    assert len(bench.fetching) == 0 and not bench.fetching.is_lent_to(PEER)


def test_a_lost_node_ends_nothing(bench: Bench) -> None:
    op, _ = bench.ask()
    bench.fetching.node_lost()
    assert bench.fetching.take_lost() == [op] and bench.fetching.take_lost() == []
    assert bench.run(2 * REMOTE_DRAIN_S) == [] and bench.fetching.is_lent_to(PEER)


def test_a_lost_node_that_answers_all_the_same(bench: Bench) -> None:
    op, token = bench.ask()
    bench.fetching.node_lost()
    bench.link.answer(token)
    assert bench.ended() == [(op, "")] and bench.fetching.take_lost() == []


def test_a_node_that_is_heard_again_says_what_it_still_writes(bench: Bench) -> None:
    first, second = bench.ask(), bench.ask()
    bench.fetching.node_lost()
    bench.welcome(writing=(second[1],))
    assert bench.ended() == [(first[0], "TransportError")]
    bench.welcome(writing=None)
    assert bench.ended() == [], "an older node says nothing"
    bench.welcome()
    assert bench.ended() == [(second[0], "TransportError")] and not bench.link.open


def test_a_node_is_asked_about_what_takes_long(bench: Bench) -> None:
    """Its answer may have been lost with a connection of ours to its control address."""
    op, token = bench.ask()
    bench.welcome()
    assert bench.ended() == [], "that was not asked about"
    bench.run(RECALL_S + 0.1)
    assert bench.fetching.doubtful(OLD, bench.now_s) == (token,) and bench.fetching.doubtful(NEW, bench.now_s) == ()
    bench.welcome()
    assert bench.ended() == [(op, "TransportError")]


def test_a_connection_closed_both_ways_ends_its_fetches(bench: Bench) -> None:
    op, _ = bench.ask()
    bench.fetching.fenced(PeerId("other"))
    assert bench.ended() == []
    bench.fetching.fenced(PEER)
    assert bench.ended() == [(op, "PeerLostError")]


def test_a_new_data_plane_ends_what_other_hosts_write(bench: Bench) -> None:
    op, _ = bench.ask()
    bench.fetching.replaced()
    is_far = bench.card.process == FAR
    assert bench.ended() == ([(op, "PeerLostError")] if is_far else [])


def test_only_what_other_hosts_hold_is_overdue(bench: Bench) -> None:
    bench.ask()
    bench.run(30.0)
    assert bool(bench.fetching.overdue(bench.now_s, 20.0)) == (bench.card.process == FAR)
    bench.welcome(writing=None)
    assert bench.fetching.overdue(bench.now_s, 20.0) == [], "it has just been heard"


@pytest.mark.parametrize(
    ("changes", "is_proof"),
    [
        ({"pid": 9}, True),
        ({"started": 9}, True),
        ({}, False),
        ({"host": "a third host", "pid": 9}, False),
        ({"namespace": "pid:[2]", "pid": 9}, False),
    ],
)
def test_another_process_at_its_address_there_is_proof(changes: dict[str, Any], is_proof: bool) -> None:
    bench = Bench(FAR)
    op, _ = bench.ask()
    bench.fetching.node_lost()
    bench.welcome(NEW, process=msgspec.structs.replace(FAR, **changes))
    assert bench.run(REMOTE_DRAIN_S - 1.0) == [], "what its kernel still has may come"
    assert bench.run(2.0) == ([(op, "PeerLostError")] if is_proof else [])


def test_another_node_at_its_address_does_not_answer_for_it(bench: Bench) -> None:
    bench.ask()
    bench.fetching.node_lost()
    bench.welcome(NEW, process=NOBODY)
    assert bench.run(2 * REMOTE_DRAIN_S) == []


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], ProcessCard]]:
    say = "from lmkv.process import own_process; print(own_process().started, flush=True); input()"
    running = subprocess.Popen([sys.executable, "-c", say], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    yield running, msgspec.structs.replace(own_process(), pid=running.pid, started=int(running.stdout.readline()))
    running.kill()
    running.communicate()


@pytest.mark.parametrize("is_lost", [True, False])
def test_the_end_of_its_process_is_seen_on_this_host(child: Any, is_lost: bool) -> None:
    """Also while our connection to it seems to be there: NIXL finds a death only with an operation."""
    running, card = child
    bench = Bench(card)
    op, _ = bench.ask()
    if is_lost:
        bench.fetching.node_lost()
    assert bench.run(RECALL_S + LOOK_EVERY_S) == []
    running.kill()
    running.wait()
    assert bench.run(LOOK_EVERY_S + DRAIN_S + 0.2) == [(op, "PeerLostError")]


def test_a_question_that_comes_after_it_was_recalled_is_not_served() -> None:
    pushing = Pushing(None, None, None, Counter())  # type: ignore[arg-type]
    assert pushing.recall(*US, (5,)) == ()
    answers: list[pw.Fetched] = []
    pushing._transport = object()  # type: ignore[assignment]
    question = pw.Fetch(5, *US, 1, b"n" * 16, b"", 0, 64, ())
    pushing.take(question, [], [], PEER, answers.append)
    assert "given it up" in answers[0].error
    other = msgspec.structs.replace(question, rank=Rank(1))
    assert "given it up" not in pushing._refusal(other, [], [], PEER)
