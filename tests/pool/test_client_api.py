"""LmkvClient with real nodes: what is stored is retrieved bit for bit; whatever is wrong is a miss, and counted."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lmkv
from lmkv import LmkvClient
from lmkv.client import Ack, NoNodeError
from lmkv.errors import ConfigError, LayoutError
from lmkv.pool.access import Reach
from tests.pool.bed import ROOT, NodeProcess, NodeThread, User, using
from tests.pool.fake_tier import FakeTier

PLANES = ("", "tcp://127.0.0.1", "nixl://?progress=event")
MODEL = {"layers": 2, "heads": 3, "head_dim": 16, "model": "m", "chunk_tokens": 32}
LATENT = {"layers": 2, "latent_dim": 24, "model": "m", "chunk_tokens": 32, "dtype": "float16"}
TOKENS = list(range(1000, 1100))


def make_kv(tokens: int = 100, seed: int = 0, heads: int = 3, parts: int = 2, dim: int = 16) -> torch.Tensor:
    return torch.randn(2, parts, heads, tokens, dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(scope="module", params=PLANES, ids=["mapped", "tcp", "nixl"])
def plane(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[NodeProcess, str]]:
    options = {"transport": request.param or "none"} | ({"share": "none"} if request.param else {})
    found = NodeProcess(tmp_path_factory.mktemp("node"), capacity="16MiB", **options)
    yield found, request.param
    assert found.end() == 0


@pytest.fixture
def pool(plane: tuple[NodeProcess, str]) -> Iterator[LmkvClient]:
    with LmkvClient(plane[0].address, transport=plane[1], **MODEL) as found:
        assert found._nodes.ready()[0].reach is (Reach.REMOTE if plane[1] else Reach.LOCAL)
        yield found
        (node,) = found._nodes._all
        found._nodes.ask([node], lambda t: lmkv.poolwire.Drop(t), lmkv.poolwire.Dropped, time.monotonic() + 5)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeThread]:
    found = NodeThread(tmp_path)
    yield found
    found.end()


def stats(pool: LmkvClient) -> dict[str, Any]:
    import json

    (answer,) = pool._nodes.ask(
        pool._nodes.ready()[:1], lmkv.poolwire.Stats, lmkv.poolwire.StatsAre, time.monotonic() + 5
    )
    assert answer is not None
    return dict(json.loads(answer.stats))


# --- storing and retrieving, by every way ---


def test_what_is_stored_is_retrieved(pool: LmkvClient) -> None:
    kv = make_kv()
    assert pool.lookup(TOKENS) == 0
    result = pool.store(TOKENS, kv)
    assert (result.stored, result.existed, result.complete, result.reached) == (3, 0, True, Ack.VOLATILE)
    assert pool.lookup(TOKENS) == 96
    got, count = pool.retrieve(TOKENS)
    assert count == 96 and torch.equal(got, kv[:, :, :, :96])
    assert pool.store(TOKENS, kv).existed == 3
    into = torch.zeros_like(kv)
    got, count = pool.retrieve(TOKENS, into=into)
    assert got is into and count == 96 and torch.equal(into[:, :, :, :96], kv[:, :, :, :96])
    assert not into[:, :, :, 96:].any()
    state = stats(pool)
    assert (state["leases"], state["reserved"], state["quarantined_bytes"]) == (0, 0, 0)


def test_the_longest_beginning(pool: LmkvClient) -> None:
    pool.store(TOKENS[:70], make_kv(70))
    kv = make_kv()
    result = pool.store(TOKENS, kv)
    assert (result.stored, result.existed) == (1, 2)
    other = [*TOKENS[:40], 7, *TOKENS[41:]]
    assert pool.retrieve(other)[1] == 32
    assert pool.retrieve(TOKENS[:31])[1] == 0
    assert pool.retrieve([])[1] == 0


def test_latents(plane: tuple[NodeProcess, str]) -> None:
    with LmkvClient(plane[0].address, transport=plane[1], **LATENT) as pool:
        kv = make_kv(heads=1, parts=1, dim=24).half()
        assert pool.store(TOKENS, kv).stored == 3
        got, count = pool.retrieve(TOKENS)
        assert count == 96 and torch.equal(got, kv[:, :, :, :96])


def test_more_than_a_batch(pool: LmkvClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmkv.client.BATCH_BYTES", pool._pages.bytes * 7)
    tokens = list(range(32 * 40))
    kv = make_kv(len(tokens))
    assert pool.store(tokens, kv).stored == 40
    got, count = pool.retrieve(tokens)
    assert count == len(tokens) and torch.equal(got, kv)


def test_a_tensor_that_is_a_view(pool: LmkvClient) -> None:
    kv = make_kv(200)[:, :, :, ::2]
    assert pool.store(TOKENS, kv).stored == 3
    into = torch.zeros(2, 2, 3, 200, 16, dtype=torch.bfloat16)[:, :, :, ::2]
    assert pool.retrieve(TOKENS, into=into)[1] == 96
    assert torch.equal(into[:, :, :, :96], kv[:, :, :, :96])


def test_two_processes_share(plane: tuple[NodeProcess, str], pool: LmkvClient) -> None:
    code = (
        "import sys, torch; from lmkv import LmkvClient; from tests.pool.test_client_api import *\n"
        "with LmkvClient(sys.argv[1], transport=sys.argv[2], **MODEL) as pool:\n"
        "    print(pool.store(TOKENS, make_kv(seed=5)).stored)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, plane[0].address, plane[1]], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "3", done.stderr
    got, count = pool.retrieve(TOKENS)
    assert count == 96 and torch.equal(got, make_kv(seed=5)[:, :, :, :96])


# --- whose KV is whose ---


@pytest.mark.parametrize(
    "other",
    [
        {"tenant": "b"},
        {"model": "n"},
        {"weights": "1"},
        {"dtype": "float16"},
        {"chunk_tokens": 16},
        {"layers": 1},
        {"heads": 6, "head_dim": 8},
        {"must": {"rope": "x"}},
        {"salt": b"s"},
    ],
    ids=str,
)
def test_other_kv_is_a_miss(node: NodeThread, other: dict[str, Any]) -> None:
    with LmkvClient(node.address, **MODEL) as one, LmkvClient(node.address, **{**MODEL, **other}) as two:
        assert one.store(TOKENS, make_kv()).stored == 3
        assert two.lookup(TOKENS) == 0
        assert one.lookup(TOKENS) == 96


# --- what is wrong ---


def corrupt(node: NodeThread, byte: int = 17) -> None:
    """Flips a bit of the first page, in the node's memory."""
    node.node._memory.data[byte] ^= 4


