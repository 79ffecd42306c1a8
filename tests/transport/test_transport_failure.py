"""Peers that die, stick, are cut off or come back; operations cancelled or abandoned."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from conftest import BackEnd, connect_both_ways, open_ends
from endpoints import Endpoint, ProcessEndpoint

from lmkv.errors import PeerLostError, StateError

Pair = tuple[Endpoint, Endpoint]
MIB = 1 << 20
STILL_S = 0.4
"""How long nothing may happen where nothing must. A longer time only makes a test stricter, never greener."""


def never(end: Endpoint, unwanted: Callable[[tuple[object, ...]], bool], seconds: float = STILL_S) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert not [event for event in end.fetch() if unwanted(event)]


def completes(ops: list[int]) -> Callable[[tuple[object, ...]], bool]:
    return lambda event: event[0] == "completion" and event[1] in ops


def post_to_stopped(writer: Endpoint, target: Endpoint, count: int) -> list[int]:
    """Operations that stay in flight: the target does not run."""
    target.stop()
    ops = []
    for number in range(count):
        local, remote = writer.rows((number * 4 * MIB, 4 * MIB)), target.rows((number * 4 * MIB, 4 * MIB))
        ops.append(writer.call("write", peer=target.name, local=local, remote=remote, note=b"%d" % number))
    return ops


def deaths(writer: Endpoint, peer: str, ops: list[int]) -> list[str]:
    """After the loss of `peer`: the errors of `ops` in order. Checks that each came once, and before the loss."""
    writer.lost(peer)
    events = writer.fetch()
    lost = [at for at, event in enumerate(events) if event[:2] == ("lost", peer)]
    assert len(lost) == 1
    errors = []
    for op in ops:
        mine = [at for at, event in enumerate(events) if event[:2] == ("completion", op)]
        assert len(mine) == 1
        assert mine[0] < lost[0]
        errors.append(events[mine[0]][2])
        writer.call("release", op=op)
    return errors


def test_killed_with_operations_in_flight(shared_pair: Pair, victim: Endpoint) -> None:
    writer = shared_pair[0]
    ops = post_to_stopped(writer, victim, 3)
    assert writer.call("in_flight") == 3
    victim.kill()
    assert deaths(writer, victim.name, ops) == ["PeerLostError"] * 3
    assert writer.call("in_flight") == 0
    with pytest.raises((StateError, PeerLostError)):
        writer.call("write", peer=victim.name, local=writer.rows((0, 1)), remote=victim.rows((0, 1)))


@pytest.mark.parametrize("after_s", [0.005, 0.03])
def test_killed_in_mid_transfer(shared_pair: Pair, victim: Endpoint, after_s: float) -> None:
    writer = shared_pair[0]
    order = np.random.default_rng(1).permutation(4096)
    local, remote = writer.blocks(np.arange(4096), 4096), victim.blocks(order, 4096)
    if not isinstance(victim, ProcessEndpoint):
        pytest.skip("in one process the copying stops only between two polls; the test above covers that")
    writer.send("write_until_lost", peer=victim.name, local=local, remote=remote, limit=10_000)
    # Any moment is a fair one to die; these two lie within the first transfers on most machines.
    time.sleep(after_s)
    victim.kill()
    ops = writer.reply()
    errors = deaths(writer, victim.name, ops)
    assert set(errors) <= {"", "PeerLostError"}
    assert writer.call("in_flight") == 0


def test_killed_while_idle_then_back_as_a_new_incarnation(
    shared_pair: Pair, victim: Endpoint, new_ends: Callable[..., list[Endpoint]]
) -> None:
    writer = shared_pair[0]
    writer.run("write", victim.name, writer.rows((0, 4096)), victim.rows((0, 4096)))
    victim.kill()
    lost = [event for event in writer.fetch() if event[:2] == ("lost", victim.name)]
    if not lost:
        try:
            op = writer.call("write", peer=victim.name, local=writer.rows((0, 64)), remote=victim.rows((0, 64)))
            assert writer.completion(op)[2] == "PeerLostError"
            writer.call("release", op=op)
        except (PeerLostError, StateError):
            pass  # it was noticed before the write: allowed
    writer.lost(victim.name)
    (again,) = new_ends("victim")
    connect_both_ways(writer, again)
    rows = writer.rows((0, 4096))
    writer.call("fill", rows=rows, seed=5)
    writer.run("write", again.name, rows, again.rows((64, 4096)), b"welcome back")
    again.note(b"welcome back")
    assert again.call("digest", rows=again.rows((64, 4096))) == writer.call("digest", rows=rows)


def test_stopped_then_continued(shared_pair: Pair, victim: Endpoint) -> None:
    writer = shared_pair[0]
    writer.call("fill", rows=writer.rows((0, 8 * MIB)), seed=6)
    ops = post_to_stopped(writer, victim, 2)
    never(writer, lambda event: completes(ops)(event) or event[:2] == ("lost", victim.name))
    victim.resume()
    for number, op in enumerate(ops):
        assert writer.completion(op)[2] == ""
        victim.note(b"%d" % number)
        writer.call("release", op=op)
    expected = writer.call("digest", rows=writer.rows((0, 8 * MIB)))
    assert victim.call("digest", rows=victim.rows((0, 8 * MIB))) == expected


def test_others_go_on_while_one_peer_is_stuck(pair: Pair, victim: Endpoint) -> None:
    writer, target = pair
    ops = post_to_stopped(writer, victim, 2)
    for _ in range(5):
        writer.run("write", target.name, writer.rows((0, MIB)), target.rows((0, MIB)), b"past the stuck one")
    assert writer.call("in_flight") == 2
    victim.resume()
    for op in ops:
        assert writer.completion(op)[2] == ""
        writer.call("release", op=op)


def test_after_the_completion_of_a_cancelled_write_nothing_lands(shared_pair: Pair, victim: Endpoint) -> None:
    writer = shared_pair[0]
    rows = writer.rows((0, 12 * MIB))
    writer.call("fill", rows=rows, seed=11)
    ops = post_to_stopped(writer, victim, 3)
    for op in ops:
        writer.call("cancel", op=op)
    # The first has begun, so it may not be over; those behind it may have been dropped unbegun.
    never(writer, completes(ops[:1]))
    victim.resume()
    for op in ops:
        writer.completion(op)
        writer.call("release", op=op)
    with pytest.raises(StateError):
        writer.call("cancel", op=ops[0])
    # The proof is given: whatever is written there from now on is safe.
    victim.call("poison", rows=victim.rows((0, 12 * MIB)), value=0xEE)
    clean = victim.call("digest", rows=victim.rows((0, 12 * MIB)))
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        assert victim.call("digest", rows=victim.rows((0, 12 * MIB))) == clean


def test_a_target_outlives_its_writer(
    shared_pair: Pair, victim: Endpoint, new_ends: Callable[..., list[Endpoint]]
) -> None:
    """The writer dies in mid-transfer; the target keeps its guards and serves others."""
    (dying,) = new_ends("dying")
    connect_both_ways(dying, victim)
    local, remote = dying.blocks(np.arange(4096), 4096), victim.blocks(np.arange(4096)[::-1].copy(), 4096)
    dying.send("write_until_lost", peer=victim.name, local=local, remote=remote, limit=20)
    dying.kill()
    writer = shared_pair[0]
    writer.call("fill", rows=writer.rows((0, MIB)), seed=12)
    writer.run("write", victim.name, writer.rows((0, MIB)), victim.rows((20 * MIB, MIB)), b"still here")
    victim.note(b"still here")
    expected = writer.call("digest", rows=writer.rows((0, MIB)))
    assert victim.call("digest", rows=victim.rows((20 * MIB, MIB))) == expected
    assert victim.call("guards_intact")


def test_abort_with_operations_in_flight(victim: Endpoint, new_ends: Callable[..., list[Endpoint]]) -> None:
    (writer,) = new_ends("aborting")
    connect_both_ways(writer, victim)
    ops = post_to_stopped(writer, victim, 3)
    with pytest.raises(StateError):
        writer.call("disconnect", peer=victim.name)
    with pytest.raises(StateError):
        writer.call("close")
    started = time.monotonic()
    writer.call("abort")
    assert time.monotonic() - started < 2.0
    writer.call("abort")
    writer.call("close")
    for command, arguments in (("poll_error", {}), ("release", {"op": ops[0]})):
        with pytest.raises(StateError):
            writer.call(command, **arguments)
    victim.resume()
    assert victim.call("guards_intact")


# --- cut off ---


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10)


@pytest.fixture
def link() -> Iterator[tuple[tuple[str, str], str]]:
    """Two network namespaces joined by a veth pair: (their names), the device's name in both."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    spaces = (f"lmkv-a{os.getpid()}", f"lmkv-b{os.getpid()}")
    made = []
    try:
        try:
            for space in spaces:
                ip("netns", "add", space)
                made.append(space)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        ip("link", "add", "kv0", "netns", spaces[0], "type", "veth", "peer", "name", "kv0", "netns", spaces[1])
        for number, space in enumerate(spaces, 1):
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "kv0")
            for device in ("lo", "kv0"):
                ip("-n", space, "link", "set", device, "up")
        yield spaces, "kv0"
    finally:
        for space in made:
            ip("netns", "del", space)


