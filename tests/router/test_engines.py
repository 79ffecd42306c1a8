"""Health, pairing and what /readyz tells of them."""

from __future__ import annotations

import json
import logging

import pytest

from lmkv.router.health import lmkv_trouble
from lmkv.router.pairs import PairState

from .conftest import Build
from .fakes import FakeEngine, drop, until


async def test_an_engine_that_comes_back_is_used_again(build: Build) -> None:
    s = await build()
    engine = s.router.engines.decode[0]
    await s.decode[0].stop()
    await until(lambda: not engine.healthy, "down")
    status, ready = await s.get("/readyz")
    assert (status, ready["ready"], ready["reasons"]) == (503, False, ["no decode engine is healthy"])
    await s.decode[0].start()
    await until(lambda: engine.healthy, "up again")
    assert (await s.get("/readyz"))[0] == 200
    assert (await s.chat(stream=True))[0] == 200


async def test_an_engine_that_calls_itself_sick_is_not_used(build: Build) -> None:
    s = await build(decode=2)
    s.decode[0].health = 503
    await until(lambda: not s.router.engines.decode[0].healthy, "down")
    for _ in range(4):
        await s.chat()
    assert [len(e.seen) for e in s.decode] == [0, 4]
    status, ready = await s.get("/readyz")
    assert status == 200
    assert any("answers 503" in warning for warning in ready["warnings"])


def die_but_serve(engine: FakeEngine) -> None:
    """As lmkv.vllm.health answers where only lmkv is dead."""
    engine.health, engine.health_body = 503, json.dumps({"trouble": "the worker loop of rank 0 has failed"}).encode()


async def test_an_engine_in_which_only_lmkv_is_dead_is_used_when_there_is_no_other(build: Build) -> None:
    s = await build(decode=2)
    first, second = s.router.engines.decode
    die_but_serve(s.decode[0])
    await until(lambda: not first.healthy, "down")
    for _ in range(4):
        assert (await s.chat())[0] == 200
    assert [len(e.seen) for e in s.decode] == [0, 4]
    s.decode[1].health = 503  # vLLM itself is dead there
    await until(lambda: not second.healthy, "down, too")
    given = len(s.prefill[0].seen)
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "r"}) as reply:
        assert reply.status == 200
    assert [len(e.seen) for e in s.decode] == [1, 4] and len(s.prefill[0].seen) == given
    assert "kv_transfer_params" not in s.decode[0].seen[0].body
    _, entry = await s.get("/explain/r")
    assert (entry["mode"], entry["aggregated_why"]) == ("aggregated", "decode_plain")
    status, ready = await s.get("/readyz")
    assert (status, ready["ready"]) == (200, True)
    assert any("rank 0 has failed" in warning for warning in ready["warnings"])
    assert [(e["healthy"], e["plain"]) for e in ready["engines"]] == [(True, False), (False, True), (False, False)]
    assert (await s.get("/v1/models"))[1]["data"][0]["engine"] == "d0"
    s.decode[1].health = 200
    await until(lambda: second.healthy, "up again")
    assert (await s.chat())[0] == 200
    assert [len(e.seen) for e in s.decode] == [1, 5]


async def test_a_plain_engine_that_fails_a_request_is_tried_again(build: Build) -> None:
    s = await build()
    die_but_serve(s.decode[0])
    await until(lambda: s.router.engines.decode[0].is_plain, "plain")
    s.decode[0].script = [drop]
    assert (await s.chat())[0] == 200
    assert len(s.decode[0].seen) == 2 and s.router.engines.decode[0].is_plain


async def test_a_prefill_engine_in_which_lmkv_is_dead_gets_nothing(build: Build) -> None:
    s = await build()
    die_but_serve(s.prefill[0])
    await until(lambda: not s.router.engines.prefill[0].healthy, "down")
    assert (await s.chat())[0] == 200
    assert not s.prefill[0].seen and len(s.decode[0].seen) == 1


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b'{"trouble": 1}', b'{"trouble": ""}'])
def test_other_words_of_an_engine_do_not_count_as_lmkvs(body: bytes) -> None:
    assert lmkv_trouble(body) == ""


async def test_prefill_down_is_a_warning_only(build: Build) -> None:
    s = await build()
    await s.prefill[0].stop()
    await until(lambda: not s.router.engines.prefill[0].healthy, "down")
    status, ready = await s.get("/readyz")
    assert (status, ready["ready"]) == (200, True)
    assert any("compute prompts themselves" in warning for warning in ready["warnings"])


