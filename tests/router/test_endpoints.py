"""The small endpoints."""

from __future__ import annotations

import json

from lmkv.obs.metrics import TABLE
from lmkv.router.ledger import AttemptEntry, Ledger
from lmkv.wire import PROTOCOL

from .conftest import Build
from .fakes import answers, like_vllm
from .test_streaming import read_metrics


async def test_live_ready_version(build: Build) -> None:
    s = await build()
    for path in ("/healthz", "/health"):
        async with s.client.get(s.url + path) as reply:
            assert reply.status == 200
    status, ready = await s.get("/readyz")
    assert (status, ready["ready"], ready["reasons"], ready["warnings"]) == (200, True, [], [])
    assert [(e["side"], e["healthy"], e["trouble"]) for e in ready["engines"]] == [
        ("prefill", True, ""),
        ("decode", True, ""),
    ]
    _, version = await s.get("/version")
    assert version["version"] and version["protocol"] == PROTOCOL


async def test_models_come_from_a_decode_engine(build: Build) -> None:
    s = await build(decode=2, health_interval_s=30.0)
    assert (await s.get("/v1/models"))[1]["data"][0]["engine"] == "d0"
    await s.decode[0].stop()
    assert (await s.get("/v1/models"))[1]["data"][0]["engine"] == "d1"
    await s.decode[1].stop()
    assert (await s.get("/v1/models"))[0] in (502, 503)


async def test_unknown_paths_and_methods(build: Build) -> None:
    s = await build()
    status, body = await s.get("/v1/nothing")
    assert (status, body["error"]["type"]) == (404, "NotFoundError")
    async with s.client.get(s.url + "/v1/completions") as reply:
        assert reply.status == 405


async def test_explain_joins_three_ledgers(build: Build) -> None:
    s = await build()
    s.decode[0].script = [answers(500, {"error": {}})]
    s.decode[0].behaviour = like_vllm
    body = {"prompt": "a", "stream": True}
    async with s.client.post(s.url + "/v1/completions", json=body, headers={"X-Request-Id": "r1"}) as reply:
        await reply.read()
        transfer_id = reply.headers["X-Lmkv-Transfer-Id"]
    s.prefill[0].control.ledgers[transfer_id] = b'{"bytes": 7}'
    s.decode[0].control.ledgers[transfer_id] = b'{"tokens": 3}'
    _, by_request = await s.get("/explain/r1")
    _, by_transfer = await s.get(f"/explain/{transfer_id}")
    assert by_request == by_transfer
    first, second = by_request["attempts"]
    assert first["trouble"].startswith("status: ") and first["engines"] == {"prefill": None, "decode": None}
    assert second["engines"] == {"prefill": {"bytes": 7}, "decode": {"tokens": 3}}
    assert second["decode_why"].startswith("least-loaded")
    assert first["transfer_id"] != second["transfer_id"] == transfer_id
    assert 0 <= second["dispatched_ms"] <= second["first_token_ms"] <= by_request["first_byte_ms"]
    assert (by_request["status"], by_request["mode"], by_request["streamed"]) == (200, "pd", True)


async def test_explain_with_an_engine_that_does_not_answer(build: Build) -> None:
    s = await build(explain_timeout_s=0.1)
    await s.chat()
    transfer_id = s.decode[0].seen[0].lmkv["transfer_id"]
    s.prefill[0].control.silent = True
    s.decode[0].control.ledgers[transfer_id] = b"not json"
    _, entry = await s.get(f"/explain/{transfer_id}")
    told = entry["attempts"][0]["engines"]
    assert "LMKV-N701" in told["prefill"]["trouble"]
    assert "not JSON" in told["decode"]["trouble"]


async def test_explain_of_something_unknown(build: Build) -> None:
    s = await build()
    status, body = await s.get("/explain/nothing")
    assert status == 404 and "nothing" in body["error"]["message"]


def test_the_ledger_forgets_the_oldest_and_keeps_repeated_ids_apart() -> None:
    ledger = Ledger(2)
    first = ledger.open("same", "/", 1)
    second = ledger.open("same", "/", 2)
    ledger.add(first, AttemptEntry("t1", None, "d", "", "", 0.0))  # type: ignore[arg-type]
    ledger.add(second, AttemptEntry("t2", None, "d", "", "", 0.0))  # type: ignore[arg-type]
    assert ledger.find("same") is second
    assert ledger.find("t1") is first
    ledger.open("other", "/", 3)
    assert ledger.find("t1") is None
    assert ledger.find("same") is second
    ledger.add(first, AttemptEntry("t3", None, "d", "", "", 0.0))  # type: ignore[arg-type]
    assert ledger.find("t3") is None
    ledger.open("last", "/", 4)
    assert ledger.find("same") is None and ledger.find("t2") is None


async def test_metrics_have_the_names_of_the_table(build: Build) -> None:
    s = await build()
    s.prefill[0].behaviour = answers(500, {})
    s.decode[0].script = [answers(500, {})]
    await s.chat(stream=True)
    await s.chat(prompt_logprobs=1)
    metrics = await read_metrics(s)
    engine = s.decode[0].url[7:]
    assert metrics['lmkv_router_requests_total{endpoint="chat",mode="pd",status="200"}'] == 1
    assert metrics['lmkv_router_requests_total{endpoint="chat",mode="aggregated",status="200"}'] == 1
    assert metrics['lmkv_router_aggregated_total{reason="prompt_logprobs"}'] == 1
    assert metrics[f'lmkv_router_retries_total{{engine="{engine}",reason="status"}}'] == 1
    assert metrics[f'lmkv_router_engine_up{{engine="{engine}",side="decode"}}'] == 1
    assert metrics['lmkv_router_first_byte_seconds_count{endpoint="chat"}'] == 2
    assert metrics["lmkv_router_in_flight"] == 0
    exposed = {name.partition("{")[0] for name in metrics}
    for spec in TABLE:
        if spec.name.startswith("lmkv_router_"):
            assert any(name.startswith(spec.name) for name in exposed) or spec.labels, spec.name


async def test_errors_are_json_in_openais_form(build: Build) -> None:
    s = await build()
    async with s.client.post(s.url + "/v1/chat/completions", data=b"{") as reply:
        assert reply.content_type == "application/json"
        error = json.loads(await reply.read())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