@pytest.mark.parametrize("byte", [0, 5000, 2 * 32 * 2 * 16 * 2 * 3 - 1])
def test_a_flipped_bit_is_a_miss_and_the_page_is_dropped(node: NodeThread, byte: int) -> None:
    with LmkvClient(node.address, **MODEL) as pool:
        kv = make_kv()
        pool.store(TOKENS, kv)
        corrupt(node, byte)
        assert pool.retrieve(TOKENS)[1] == 0
        assert pool.counters["corrupt"] == 1
        assert stats(pool)["counters"]["corrupt"] == 1 and pool.lookup(TOKENS) == 0
        assert pool.store(TOKENS, kv).stored == 1, "the page itself, not those behind it"
        assert pool.retrieve(TOKENS)[1] == 96


def test_a_run_ends_before_what_is_wrong(node: NodeThread) -> None:
    with LmkvClient(node.address, **MODEL) as pool:
        kv = make_kv()
        pool.store(TOKENS, kv)
        corrupt(node, pool._pages.bytes + 100)  # pages of 12 KiB lie side by side
        got, count = pool.retrieve(TOKENS)
        assert count == 32 and torch.equal(got, kv[:, :, :, :32])


def test_a_slot_that_has_another_page_by_now(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node lets go of the pages while they are read: other bytes come, and are found out."""
    with LmkvClient(node.address, **MODEL) as pool, LmkvClient(node.address, **{**MODEL, "tenant": "b"}) as other:
        pool.store(TOKENS, make_kv())
        read = pool._nodes.read

        def late(*args: Any) -> Any:
            monkeypatch.setattr(pool._nodes, "read", read)
            node.node._leases.expire(1e18)  # the node's thread sleeps in poll
            assert other.store(list(range(20_000, 26_000)), make_kv(6000, seed=9)).stored
            return read(*args)

        monkeypatch.setattr(pool._nodes, "read", late)
        assert pool.retrieve(TOKENS)[1] == 0
        assert pool.counters["corrupt"] == 1
        assert other.retrieve(list(range(20_000, 26_000)))[1] > 0
        assert "corrupt" not in stats(pool)["counters"], "not held any more, so it proves nothing"


def test_a_lease_that_runs_out_is_a_miss(node: NodeThread) -> None:
    with LmkvClient(node.address, **MODEL, lease_s=1e-6) as pool:
        pool.store(TOKENS, make_kv())
        assert pool.lookup(TOKENS) == 96
        assert pool.retrieve(TOKENS)[1] == 0
        assert pool.counters["expired"] == 1


def test_a_write_lease_that_runs_out_is_a_refusal(tmp_path: Path) -> None:
    node = NodeThread(tmp_path, write_lease_s=1e-6)
    with using(node), LmkvClient(node.address, **MODEL) as pool:
        result = pool.store(TOKENS, make_kv())
        assert result.stored == 0 and sum(result.refused.values()) == 3
        assert stats(pool)["used_bytes"] == 0


def test_a_full_node_refuses_and_is_no_error(node: NodeThread) -> None:
    other = User(node.address)
    with using(other), LmkvClient(node.address, **MODEL) as pool:
        other.reserve(range(510))
        result = pool.store(TOKENS, make_kv())
        assert result.refused == {"full": 3} and pool.counters["refused:full"] == 3
        assert not result.complete


def test_busy_and_draining(node: NodeThread) -> None:
    with LmkvClient(node.address, **MODEL) as pool, LmkvClient(node.address, **MODEL) as other:
        mine = (other._nodes.incarnation, lmkv.ids.Rank(0), other.namespace, other._keys(TOKENS)[0])
        other._nodes.ask(
            other._nodes.ready(),
            lambda t: lmkv.poolwire.Reserve(t, *mine, other._pages.bytes, 1, 0),
            lmkv.poolwire.Reserved,
            time.monotonic() + 5,
        )
        result = pool.store(TOKENS, make_kv())
        assert (result.stored, result.refused) == (2, {"busy": 1})
        pool._nodes.ask(
            pool._nodes.ready(), lambda t: lmkv.poolwire.Drain(t), lmkv.poolwire.Drained, time.monotonic() + 5
        )
        assert pool.store(TOKENS[50:], make_kv(50)).refused == {"draining": 1}


def test_a_node_that_dies_is_a_miss(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path)
    with LmkvClient(node.address, **MODEL) as pool:
        pool.store(TOKENS, make_kv())
        node.kill()
        assert pool.retrieve(TOKENS)[1] == pool.lookup(TOKENS) == 0
        assert pool.store(TOKENS, make_kv()).refused == {"unreachable": 3}
        assert pool.counters["unreachable"] == 2
        again = NodeProcess(tmp_path, listen=node.address)
        with using(again):
            assert pool._nodes.wait(pool._nodes.ready, time.monotonic() + 10)
            assert pool.store(TOKENS, make_kv()).stored == 3
            assert pool.retrieve(TOKENS)[1] == 96


def test_a_node_that_is_stuck_is_a_miss_in_time(tmp_path: Path) -> None:
    node = NodeProcess(tmp_path)
    with using(node), LmkvClient(node.address, **MODEL, timeout_s=0.3, wait_s=0.1) as pool:
        pool.store(TOKENS, make_kv())
        node.process.send_signal(signal.SIGSTOP)
        started_s = time.monotonic()
        assert pool.retrieve(TOKENS)[1] == 0
        assert pool.store(TOKENS[32:], make_kv(68)).refused == {"unreachable": 2}
        assert time.monotonic() - started_s < 2.0
        node.process.send_signal(signal.SIGCONT)
        user = User(node.address)
        with using(user):
            pool._timeout_s = 5.0
            assert pool.retrieve(TOKENS)[1] == 96
            found = user.until_stats(lambda s: not s["reserved"] and not s["leases"])
            assert found["quarantined_bytes"] == 0, "what it gave while it was not heard is taken back"


def test_an_error_of_the_callers_leaves_nothing_behind(node: NodeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    with LmkvClient(node.address, **MODEL) as pool:

        def broken(*_: Any) -> Any:
            raise RuntimeError("a tensor on a device that is gone")

        monkeypatch.setattr(pool._pages, "pack", broken)
        with pytest.raises(RuntimeError, match="device"):
            pool.store(TOKENS, make_kv())
        state = stats(pool)
        assert (state["reserved"], state["used_bytes"], state["quarantined_bytes"]) == (0, 0, 0)


# --- several nodes, tiers ---


def test_several_nodes(tmp_path: Path) -> None:
    one, two = NodeThread(tmp_path), NodeThread(tmp_path)
    with using(one, two), LmkvClient(two.address, **MODEL) as other:
        kv = make_kv()
        other.store(TOKENS, kv)
        with LmkvClient([one.address, two.address], **MODEL) as pool:
            assert pool._nodes.wait(lambda: len(pool._nodes.ready()) == 2, time.monotonic() + 5)
            pool.store(TOKENS[:32], kv[:, :, :, :32])
            assert pool.lookup(TOKENS) == 96
            got, count = pool.retrieve(TOKENS)
            assert count == 96 and torch.equal(got, kv[:, :, :, :96])
        with LmkvClient(one.address, **MODEL) as pool:
            assert pool.lookup(TOKENS) == 32


def test_durable_and_back_from_a_tier(tmp_path: Path) -> None:
    tier = FakeTier()
    node = NodeThread(tmp_path, tier.settings())
    with using(node), LmkvClient(node.address, **MODEL) as pool:
        kv = make_kv()
        assert pool.store(TOKENS, kv, ack=Ack.DURABLE).reached is Ack.DURABLE
        other = User(node.address)
        other.reserve(range(512))
        other.close()
        tier.get_gate.clear()
        threading.Timer(0.2, tier.get_gate.set).start()
        got, count = pool.retrieve(TOKENS)
        assert count == 96 and torch.equal(got, kv[:, :, :, :96])


# --- what the caller did wrong ---


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"address": []}, ConfigError, "no address"),
        ({"address": "nowhere"}, ConfigError, "not a control address"),
        ({"heads": 0, "head_dim": 0}, ConfigError, "no shape"),
        ({"latent_dim": 5}, ConfigError, "no shape"),
        ({"dtype": "float65"}, LayoutError, "'float65' is unknown"),
        ({"layers": 0}, LayoutError, "cannot be"),
        ({"chunk_tokens": 0}, ConfigError, "chunk_tokens"),
        ({"address": "tcp://127.0.0.1:1", "connect_s": 0.2}, NoNodeError, "no pool node can be used"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_settings_that_are_wrong(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {"address": "tcp://127.0.0.1:18300", **MODEL, **change}
    with pytest.raises(error, match=says):
        LmkvClient(given.pop("address"), **given)


@pytest.mark.parametrize(
    "kv", [make_kv(99), make_kv(heads=2), make_kv().half(), make_kv()[0]], ids=["tokens", "heads", "dtype", "rank"]
)
def test_tensors_that_do_not_fit(node: NodeThread, kv: torch.Tensor) -> None:
    with LmkvClient(node.address, **MODEL) as pool:
        with pytest.raises(LayoutError, match="KV has the shape"):
            pool.store(TOKENS, kv)
        with pytest.raises(LayoutError, match="KV has the shape"):
            pool.retrieve(TOKENS, into=kv)


def test_a_far_node_without_a_data_plane(tmp_path: Path) -> None:
    node = NodeThread(tmp_path, share="none")
    with using(node), pytest.raises(NoNodeError, match="no pool node can be used"):
        LmkvClient(node.address, **MODEL, connect_s=0.5)


# --- documents ---


def test_the_example_of_the_document_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/client.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 15
    node = NodeProcess(tmp_path, capacity="16MiB")
    with using(node):
        code = example.replace("tcp://127.0.0.1:18300", node.address)
        assert code != example
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "stored=7" in done.stdout


def test_lmkv_itself_stays_light() -> None:
    code = "import lmkv, sys; assert not {'torch', 'zmq', 'numpy'} & set(sys.modules); lmkv.LmkvClient; lmkv.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "has no attribute 'nothing'" in done.stderr and "Assertion" not in done.stderr
