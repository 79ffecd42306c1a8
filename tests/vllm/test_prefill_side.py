"""Prefill's scheduler half: whose blocks a transfer sends, and when a finished prompt gives way."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv.ids import TransferId
from lmkv.obs.ledger import LedgerBook
from lmkv.transfer.prompt import Prompt
from lmkv.vllm.params import RequestParams
from lmkv.vllm.yielding import YIELD_S

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, while vLLM is imported
    from lmkv.vllm import prefill
    from lmkv.vllm.metadata import StepMeta

PARAMS = RequestParams(TransferId("t" * 32), "prefill", "tcp://127.0.0.1:1")


class Bench:
    """PrefillSide, with requests of one step and of two blocks."""

    def __init__(self) -> None:
        self.now_s = 0.0
        caches = SimpleNamespace(select_transfer_block_ids=lambda tables: tables)
        runtime: Any = SimpleNamespace(clock=lambda: self.now_s)
        self.book = LedgerBook()
        self.side = prefill.PrefillSide(caches, (16,), self.book, SimpleNamespace(), runtime)  # type: ignore[arg-type]

    def request(self, name: str) -> Any:
        return SimpleNamespace(request_id=name, num_prompt_tokens=32, status=SimpleNamespace(name="FINISHED"))

    def output(self, *names: str, preempted: tuple[str, ...] = ()) -> Any:
        """vLLM's, of a step that computes these."""
        return SimpleNamespace(
            preempted_req_ids=preempted,
            scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in names],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens=dict.fromkeys(names, 32),
            total_num_scheduled_tokens=32 * len(names),
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: ([1, 2],)),
        )

    def step(self, *names: str) -> StepMeta:
        meta = StepMeta()
        self.side.fill(meta, self.output(*names))
        return meta

    def compute(self, name: str) -> Any:
        """A prompt that is finished and held."""
        made = self.request(name)
        assert self.side.new_request(made, PARAMS)
        self.step(name)
        assert self.side.finished(made, StepMeta())
        return made


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(prefill, "prompt_of", lambda request, adapters: Prompt(b"p" * 16, 32))
    return Bench()


def test_a_transfer_sends_the_blocks_of_one_request(bench: Bench) -> None:
    """A second one under its id would have its blocks sent under the first one's prompt."""
    bench.compute("first")
    assert not bench.side.new_request(bench.request("second"), PARAMS)
    assert bench.book.counts() == {"transfer:in_use": 1}
    bench.side.freed({"another"})
    assert not bench.side.new_request(bench.request("third"), PARAMS)
    bench.side.freed({"first"})
    assert bench.side.new_request(bench.request("fourth"), PARAMS)


def test_the_id_of_a_request_that_never_ran_is_free_again(bench: Bench) -> None:
    aborted = bench.request("aborted")
    assert bench.side.new_request(aborted, PARAMS)
    assert not bench.side.finished(aborted, StepMeta())
    assert bench.side.new_request(bench.request("again"), PARAMS)


def test_a_half_that_ends_while_it_loads_is_not_held(bench: Bench) -> None:
    """It was preempted, and is loaded from the pool: vLLM frees its blocks when it is told as received."""
    half = bench.request("half")
    assert bench.side.new_request(half, PARAMS)
    bench.step("half")
    preempted = StepMeta()
    bench.side.fill(preempted, bench.output(preempted=("half",)))
    assert preempted.preempted == [PARAMS.transfer_id]
    meta = StepMeta()
    assert not bench.side.finished(half, meta, loading=True)
    assert [tid for tid, _ in meta.withdrawals] == [PARAMS.transfer_id]
    assert bench.side.new_request(bench.request("again"), PARAMS)


def test_a_held_prompt_is_named_when_nothing_can_run(bench: Bench) -> None:
    bench.compute("held")
    found = []
    for i in range(3):
        bench.now_s = i * YIELD_S
        bench.side.yielding.asked(prefill.RequestId("waiting"))
        found.append(bench.step().yields)
    assert found == [[], [PARAMS.transfer_id], [PARAMS.transfer_id]]
    bench.side.freed({"held"})
    bench.now_s += YIELD_S
    bench.side.yielding.asked(prefill.RequestId("waiting"))
    assert bench.step().yields == []
