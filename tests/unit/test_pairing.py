"""Two pairing machines talking through lists."""

from __future__ import annotations

import msgspec
import pytest

from lmkv import wire
from lmkv.control.pairing import Action, Answer, Pairing, PairState, ToEngine, ToWorkers
from lmkv.errors import CompatError
from lmkv.ids import EngineName, Incarnation, Rank

A, B = "tcp://a:1", "tcp://b:1"


def card(address: str, incarnation: str, ranks: int = 1, must: str = "m") -> wire.EngineCard:
    workers = tuple(wire.WorkerCard(Rank(r), f"{address}{r}", "inproc", b"", "DRAM", (), 1, 1) for r in range(ranks))
    name = EngineName(address[6])
    return wire.EngineCard(name, Incarnation(incarnation), address, "both", {"model": must}, {}, (16,), workers)


def same_model(ours: wire.EngineCard, theirs: wire.EngineCard) -> None:
    if ours.must != theirs.must:
        raise CompatError("model", ours.must["model"], theirs.must["model"], hint="serve one model")


def answer(introduction: wire.Introduce, rank: Rank, error: str = "") -> wire.Introduced:
    return wire.Introduced(rank, introduction.card.incarnation, error, introduction.pair, introduction.ours)


def tell(machine: Pairing, incarnation: str, error: str, now_s: float, rank: int = 0) -> list[Action]:
    """A worker tells of the pair that the machine knows."""
    peer = machine._peers.get(Incarnation(incarnation))
    pair, ours = (peer.pair, machine.number(peer.card.address)) if peer is not None else (0, 0)
    return machine.introduced(wire.Introduced(Rank(rank), Incarnation(incarnation), error, pair, ours), now_s)


