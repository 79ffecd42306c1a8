"""A node's events and snapshots, its life and end, and what its operator has to correct."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import zmq

from lmkv import poolwire as pw
from lmkv.errors import ConfigError
from lmkv.pool.access import Reach
from lmkv.poolwire import Refusal, Slot, Tier
from tests.pool.bed import PAGES, SPACE, NodeProcess, NodeThread, User, content, until, using

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
        user.store(1, 2, size=200_000)
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
