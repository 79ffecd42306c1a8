"""A pool node on real sockets: what it promises to its clients, near and far, well-behaved and not."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from lmkv import poolwire as pw
from lmkv.errors import ConfigError
from lmkv.hashing import namespace_of
from lmkv.pool.access import Reach
from lmkv.poolwire import Refusal, Slot, Tier
from tests.pool.bed import PAGE, PAGES, SPACE, NodeProcess, NodeThread, User, content, key, until, using

PLANES = ("", "tcp://127.0.0.1", "nixl://?progress=event")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeThread]:
    found = NodeThread(tmp_path)
    yield found
    found.end()


@pytest.fixture
def user(node: NodeThread) -> Iterator[User]:
    found = User(node.address)
    yield found
    found.close()


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


# --- events and snapshots ---


def test_a_snapshot_and_events_are_exact(tmp_path: Path) -> None:
    node = NodeThread(tmp_path, capacity="12MiB", policy="lru")
    user = User(node.address)
    with using(node, user):
        events = user.context.socket(zmq.SUB)
        events.setsockopt(zmq.RCVHWM, 0)
        events.subscribe(b"")
        events.connect(node.card.events)
        user.store(*range(1000))
        until(lambda: events.poll(100), what="a sign of life")
        seen: dict[bytes, int] = {}
        first = part = user.get(lambda t: pw.Snapshot(t, b""), pw.SnapshotPart)
        while True:
            seen |= dict(records(part.records))
            if not part.cursor:
                break
            user.store(*range(2000, 2010))
            part = user.get(lambda t, c=part.cursor: pw.Snapshot(t, c), pw.SnapshotPart)
            assert part.seq == first.seq
        for at in range(3000, 13_000, 250):
            user.store(*range(at, at + 250))
            if at % 1000 == 0:
                user.drop(list(range(at, at + 50)))
        expected = listed(user)
        next_seq = first.seq + 1
        while expected != seen:
            assert events.poll(3000), "all events have come, and the picture is not right"
            message = pw.decode(events.recv())
            assert isinstance(message, pw.Events) and message.incarnation == node.card.incarnation
            assert message.first <= next_seq, "a gap"
            for record, tiers in records(message.records)[max(next_seq - message.first, 0) :]:
                seen[record] = tiers
                if not tiers:
                    del seen[record]
            next_seq = max(next_seq, message.first + len(message.records) // pw.EVENT_BYTES)
        assert len(expected) == 6 * PAGES
        events.close(0)


def records(raw: bytes) -> list[tuple[bytes, int]]:
    return [(record[:-1], record[-1]) for record in pw.split_keys(raw, pw.EVENT_BYTES)]


def listed(user: User, limit: int = 700) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    after, more = b"", True
    while more:
        keys = user.get(lambda t, a=after: pw.ListKeys(t, SPACE, a, limit), pw.Keys)
        part = dict(records(keys.records))
        assert list(part) == sorted(part) and not set(part) & set(found)
        found |= part
        after, more = max(part, default=after), keys.more
    return found


def test_a_snapshot_in_parts_is_of_one_moment(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv.pool.publisher.PART_BYTES", pw.EVENT_BYTES * 10)
    user.store(*range(25))
    part = user.get(lambda t: pw.Snapshot(t, b""), pw.SnapshotPart)
    user.drop()
    sizes = [len(part.records) // pw.EVENT_BYTES]
    while part.cursor:
        part = user.get(lambda t, c=part.cursor: pw.Snapshot(t, c), pw.SnapshotPart)
        sizes.append(len(part.records) // pw.EVENT_BYTES)
    assert sizes == [10, 10, 5]


def test_old_pictures_go_when_there_are_many(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv.pool.publisher.PART_BYTES", pw.EVENT_BYTES)
    monkeypatch.setattr("lmkv.pool.publisher.MOST_PICTURES_BYTES", pw.EVENT_BYTES * 5)
    user.store(1, 2)
    cursors = [user.get(lambda t: pw.Snapshot(t, b""), pw.SnapshotPart).cursor for _ in range(3)]
    assert user.ask(lambda t: pw.Snapshot(t, cursors[0]), pw.SnapshotPart) is None
    assert user.get(lambda t: pw.Snapshot(t, cursors[2]), pw.SnapshotPart).cursor == b""


# --- the node's own life ---


def test_drain_takes_nothing_new(user: User) -> None:
    user.store(1)
    slots = user.reserve([2])
    assert user.get(lambda t: pw.Drain(t), pw.Drained).volatile == 1
    assert user.reserve([3]) == (Slot(-1, 0, Refusal.DRAINING),)
    assert user.commit([2], slots).refusals == (Refusal.NONE,), "what had begun is taken"
    assert user.load(1) == 1 and user.stats()["draining"]


def test_drain_and_stop(tmp_path: Path) -> None:
    node = NodeThread(tmp_path)
    user = User(node.address)
    user.get(lambda t: pw.Drain(t, stop=True), pw.Drained)
    node.thread.join(10)
    assert not node.thread.is_alive() and node.problem is None
    user.pump(lambda: not user.access.ready)
    user.close()


def test_a_restarted_node_is_another_one(tmp_path: Path) -> None:
    first = NodeProcess(tmp_path, share=str(tmp_path / "s"))
    user = User(first.address)
    try:
        user.store(1)
        (old,) = user.reserve([2])
        incarnation = user.access.incarnation
        assert incarnation
        first.kill()
        user.pump(lambda: not user.access.ready)
        second = NodeProcess(tmp_path, share=str(tmp_path / "s"), listen=first.address)
        user.attach()
        assert user.access.incarnation not in ("", incarnation)
        assert user.load(1) == 0
        assert user.commit([2], [old]).refusals[0] in (Refusal.STALE, Refusal.UNKNOWN)
        user.unpin(pw.Pinned(0, 1, 1.0, 0, ()))
        user.store(1, 2)
        assert user.load(1, 2) == 2
        assert second.end() == 0
    finally:
        user.close()


def test_a_silent_node_is_the_same_one_when_it_is_heard_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv.pool.access.LOST_S", 0.6)
    monkeypatch.setattr("lmkv.pool.access.BEAT_S", 0.2)
    node = NodeProcess(tmp_path)
    user = User(node.address)
    with using(node, user):
        (slot,) = user.reserve([1])
        node.process.send_signal(signal.SIGSTOP)
        user.pump(lambda: not user.access.ready)
        node.process.send_signal(signal.SIGCONT)
        user.attach()
        user.write(slot.offset, content(1))
        assert user.commit([1], [slot]).refusals == (Refusal.NONE,)
        assert user.load(1) == 1


def test_a_client_that_was_away_does_not_take_its_node_for_lost(node: NodeThread, user: User) -> None:
    (slot,) = user.reserve([1])
    user.access._heard_s -= 100.0  # as after a stop of this process
    user.access._tick_s -= 100.0
    user.access.tick(time.monotonic())
    assert user.access.ready
    assert user.commit([1], [slot]).refusals == (Refusal.NONE,)


def test_beats_to_a_controller(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    controller = context.socket(zmq.ROUTER)
    port = controller.bind_to_random_port("tcp://127.0.0.1")
    node = NodeThread(tmp_path, controller=(f"tcp://127.0.0.1:{port}",), beat_s=0.05)
    beats: list[pw.NodeBeat] = []

    def take() -> bool:
        while controller.poll(50):
            beat = pw.decode(controller.recv_multipart()[1])
            assert isinstance(beat, pw.NodeBeat)
            beats.append(beat)
        return len(beats) > 3

    until(take)
    assert beats[0].card == node.card and beats[0].capacity_bytes == node.card.arena_bytes
    node.end()
    take()
    assert beats[-1].leaving and not any(beat.leaving for beat in beats[:-1])
    controller.close(0)
    context.term()


@pytest.mark.parametrize("capacity", [1 << 20, 3 << 20, (5 << 20) + 12345])
def test_arenas_of_any_size(tmp_path: Path, capacity: int) -> None:
    node = NodeThread(tmp_path, capacity=str(capacity))
    user = User(node.address)
    with using(node, user):
        assert node.card.arena_bytes >= capacity
        user.store(1, 2, size=300_000)
        user.store(3, 4, 5, size=5_000)
        assert user.load(1, 2) == 2 and user.load(3, 4, 5) == 3


def test_ipv6(tmp_path: Path) -> None:
    try:
        node = NodeThread(tmp_path, listen="tcp://[::1]:0")
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert "[::1]" in node.card.address and "[::1]" in node.card.events
    user = User(node.address)
    with using(node, user):
        user.store(1)
        assert user.load(1) == 1


# --- what the operator has to correct ---


def test_a_share_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot share the arena"):
        NodeThread(tmp_path, share=str(tmp_path / "file" / "s"))
    with pytest.raises(ConfigError, match="cannot share the arena"):
        NodeThread(tmp_path, share=str(tmp_path / ("x" * 200)))
    with pytest.raises(ConfigError, match="cannot share the arena"):
        NodeThread(tmp_path, share=str(tmp_path / "file"))
    assert (tmp_path / "file").exists(), "what is no socket is not removed"


def test_two_nodes_do_not_share_a_share(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    node = NodeThread(tmp_path, share=path)
    with using(node), pytest.raises(ConfigError, match="another pool node listens there"):
        NodeThread(tmp_path, share=path)
    assert not Path(path).exists()


def test_a_left_over_share_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    node = NodeProcess(tmp_path, share=path)
    node.kill()
    assert Path(path).exists()
    again = NodeThread(tmp_path, share=path)
    user = User(again.address)
    with using(again, user):
        assert user.access.reach is Reach.LOCAL


def test_an_address_in_use(node: NodeThread, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        NodeThread(tmp_path, listen=node.address)


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than the"):
        NodeThread(tmp_path, capacity="64TiB")


def test_tiers_of_the_answer(user: User) -> None:
    user.store(1)
    assert user.pin([1]).pages[0].tier is Tier.DRAM
    assert json.dumps(user.stats())
