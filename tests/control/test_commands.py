"""`lmkv controller` and the admin commands as processes."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest

from lmkv.control.admin import Admin
from lmkv.control.follow import EXACT

from .fake_node import FakeNode
from .processes import COMMAND, Serving, lmkv
from .test_controller import NAMESPACE, keys, pages, until

HEX = NAMESPACE.hex()


@pytest.fixture
def serving() -> Iterator[Serving]:
    serving = Serving("--listen", "tcp://127.0.0.1:0", "--name", "c0")
    yield serving
    if serving.process.returncode is None:
        serving.kill()


@pytest.fixture
def node(serving: Serving) -> Iterator[FakeNode]:
    node = FakeNode([serving.address], pages=pages(0, 5) | {b"o" * 16 + keys(9, 1)[0]: 6}, name="n0", part_records=2)
    exact(serving.address, 1)
    yield node
    node.close()


def exact(address: str, count: int, deadline_s: float = 10.0) -> None:
    with Admin(address) as admin:
        until(
            lambda: [m.state for m in admin.members().nodes] == [EXACT] * count,
            f"{count} nodes are exact",
            deadline_s,
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_and_end(number: signal.Signals) -> None:
    serving = Serving("--listen", "tcp://127.0.0.1:0", ready=())
    assert serving.line.startswith("lmkv controller ready at tcp://127.0.0.1:")
    serving.process.send_signal(number)
    out, err = serving.process.communicate(timeout=10)
    assert (serving.process.returncode, out, "Traceback" in err) == (0, "", False)


def test_a_mistake_of_a_process_has_no_traceback() -> None:
    command = [*COMMAND, "controller", "--listen", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "LMKV-C1" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "nonsense"], "'nonsense' is not a control address"),
        (["--listen", "tcp://no.such.host.invalid:1"], "cannot listen on tcp://no.such.host.invalid:1"),
        (["--log-level", "loud"], "--log-level"),
        (["--lease-s", "0"], "lease_s is 0"),
        (["--lease-s", "9", "--forget-s", "3"], "forget_s 3 is below lease_s 9"),
        (["--etcd", "tcp://x:1"], "'tcp://x:1' is not the address of an etcd"),
        (["--etcd", "http://x:1", "--etcd-prefix", "x"], "begin the prefix with /"),
        (["--replicate", "2", "--replicate-heat", "0"], "heat is 0"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    where = [] if "--listen" in arguments else ["--listen", "tcp://127.0.0.1:0"]
    done = lmkv("controller", *where, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_killed_and_exact_again_within_seconds() -> None:
    """Nothing to restore but what the node tells: 100,000 pages."""
    serving = Serving("--listen", "tcp://127.0.0.1:0")
    node = FakeNode([serving.address], pages=pages(0, 100_000))
    try:
        exact(serving.address, 1)
        serving.kill()
        node.put(pages(100_000, 100))
        serving = Serving("--listen", serving.address)
        exact(serving.address, 1, 5.0)
        with Admin(serving.address) as admin:
            assert admin.members().nodes[0].pages == 100_100
            found = admin.lookup(NAMESPACE, b"".join(keys(99_990, 120)))
        assert [holder.tiers for holder in found.holders] == [b"\1" * 110 + b"\0" * 10]
        assert serving.end()[0] == 0
    finally:
        node.close()
        serving.kill()


def test_status(serving: Serving, node: FakeNode) -> None:
    done = lmkv("status", "--controller", serving.address, "--node", node.card.address, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    (seen,) = found["controllers"]
    assert (seen["name"], seen["address"]) == ("c0", serving.address)
    member = seen["nodes"][0]
    assert member.pop("heard_s") < 5
    assert member == {
        "name": "n0", "incarnation": node.incarnation, "address": node.card.address, "state": "EXACT", "pages": 6,
        "used_bytes": 600, "capacity_bytes": 1 << 30, "draining": False,
    }  # fmt: skip
    assert found["nodes"][0]["stats"]["pages"] == 6
    text = lmkv("status", "--controller", serving.address, "--node", node.card.address).stdout
    assert "controller c0 at" in text and "EXACT" in text and "1.0 GiB" in text and node.incarnation in text
    quiet = lmkv("status", "--controller", serving.address, "--controller", "tcp://127.0.0.1:1")
    assert quiet.exit_code == 1 and "tcp://127.0.0.1:1" in quiet.stderr and "EXACT" in quiet.stdout


def test_keys(serving: Serving, node: FakeNode) -> None:
    done = lmkv("keys", "--controller", serving.address, "--json")
    (answer,) = json.loads(done.stdout)
    assert answer["address"] == node.card.address and len(answer["keys"]) == 6
    assert answer["keys"][-1] == {
        "namespace": (b"o" * 16).hex(), "chunk": keys(9, 1)[0][:16].hex(), "group": 0, "tiers": ["DISK", "OBJECT"],
    }  # fmt: skip
    text = lmkv("keys", "--node", node.card.address, "--namespace", HEX, "--limit", "3").stdout
    assert "3 pages" in text and text.count(HEX) == 3 and "DRAM" in text
    assert lmkv("keys", "--node", node.card.address, "--namespace", "xyz").exit_code == 2


def test_drain(serving: Serving, node: FakeNode) -> None:
    done = lmkv("drain", "--node", node.card.address, "--json")
    assert json.loads(done.stdout) == [{"address": node.card.address, "volatile": 5}]
    assert node.draining
    with Admin(serving.address) as admin:
        until(lambda: admin.members().nodes[0].draining, "the beat tells")
    assert "5 pages are in its memory only" in lmkv("drain", "--node", node.card.address).stdout
    assert lmkv("drain").exit_code == 2


def test_drop(serving: Serving, node: FakeNode) -> None:
    refused = lmkv("drop", "--controller", serving.address)
    assert refused.exit_code == 2 and "every page" in refused.stderr and len(node.model.pages) == 6
    lost = lmkv("drop", "--controller", serving.address, "--key", "00" * 17, "--yes")
    assert lost.exit_code == 2 and len(node.model.pages) == 6
    one = lmkv("drop", "--node", node.card.address, "--namespace", HEX, "--key", keys(1, 1)[0].hex(), "--json")
    assert json.loads(one.stdout) == [{"address": node.card.address, "dropped": 1}]
    rest = lmkv("drop", "--controller", serving.address, "--namespace", HEX)
    assert "4 pages dropped" in rest.stdout
    everything = lmkv("drop", "--controller", serving.address, "--yes")
    assert "1 pages dropped" in everything.stdout and not node.model.pages
    with Admin(serving.address) as admin:
        until(lambda: admin.members().nodes[0].pages == 0, "the controller hears of it")


def test_nobody_answers() -> None:
    done = lmkv("drop", "--yes", "--controller", "tcp://127.0.0.1:1")
    assert done.exit_code == 1 and "tcp://127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr
    done = lmkv("drain", "--node", "tcp://127.0.0.1:1", "--deadline-s", "0.2")
    assert done.exit_code == 1 and "check the address" in done.stderr