async def test_pairs_are_met_before_the_first_request(build: Build) -> None:
    s = await build(prefill=2, decode=2)
    for decode in s.decode:
        assert sorted(decode.control.met) == sorted(p.control.address for p in s.prefill)
    for prefill in s.prefill:
        assert not prefill.control.met
    _, ready = await s.get("/readyz")
    assert {(pair["prefill"], pair["decode"], pair["state"]) for pair in ready["pairs"]} == {
        (p.url[7:], d.url[7:], "ready") for p in s.prefill for d in s.decode
    }


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_new_incarnation_is_met_again(build: Build, side: str) -> None:
    s = await build()
    control = (s.prefill if side == "prefill" else s.decode)[0].control
    control.incarnation = "f" * 16
    if side == "decode":
        control.peers.clear()
    await until(lambda: len(s.decode[0].control.met) == 2, "met again")
    await s.paired()


async def test_a_lost_pair_is_met_again(build: Build) -> None:
    s = await build()
    s.decode[0].control.peers.clear()
    await until(lambda: len(s.decode[0].control.met) == 2, "met again")
    await s.paired()


async def test_a_pair_that_stays_ready_is_left_alone(build: Build) -> None:
    s = await build(control_interval_s=0.02)
    pair = s.router.pairs.pairs[0]
    seen = []
    await until(lambda: seen.append(pair.state) or len(seen) > 40, "many looks")  # type: ignore[func-returns-value]
    assert set(seen) == {PairState.READY}
    assert len(s.decode[0].control.met) == 1


REFUSAL = "the peer differs in 'kv_dtype': ours 'bf16', theirs 'fp8'"


async def test_a_refused_pair_is_never_chosen_and_is_told(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmkv")
    s = await build(decode=2, paired=False, refusal=REFUSAL)
    first, second = s.router.pairs.pairs
    await until(lambda: first.state is PairState.REFUSED and second.state is PairState.READY, "refused")
    for _ in range(6):
        await s.chat(stream=True)
    assert [len(e.seen) for e in s.decode] == [0, 6]
    assert all("kv_transfer_params" in seen.body for seen in s.decode[1].seen)
    _, ready = await s.get("/readyz")
    assert any("kv_dtype" in warning and "refused" in warning for warning in ready["warnings"])
    told = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(told) == 1 and "kv_dtype" in told[0]


async def test_all_pairs_refused_means_decode_alone(build: Build) -> None:
    s = await build(paired=False, refusal=REFUSAL)
    await until(lambda: s.router.pairs.pairs[0].state is PairState.REFUSED, "refused")
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "r"}) as reply:
        assert reply.status == 200
        await reply.read()
    assert not s.prefill[0].seen
    _, entry = await s.get("/explain/r")
    assert entry["aggregated_why"] == "pairs_refused"


async def test_a_refused_pair_stays_refused_while_the_engine_is_silent(build: Build) -> None:
    s = await build(paired=False, refusal=REFUSAL, meet_timeout_s=0.1)
    pair = s.router.pairs.pairs[0]
    await until(lambda: pair.state is PairState.REFUSED, "refused")
    s.decode[0].control.silent = True
    await until(lambda: s.router.engines.decode[0].control_trouble, "silence noticed")
    assert pair.state is PairState.REFUSED


async def test_requests_are_served_while_the_control_plane_is_silent(build: Build) -> None:
    """Engines also pair on the request's own `peer`: an unknown pair is used."""
    s = await build(paired=False)
    for engine in s.engines:
        engine.control.silent = True
    assert (await s.chat(stream=True))[0] == 200
    assert s.decode[0].seen[0].lmkv["role"] == "decode"
    await until(lambda: s.router.engines.decode[0].control_trouble.startswith("LMKV-N701"), "silence noticed")


async def test_a_cold_pair_waits_behind_a_warm_one(build: Build) -> None:
    s = await build(decode=2)
    s.decode[0].control.silent = True
    s.decode[0].control.incarnation = "d" * 16
    pair = s.router.pairs.pairs[0]
    s.prefill[0].control.incarnation = "e" * 16
    await until(lambda: pair.state is PairState.UNKNOWN and s.router.pairs.pairs[1].met
                and s.router.pairs.pairs[1].met[0] == "e" * 16, "one pair cold")  # fmt: skip
    for _ in range(4):
        await s.chat()
    assert [len(e.seen) for e in s.decode] == [0, 4]
