"""The halves of a connector whose worker loop has died: the engine goes on by itself, at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv.config import ConnectorSettings
from lmkv.control.pairing import PairState
from lmkv.ids import Epoch, Incarnation, Rank, RequestId, make_transfer_id
from lmkv.transfer.prompt import Prompt
from lmkv.vllm.specs import BlockRange, ExpectSpec, LoadSpec, OfferSpec, RankReport
from tests.simulation.builders import REQUEST, Engine, start_node
from tests.simulation.virtual import SteppedRuntime
from tests.vllm.pool_bed import CHUNK, NAMESPACE, FullAttentionSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vLLM imports warns
    from vllm.v1.outputs import KVConnectorOutput

    from lmkv.vllm import decode, prefill, scheduler
    from lmkv.vllm.metadata import StepMeta, WorkerMeta
    from lmkv.vllm.scheduler import SchedulerSide
    from lmkv.vllm.worker import WorkerSide

TID = make_transfer_id(1, bytes(10))
OTHER = make_transfer_id(2, bytes(10))


def bug(*_: Any, **__: Any) -> None:
    raise RuntimeError("a bug")


@pytest.fixture
def world() -> Iterator[SteppedRuntime]:
    with SteppedRuntime(1, raises=False) as made:
        yield made


@pytest.fixture
def dead(world: SteppedRuntime, monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine(world, "engine", start_node(world).card.address)
    monkeypatch.setattr(engine.loop, "_publish", bug)
    assert world.run_until(lambda: not engine.loop.alive, 5.0)
    return engine


def worker_side(engine: Engine) -> WorkerSide:
    side = WorkerSide(SimpleNamespace(), engine.cache_config, engine.settings, Rank(0), engine.process.runtime)
    side._loop = engine.loop
    return side


def test_the_worker_half_gives_up_what_a_dead_loop_had(world: SteppedRuntime, dead: Engine) -> None:
    side, began_s = worker_side(dead), world.clock()
    meta = StepMeta(
        offers=[OfferSpec(TID, RequestId("sent"), Prompt(b"p" * 16, 64))],
        expects=[ExpectSpec(TID, RequestId("expected"), Epoch(1), Incarnation("x"), 0, ())],
        loads=[LoadSpec(RequestId("loaded"), NAMESPACE, (0, 64), (BlockRange(0, 0, (1,)),), (), 0.0)],
        preempted=[TID],
        overwritten=[REQUEST],
        idle=True,
    )
    side.before_forward(meta)
    side.bind(meta)
    side.sweep()
    sent, received, failed = side.results({"sent"})
    assert (sent, received, failed) == ({"sent"}, {"expected", "loaded"}, {"expected"})
    assert side.load_errors() == {1}
    told = side.worker_meta()
    assert told is not None and "rank 0 has failed" in told.broken
    assert told.reports == [RankReport(TID, RequestId("expected"), "failed", False, "the worker loop has died")]
    assert world.clock() == began_s


def test_what_one_rank_tells_is_told_of_all() -> None:
    both = WorkerMeta(broken="rank 1").aggregate(WorkerMeta())
    assert both.broken == WorkerMeta().aggregate(WorkerMeta(broken="rank 1")).broken == "rank 1"


# --- the scheduler's half ---


def request(name: str, role: str, tid: str) -> Any:
    params = {"lmkv": {"transfer_id": tid, "role": role, "peer": {"address": "tcp://127.0.0.1:9"}}}
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=128,
        num_tokens=128,
        kv_transfer_params=params,
        status=SimpleNamespace(name="FINISHED"),
    )


@pytest.fixture
def side(world: SteppedRuntime, monkeypatch: pytest.MonkeyPatch) -> SchedulerSide:
    monkeypatch.setattr(scheduler, "must_match", lambda config, version: {"dtype": "d", "kv_dtype": "k"})
    monkeypatch.setattr(scheduler, "weight_sources", lambda config: ())
    monkeypatch.setattr(scheduler, "lora_settings", lambda config: "")
    for half in (prefill, decode):
        monkeypatch.setattr(half, "prompt_of", lambda request, adapters: Prompt(b"p" * 16, 128))
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1, data_parallel_rank=0),
        kv_transfer_config=SimpleNamespace(kv_role="kv_both"),
        model_config=SimpleNamespace(model="m"),
    )
    caches = SimpleNamespace(
        transfer_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec(CHUNK))],
        select_transfer_block_ids=lambda tables: tables,
    )
    settings = ConnectorSettings(listen="tcp://127.0.0.1:0")
    return SchedulerSide(config, caches, settings, world.process("scheduler").runtime)


def output(worker_meta: WorkerMeta) -> Any:
    return KVConnectorOutput(kv_connector_worker_meta=worker_meta)


def scheduled(*names: str) -> Any:
    return SimpleNamespace(
        preempted_req_ids=(),
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in names],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens=dict.fromkeys(names, 64),
        total_num_scheduled_tokens=64 * len(names),
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: ([1, 2],)),
    )


def test_the_scheduler_half_becomes_a_plain_engine(side: SchedulerSide) -> None:
    begun = request("begun", "prefill", TID)
    side.new_request(begun)
    meta = side.build_meta(scheduled("begun"))
    assert [offer.request_id for offer in meta.offers] == ["begun"] and len(meta.pushes) == 1
    side.take_output(output(WorkerMeta(broken="rank 0 is dead")))
    meta = side.build_meta(scheduled("begun"))
    assert meta.withdrawals == [(TID, "rank 0 is dead")]
    assert meta.pushes == [] and side.finished(begun), "its blocks go when the workers have let go of them"
    assert side._endpoint.pair("tcp://127.0.0.1:9")[:2] == (PairState.REFUSED, "rank 0 is dead")
    for name, role in (("p", "prefill"), ("d", "decode")):
        late = request(name, role, OTHER)
        side.new_request(late)
        assert side.matched_tokens(late, 0) == (0, False)
        meta = side.build_meta(scheduled(name))
        assert not (meta.offers or meta.pushes or meta.expects or meta.loads or meta.stores)
        assert not side.finished(late)
    assert not side.has_news
    assert side.book.counts()["broken"] == 1


def test_failures_are_counted_where_they_are_asked_for(side: SchedulerSide) -> None:
    side.take_output(output(WorkerMeta(failures={"Grant": 2})))  # type: ignore[arg-type]
    assert side.book.counts() == {"failure:Grant": 2}
