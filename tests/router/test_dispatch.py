"""One request becomes two, at the same moment."""

from __future__ import annotations

import asyncio
import io
import json

import msgspec
import pytest
from aiohttp import web

from .conftest import Build
from .fakes import Seen, after_arrival_at, answers, hang, like_vllm, until, within
from .test_bodies import DELICATE, joined


def raw(body: bytes) -> dict[str, bytes]:
    return {name: bytes(value) for name, value in msgspec.json.decode(body, type=dict[str, msgspec.Raw]).items()}


async def test_both_engines_get_the_same_transfer_and_each_others_address(build: Build) -> None:
    s = await build()
    s.decode[0].behaviour = after_arrival_at(s.prefill, like_vllm)
    assert (await s.chat(stream=True))[0] == 200
    (p,), (d,) = s.prefill[0].seen, s.decode[0].seen
    assert p.lmkv["transfer_id"] == d.lmkv["transfer_id"]
    assert len(p.lmkv["transfer_id"]) == 32
    assert p.lmkv == {**p.lmkv, "role": "prefill", "peer": {"address": s.decode[0].control.address}}
    assert d.lmkv == {**d.lmkv, "role": "decode", "peer": {"address": s.prefill[0].control.address}}
    assert (p.body["max_tokens"], p.body["stream"], "max_tokens" in d.body) == (1, False, False)


async def test_neither_is_awaited_by_the_other(build: Build) -> None:
    """Each engine answers only after the other one has its request: a serial router would hang here."""
    s = await build()
    both = asyncio.Barrier(2)

    async def wait_for_the_other(request: web.Request, seen: Seen) -> web.StreamResponse:
        await both.wait()
        return await like_vllm(request, seen)

    s.prefill[0].behaviour = s.decode[0].behaviour = wait_for_the_other
    for _ in range(5):
        assert (await within(s.chat(stream=True)))[0] == 200


async def test_the_answer_does_not_wait_for_prefills_answer(build: Build) -> None:
    s = await build()
    s.prefill[0].behaviour = hang
    status, body = await within(s.chat(stream=True))
    assert (status, body.endswith(b"data: [DONE]\n\n")) == (200, True)
    (p,) = s.prefill[0].seen
    await within(p.done.wait())
    assert p.aborted


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_bodies_with_n_logprobs_tools_and_odd_numbers_arrive_unharmed(build: Build, path: str) -> None:
    s = await build()
    s.decode[0].behaviour = after_arrival_at(s.prefill, like_vllm)
    members = dict(DELICATE)
    headers = {"Content-Type": "application/json"}
    async with s.client.post(s.url + path, data=joined(members), headers=headers) as reply:
        assert reply.status == 200
        await reply.read()
    arrived = raw(s.decode[0].seen[0].raw)
    del arrived["kv_transfer_params"]
    assert arrived == members
    at_prefill = raw(s.prefill[0].seen[0].raw)
    assert (at_prefill["n"], at_prefill["messages"]) == (b"1", members["messages"])
    assert not at_prefill.keys() & {"logprobs", "top_logprobs", "stop"}


async def test_a_large_body_passes(build: Build) -> None:
    s = await build()
    image = "A" * (20 << 20)
    body = io.BytesIO(json.dumps({"messages": [{"role": "user", "content": image}]}).encode())
    async with s.client.post(s.url + "/v1/chat/completions", data=body) as reply:
        assert reply.status == 200
    assert s.decode[0].seen[0].body["messages"][0]["content"] == image


async def test_a_body_over_the_limit_is_refused(build: Build) -> None:
    s = await build(max_body_bytes=1000)
    status, body = await s.chat(messages=[{"role": "user", "content": "A" * 2000}])
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (413, 413)
    assert "1000 bytes" in error["message"]
    assert not s.decode[0].seen


