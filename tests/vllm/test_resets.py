"""A reset of vLLM's prefix cache renames an engine's weights, for its peers, its pool and whoever asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmkv import wire
from lmkv.config import ConnectorSettings
from lmkv.control.client import ControlClient
from lmkv.control.pairing import PairState
from lmkv.ids import Rank
from lmkv.vllm import identity

from .real_vllm import (
    BlockPool,
    HandshakeMeta,
    Request,
    SamplingParams,
    SchedulerSide,
    kv_cache_interface,
    model_folder,
    vllm_config,
)

pytestmark = pytest.mark.timeout(600)  # importing vLLM and its first configuration may take a minute and more

KV = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
STEP = SimpleNamespace(
    total_num_scheduled_tokens=0, preempted_req_ids=(), scheduled_new_reqs=[], num_scheduled_tokens={},
    scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]), finished_req_ids=set(),
)  # fmt: skip


class Pool:
    """What the engine's pool half is told."""

    trouble = ""

    def __init__(self) -> None:
        self.names: list[bytes] = []

    def renamed(self, manifest: Any) -> None:
        self.names.append(manifest.namespace())

    def __getattr__(self, name: str) -> Any:
        return lambda *_: False


class Engine:
    """The scheduler half of an engine with a worker that only has a card, and vLLM's own block pool."""

    def __init__(self, model: Path, **settings: Any) -> None:
        config = vllm_config(model)
        object.__setattr__(config, "kv_transfer_config", SimpleNamespace(kv_role="kv_both"))
        group = kv_cache_interface.KVCacheGroupSpec(["layer.0"], kv_cache_interface.FullAttentionSpec(**KV))
        caches = kv_cache_interface.KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[group])
        self.side = SchedulerSide(config, caches, ConnectorSettings(**settings))
        self.blocks = BlockPool(8, True, 16)
        self.side.bind_block_pool(self.blocks)
        self.pool = Pool()

    def start(self) -> None:
        worker = wire.WorkerCard(Rank(0), "tcp://127.0.0.1:9", "inproc", b"", "DRAM", (), 0, 0)
        self.side.start({0: HandshakeMeta(worker, {"interior": "x"})})
        until(lambda: self.described() is not None)
        self.side._pool = self.pool

    def described(self) -> wire.Description | None:
        async def ask() -> wire.Description:
            client = ControlClient()
            try:
                return await client.describe(self.side.address, deadline_s=60)
            finally:
                await client.close()

        return asyncio.run(ask()) if self.side._card is not None else None

    @property
    def private(self) -> str:
        said = self.described()
        assert said is not None
        return said.private

    def weights(self) -> str:
        assert self.side._card is not None
        return self.side._card.must["weights"]


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def step(engine: Engine) -> None:
    engine.side.build_meta(STEP)


def request(engine: Engine) -> None:
    engine.side.new_request(Request("r", [1, 2, 3], SamplingParams(max_tokens=1), None))


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    monkeypatch.setattr(identity, "process_start_s", lambda: time.time() + 60)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"w")
    made: list[Engine] = []

    def make(**settings: Any) -> Engine:
        made.append(Engine(folder, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.side.close()


@pytest.mark.parametrize("notice", [step, request])
def test_vllm_does_not_tell_of_a_reset_and_it_is_noticed(
    engines: Callable[..., Engine], notice: Callable[[Engine], None]
) -> None:
    """`reset_prefix_cache` without `reset_external` calls no hook of connectors: RL resets so after new weights."""
    engine = engines()
    engine.start()
    notice(engine)
    before = engine.weights()
    assert engine.private == "" and not engine.pool.names
    assert engine.blocks.reset_prefix_cache()
    notice(engine)
    assert "reset" in engine.private and engine.weights() != before
    notice(engine)
    assert len(engine.pool.names) == 1, "one reset is one name"


def test_a_reset_that_vllm_tells_of_is_one_reset(engines: Callable[..., Engine]) -> None:
    """Its own cache first, then the connector's: as `Scheduler.reset_prefix_cache(reset_connector=True)` does."""
    engine = engines()
    engine.start()
    for count in (1, 2):
        assert engine.blocks.reset_prefix_cache() and engine.side.reset_cache()
        step(engine)
        assert len(engine.pool.names) == count == len(set(engine.pool.names))


@pytest.mark.parametrize(("on_reset", "plain", "external"), [("external", False, True), ("keep", False, False)])
def test_what_counts_as_new_weights_can_be_set(
    engines: Callable[..., Engine], on_reset: str, plain: bool, external: bool
) -> None:
    engine = engines(on_reset=on_reset)
    engine.start()
    engine.blocks.reset_prefix_cache()
    step(engine)
    assert (engine.private != "") == plain
    engine.side.reset_cache()
    assert (engine.private != "") == external


def test_a_reset_before_the_weights_are_known_is_not_lost(
    engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    engine.blocks.reset_prefix_cache()
    step(engine)
    engine.start()
    assert "reset" in engine.private and engine.weights().startswith(identity.PRIVATE)


def test_peers_refuse_after_a_reset_until_both_were_reset(engines: Callable[..., Engine]) -> None:
    """Two engines with real endpoints; their workers are made to say that they have met."""
    one, other = engines(on_reset="count"), engines(on_reset="count")
    one.start()
    other.start()

    def state() -> tuple[PairState, PairState]:
        found = []
        for engine, peer in ((one, other), (other, one)):
            pairing = engine.side._endpoint._pairing
            assert pairing is not None
            for known in list(pairing._peers.values()):
                ours = pairing.number(known.card.address)
                told = wire.Introduced(Rank(0), known.card.incarnation, "", known.pair, ours)
                pairing.introduced(told, time.monotonic())
            found.append(engine.side._endpoint.pair(peer.side.address)[0])
        return found[0], found[1]

    until(lambda: state() == (PairState.READY, PairState.READY))
    one.blocks.reset_prefix_cache()
    step(one)
    until(lambda: state() == (PairState.REFUSED, PairState.REFUSED))
    assert "differs in 'weights'" in other.side._endpoint.pair(one.side.address)[1]
    other.blocks.reset_prefix_cache()
    step(other)
    until(lambda: state() == (PairState.READY, PairState.READY))


def test_unlike_block_pools_are_told_by_their_map() -> None:
    """The trace that is looked for is vLLM's: a refused reset leaves none."""
    blocks = BlockPool(8, True, 16)
    before = blocks.cached_block_hash_to_block
    taken = blocks.get_new_blocks(1)
    assert not blocks.reset_prefix_cache() and blocks.cached_block_hash_to_block is before
    blocks.free_blocks(taken)
    assert blocks.reset_prefix_cache() and blocks.cached_block_hash_to_block is not before
