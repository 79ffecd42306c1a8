"""What every back end does with live peers: bytes, notes, bounds, states."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from endpoints import Endpoint
from peer_process import GUARD_BYTES, enlarged

from lmkv.errors import ConnectError, ExtentError, StateError

Pair = tuple[Endpoint, Endpoint]
KIB, MIB = 1 << 10, 1 << 20


def scattered(end: Endpoint, count: int, block_bytes: int, seed: int) -> np.ndarray:
    """`count` blocks anywhere in the arena, in random order, each once."""
    picks = np.random.default_rng(seed).choice(end.arena_bytes // block_bytes, count, replace=False)
    return end.blocks(picks, block_bytes)


@pytest.mark.parametrize("command", ["write", "read"])
@pytest.mark.parametrize(
    ("count", "block_bytes"), [(1, 1), (3, 4093), (4096, 4 * KIB), (512, 64 * KIB), (2, 64 * MIB)], ids=str
)
def test_bytes_arrive(pair: Pair, command: str, count: int, block_bytes: int) -> None:
    writer, target = pair
    local, remote = scattered(writer, count, block_bytes, 1), scattered(target, count, block_bytes, 2)
    writer.call("fill", rows=local, seed=count)
    target.call("fill", rows=remote, seed=count + 1)
    source, sink = ((writer, local), (target, remote)) if command == "write" else ((target, remote), (writer, local))
    expected = source[0].call("digest", rows=source[1])
    writer.run(command, target.name, local, remote)
    assert sink[0].call("digest", rows=sink[1]) == expected


@pytest.mark.parametrize("command", ["write", "read"])
def test_nothing_beside_the_extents_changes(pair: Pair, command: str) -> None:
    writer, target = pair
    writer.call("fill", rows=writer.rows((0, 2 * MIB)), seed=7)
    target.call("fill", rows=target.rows((0, 2 * MIB)), seed=8)
    sink, other = (target, writer) if command == "write" else (writer, target)
    rows = sink.rows((4096, 100), (8192, 1), (12000, 5000))
    between = sink.rows((0, 4096), (4196, 3996), (8193, 3807), (17000, MIB))
    before = sink.call("digest", rows=between)
    mirror = other.rows((0, 100), (1000, 1), (2000, 5000))
    local, remote = (mirror, rows) if command == "write" else (rows, mirror)
    writer.run(command, target.name, local, remote)
    assert sink.call("digest", rows=between) == before
    assert sink.call("digest", rows=rows) == other.call("digest", rows=mirror)


def test_the_order_of_rows_does_not_matter(pair: Pair) -> None:
    writer, target = pair
    local, remote = scattered(writer, 300, 8 * KIB, 4), scattered(target, 300, 8 * KIB, 5)
    writer.call("fill", rows=local, seed=3)
    expected = writer.call("digest", rows=local)
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(300)
        target.call("poison", rows=remote, value=seed)
        writer.run("write", target.name, np.ascontiguousarray(local[order]), np.ascontiguousarray(remote[order]))
        assert target.call("digest", rows=remote) == expected


def test_runs_that_continue_on_one_side_only(pair: Pair) -> None:
    writer, target = pair
    local = writer.blocks(np.arange(64), 4 * KIB)
    writer.call("fill", rows=local, seed=9)
    for remote in (target.blocks(np.arange(64), 4 * KIB), target.blocks(np.arange(64) * 2, 4 * KIB)):
        writer.run("write", target.name, local, remote)
        assert target.call("digest", rows=remote) == writer.call("digest", rows=local)


def test_zero_length_rows_move_nothing(pair: Pair) -> None:
    writer, target = pair
    local, remote = writer.rows((0, 0), (64, 32), (200, 0)), target.rows((0, 0), (64, 32), (500, 0))
    writer.call("fill", rows=local, seed=10)
    writer.run("write", target.name, local, remote)
    assert target.call("digest", rows=remote) == writer.call("digest", rows=local)


@pytest.mark.parametrize("note_bytes", [1, 200, 4096])
@pytest.mark.parametrize("command", ["write", "read"])
def test_a_note_means_that_the_bytes_are_there(pair: Pair, command: str, note_bytes: int) -> None:
    writer, target = pair
    local, remote = scattered(writer, 64, 128 * KIB, note_bytes), scattered(target, 64, 128 * KIB, note_bytes + 1)
    writer.call("fill", rows=local, seed=note_bytes)
    target.call("poison", rows=remote, value=0)
    note = command.encode()[:1].ljust(note_bytes, b"n")
    target.call("watch", note=note, rows=remote)
    expected = writer.call("digest", rows=local) if command == "write" else target.call("digest", rows=remote)
    writer.run(command, target.name, local, remote, note)
    _, peer, payload, digest = target.note(note)
    assert (peer, payload, digest) == (writer.name, note, expected)


def test_no_note_gives_no_notification(pair: Pair) -> None:
    writer, target = pair
    seen = len([event for event in target.fetch() if event[0] == "note"])
    writer.run("write", target.name, writer.rows((0, 4096)), target.rows((0, 4096)))
    writer.call("notify", peer=target.name, note=b"after the silent write")
    target.note(b"after the silent write")
    assert len([event for event in target.fetch() if event[0] == "note"]) == seen + 1


@pytest.mark.parametrize("note_bytes", [1, 200, 4096])
def test_notify_alone(pair: Pair, note_bytes: int) -> None:
    for one, other in (pair, pair[::-1]):
        note = f"notify {note_bytes}".encode().ljust(note_bytes, b".")[:note_bytes]
        one.call("notify", peer=other.name, note=note)
        assert other.note(note)[1] == one.name


def test_many_operations_in_both_directions_each_complete_once(pair: Pair) -> None:
    ops: list[tuple[Endpoint, int]] = []
    for number in range(20):
        for one, other in (pair, pair[::-1]):
            local, remote = one.rows((number * MIB, 256 * KIB)), other.rows((number * MIB, 256 * KIB))
            note = f"both {number}".encode()
            ops.append((one, one.call("write", peer=other.name, local=local, remote=remote, note=note)))
    for one, op in ops:
        assert one.completion(op)[2] == ""
        one.call("release", op=op)
        assert len([event for event in one.fetch() if event[:2] == ("completion", op)]) == 1
    for end in pair:
        for number in range(20):
            end.note(f"both {number}".encode())
        notes = [event[2] for event in end.events if event[0] == "note" and event[2].startswith(b"both")]
        assert len(notes) == len(set(notes)) == 20


# --- bounds ---


@pytest.mark.parametrize("side", ["local", "remote"])
@pytest.mark.parametrize("command", ["write", "read"])
def test_out_of_range_is_refused_at_the_caller(pair: Pair, command: str, side: str) -> None:
    writer, target = pair
    end = writer if side == "local" else target
    before = writer.call("digest", rows=writer.rows((0, 100))), target.call("digest", rows=target.rows((0, 100)))
    for at in (-1, end.arena_bytes - 49, end.arena_bytes, -GUARD_BYTES):
        rows = {
            "local": writer.rows((0, 50), (50, 50)),
            "remote": target.rows((0, 50), (50, 50)),
            side: end.rows((0, 50), (at, 50)),
        }
        with pytest.raises(ExtentError):
            writer.call(command, peer=target.name, local=rows["local"], remote=rows["remote"])
    assert before == (
        writer.call("digest", rows=writer.rows((0, 100))),
        target.call("digest", rows=target.rows((0, 100))),
    )


def test_tables_that_do_not_match_are_refused(pair: Pair) -> None:
    writer, target = pair
    for local, remote in (
        (writer.rows((0, 10)), target.rows((0, 11))),
        (writer.rows((0, 10)), target.rows((0, 5), (5, 5))),
        (writer.rows(), target.rows()),
        (writer.rows((0, 10)).astype(np.int64), target.rows((0, 10))),
    ):
        with pytest.raises(ExtentError):
            writer.call("write", peer=target.name, local=local, remote=remote)


@pytest.mark.parametrize("command", ["write", "read"])
def test_a_target_that_checks_refuses_a_lying_caller(
    shared_pair: Pair, new_ends: Callable[..., list[Endpoint]], command: str
) -> None:
    if not shared_pair[0].__dict__["target_checks_bounds"]:
        pytest.skip("this back end's target enforces nothing")
    liar, target = new_ends("liar", "victim")
    target.call("connect", export=liar.export)
    liar.call("connect", export=enlarged(target.export, target.arena_bytes, GUARD_BYTES))
    local, remote = liar.rows((0, 4096), (4096, 64)), target.rows((0, 4096), (target.arena_bytes, 64))
    op = liar.call(command, peer=target.name, local=local, remote=remote, note=b"lie")
    assert liar.completion(op)[2] == "ExtentError"
    assert target.call("guards_intact")
    liar.call("notify", peer=target.name, note=b"truth")
    target.note(b"truth")
    assert not [event for event in target.fetch() if event[:1] == ("note",) and event[2] == b"lie"]
    liar.run(command, target.name, liar.rows((0, 4096)), target.rows((0, 4096)))


# --- states ---


def refused(end: Endpoint, command: str, **arguments: Any) -> None:
    with pytest.raises(StateError):
        end.call(command, **arguments)


def test_release_only_once_and_only_after_completion(pair: Pair) -> None:
    writer, target = pair
    refused(writer, "release", op=10**9)
    writer.call("pumping", on=False)
    op = writer.call("write", peer=target.name, local=writer.rows((0, 64)), remote=target.rows((0, 64)))
    refused(writer, "release", op=op)
    writer.call("pumping", on=True)
    writer.completion(op)
    writer.call("release", op=op)
    refused(writer, "release", op=op)


def test_the_completion_comes_from_a_later_poll_and_close_waits_for_it(pair: Pair) -> None:
    writer, target = pair
    writer.call("pumping", on=False)
    op = writer.call("write", peer=target.name, local=writer.rows((0, 64)), remote=target.rows((0, 64)))
    assert writer.call("in_flight") == 1
    with pytest.raises(StateError):
        writer.call("disconnect", peer=target.name)
    with pytest.raises(StateError):
        writer.call("close")
    writer.call("pumping", on=True)
    assert writer.completion(op)[2] == ""
    assert writer.call("in_flight") == 0
    writer.call("release", op=op)


def test_unknown_peers_twice_connected_and_empty_notes(pair: Pair) -> None:
    writer, target = pair
    refused(writer, "connect", export=target.export)
    refused(writer, "notify", peer=target.name, note=b"")
    refused(writer, "notify", peer="nobody", note=b"x")
    refused(writer, "disconnect", peer="nobody")
    refused(writer, "write", peer="nobody", local=writer.rows((0, 1)), remote=target.rows((0, 1)))
    refused(writer, "read", peer="nobody", local=writer.rows((0, 1)), remote=target.rows((0, 1)))


def test_wrong_thread(pair: Pair) -> None:
    assert pair[0].call("poll_on_other_thread") == "StateError"


def test_exports_that_cannot_be_read(pair: Pair) -> None:
    writer, target = pair
    for export in (b"", b"garbage", target.export[: len(target.export) // 2], b"\x94" + target.export):
        with pytest.raises(ConnectError):
            writer.call("connect", export=export)


def test_disconnect_then_a_new_peer(pair: Pair, new_ends: Callable[..., list[Endpoint]]) -> None:
    """A third end comes, works, is forgotten and closes in order; the writer does not lose anyone else."""
    writer, _ = pair
    (third,) = new_ends("third")
    writer.call("connect", export=third.export)
    third.call("connect", export=writer.export)
    writer.run("write", third.name, writer.rows((0, 4096)), third.rows((0, 4096)), b"to the third")
    third.note(b"to the third")
    writer.call("disconnect", peer=third.name)
    refused(writer, "write", peer=third.name, local=writer.rows((0, 1)), remote=third.rows((0, 1)))
    third.call("close")
    third.call("close")
    refused(third, "poll_error")
    third.call("abort")


def test_nothing_leaks(pair: Pair) -> None:
    assert pair[0].call("leaks", cycles=4) == {"fds": 0, "threads": 0}


def test_idle_ends_still_answer(pair: Pair) -> None:
    """After silence on both sides a write and its note still work."""
    writer, target = pair
    time.sleep(0.3)
    writer.run("write", target.name, writer.rows((0, 4096)), target.rows((0, 4096)), b"after silence")
    target.note(b"after silence")