class Net:
    """Delivers what the machines send; workers answer every Introduce at once unless `deaf`."""

    def __init__(self, *machines: Pairing) -> None:
        self.machines = {m.card.address: m for m in machines}
        self.answers: list[wire.Control] = []
        self.dismissed: list[Incarnation] = []
        self.sent: list[wire.Control] = []
        self.workers_heard: list[wire.Control] = []
        self.worker_error = ""
        self.deaf = False

    def do(self, machine: Pairing, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case ToEngine(address, message):
                    self.sent.append(message)
                    target = self.machines.get(address)
                    if target is not None:
                        self.do(target, self._deliver(target, message))
                case ToWorkers(wire.Introduce() as message):
                    self.workers_heard.append(message)
                    for worker in machine.card.workers if not self.deaf else ():
                        told = machine.introduced(answer(message, worker.rank, self.worker_error), 0.0)
                        self.do(machine, told)
                case ToWorkers(wire.Dismiss(incarnation, _)):
                    self.dismissed.append(incarnation)
                case Answer(_, message):
                    self.answers.append(message)

    def _deliver(self, target: Pairing, message: wire.Control) -> list[Action]:
        match message:
            case wire.Hello(sender, number):
                return target.hello(sender, number)
            case wire.Welcome(sender, number, yours):
                return target.welcome(sender, number, yours)
            case wire.Refuse():
                return target.refuse(message.address, message.reason)
        raise AssertionError(message)


def pair(ranks: int = 1, must: str = "m") -> tuple[Pairing, Pairing, Net]:
    a, b = Pairing(card(A, "a1", ranks), same_model), Pairing(card(B, "b1", ranks, must), same_model)
    return a, b, Net(a, b)


@pytest.mark.parametrize("ranks", [1, 4])
def test_one_hello_makes_both_ready(ranks: int) -> None:
    a, b, net = pair(ranks)
    net.do(a, a.want(B, 0.0, (b"router", "t")))
    assert a.state(B) == (PairState.READY, "") and b.state(A) == (PairState.READY, "")
    assert net.answers == [wire.Met("t", "b", "b1", "")]


def test_hello_is_repeated_but_not_hammered() -> None:
    a = Pairing(card(A, "a1"), same_model)
    assert a.want(B, 0.0) and not a.want(B, 0.5) and a.want(B, 1.0)


def test_welcome_waits_for_every_worker() -> None:
    a, b, net = pair(ranks=2)
    net.deaf = True
    net.do(a, a.want(B, 0.0))
    tell(b, "a1", "", 0.0)
    assert b.state(A)[0] is PairState.PENDING
    actions = tell(b, "a1", "", 0.0, rank=1)
    assert actions == [ToEngine(A, wire.Welcome(b.card, 1, 1))] and b.state(A)[0] is PairState.READY


def test_a_repeated_welcome_introduces_again_a_peer_whose_workers_have_not_answered() -> None:
    a, them = Pairing(card(A, "a1"), same_model), card(B, "b1")
    a.want(B, 0.0)
    first = a.welcome(them, 1, a.number(B))
    assert first == [ToWorkers(wire.Introduce(them, a.card, 1, a.number(B)))]
    assert a.welcome(them, 1, a.number(B)) == first
    tell(a, "b1", "", 0.0)
    assert a.state(B)[0] is PairState.READY and a.welcome(them, 1, a.number(B)) == []


def test_both_may_start_at_once() -> None:
    a, b, net = pair()
    first, second = a.want(B, 0.0), b.want(A, 0.0)
    net.do(a, first)
    net.do(b, second)
    assert a.state(B)[0] is b.state(A)[0] is PairState.READY


def test_refusal_names_the_field_to_whoever_waits_and_is_tried_again_later() -> None:
    a, b, net = pair(must="another")
    net.do(a, a.want(B, 0.0, (b"router", "t")))
    state, reason = a.state(B)
    assert state is PairState.REFUSED and "'model'" in reason and "serve one model" in reason
    assert isinstance(net.answers[0], wire.Met) and "'model'" in net.answers[0].refused
    assert a.want(B, 1.0, (b"router", "t2")) == [Answer(b"router", wire.Met("t2", "", "", reason))]
    assert a.want(B, 6.0) == [ToEngine(B, wire.Hello(a.card, 1))]
    assert b.ready_peers() == []


def test_a_restarted_peer_replaces_its_older_incarnation() -> None:
    a, b, net = pair()
    net.do(a, a.want(B, 0.0))
    again = Pairing(card(A, "a2"), same_model)
    net.machines[A] = again
    net.do(again, again.want(B, 0.0))
    assert net.dismissed == [Incarnation("a1")]
    assert [peer.incarnation for peer in b.ready_peers()] == [Incarnation("a2")]


def test_a_lost_pair_is_found_again() -> None:
    a, _, net = pair()
    net.do(a, a.want(B, 0.0))
    net.do(a, tell(a, "b1", "silent", 10.0))
    assert a.state(B)[0] is PairState.PENDING and net.dismissed == [Incarnation("b1")]
    assert a.want(B, 10.5) == []
    net.do(a, a.want(B, 11.0))
    assert a.state(B)[0] is PairState.READY


def test_a_worker_that_cannot_connect_refuses_the_pair() -> None:
    a, b, net = pair()
    net.worker_error = "no route"
    net.do(a, a.want(B, 0.0, (b"router", "t")))
    assert "no route" in b.state(A)[1] and b.ready_peers() == []
    assert a.state(B)[0] is PairState.PENDING


def test_news_of_unknown_peers_is_ignored() -> None:
    a, _, _ = pair()
    assert tell(a, "nobody", "", 0.0) == []
    assert tell(a, "nobody", "lost", 0.0) == []


def introductions(net: Net, incarnation: str) -> list[wire.Introduce]:
    return [m for m in net.workers_heard if isinstance(m, wire.Introduce) and m.card.incarnation == incarnation]


@pytest.mark.parametrize("error", ["", "connection lost"])
def test_what_a_worker_tells_of_an_older_pair_is_over(error: str) -> None:
    """One rank of A loses B, while the other's word of the old pair, good or bad, is still on its way."""
    a, _, net = pair(ranks=2)
    net.do(a, a.want(B, 0.0))
    (old,) = introductions(net, "b1")
    net.do(a, tell(a, "b1", "connection lost", 5.0))
    net.deaf = True
    net.do(a, a.hello(card(B, "b1", ranks=2), old.pair))
    new = introductions(net, "b1")[-1]
    assert (old.ours, new.ours) == (1, 2)
    assert a.introduced(answer(new, Rank(0)), 7.0) == []
    assert a.introduced(answer(old, Rank(1), error), 7.0) == []
    assert a.state(B)[0] is PairState.PENDING and a.knows(Incarnation("b1")), "rank 1 has not come so far"
    a.introduced(answer(new, Rank(1)), 7.0)
    assert a.state(B)[0] is PairState.READY


def test_a_worker_that_was_ready_for_the_others_older_number_is_not_for_its_newer_one() -> None:
    """B has lost A and says so, while A still hears of the pair before: B would serve no grant over that connection."""
    a, _, net = pair()
    net.do(a, a.want(B, 0.0))
    (old,) = introductions(net, "b1")
    net.deaf = True
    net.do(a, a.hello(card(B, "b1"), 9))
    a.introduced(answer(old, Rank(0)), 1.0)
    assert a.state(B)[0] is PairState.PENDING
    net.do(a, a.introduced(answer(old, Rank(0), "connection lost"), 2.0))
    assert not a.knows(Incarnation("b1")), "but a loss is one: our number has not changed since"


# --- an engine whose card changes (its weights have another name) ---


def renewed(machine: Pairing, net: Net, must: str) -> None:
    net.do(machine, list(machine.renew(msgspec.structs.replace(machine.card, must={"model": must}))))


def test_a_changed_card_ends_the_pair_on_both_sides_and_an_equal_one_brings_it_back() -> None:
    a, b, net = pair()
    net.do(a, a.want(B, 0.0))
    renewed(a, net, "m+1")
    for machine, address in ((a, B), (b, A)):
        state, reason = machine.state(address)
        assert state is PairState.REFUSED and "'m+1'" in reason
        assert machine.ready_card(address) is None and machine.ready_peers() == []
    assert net.dismissed == [], "the workers stay connected, what is in flight ends as it would have"
    renewed(b, net, "m+1")
    for machine, address in ((a, B), (b, A)):
        assert machine.state(address) == (PairState.READY, "")
        seen = machine.ready_card(address)
        assert seen is not None and seen.must == {"model": "m+1"}


def test_a_changed_card_that_was_not_heard_of_is_told_again() -> None:
    """The message is lost; the next request for the pair finds out."""
    a, b, net = pair()
    net.do(a, a.want(B, 0.0))
    a.renew(msgspec.structs.replace(a.card, must={"model": "m+1"}))
    assert a.state(B)[0] is PairState.REFUSED and b.state(A)[0] is PairState.READY
    net.do(a, a.want(B, 10.0, (b"router", "t")))
    assert b.state(A)[0] is PairState.REFUSED
    assert [answer.refused != "" for answer in net.answers if isinstance(answer, wire.Met)] == [True]
    b.renew(msgspec.structs.replace(b.card, must={"model": "m+1"}))
    net.do(a, a.want(B, 20.0, (b"router", "u")))
    assert a.state(B)[0] is PairState.READY and b.state(A)[0] is PairState.READY
    assert net.answers[-1] == wire.Met("u", "b", "b1", "")


def test_a_card_that_changes_while_the_pair_is_made() -> None:
    a, b, net = pair()
    net.deaf = True
    net.do(a, a.want(B, 0.0, (b"router", "t")))
    renewed(a, net, "m+1")
    net.do(b, tell(b, "a1", "", 1.0))
    net.do(a, tell(a, "b1", "", 1.0))
    assert a.state(B)[0] is PairState.REFUSED and b.state(A)[0] is PairState.REFUSED


def test_only_what_must_match_is_taken_from_a_new_card() -> None:
    """Within a pair, memory and addresses of an incarnation never change: whoever says so is not it."""
    a, _, net = pair()
    net.do(a, a.want(B, 0.0))
    forged = msgspec.structs.replace(card(B, "b1", ranks=3), layout={"x": "y"})
    a.hello(forged, 1)
    seen = a.ready_card(B)
    assert seen is not None and len(seen.workers) == 1 and seen.layout == {}


def test_a_side_that_was_cut_off_makes_the_pair_anew_and_voids_its_grants() -> None:
    """Only A has lost the connection; B must part from the old pair before it serves grants of the new one."""
    a, b, net = pair()
    net.do(a, a.want(B, 0.0))
    assert a.state(B)[0] is b.state(A)[0] is PairState.READY
    assert (a.number(B), b.number(A)) == (1, 1)
    net.do(a, tell(a, "b1", "connection lost", 5.0))
    assert a.state(B)[0] is PairState.PENDING and a.number(B) == 2
    net.dismissed.clear()
    net.do(a, a.want(B, 7.0))
    assert a.state(B)[0] is b.state(A)[0] is PairState.READY
    assert net.dismissed == [Incarnation("a1")], "B's workers part from A first"
    assert (a.number(B), b.number(A)) == (2, 1)
    net.dismissed.clear()
    net.do(a, a.want(B, 20.0))
    net.do(b, b.want(A, 20.0))
    assert net.dismissed == [], "no ping-pong"


def test_a_data_plane_that_was_made_anew_is_told_to_all_peers() -> None:
    a, b, net = pair()
    net.do(a, a.want(B, 0.0))
    actions, addresses = a.replaced(Rank(0), b"new export")
    assert actions == [ToWorkers(wire.Dismiss(Incarnation("b1"), dead=False))] and addresses == [B]
    assert a.card.workers[0].export == b"new export" and a.state(B)[0] is PairState.PENDING
    net.dismissed.clear()
    net.do(a, a.want(B, 0.1))
    assert a.state(B)[0] is b.state(A)[0] is PairState.READY
    assert net.dismissed == [Incarnation("a1")]
    known = b.ready_card(A)
    assert known is not None and known.workers[0].export == b"new export"
    assert a.number(B) == 2, "grants from before are void"


def test_a_number_that_the_other_has_missed_is_told_again() -> None:
    """B loses the pair after it has said Hello, and hears the Welcome to that Hello with its number of before."""
    a, b, net = pair()
    hello = b.want(A, 0.0)
    net.do(b, hello)
    assert a.state(B)[0] is b.state(A)[0] is PairState.READY
    tell(a, "b1", "lost", 1.0)
    (old,) = b.want(A, 2.0) or [ToEngine(A, wire.Hello(b.card, b.number(A)))]
    tell(b, "a1", "lost", 3.0)
    net.do(b, [old])
    assert a.state(B)[0] is b.state(A)[0] is PairState.READY
    assert a._peers[Incarnation("b1")].pair == b.number(A) == 2, "grants of B carry the number that A serves"


def test_a_welcome_to_an_engine_that_was_at_this_address_before_is_answered_with_our_number() -> None:
    (answer,) = Pairing(card(A, "a2"), same_model).welcome(card(B, "b1"), pair=4, ours=3)
    assert isinstance(answer, ToEngine) and answer.message == wire.Hello(card(A, "a2"), 1)