async def test_a_body_that_does_not_come_ends_in_time(build: Build) -> None:
    s = await build(idle_timeout_s=0.3)
    host, port = s.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    status = await asyncio.wait_for(reader.readline(), 5)
    assert b" 408 " in status and not s.decode[0].seen
    writer.close()


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"kv_transfer_params":{"lmkv":{"transfer_id":"x"}}}', b'{"kv_transfer_params":1}']
)
async def test_refused_bodies_reach_no_engine(build: Build, body: bytes) -> None:
    s = await build()
    async with s.client.post(s.url + "/v1/completions", data=body) as reply:
        error = (await reply.json())["error"]
        assert (reply.status, error["type"], error["code"]) == (400, "BadRequestError", 400)
        assert "LMKV-R601" in error["message"]
        assert reply.headers["X-Request-Id"]
    assert not s.decode[0].seen and not s.prefill[0].seen


@pytest.mark.parametrize(
    ("path", "members", "reason"),
    [
        ("/v1/chat/completions", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/chat/completions", {"use_beam_search": True}, "use_beam_search"),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 1}, "echo_logprobs"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "batch"),
        ("/v1/completions", {"prompt": [[1], [2, 3]]}, "batch"),
    ],
)
async def test_what_is_not_fit_goes_to_decode_alone(
    build: Build, path: str, members: dict[str, object], reason: str
) -> None:
    s = await build()
    async with s.client.post(s.url + path, json=members, headers={"X-Request-Id": "r1"}) as reply:
        assert reply.status == 200
        assert "X-Lmkv-Transfer-Id" not in reply.headers
        await reply.read()
    assert not s.prefill[0].seen
    assert s.decode[0].seen[0].body == members
    _, entry = await s.get("/explain/r1")
    assert (entry["mode"], entry["aggregated_why"]) == ("aggregated", reason)


async def test_without_prefill_engines_decode_works_alone(build: Build) -> None:
    s = await build(prefill=0)
    assert (await s.chat(stream=True))[0] == 200
    assert "kv_transfer_params" not in s.decode[0].seen[0].body


async def test_a_dead_prefill_engine_is_not_asked(build: Build) -> None:
    s = await build()
    await s.prefill[0].stop()
    await until(lambda: not s.router.engines.prefill[0].healthy, "prefill down")
    assert (await s.chat(stream=True))[0] == 200
    assert "kv_transfer_params" not in s.decode[0].seen[0].body


async def test_no_decode_engine(build: Build) -> None:
    s = await build()
    await s.decode[0].stop()
    await until(lambda: not s.router.engines.decode[0].healthy, "decode down")
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a"}) as reply:
        error = (await reply.json())["error"]
        assert (reply.status, reply.headers["Retry-After"], error["type"]) == (503, "1", "ServiceUnavailableError")
    assert not s.prefill[0].seen


@pytest.mark.parametrize(
    "failing", [answers(500, {"error": {"message": "boom"}}), answers(400, {"error": {"message": "no"}})]
)
async def test_prefill_failing_alone_fails_nothing(build: Build, failing: object) -> None:
    s = await build()
    s.prefill[0].behaviour = failing  # type: ignore[assignment]
    released = asyncio.Event()

    async def late(request: web.Request, seen: Seen) -> web.StreamResponse:
        await released.wait()
        return await like_vllm(request, seen)

    s.decode[0].behaviour = late
    asked = asyncio.create_task(s.chat(stream=True))
    await until(lambda: s.router.ledger.find(s.decode[0].seen[0].lmkv["transfer_id"]).attempts[0].prefill_trouble
                if s.decode[0].seen else False, "prefill's failure noted")  # fmt: skip
    released.set()
    assert (await within(asked))[0] == 200
    assert len(s.decode[0].seen) == 1
    assert s.router.engines.prefill[0].healthy
    _, entry = await s.get("/explain/" + s.decode[0].seen[0].lmkv["transfer_id"])
    assert entry["attempts"][0]["prefill_trouble"].startswith("status: ")


async def test_prefill_losing_its_connection_is_marked_down_at_once(build: Build) -> None:
    s = await build(health_interval_s=30.0)
    await s.prefill[0].stop()
    assert (await within(s.chat(stream=True)))[0] == 200
    engine = s.router.engines.prefill[0]
    await until(lambda: not engine.healthy, "prefill marked down")
    assert len(s.decode[0].seen) == 1
    assert (await s.chat(stream=True))[0] == 200
    assert "kv_transfer_params" not in s.decode[0].seen[1].body


async def test_load_spreads_and_is_given_back(build: Build) -> None:
    s = await build(prefill=2, decode=2)
    await asyncio.gather(*(s.chat(stream=True) for _ in range(8)))
    assert [len(e.seen) for e in s.engines] == [4, 4, 4, 4]


async def test_a_prompt_weighs_on_prefill_until_it_is_computed(build: Build) -> None:
    s = await build()
    prefill, decode = s.router.engines.all
    go_on = asyncio.Event()

    async def when_told(request: web.Request, seen: Seen) -> web.StreamResponse:
        await go_on.wait()
        return await like_vllm(request, seen)

    s.prefill[0].behaviour = when_told
    s.decode[0].behaviour = hang
    asking = asyncio.create_task(s.chat(stream=True))
    await until(lambda: s.prefill[0].seen, "prefill asked")
    assert (prefill.requests, decode.requests) == (1, 1)
    assert prefill.prompt_bytes > 50 and decode.prompt_bytes == 0
    go_on.set()
    await until(lambda: prefill.requests == 0, "prefill done")
    assert (prefill.prompt_bytes, decode.requests) == (0, 1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: decode.requests == 0, "decode given up")


async def test_headers_pass_both_ways(build: Build) -> None:
    s = await build()
    s.decode[0].behaviour = after_arrival_at(s.prefill, like_vllm)
    sent = {
        "Authorization": "Bearer client",
        "X-Request-Id": "my-id",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "X-Session-Id": "s1",
        "X-Data-Parallel-Rank": "1",
        "Accept-Encoding": "gzip",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
    }
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a", "stream": True}, headers=sent) as reply:
        await reply.read()
        assert reply.headers["X-Request-Id"] == "my-id"
        assert reply.headers["X-Engine"] == "fake"
        assert reply.headers["X-Lmkv-Transfer-Id"] == s.decode[0].seen[0].lmkv["transfer_id"]
        assert reply.headers.getall("Content-Type") == ["text/event-stream; charset=utf-8"]
    for engine in s.engines:
        got = {name.lower(): value for name, value in engine.seen[0].headers.items()}
        assert (got["authorization"], got["x-request-id"]) == ("Bearer client", "my-id")
        assert (got["traceparent"], got["x-session-id"]) == (sent["traceparent"], "s1")
        assert got["accept-encoding"] == "identity"
        assert not got.keys() & {"x-data-parallel-rank", "x-hop"}


async def test_a_missing_request_id_is_made(build: Build) -> None:
    s = await build()
    s.decode[0].behaviour = after_arrival_at(s.prefill, like_vllm)
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a"}) as reply:
        made = reply.headers["X-Request-Id"]
    assert len(made) == 32
    assert {e.seen[0].headers["X-Request-Id"] for e in s.engines} == {made}


async def test_keys(build: Build) -> None:
    s = await build(api_key="outer", engine_api_key="inner")
    s.decode[0].behaviour = after_arrival_at(s.prefill, like_vllm)
    url, body = s.url + "/v1/completions", {"prompt": "a"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "outer"}, {"Authorization": "Bearer é"}):
        async with s.client.post(url, json=body, headers=headers) as reply:
            error = (await reply.json())["error"]
            assert (reply.status, error["type"]) == (401, "AuthenticationError")
        async with s.client.get(s.url + "/v1/models", headers=headers) as reply:
            assert reply.status == 401
    assert not s.decode[0].seen
    async with s.client.post(url, json=body, headers={"Authorization": "Bearer outer"}) as reply:
        assert reply.status == 200
        await reply.read()
    assert {e.seen[0].headers["Authorization"] for e in s.engines} == {"Bearer inner"}


async def test_the_routers_key_does_not_reach_engines(build: Build) -> None:
    s = await build(api_key="outer")
    headers = {"Authorization": "Bearer outer"}
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a"}, headers=headers) as reply:
        assert reply.status == 200
    assert "Authorization" not in s.decode[0].seen[0].headers
