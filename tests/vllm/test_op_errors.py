"""An op that raises ends one store, load or transfer; what follows works. And an engine on a device with a pool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import zmq

from lmkv.config import ConnectorSettings
from lmkv.errors import KernelError
from lmkv.ids import Rank
from lmkv.pool.access import Reach
from lmkv.transport import MemoryKind
from lmkv.vllm import memory
from lmkv.vllm.device import standing_in
from lmkv.vllm.geometry import Shard
from lmkv.vllm.pooled import loads
from lmkv.vllm.pooled.shares import Shares
from lmkv.vllm.pooled.staging import Staging
from lmkv.vllm.specs import BlockRange

from . import test_landing
from .fake_device import FakeModule
from .pool_bed import CHUNK, PAGE_BYTES, REQUEST, RankBed, running_node
from .test_device import caches

IDS, OTHER_IDS = [5, 2, 9, 1, 7, 3, 11, 4], [20, 21, 13, 14, 15, 16, 17, 18]
KEYS = 4
FAULT = RuntimeError("CUDA error: out of memory")


def broken(op: str) -> Any:
    return mock.patch.object(torch.ops.lmkv, op, side_effect=FAULT)


@pytest.fixture(params=["map", "tcp"])
def bed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RankBed]:
    """Pages where they lie, and through staging."""
    mapped = request.param == "map"
    more = {} if mapped else {"share": "none", "transport": "tcp://"}
    with running_node(tmp_path, **more) as node, RankBed(node, transport="" if mapped else "tcp://") as bed:
        yield bed


def test_a_store_whose_op_raises_is_given_up(bed: RankBed) -> None:
    keys = bed.keys(1, KEYS)
    with broken("pack_pages"):
        bed.store(keys, IDS)
    assert bed.packed == [REQUEST], "the blocks are free"
    assert bed.counters()["store:failed"] == KEYS and bed.pool._staging.idle
    bed.store(keys, IDS)
    assert bed.load(keys, OTHER_IDS).good == KEYS * CHUNK


def test_a_load_whose_op_raises_is_cut(bed: RankBed) -> None:
    keys = bed.keys(2, KEYS)
    bed.store(keys, IDS)
    with broken("unpack_pages"):
        report = bed.load(keys, OTHER_IDS)
    assert (report.good, report.reason) == (0, "failed")
    assert not bed.pool.waiting and bed.pool._staging.idle
    assert bed.load(keys, OTHER_IDS).good == KEYS * CHUNK
    assert torch.equal(bed.rows(IDS), bed.rows(OTHER_IDS))


def test_what_was_loaded_before_the_op_raised_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loads, "SLICE_BYTES", PAGE_BYTES)
    op, calls = torch.ops.lmkv.unpack_pages, 0

    def fails_from_the_third_page_on(*given: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:  # two heads a page
            raise FAULT
        op(*given)

    with running_node(tmp_path) as node, RankBed(node) as bed:
        keys = bed.keys(3, KEYS)
        bed.store(keys, IDS)
        with mock.patch.object(torch.ops.lmkv, "unpack_pages", fails_from_the_third_page_on):
            report = bed.load(keys, OTHER_IDS)
        assert (report.good, report.reason) == (2 * CHUNK, "failed")
        assert torch.equal(bed.rows(OTHER_IDS[:4]), bed.rows(IDS[:4]))


# --- landing ---


@pytest.fixture
def bench() -> Iterator[test_landing.Bench]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = test_landing.Bench(context)
    yield made
    made.close()
    context.term()


def test_a_conversion_whose_op_raises_fails_the_transfer(bench: test_landing.Bench) -> None:
    note = bench.write(bench.credits()[0], test_landing.ALL, test_landing.IDS)
    with broken("convert_blocks"):
        error = bench.landing.take_out(test_landing.PREFILL, note, test_landing.ALL)
    assert "LMKV-K900 convert_blocks failed" in error and "out of memory" in error
    assert bench.landing.take_out(test_landing.PREFILL, note, test_landing.ALL) == ""


def test_a_checksum_whose_op_raises_fails_the_transfer(bench: test_landing.Bench) -> None:
    note = bench.write(bench.credits()[0], test_landing.ALL, test_landing.IDS)
    checksums = bench.landing._verifier._checksums
    with mock.patch.object(checksums, "of", side_effect=KernelError("checksum_runs failed: out of memory")):
        fault = bench.landing.fault(test_landing.PREFILL, note, test_landing.ALL)
    assert "cannot be verified" in fault and "out of memory" in fault
    assert bench.landing.fault(test_landing.PREFILL, note, test_landing.ALL) == ""


@pytest.fixture
def fake() -> Iterator[FakeModule]:
    module = FakeModule()
    with standing_in("cpu", module):
        yield module


def test_a_conversion_on_a_device_is_waited_for(fake: FakeModule, bench: test_landing.Bench) -> None:
    note = bench.write(bench.credits()[0], test_landing.ALL, test_landing.IDS)
    assert bench.landing.take_out(test_landing.PREFILL, note, test_landing.ALL) == ""
    assert fake.names() == ["synchronize"]
    fake.failing = "CUDA error: an illegal memory access was encountered"
    assert "illegal memory access" in bench.landing.take_out(test_landing.PREFILL, note, test_landing.ALL)


# --- an engine on a device ---


@pytest.mark.parametrize("from_token", [0, 40])
def test_blocks_on_a_device_are_written_when_a_load_is_told(fake: FakeModule, from_token: int) -> None:
    found = memory.describe(*caches("cpu"), "FLASH_ATTN", Shard(0, 1, 2))
    shares = Shares(found, 64, 0, 1)
    page = torch.zeros(shares.largest_bytes, dtype=torch.uint8)
    shares.unpack(0, BlockRange(0, 0, (0, 1, 2, 3)), [0], page, [0], from_token)
    assert fake.names()[-1:] == ["synchronize"]


def test_an_engine_on_a_device_maps_no_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is on this host and shares its arena; pages go through staging, which is where the caches are."""
    monkeypatch.setattr(Staging, "in_host_memory", property(lambda staging: False))
    with running_node(tmp_path, transport="tcp://") as node, RankBed(node, transport="tcp://") as bed:
        assert bed.access.reach is Reach.REMOTE and bed.access.memory is None
        keys = bed.keys(4, KEYS)
        bed.store(keys, IDS)
        assert bed.load(keys, OTHER_IDS).good == KEYS * CHUNK
        assert torch.equal(bed.rows(IDS), bed.rows(OTHER_IDS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_hooks_of_an_engine_on_a_device_fence(fake: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmkv.vllm import worker

    loop = mock.Mock()
    monkeypatch.setattr(worker, "WorkerLoop", loop)
    tensors, config = caches("cpu")
    role = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_role="kv_producer"))
    side = worker.WorkerSide(role, config, ConnectorSettings(transport="inproc://"), Rank(0))
    assert side._fence() is None, "nothing is known of the caches yet"
    side.register(tensors, "FLASH_ATTN", Shard(0, 1, 2))
    fence = side._fence()
    assert fence is not None and not fence.query()
    fake.pass_events()
    assert fence.query()
    assert loop.call_args.args[3].device.kind is MemoryKind.VRAM, "the loop is told of the device"
