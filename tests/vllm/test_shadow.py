"""What an engine tells a probe, and which requests count as what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmkv.ids import Incarnation, RequestId
from lmkv.vllm.params import is_approximate, is_probe, ledger_id, request_params
from lmkv.vllm.shadow import Probes, pool_source, prompt_digest
from lmkv.vllm.specs import LoadSpec, PageSource

PROBE = {"lmkv": {"probe": True, "approximate": True}}
NAME = "f" * 32


def request(name: str, params: Any = None, ids: Any = (1, 2, 3), features: Any = ()) -> Any:
    return SimpleNamespace(
        request_id=name, kv_transfer_params=params, prompt_token_ids=list(ids), mm_features=list(features)
    )


def image(identifier: str, offset: int = 4) -> Any:
    return SimpleNamespace(
        modality="image", identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=3)
    )


def test_a_probe_is_told_what_the_prefix_cache_had() -> None:
    probes = Probes("torch.float32", "auto")
    probe, other = request("p", PROBE), request("o", {"lmkv": {"approximate": True}})
    for each in (probe, other):
        probes.scheduled(each, 640)
    probes.scheduled(probe, 0)  # preempted, and its blocks were taken
    probes.scheduled(probe, 700)  # and now it finds what it has computed itself
    assert probes.reply(other) is None and probes.reply(request("plain")) is None
    told = probes.reply(probe)
    assert told == {
        "lmkv": {
            "probe": {"cached_tokens": 0, "prompt": prompt_digest(probe), "dtype": "torch.float32", "kv_dtype": "auto"}
        }
    }
    assert probes.reply(probe) is None, "nothing is kept of a request that has ended"


def test_other_prompts_have_other_digests() -> None:
    prompts = [
        request("a"),
        request("b", ids=(1, 2)),
        request("c", ids=(1, 3, 2)),
        request("d", features=[image("x")]),
        request("e", features=[image("y")]),
        request("f", features=[image("x", 5)]),
    ]
    assert len({prompt_digest(each) for each in prompts}) == len(prompts)
    assert prompt_digest(request("g")) == prompt_digest(prompts[0])


@pytest.mark.parametrize("params", [PROBE, {"lmkv": {"ledger": NAME}}, {"lmkv": {"approximate": True}}, None, {}])
def test_requests_without_a_transfer_are_taken_silently(params: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert request_params(params) is None and not caplog.records


def test_what_is_a_probe_and_what_has_a_ledger() -> None:
    assert is_probe(PROBE) and is_approximate(PROBE) and ledger_id(PROBE) is None
    assert not is_probe({"lmkv": {"ledger": NAME}}) and not is_probe({"lmkv": 3}) and not is_probe(None)
    assert ledger_id({"lmkv": {"ledger": NAME}}) == NAME == ledger_id({"lmkv": {"transfer_id": NAME, "role": "decode"}})
    for bad in (None, {}, {"lmkv": []}, {"lmkv": {"ledger": 5}}, {"lmkv": {"ledger": "short"}}):
        assert ledger_id(bad) is None


def test_the_pages_of_a_load_are_named() -> None:
    nodes = [Incarnation("a" * 16), Incarnation("a" * 16), Incarnation("b" * 16)]
    pages = tuple(PageSource(i, bytes([i]) * 16, node, 1, 0.0, (0,), ((1,),)) for i, node in enumerate(nodes))
    spec = LoadSpec(RequestId("r"), b"n" * 16, (0, 384), (), pages, 0.0)
    assert pool_source(spec, 256) == {
        "tokens": [0, 256],
        "namespace": (b"n" * 16).hex(),
        "nodes": {
            "a" * 16: {"first_chunk": 0, "first_key": "00" * 16, "last_chunk": 1, "last_key": "01" * 16, "pages": 2},
            "b" * 16: {"first_chunk": 2, "first_key": "02" * 16, "last_chunk": 2, "last_key": "02" * 16, "pages": 1},
        },
    }
