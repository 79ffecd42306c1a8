"""A node killed at every named point: what was promised as durable comes back right, all else is right or a miss.

`LMKV_CHAOS_ROUNDS` sets the number of rounds, `LMKV_CHAOS_SEED` the first seed. A round that fails prints its seed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lmkv.pool.faults import POINTS, VARIABLE
from lmkv.poolwire import Ack

from .user import NodeGone, PoolUser, make_key

ROUNDS = int(os.environ.get("LMKV_CHAOS_ROUNDS", "60"))
FIRST_SEED = int(os.environ.get("LMKV_CHAOS_SEED", "1"))
PAGE_BYTES = 64 << 10
ARENA = "4MiB"
"""64 pages: what is stored in a round does not fit, so pages are evicted and come back from disk."""
DISK = "128MiB"
"""More than is ever stored before it is forgotten: the disk tier has no reason to give anything up."""
SEGMENT = "1MiB"
"""Fifteen pages: drops leave segments nearly empty. They are compacted only where pages of another size need room."""
STORE_POINTS = tuple(point for point in POINTS if point.startswith(("reserve:", "commit:", "spill:")))
COMPACT_POINTS = tuple(point for point in POINTS if point.startswith("compact:"))
OBJECT_POINTS = tuple(point for point in POINTS if point.startswith("object:"))


@dataclass(slots=True)
class World:
    """What has been promised so far, across deaths."""

    directory: Path
    durable: set[bytes] = field(default_factory=set)
    maybe: set[bytes] = field(default_factory=set)
    """Stored as volatile, or with an answer that never came."""
    deaths: dict[str, int] = field(default_factory=dict)


class NodeProcess:
    def __init__(self, world: World, kill_at: str, disk: str = DISK) -> None:
        command = [sys.executable, "-c", "from lmkv.cli import main; main()", "pool", "--listen", "tcp://127.0.0.1:0"]
        command += [
            "--capacity",
            ARENA,
            "--disk",
            str(world.directory),
            "--disk-capacity",
            disk,
            "--disk-segment",
            SEGMENT,
        ]
        command += ["--transport", "none", "--json", "--log-level", "warning", "--drain-s", "20", "--no-huge"]
        command += ["--share", str(world.directory.parent / "share.sock")]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, VARIABLE: kill_at}
        )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()

    @property
    def address(self) -> str:
        return self.ready.split('"')[3] if self.ready else ""

    def end(self) -> str:
        """Kill what is left of it; what it said."""
        self.process.kill()
        _, said = self.process.communicate(timeout=20)
        return said


def act(user: PoolUser, rng: random.Random, world: World, round_: int) -> None:
    """Stores, loads and drops until the node dies or the round is over."""
    for step in range(40):
        kind = rng.random()
        if kind < 0.55:
            ack = Ack.DURABLE if rng.random() < 0.5 else Ack.VOLATILE
            keys = [make_key(round_ * 10_000 + step * 100 + i) for i in range(rng.randint(1, 8))]
            world.maybe.update(keys)
            reached = user.store(keys, ack)
            world.durable.update(key for key, what in reached.items() if what is Ack.DURABLE)
        elif kind < 0.9 and (known := sorted(world.durable | world.maybe)):
            user.load(rng.choice(known))
        elif world.durable:
            keys = rng.sample(sorted(world.durable), min(4, len(world.durable)))
            world.durable.difference_update(keys)  # from now on they may be there or not
            world.maybe.update(keys)
            user.drop(keys)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "disk")


def play(world: World, seed: int, point: str) -> None:
    rng = random.Random(seed)
    node = NodeProcess(world, f"{point}:{rng.randint(1, 12 if point in STORE_POINTS else 3)}")
    try:
        if not node.ready:  # it died while it recovered: that is a round, too
            world.deaths["at start"] = world.deaths.get("at start", 0) + 1
            return
        with PoolUser(node.address, PAGE_BYTES, seed) as user:
            act(user, rng, world, seed)
    except NodeGone:
        world.deaths[point] = world.deaths.get(point, 0) + 1
    finally:
        said = node.end()
        assert "Traceback" not in said, said


def verify(world: World, seed: int) -> None:
    """A node without faults, on what the last one has left."""
    node = NodeProcess(world, "")
    try:
        assert node.ready, node.end()
        with PoolUser(node.address, PAGE_BYTES, seed) as user:
            lost = [key for key in sorted(world.durable) if not user.load(key)]
            assert not lost, f"{len(lost)} of {len(world.durable)} durable pages are lost"
            for key in random.Random(seed).sample(sorted(world.maybe), min(20, len(world.maybe))):
                user.load(key)
    finally:
        said = node.end()
        assert "Traceback" not in said, said


@pytest.mark.timeout(1800)
def test_whatever_was_durable_comes_back(world: World) -> None:
    points = [point for point in POINTS if point not in (*COMPACT_POINTS, *OBJECT_POINTS)]
    for round_ in range(ROUNDS):
        seed = FIRST_SEED + round_
        try:
            play(world, seed, points[round_ % len(points)])
            verify(world, seed)
        except BaseException:
            print(f"round {round_}, seed {seed}, point {points[round_ % len(points)]}")
            raise
        if len(world.durable | world.maybe) > 700:
            forget(world)
    print(f"{ROUNDS} rounds, seeds {FIRST_SEED} to {FIRST_SEED + ROUNDS - 1}, deaths {world.deaths}")
    assert sum(world.deaths.values()) >= ROUNDS // 3, f"few rounds killed anything: {world.deaths}"


def forget(world: World) -> None:
    node = NodeProcess(world, "")
    try:
        with PoolUser(node.address, PAGE_BYTES, 0) as user:
            user.drop(sorted(world.durable | world.maybe))
            world.durable.clear()
            world.maybe.clear()
    finally:
        node.end()


@pytest.mark.parametrize("point", COMPACT_POINTS)
def test_a_node_that_dies_while_it_compacts(world: World, point: str) -> None:
    """Its disk is full of segments that are three quarters empty when pages of another size need room."""
    full, quarter = "4MiB", PAGE_BYTES // 4
    node = NodeProcess(world, f"{point}:1", full)
    keys = [make_key(i) for i in range(60)]
    kept, small = keys[::4], list[bytes]()
    with pytest.raises(NodeGone), PoolUser(node.address, PAGE_BYTES, 1) as user:
        for i in range(0, 60, 4):
            assert set(user.store(keys[i : i + 4], Ack.DURABLE).values()) == {Ack.DURABLE}
        assert user.drop([key for key in keys if key not in kept]) == 45
        user.page_bytes = quarter
        for i in range(1000, 1400):
            small += user.store([make_key(i)], Ack.DURABLE)
    node.end()
    node = NodeProcess(world, "", full)
    try:
        with PoolUser(node.address, PAGE_BYTES, 2) as user:
            assert [key for key in kept if not user.load(key)] == []
            user.page_bytes = quarter
            assert [key for key in small if not user.load(key)] == []
    finally:
        node.end()
