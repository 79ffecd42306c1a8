"""A pool node on real sockets: what it promises to its clients, near and far, well-behaved and not."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from lmkv import poolwire as pw
from lmkv.hashing import namespace_of
from lmkv.pool.access import Reach
from lmkv.poolwire import Refusal
from tests.pool.bed import PAGE, PAGES, SPACE, NodeProcess, NodeThread, User, content, key, using

PLANES = ("", "tcp://127.0.0.1", "nixl://?progress=event")


@pytest.fixture(scope="module", params=PLANES, ids=["mapped", "tcp", "nixl"])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[NodeProcess, str]]:
    found = NodeProcess(tmp_path_factory.mktemp("node"), transport=request.param or "none", capacity="8MiB")
    yield found, request.param
    assert found.end() == 0


# --- bytes, by every way ---


def test_what_one_stores_another_loads(plane: tuple[NodeProcess, str]) -> None:
    node, url = plane
    writer, reader = User(node.address, url=url), User(node.address, url=url)
    with using(writer, reader):
        assert writer.access.reach is (Reach.REMOTE if url else Reach.LOCAL)
        writer.store(1, 2, 3, size=100_000)
        assert reader.load(1, 2, 3) == 3
        assert reader.load(1, 2, 99, 3) == 2, "the longest run"
        assert writer.drop() == 3
        assert reader.load(1) == 0


def test_two_ranks_write_one_page(plane: tuple[NodeProcess, str]) -> None:
    node, url = plane
    one = User(node.address, url=url)
    two = User(node.address, url=url, rank=1, incarnation=one.incarnation)
    with using(one, two):
        (slot,) = one.reserve([10], 2 * PAGE, shards=2, shard=0)
        assert two.reserve([10], 2 * PAGE, shards=2, shard=1) == (slot,)
        data = content(10, 2 * PAGE)
        one.write(slot.offset, data[:PAGE])
        two.write(slot.offset + PAGE, data[PAGE:])
        assert two.commit([10], [slot], shard=1).refusals == (Refusal.NONE,)
        assert two.pin([10]).why is Refusal.ABSENT
        assert one.commit([10], [slot], shard=0).refusals == (Refusal.NONE,)
        assert two.load(10) == 1
        one.drop()


def test_a_mapped_and_a_remote_client_share(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path, transport="tcp://127.0.0.1")
    near, far = User(node.address), User(node.address, url="tcp://127.0.0.1")
    with using(node, near, far):
        near.store(1)
        far.store(2)
        assert near.load(1, 2) == far.load(1, 2) == 2
        assert sorted(near.stats()["clients"].values()) == ["data plane", "maps it"]


# --- hello ---


def test_another_protocol_is_refused(node: NodeThread, user: User) -> None:
    answer = user.get(
        lambda t: pw.PoolHello(t, user.incarnation, user.rank, "old", protocol=node.card.protocol + 1), pw.PoolWelcome
    )
    assert "speaks protocol" in answer.refused


def test_a_node_without_data_plane_says_so(node: NodeThread, user: User) -> None:
    answer = user.get(lambda t: pw.PoolHello(t, user.incarnation, pw.Rank(5), "far", b"export"), pw.PoolWelcome)
    assert "no data plane" in answer.refused


@pytest.mark.parametrize("scratch", [(-1, 64), (1 << 63, 64), (64, -1)])
def test_scratch_memory_that_cannot_be(tmp_path: Path, scratch: tuple[int, int]) -> None:
    node = NodeThread(tmp_path, transport="tcp://127.0.0.1")
    user = User(node.address)
    with using(node, user):
        hello = (user.incarnation, pw.Rank(5), "far", b"export", *scratch)
        assert user.get(lambda t: pw.PoolHello(t, *hello), pw.PoolWelcome).refused


def test_an_export_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    node = NodeThread(tmp_path, transport="tcp://127.0.0.1")
    user = User(node.address)
    with using(node, user):
        hello = (user.incarnation, pw.Rank(5), "far", b"rubbish")
        assert "cannot connect" in user.get(lambda t: pw.PoolHello(t, *hello), pw.PoolWelcome).refused


def test_namespaces_are_described(user: User) -> None:
    text = '{"model":"m"}'
    user.access.declare(namespace_of(text), text)
    user.until_stats(lambda s: s["namespaces"] == {namespace_of(text).hex(): text})
    user.link.tell(pw.Declare(SPACE, text))
    user.until_stats(lambda s: s["counters"]["unreadable"] == 1)
    assert SPACE.hex() not in user.stats()["namespaces"]


# --- who may not ---


def test_a_stranger_gets_no_slot(node: NodeThread) -> None:
    stranger = User(node.address, attach=False)
    with using(stranger):
        question = (stranger.incarnation, stranger.rank, SPACE, key(1), PAGE, 1, 0)
        assert stranger.ask(lambda t: pw.Reserve(t, *question), pw.Reserved) is None


def test_who_has_no_way_to_write_gets_no_slot(node: NodeThread, user: User) -> None:
    other = pw.Rank(7)
    user.get(lambda t: pw.PoolHello(t, user.incarnation, other, "only asks"), pw.PoolWelcome)
    question = (user.incarnation, other, SPACE, key(1), PAGE, 1, 0)
    assert user.ask(lambda t: pw.Reserve(t, *question), pw.Reserved) is None
    assert user.stats()["reserved"] == 0


BAD = {
    "page of nothing": lambda t, u: pw.Reserve(t, u.incarnation, u.rank, SPACE, key(1), 0, 1, 0),
    "shard of none": lambda t, u: pw.Reserve(t, u.incarnation, u.rank, SPACE, key(1), PAGE, 1, 1),
    "many shards": lambda t, u: pw.Reserve(t, u.incarnation, u.rank, SPACE, key(1), PAGE, 9999, 1),
    "short namespace": lambda t, u: pw.Reserve(t, u.incarnation, u.rank, b"n", key(1), PAGE, 1, 0),
    "half a key": lambda t, u: pw.Pin(t, u.incarnation, u.rank, SPACE, key(1)[:9], 1.0),
    "many keys": lambda t, u: pw.Pin(t, u.incarnation, u.rank, SPACE, key(1) * 70_000, 1.0),
    "lease of nan": lambda t, u: pw.Pin(t, u.incarnation, u.rank, SPACE, key(1), float("nan")),
    "wait of nan": lambda t, u: pw.Pin(t, u.incarnation, u.rank, SPACE, key(1), 1.0, float("nan")),
    "negative lease": lambda t, u: pw.Pin(t, u.incarnation, u.rank, SPACE, key(1), -1.0),
    "endless wait": lambda t, u: pw.Pin(t, u.incarnation, u.rank, SPACE, key(1), 1.0, float("inf")),
    "sums of another": lambda t, u: pw.Commit(t, u.incarnation, u.rank, SPACE, key(1), (), 0, ()),
    "an answer": lambda t, u: pw.Dropped(t, 1),
    "a cursor": lambda t, u: pw.Snapshot(t, b"17:3"),
    "rubbish for a cursor": lambda t, u: pw.Snapshot(t, b"\xff"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_questions_are_answered_and_counted(user: User, what: str) -> None:
    before = user.counters().get("unreadable", 0)
    answers: list[pw.PoolMessage] = []
    taken = user.link._take
    user.link._take = lambda payload: (answers.append(pw.decode(payload)), taken(payload))
    assert user.ask(lambda t: BAD[what](t, user), pw.Committed) is None
    assert [type(a).__name__ for a in answers if not isinstance(a, pw.PoolWelcome)] == ["Unreadable"]
    assert user.counters()["unreadable"] == before + 1
    user.store(1)
    assert user.load(1) == 1


@pytest.mark.parametrize("frames", [[b""], [b"\xc1"], [b"\x93rubbish"], [b"a", b"b"], [b"x" * 100_000]])
def test_rubbish_is_counted(node: NodeThread, user: User, frames: list[bytes]) -> None:
    socket = user.context.socket(zmq.DEALER)
    socket.connect(node.address)
    try:
        socket.send_multipart(frames)
        user.until_stats(lambda s: s["counters"].get("unreadable"))
    finally:
        socket.close(0)


def test_a_message_that_is_too_large_ends_its_connection_only(node: NodeThread, user: User) -> None:
    socket = user.context.socket(zmq.DEALER)
    socket.connect(node.address)
    try:
        socket.send(bytes(20 << 20))
        user.store(1)
        assert user.load(1) == 1
    finally:
        socket.close(0)


def test_a_page_larger_than_the_arena(user: User) -> None:
    user.store(1)
    assert user.reserve([2], 1 << 50)[0].refusal is Refusal.FULL
    assert user.load(1) == 1


# --- pins ---


def test_an_expired_pin_lets_the_page_go(user: User) -> None:
    user.store(1)
    pinned = user.pin([1], lease_s=0.3)
    assert pinned.lease_s == pytest.approx(0.3)
    user.drop([1])
    everything = range(100, 100 + PAGES)
    assert [s.refusal for s in user.reserve(everything)].count(Refusal.FULL) == 1, "its slot is held"
    user.until_stats(lambda s: s["leases"] == 0)
    (slot,) = user.reserve([2])
    assert slot.offset == pinned.pages[0].offset and slot.generation != pinned.pages[0].generation
    assert user.counters()["pin:expired"] == 1
    user.unpin(pinned)
    assert user.stats()["leases"] == 0


def test_pins_are_bounded_and_say_so(user: User) -> None:
    user.store(*range(400))
    half = PAGES // 2
    pinned = user.pin(list(range(400)))
    assert len(pinned.pages) == half and pinned.why is Refusal.FULL
    assert len(user.pin(list(range(half))).pages) == half, "what is pinned anyway may be pinned again"
    assert user.pin([half]).why is Refusal.FULL


def test_a_page_found_corrupt_is_dropped_if_it_was_held(user: User) -> None:
    user.store(1, 2)
    pinned = user.pin([1])
    user.unpin(pinned, corrupt=[1, 2])
    assert user.until_stats(lambda s: s["counters"].get("corrupt"))["counters"]["corrupt"] == 1
    assert user.load(1) == 0 and user.load(2) == 1
    user.store(1)
    user.unpin(pinned, corrupt=[1])
    assert user.load(1) == 1, "that was another page"


def test_touch_keeps_a_page(tmp_path: Path) -> None:
    node = NodeThread(tmp_path, policy="lru")
    user = User(node.address)
    with using(node, user):
        user.store(*range(PAGES))
        user.link.tell(pw.Touch(SPACE, key(PAGES - 1)))  # the end of the chain, so the first to go
        user.store(*range(1000, 1010))
        assert user.load(PAGES - 1) == 1 and user.load(PAGES - 2) == 0


# --- answers that come too late ---


def test_what_an_answer_nobody_awaits_has_given_is_given_back(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path)
    user = User(node.address)
    with using(node, user):
        user.store(9)
        late: list[object] = []
        reserve = (user.incarnation, user.rank, SPACE, key(1) + key(2), PAGE, 1, 0)
        pin = (user.incarnation, user.rank, SPACE, key(9), 60.0)
        node.process.send_signal(signal.SIGSTOP)
        until_s = time.monotonic() + 0.1
        user.link.ask(lambda t: pw.Reserve(t, *reserve), pw.Reserved, late.append, until_s)
        user.link.ask(lambda t: pw.Pin(t, *pin), pw.Pinned, late.append, until_s)
        user.pump(lambda: len(late) == 2)
        node.process.send_signal(signal.SIGCONT)
        assert late == [None, None]
        stats = user.until_stats(lambda s: s["counters"].get("abandoned") == 2 and not s["leases"])
        assert (stats["quarantined_bytes"], stats["used_bytes"], stats["reserved"]) == (0, PAGE, 0)
        assert stats["counters"]["pin:pages"] == 1, "there was a lease"


# --- slots of which a writer has said, in vain, that it gives them back ---


def test_a_slot_comes_back_though_the_message_that_gave_it_back_was_lost(tmp_path: Path) -> None:
    node = NodeThread(tmp_path, write_lease_s=0.5)
    user = User(node.address)
    with using(node, user):
        lost, out = user.reserve([1]), user.reserve([2])
        send = user.link._socket.send
        user.link._socket.send = lambda *arguments: None
        user.abandon([1], lost, drained=True)
        user.link._socket.send = send
        stats = user.until_stats(lambda s: s["counters"].get("reserve:expired") == 2 and s["quarantined_bytes"] == PAGE)
        assert stats["used_bytes"] == PAGE, "what may still be written to stays out of use"
        user.pump_for(1.5)  # more than a beat
        assert user.stats()["quarantined_bytes"] == PAGE
        user.abandon([2], out, drained=True)
        user.until_stats(lambda s: s["quarantined_bytes"] == s["used_bytes"] == 0)


def test_slots_are_settled_in_the_order_of_their_questions(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path)
    user = User(node.address)
    with using(node, user):
        before = user.link.settled
        first, second = user.reserve([1, 2]), user.reserve([3])
        held = user.link.settled
        assert before[0] == held[0] < held[1], "up to the question whose slots are out"
        user.commit([3], second)
        assert user.link.settled == held
        user.commit([1], first[:1])
        user.abandon([2], first[1:], drained=False)
        assert user.link.settled == held, "something may still land in it"
        user.abandon([2], first[1:], drained=True)
        assert user.link.settled[1] > held[1]
        user.reserve([1, 3])
        later = user.link.settled
        user.get(lambda t: pw.Stats(t), pw.StatsAre)
        assert user.link.settled[1] > later[1], "nothing was lent: both pages are there"
        user.reserve([4])
        user.link.void_slots()
        user.get(lambda t: pw.Stats(t), pw.StatsAre)
        assert user.link.settled[1] > later[1] + 2, "slots of a node that is no more are nobody's"
