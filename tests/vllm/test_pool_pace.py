"""Who waits for whom while bytes move: slots of staging, the engine's idle step, the node's polls."""

from __future__ import annotations

import select
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv.config import ConnectorSettings
from lmkv.control import wake
from lmkv.control.wake import Wake, wait
from lmkv.ids import Rank
from lmkv.pool.clients import MOVING_S
from lmkv.transport import open_transport
from lmkv.vllm import memory
from lmkv.vllm.commands import BlockHold, Stored
from lmkv.vllm.geometry import Shard
from lmkv.vllm.pooled.rank import open_pool
from lmkv.vllm.pooled.staging import Staging
from lmkv.vllm.specs import BlockRange, StoreSpec
from lmkv.vllm.writer import WorkerLoop

from .pool_bed import CHUNK, HEAD_SIZE, HEADS, LAYERS, NAMESPACE, REQUEST, RankBed, caches_of, running_node

# --- staging ---


@pytest.fixture
def staging() -> Staging:
    return Staging(10 * 4096, 4000, torch.device("cpu"))


def test_slots_follow_each_other_again_after_use(staging: Staging) -> None:
    first, second = staging.take(4), staging.take(3)
    assert first + second == [0, 1, 2, 3, 4, 5, 6]
    staging.give_back(second)
    staging.give_back([3, 1, 0, 2])
    assert staging.take(5) == [0, 1, 2, 3, 4]


def test_stores_leave_half_to_loads(staging: Staging) -> None:
    stored = staging.take(100, for_store=True)
    assert len(stored) == 5 and not staging.can_store
    assert len(staging.take(100)) == 5
    assert staging.take(1) == staging.take(1, for_store=True) == []
    staging.give_back(stored)
    assert staging.can_store and staging.can_load(5)


# --- waits ---


def test_a_wait_below_a_millisecond_is_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(wake.time, "sleep", slept.append)
    asked: list[float] = []
    poller: Any = SimpleNamespace(poll=lambda ms: asked.append(ms) or [])
    for seconds in (0.0002, 0.004, 0.0, -1.0):
        wait(poller, seconds)
    assert slept == [0.0002]
    assert asked == [0, 4, 0, 0]


def test_a_wait_tells_what_is_ready() -> None:
    poller, event = select.poll(), Wake()
    poller.register(event.fd, select.POLLIN)
    assert wait(poller, 0.0001) == []
    event.set()
    assert [fd for fd, _ in wait(poller, 0.0001)] == [event.fd]
    event.close()


# --- the engine's idle step ---


@pytest.fixture
def loop() -> Any:
    """Of a rank whose engine has no name yet: what is stored is let go at once."""
    views, config = caches_of(torch.zeros(LAYERS, 4, HEADS, CHUNK, 2 * HEAD_SIZE), CHUNK)
    settings = ConnectorSettings(pool=("tcp://127.0.0.1:9",), chunk_tokens=CHUNK, staging_bytes=1 << 20)
    found = memory.describe(views, config, "FLASH_ATTN", Shard(0, 1, HEADS))
    pool, why = open_pool(settings, Rank(0), 1, found, config)
    assert pool is not None, why
    found = found.with_region(pool.region)
    loop = WorkerLoop(settings, Rank(0), open_transport("inproc://", "pace"), found, "tcp://127.0.0.1:0", pool)
    loop.start()
    yield loop
    loop.close()


def test_a_wait_for_results_ends_with_the_first(loop: WorkerLoop) -> None:
    spec = StoreSpec(REQUEST, NAMESPACE, 0, (bytes(16),), (BlockRange(0, 0, (1,)),))
    later = threading.Timer(0.05, lambda: loop.submit(Stored((spec,), (BlockHold(),), None)))
    later.start()
    began_s = time.monotonic()
    taken = loop.take(wait_s=30.0)
    assert taken.packed == [REQUEST] and taken
    assert time.monotonic() - began_s < 15.0
    later.join()


def test_without_results_a_wait_ends_by_itself(loop: WorkerLoop) -> None:
    assert not loop.take(wait_s=0.01)


# --- the node's polls ---


@pytest.mark.parametrize("plane", ["", "nixl://"])
def test_a_node_polls_fast_while_bytes_of_the_data_plane_move(tmp_path: Path, plane: str) -> None:
    with (
        running_node(tmp_path, share="none" if plane else "", transport=plane or "none") as node,
        RankBed(node, transport=plane) as bed,
    ):
        bed.store(bed.keys(1, 2), [1, 2, 3, 4])
        assert node.is_hurried(time.monotonic()) is bool(plane)
        assert not node.is_hurried(time.monotonic() + MOVING_S)
