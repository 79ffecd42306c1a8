"""Processes killed at every point of a tier: what they were promised is there, and nothing else ever is.

LMKV_CHAOS_ROUNDS sets how many (40), LMKV_CHAOS_SEED which.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from lmkv.pool import faults
from lmkv.pool.tiers.base import StoreTier

from .tier_victim import KEYS, THREADS, key_at, open_tier, read

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = int(os.environ.get("LMKV_CHAOS_ROUNDS", "40"))
SEED = int(os.environ.get("LMKV_CHAOS_SEED", "1"))
DISK_POINTS = [
    *("spill:before_write", "spill:half_written", "spill:written", "spill:synced", "spill:indexed"),
    *("promote:before_read", "promote:read"),
    *("compact:before", "compact:half_copied", "compact:copied", "compact:switched"),
    *("drop:before", "drop:unindexed"),
]
OBJECT_POINTS = ["object:before_put", "object:put"]
TIMES = {"compact:before": 3, "compact": 1, "drop": 6, "promote": 3}
"""How often a point is passed at most before it kills, where that is less than 40."""
CHAIN = 4
"""Rounds on one directory, one after the other."""

State = dict[tuple[int, int], set[int | None]]
"""By thread and number: the versions that may be there."""


@dataclass
class Tally:
    killed: Counter[str] = field(default_factory=Counter)
    promised: int = 0
    checked: int = 0
    torn: int = 0


@dataclass(frozen=True)
class Setting:
    where: str
    capacity_bytes: int
    sealed: bool
    segment_bytes: int = 0
    """1: a segment a slot, so that a slot is used again as soon as it is free."""

    @classmethod
    def drawn(cls, where: str, source: random.Random) -> Setting:
        return cls(where, source.choice((0, 0, 3 << 20)), source.random() < 0.25)

    def for_point(self, point: str, source: random.Random) -> Setting:
        """Only segments of several slots are ever half empty."""
        few = 256 << 10
        return replace(self, segment_bytes=few if point.startswith("compact") else source.choice((1, few)))

    def open(self) -> StoreTier:
        return open_tier(self.where, self.capacity_bytes, self.segment_bytes, self.sealed)


def run_victim(setting: Setting, seed: int, kill_at: str) -> tuple[bool, list[str]]:
    """Whether it was killed, and the whole lines it wrote."""
    numbers = (seed, setting.capacity_bytes, setting.segment_bytes, int(setting.sealed))
    command = [sys.executable, "-m", "tests.pool.tier_victim", setting.where, *map(str, numbers)]
    environment = os.environ | {faults.VARIABLE: kill_at}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    assert done.stderr == ""
    return done.returncode != 0, done.stdout.splitlines()


def follow(state: State, lines: list[str], tally: Tally) -> None:
    for line in lines:
        if line == "end":
            continue
        mark, thread, number, what = line.split()
        at = (int(thread), int(number))
        version = None if what == "gone" else int(what)
        if mark == "?":
            state[at] = state[at] | {version}
        else:
            state[at] = {version}
            tally.promised += version is not None


def check(tier: StoreTier, state: State, may_be_gone: bool, tally: Tally) -> None:
    """Every page is one of those that may be there; from now on it is that one."""
    listed = {key for key, _ in tier.scan()}
    for (thread, number), allowed in state.items():
        key = key_at(thread, number)
        version = read(tier, key)
        assert version in allowed | ({None} if may_be_gone else set()), (thread, number, version, allowed)
        assert (version is not None) == (key in listed)
        state[thread, number] = {version}
        tally.checked += 1
    assert len(listed) == sum(versions != {None} for versions in state.values())
    assert tier.counters()["corrupt"] == 0


def chains(where: Path, points: list[str], rounds: int, kind: str) -> Tally:
    source = random.Random(SEED)
    tally = Tally()
    state: State = {}
    for number in range(rounds):
        if number % CHAIN == 0:
            state = {(thread, key): {None} for thread in range(THREADS) for key in range(KEYS)}
            place = str(where / f"{number}")
            setting = Setting.drawn(place if kind == "disk" else f"file://{place}", source)
        point = points[number % len(points)]
        setting = setting.for_point(point, source)
        count = source.randint(1, TIMES.get(point, TIMES.get(point.partition(":")[0], 40)))
        seed = SEED * 10_000 + number
        print(f"round {number}: seed {seed}, {point}:{count}, {setting}")
        killed, lines = run_victim(setting, seed, f"{point}:{count}")
        tally.killed[point] += killed
        follow(state, lines, tally)
        tier = setting.open()
        try:
            check(tier, state, setting.capacity_bytes > 0, tally)
            tally.torn += tier.counters()["torn"]
        finally:
            tier.close()
    print(tally)
    return tally


def test_disk(tmp_path: Path) -> None:
    tally = chains(tmp_path, DISK_POINTS, ROUNDS, "disk")
    assert set(+tally.killed) == set(DISK_POINTS), "a point was never reached"
    assert sum(tally.killed.values()) >= ROUNDS * 0.8
    assert tally.promised > ROUNDS


def test_objects(tmp_path: Path) -> None:
    tally = chains(tmp_path, OBJECT_POINTS, max(4, ROUNDS // 5), "file")
    assert set(+tally.killed) == set(OBJECT_POINTS)
    assert tally.promised > 0
