"""Until the first token another attempt is invisible to the client."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from .conftest import Build, System
from .fakes import (
    DONE,
    Behaviour,
    Seen,
    after_arrival_at,
    answers,
    chat_chunk,
    chat_stream,
    drop,
    error_chunk,
    hang,
    like_vllm,
    role_chunk,
    streams,
    streams_then_dies,
    streams_then_hangs,
    within,
)

ANSWER = b"".join(chat_stream(["He", "llo"]))

FAILURES: dict[str, tuple[Behaviour, str]] = {
    "connection dropped": (drop, "connection"),
    "500": (answers(500, {"error": {"message": "boom"}}), "status"),
    "503": (answers(503, {"error": {"message": "later"}}), "status"),
    "error event first": (streams([error_chunk(), DONE]), "error_event"),
    "error event behind role": (streams([role_chunk(), error_chunk(), DONE]), "error_event"),
    "error event in one write with role": (streams([role_chunk() + error_chunk() + DONE]), "error_event"),
    "dies after role": (streams_then_dies([role_chunk()]), "connection"),
    "dies after half a token": (streams_then_dies([role_chunk(), chat_chunk("a")[:20]]), "connection"),
    "ends after role": (streams([role_chunk()]), "no_token"),
    "hangs": (hang, "deadline"),
    "hangs after role": (streams_then_hangs([role_chunk()]), "deadline"),
}


def transfer_ids(s: System) -> list[str]:
    return [seen.lmkv["transfer_id"] for engine in s.decode for seen in engine.seen]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("engines", [1, 2])
async def test_failure_before_the_first_token_is_retried(build: Build, failure: str, engines: int) -> None:
    behaviour, reason = FAILURES[failure]
    s = await build(prefill=engines, decode=engines, first_token_timeout_s=0.5)
    s.decode[0].script = [after_arrival_at(s.prefill, behaviour)]
    for engine in s.decode:
        engine.behaviour = after_arrival_at(s.prefill, like_vllm)
    status, body = await within(s.chat(stream=True))
    assert (status, body) == (200, ANSWER)
    ids = transfer_ids(s)
    assert len(ids) == 2 and len(set(ids)) == 2
    assert {seen.lmkv["transfer_id"] for e in s.prefill for seen in e.seen} == set(ids)
    if engines == 2:
        assert [len(e.seen) for e in s.engines] == [1, 1, 1, 1]
    _, entry = await s.get(f"/explain/{ids[1]}")
    first, second = entry["attempts"]
    assert first["trouble"].startswith(reason + ": ")
    assert second["trouble"] == ""
    assert entry["outcome"] == "answered"


@pytest.mark.parametrize("failure", ["connection dropped", "500"])
async def test_answers_that_are_not_streamed_are_retried_too(build: Build, failure: str) -> None:
    s = await build()
    s.decode[0].script = [FAILURES[failure][0]]
    status, body = await within(s.chat())
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "Hello")
    assert len(set(transfer_ids(s))) == 2


async def test_a_body_that_breaks_off_is_retried(build: Build) -> None:
    async def half(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "100"})
        await reply.prepare(request)
        await reply.write(b'{"id":')
        return await drop(request, seen)

    s = await build()
    s.decode[0].script = [half]
    status, body = await within(s.chat())
    assert (status, "choices" in json.loads(body)) == (200, True)


async def test_a_late_unstreamed_answer_is_retried(build: Build) -> None:
    s = await build(response_timeout_s=0.5)
    s.decode[0].script = [hang]
    assert (await within(s.chat()))[0] == 200


@pytest.mark.parametrize("failure", ["error event behind role", "hangs"])
async def test_both_requests_are_aborted_before_the_next_attempt(build: Build, failure: str) -> None:
    s = await build(first_token_timeout_s=0.5)
    s.prefill[0].script = [hang]
    behaviour = FAILURES[failure][0]
    s.decode[0].script = [after_arrival_at(s.prefill, behaviour)]
    at_second: list[bool] = []

    async def second(request: web.Request, seen: Seen) -> web.StreamResponse:
        first = s.prefill[0].seen[0]
        await within(first.done.wait())
        at_second.append(first.aborted)
        if behaviour is hang:
            await within(s.decode[0].seen[0].done.wait())
            at_second.append(s.decode[0].seen[0].aborted)
        return await streams(chat_stream(["a"]))(request, seen)

    s.decode[0].behaviour = second
    assert (await within(s.chat(stream=True)))[0] == 200
    assert at_second and all(at_second)


async def test_nothing_goes_to_the_client_before_the_first_token(build: Build) -> None:
    """Not even the status line: the fake sends role chunks, a comment, an error; the client must still be waiting."""
    s = await build(retries=1)
    s.decode[0].script = [streams([role_chunk(), b": keep-alive\n\n", error_chunk(), DONE])]
    token = asyncio.Event()

    async def role_then_wait(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(role_chunk())
        await token.wait()
        await reply.write(chat_chunk("a") + DONE)
        return reply

    s.decode[0].behaviour = role_then_wait
    host, port = s.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"messages":[],"stream":true}'
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    reading = asyncio.create_task(reader.read())
    while len(s.decode[0].seen) < 2:
        await within(s.decode[0].arrival.wait())
        s.decode[0].arrival.clear()
    await asyncio.sleep(0.2)
    assert not reader.at_eof() and not reading.done() and not reader._buffer  # type: ignore[attr-defined]
    token.set()
    answer = await within(reading)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert role_chunk() + chat_chunk("a") + DONE in answer
    assert b'"error"' not in answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
@pytest.mark.parametrize("stream", [True, False])
async def test_4xx_is_relayed_as_it_is_and_once(build: Build, status: int, stream: bool) -> None:
    said = {"error": {"message": "é too long", "type": "BadRequestError", "param": None, "code": status}}
    s = await build(decode=2)
    for engine in s.engines:
        engine.behaviour = answers(status, said, {"X-Why": "because", "Retry-After": "7"})
    async with s.client.post(s.url + "/v1/chat/completions", json={"messages": [], "stream": stream}) as reply:
        assert (reply.status, await reply.read()) == (status, json.dumps(said).encode())
        assert (reply.headers["X-Why"], reply.headers["Retry-After"]) == ("because", "7")
    assert sum(len(e.seen) for e in s.decode) == 1


async def test_an_error_event_that_blames_the_client_is_relayed(build: Build) -> None:
    s = await build()
    said = role_chunk() + error_chunk("bad grammar", 400) + DONE
    s.decode[0].behaviour = streams([said])
    assert await s.chat(stream=True) == (200, said)
    assert len(s.decode[0].seen) == 1


async def test_retries_end_with_the_engines_own_words(build: Build) -> None:
    s = await build(retries=2)
    s.decode[0].behaviour = answers(500, {"error": {"message": "boom"}})
    status, body = await s.chat(stream=True)
    assert (status, json.loads(body)) == (500, {"error": {"message": "boom"}})
    assert len(set(transfer_ids(s))) == 3


@pytest.mark.parametrize(("failure", "status"), [("error event behind role", 502), ("hangs", 504)])
async def test_retries_end_with_an_error_in_openais_form(build: Build, failure: str, status: int) -> None:
    s = await build(retries=1, first_token_timeout_s=0.3)
    s.decode[0].behaviour = FAILURES[failure][0]
    got, body = await within(s.chat(stream=True))
    error = json.loads(body)["error"]
    assert (got, error["code"]) == (status, status)
    assert "2 attempts failed" in error["message"]
    assert len(s.decode[0].seen) == 2


async def test_no_retry_when_retries_are_off(build: Build) -> None:
    s = await build(retries=0)
    s.decode[0].script = [answers(500, {"error": {}})]
    assert (await s.chat())[0] == 500
    assert len(s.decode[0].seen) == 1


async def test_the_only_decode_engine_dying_is_told(build: Build) -> None:
    """Between two polls: the router notices by itself, asks again, and answers 503 instead of trying in vain."""
    s = await build(health_interval_s=30.0)
    await s.decode[0].stop()
    status, body = await within(s.chat(stream=True))
    assert status == 503
    assert "after 1 attempts" in json.loads(body)["error"]["message"]


async def test_a_dead_decode_engine_is_passed_over_between_polls(build: Build) -> None:
    s = await build(decode=2, health_interval_s=30.0)
    await s.decode[0].stop()
    for _ in range(4):
        assert (await within(s.chat(stream=True))) == (200, ANSWER)
    assert len(s.decode[1].seen) == 4


async def test_an_engine_that_cannot_be_connected_counts_as_lost(build: Build) -> None:
    """A listener whose backlog is full takes no connection: the connect deadline, not the first token's, decides."""
    import socket

    s = await build(connect_timeout_s=0.3, health_interval_s=30.0)
    await s.decode[0].stop()
    listener = socket.create_server(("127.0.0.1", s.decode[0].port), backlog=0, reuse_port=False)
    filler = [socket.socket() for _ in range(4)]
    for each in filler:
        each.setblocking(False)
        each.connect_ex(listener.getsockname())
    try:
        status, _ = await within(s.chat(stream=True))
        assert status == 503
        entry = s.router.ledger.find(s.prefill[0].seen[0].lmkv["transfer_id"])
        assert entry is not None and entry.attempts[0].trouble.startswith("connection: ")
    finally:
        for each in [*filler, listener]:
            each.close()
