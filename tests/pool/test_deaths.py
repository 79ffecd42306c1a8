"""Clients that die or stop while they may write: slots come back when it is proved that they cannot, not before."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmkv.poolwire import Refusal
from lmkv.wire import ProcessCard
from tests.pool.bed import PAGE, PAGES, ROOT, NodeProcess, NodeThread, User, using

PLANES = ("", "tcp://127.0.0.1", "nixl://?progress=event")
LEASE_S = 0.5


class Victim:
    def __init__(self, address: str, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pool.victim", address, url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.reply() == "ready"

    def reply(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def call(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.reply()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module", params=PLANES, ids=["mapped", "tcp", "nixl"])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[NodeProcess, str]]:
    env = {"LMKV_POOL_WRITE_LEASE_S": str(LEASE_S)}
    found = NodeProcess(tmp_path_factory.mktemp("node"), transport=request.param or "none", env=env)
    yield found, request.param
    assert found.end() == 0


@pytest.fixture
def victim(plane: tuple[NodeProcess, str], request: pytest.FixtureRequest) -> Iterator[Victim]:
    if "nixl" in plane[1] and "kill" not in request.node.name:
        pytest.skip("the data plane makes no difference, and nixl takes 5 s to find a death")
    found = Victim(plane[0].address, plane[1])
    yield found
    found.end()


@pytest.fixture
def user(plane: tuple[NodeProcess, str]) -> Iterator[User]:
    """Of the same host, whatever the victim's way."""
    found = User(plane[0].address)
    yield found
    found.drop()
    found.close()


def test_slots_of_a_killed_client_come_back(victim: Victim, user: User) -> None:
    victim.call("reserve 1 2")
    assert user.stats()["used_bytes"] == 2 * PAGE
    victim.signal(signal.SIGKILL)
    stats = user.until_stats(lambda s: s["used_bytes"] == 0, timeout_s=20)
    assert (stats["reserved"], stats["quarantined_bytes"]) == (0, 0)


def test_a_stopped_client_keeps_its_slots_until_it_goes_on(victim: Victim, user: User) -> None:
    slots = json.loads(victim.call("reserve 1 2"))
    victim.signal(signal.SIGSTOP)
    user.until_stats(lambda s: s["quarantined_bytes"] == 2 * PAGE)
    # The keys are free, the slots are not, however much is wanted and however long it takes.
    given = {slot.offset for slot in user.reserve(range(1, PAGES)) if slot.refusal is Refusal.NONE}
    assert len(given) == PAGES - 2 and not given & set(slots)
    user.pump_for(2 * LEASE_S)
    assert user.stats()["quarantined_bytes"] >= 2 * PAGE
    victim.signal(signal.SIGCONT)
    assert json.loads(victim.call("commit")) == ["STALE", "STALE"]
    user.until_stats(lambda s: s["quarantined_bytes"] == len(given) * PAGE)


@pytest.mark.parametrize("how", ["abandon", "die"])
def test_a_stopped_client_gives_its_slots_back(victim: Victim, user: User, how: str) -> None:
    victim.call("reserve 1 2")
    victim.signal(signal.SIGSTOP)
    user.until_stats(lambda s: s["quarantined_bytes"] == 2 * PAGE)
    if how == "die":
        victim.signal(signal.SIGKILL)
    else:
        victim.signal(signal.SIGCONT)
        assert victim.call("abandon") == "done"
    user.until_stats(lambda s: s["used_bytes"] == 0, timeout_s=20)


def test_pins_of_a_dead_reader_end(victim: Victim, user: User) -> None:
    user.store(1)
    assert victim.call("pin 1") == "1"
    assert user.stats()["leases"] == 1
    victim.signal(signal.SIGKILL)
    started_s = time.monotonic()
    user.until_stats(lambda s: s["leases"] == 0, timeout_s=20)
    assert time.monotonic() - started_s < 20, "long before the lease's minute"


def test_a_client_that_only_lost_its_connection_keeps_its_slots(tmp_path: Path) -> None:
    """Over NIXL. It lives, and says itself when nothing of it can land any more."""
    node = NodeProcess(tmp_path, transport=PLANES[2], env={"LMKV_POOL_WRITE_LEASE_S": str(LEASE_S)})
    user = User(node.address)
    victim = Victim(node.address, PLANES[2])
    with using(victim, node, user):
        victim.call("reserve 1 2")
        assert victim.call("cut") == "done"
        lost = user.until_stats(lambda s: "data plane" not in s["clients"].values(), timeout_s=30)
        assert "lost" in lost["clients"].values()
        user.pump_for(2.0)
        stats = user.stats()
        assert stats["quarantined_bytes"] == stats["used_bytes"] == 2 * PAGE
        assert victim.call("go on") == "done"
        victim.call("abandon")
        user.until_stats(lambda s: s["used_bytes"] == 0)
        assert victim.call("store 7 8") == "done", "it is connected anew"
        assert user.load(7, 8) == 2


@pytest.mark.parametrize("reader", PLANES[::2], ids=["mapped", "nixl"])
def test_slots_of_a_silent_client_of_another_host_are_fenced_by_a_new_data_plane(tmp_path: Path, reader: str) -> None:
    """It comes back, and what it had been given is void. The others connect anew."""
    node = NodeThread(tmp_path, transport=PLANES[2], write_lease_s=LEASE_S, quarantine_s=1.5)
    far, user = User(node.address, url=PLANES[2], attach=False), User(node.address, url=reader)
    me = far.access._me
    far.access._me = dataclasses.replace(me, process=ProcessCard("another host", "pid:[1]", 7, 7))
    with using(node, far, user):
        user.store(3)
        far.attach()
        slots = far.reserve([1, 2])
        held = 3 * PAGE
        user.until_stats(lambda s: s["quarantined_bytes"] == 2 * PAGE and s["used_bytes"] == held)
        stats = user.until_stats(lambda s: s["used_bytes"] == PAGE)
        assert stats["counters"]["data_plane:replaced"] == 1 and node.node.card.export != node.card.export
        for client in (far, user) if reader else (far,):
            client.pump(lambda: client.access.bond > 0 and client.access.ready, 20.0)  # noqa: B023
        assert set(far.commit([1, 2], slots).refusals) == {Refusal.STALE}
        user.store(4)
        far.store(5)
        assert user.load(3, 4, 5) == far.load(3, 4, 5) == 3
        assert user.stats()["counters"]["data_plane:replaced"] == 1


def test_a_second_attachment_of_a_living_client_is_not_its_death(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path)
    first = User(node.address)
    second = User(node.address, incarnation=first.incarnation)
    other = User(node.address)
    with using(node, first, other):
        (slot,) = first.reserve([1])
        second.close()
        other.store(2)
        assert first.commit([1], [slot]).refusals == (Refusal.NONE,)