@contextlib.contextmanager
def apart(back_end: BackEnd, link: tuple[tuple[str, str], str], options: str = "") -> Iterator[list[Endpoint]]:
    """A writer and a target, connected, each in a namespace of its own."""
    spaces, device = link
    ends: list[Endpoint] = []
    try:
        for number, space in enumerate(spaces, 1):
            here = replace(back_end, url=back_end.url.replace("127.0.0.1", f"10.77.0.{number}") + options)
            env = {**here.env, "UCX_NET_DEVICES": device}
            prefix = ("ip", "netns", "exec", space)
            ends += open_ends(replace(here, env=env), f"space{number}", arena_bytes=32 * MIB, prefix=prefix)
        connect_both_ways(*ends)
        yield ends
    finally:
        for end in ends:
            end.end()


@pytest.mark.root
def test_cut_off_gives_nothing_and_heals(back_end: BackEnd, link: tuple[tuple[str, str], str]) -> None:
    if back_end.id not in ("tcp", "ucx", "nixl-tcp"):
        pytest.skip("does not go over the network")
    spaces, device = link
    with apart(back_end, link) as (writer, target):
        writer.call("fill", rows=writer.rows((0, 16 * MIB)), seed=13)
        writer.run("write", target.name, writer.rows((0, MIB)), target.rows((0, MIB)), b"before")
        ip("-n", spaces[0], "link", "set", device, "down")
        whole = writer.rows((0, 16 * MIB)), target.rows((0, 16 * MIB))
        op = writer.call("write", peer=target.name, local=whole[0], remote=whole[1], note=b"across the cut")
        never(writer, lambda event: completes([op])(event) or event[0] == "lost")
        ip("-n", spaces[0], "link", "set", device, "up")
        assert writer.completion(op)[2] == ""
        target.note(b"across the cut")
        expected = writer.call("digest", rows=whole[0])
        assert target.call("digest", rows=whole[1]) == expected


@pytest.mark.root
def test_a_host_without_power_is_lost_in_bounded_time(back_end: BackEnd, link: tuple[tuple[str, str], str]) -> None:
    """Something is in flight one way, nothing the other."""
    if back_end.id != "tcp":
        pytest.skip("only tcp:// gives up by itself")
    spaces, device = link
    with apart(back_end, link, "?give_up_s=2") as (writer, target):
        writer.run("write", target.name, writer.rows((0, MIB)), target.rows((0, MIB)), b"before")
        ip("-n", spaces[0], "link", "set", device, "down")
        cut_s = time.monotonic()
        op = writer.call(
            "write", peer=target.name, local=writer.rows((0, 16 * MIB)), remote=target.rows((0, 16 * MIB)), note=b"x"
        )
        assert "PeerLostError" in writer.completion(op)[2]
        writer.lost(target.name)
        target.lost(writer.name)
        assert 1.5 < time.monotonic() - cut_s < 12
        ip("-n", spaces[0], "link", "set", device, "up")
        before = target.call("digest", rows=target.rows((0, 16 * MIB)))
        never(target, lambda event: event[0] == "note" and event[2] == b"x")
        assert target.call("digest", rows=target.rows((0, 16 * MIB))) == before, "the closed connection is a fence"
