"""After the first token: bytes as they are, an end that can be told, and aborts that reach both engines."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp
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
    hang,
    role_chunk,
    streams,
    streams_then_dies,
    streams_then_hangs,
    until,
    within,
)


async def test_streamed_bytes_are_identical(build: Build) -> None:
    """Odd spellings, comments, cuts inside events and characters, text that is not even SSE: all as sent."""
    chunks = [
        role_chunk(),
        b'data:{"choices":[{"delta":{"content":"\xc3',
        b'\xa9"}}]}\n',
        b"\n: keep-alive\n\nevent: x\r\n\r\n",
        b"\x00\xff not sse at all",
        b"x" * 200_000,
        DONE,
    ]
    s = await build()
    s.decode[0].behaviour = streams(chunks, pause_s=0.01)
    assert await s.chat(stream=True) == (200, b"".join(chunks))


async def test_chunks_come_as_they_are_made(build: Build) -> None:
    """Each chunk is sent only after the client has read the one before: any buffering would hang."""
    s = await build()
    read = asyncio.Semaphore(0)
    words = [chat_chunk(word) for word in "abcdef"]

    async def paced(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(role_chunk())
        for word in words:
            await reply.write(word)
            await read.acquire()
        return reply

    s.decode[0].behaviour = paced
    async with s.client.post(s.url + "/v1/chat/completions", json={"messages": [], "stream": True}) as reply:
        assert await within(reply.content.readexactly(len(role_chunk()))) == role_chunk()
        for word in words:
            assert await within(reply.content.readexactly(len(word))) == word
            read.release()


async def test_unstreamed_bytes_are_identical(build: Build) -> None:
    body = b'{ "choices":[ {"x":1.50, "y":"\\u00e9\xc3\xa9"} ] ,"usage":{}}\n'

    async def answer(request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    s = await build()
    s.decode[0].behaviour = answer
    assert await s.chat() == (200, body)


async def test_a_compressed_answer_is_not_touched(build: Build) -> None:
    import gzip

    body = gzip.compress(b'{"choices":[]}')

    async def answer(request: web.Request, seen: Seen) -> web.StreamResponse:
        return web.Response(body=body, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})

    s = await build()
    s.decode[0].behaviour = answer
    async with s.client.post(s.url + "/v1/completions", json={"prompt": "a"}) as reply:
        assert (reply.headers["Content-Encoding"], await reply.read()) == ("gzip", body)


async def test_a_hundred_streams_at_once(build: Build) -> None:
    s = await build(prefill=2, decode=2)
    mixed: set[bytes] = set()

    async def own_words(request: web.Request, seen: Seen) -> web.StreamResponse:
        who = seen.body["messages"][0]["content"]
        return await streams(chat_stream([f"{who}-{i}" for i in range(20)]), pause_s=0.005)(request, seen)

    for engine in s.decode:
        engine.behaviour = own_words

    async def one(i: int) -> None:
        status, body = await s.chat(stream=True, messages=[{"role": "user", "content": f"c{i}"}])
        assert (status, body) == (200, b"".join(chat_stream([f"c{i}-{k}" for k in range(20)])))
        mixed.add(body)

    await within(asyncio.gather(*(one(i) for i in range(100))))
    assert len(mixed) == 100
    assert [len(e.seen) for e in s.decode] == [50, 50]
    ids = [seen.lmkv["transfer_id"] for e in s.decode for seen in e.seen]
    assert len(set(ids)) == 100


@pytest.mark.parametrize("tail", [b"", chat_chunk("b")[:30]])
async def test_a_break_after_the_first_byte_is_told(build: Build, tail: bytes) -> None:
    sent = role_chunk() + chat_chunk("a") + tail
    s = await build()
    s.decode[0].behaviour = streams_then_dies([role_chunk(), chat_chunk("a") + tail])
    status, body = await within(s.chat(stream=True))
    assert status == 200
    assert body.startswith(sent + b"\n\ndata: ")
    error = json.loads(body[len(sent) :].strip().removeprefix(b"data: "))["error"]
    assert error["code"] == 502 and "LMKV-R608" in error["message"]
    assert b"[DONE]" not in body
    assert len(s.decode[0].seen) == 1
    _, entry = await s.get("/explain/" + s.decode[0].seen[0].lmkv["transfer_id"])
    assert entry["outcome"].startswith(f"broken after {len(sent)} bytes: connection")
    metrics = await read_metrics(s)
    assert sum(v for k, v in metrics.items() if k.startswith("lmkv_router_stream_breaks_total")) == 1


async def test_a_stream_that_stalls_is_ended(build: Build) -> None:
    s = await build(idle_timeout_s=0.4)
    s.decode[0].behaviour = streams_then_hangs([role_chunk(), chat_chunk("a")])
    _, body = await within(s.chat(stream=True))
    assert body.startswith(role_chunk() + chat_chunk("a") + b'\n\ndata: {"error":')
    await within(s.decode[0].seen[0].done.wait())
    assert s.decode[0].seen[0].aborted


async def test_a_slow_stream_is_not_ended(build: Build) -> None:
    """The limit is on a pause, not on the whole."""
    s = await build(idle_timeout_s=0.4)
    chunks = chat_stream(list("abcdefgh"))
    s.decode[0].behaviour = streams(chunks, pause_s=0.1)
    began_s = time.monotonic()
    assert await within(s.chat(stream=True)) == (200, b"".join(chunks))
    assert time.monotonic() - began_s > 0.8


async def test_a_client_that_stops_reading_is_let_go(build: Build) -> None:
    s = await build(idle_timeout_s=0.5)

    async def flood(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        while True:
            await reply.write(chat_chunk("x" * 10_000))

    s.decode[0].behaviour = flood
    host, port = s.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = b'{"messages":[],"stream":true}'
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await until(lambda: s.decode[0].seen and s.decode[0].seen[0].done.is_set(), "the engine's request ended")
    assert s.decode[0].seen[0].aborted
    writer.close()
    await until(lambda: not s.router.in_flight, "nothing in flight")


ABORT_AT: dict[str, tuple[Behaviour, bool]] = {
    "waiting for headers": (hang, True),
    "waiting for the first token": (streams_then_hangs([role_chunk()]), True),
    "streaming": (streams_then_hangs([role_chunk(), chat_chunk("a")]), True),
    "waiting for an answer": (hang, False),
}


@pytest.mark.parametrize("at", ABORT_AT)
async def test_a_client_going_away_aborts_both(build: Build, at: str) -> None:
    behaviour, stream = ABORT_AT[at]
    s = await build()
    s.prefill[0].behaviour = hang
    s.decode[0].behaviour = after_arrival_at(s.prefill, behaviour)
    asking = asyncio.create_task(read_first(s, stream))
    await until(lambda: s.prefill[0].seen and s.decode[0].seen, "both asked")
    if at == "streaming":
        await within(asking_got(asking))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    for engine in s.engines:
        (seen,) = engine.seen
        await within(seen.done.wait())
        assert seen.aborted
    await until(lambda: not s.router.in_flight, "nothing in flight")
    _, entry = await s.get("/explain/" + s.decode[0].seen[0].lmkv["transfer_id"])
    when = "streaming" if at == "streaming" else "waiting"
    assert entry["outcome"] == f"the client went away while {when}"
    assert len(entry["attempts"]) == 1
    metrics = await read_metrics(s)
    assert metrics[f'lmkv_router_client_aborts_total{{when="{when}"}}'] == 1
    assert all(engine.healthy for engine in s.router.engines.all)


async def read_first(s: System, stream: bool) -> None:
    async with s.client.post(s.url + "/v1/chat/completions", json={"messages": [], "stream": stream}) as reply:
        asyncio.current_task().set_name("got " + (await reply.content.readany()).decode()[:1])  # type: ignore[union-attr]
        await reply.read()


async def asking_got(asking: asyncio.Task[None]) -> None:
    await until(lambda: asking.get_name().startswith("got "), "the first bytes")


async def read_metrics(s: System) -> dict[str, float]:
    async with s.client.get(s.url + "/metrics") as reply:
        assert reply.status == 200
        lines = [line for line in (await reply.text()).splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def test_connections_are_kept(build: Build) -> None:
    """A finished stream gives its connection back; an abort closes it."""
    s = await build()
    peers: set[object] = set()

    async def note(request: web.Request, seen: Seen) -> web.StreamResponse:
        peers.add(request.transport.get_extra_info("peername"))  # type: ignore[union-attr]
        return await streams(chat_stream(["a"]))(request, seen)

    s.decode[0].behaviour = note
    for _ in range(10):
        assert (await s.chat(stream=True))[0] == 200
    assert len(peers) <= 2


async def test_an_http_1_0_client_is_served(build: Build) -> None:
    s = await build()
    s.decode[0].behaviour = streams(chat_stream(["a"]))
    host, port = s.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"messages":[],"stream":true}'
    writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    answer = await within(reader.read())
    assert answer.partition(b"\r\n\r\n")[2] == b"".join(chat_stream(["a"]))
    writer.close()
    await writer.wait_closed()


async def test_a_redirect_is_not_followed(build: Build) -> None:
    s = await build()
    s.decode[0].behaviour = answers(307, {}, {"Location": "http://127.0.0.1:1/"})
    url = s.url + "/v1/completions"
    async with s.client.post(url, json={"prompt": "a"}, allow_redirects=False) as reply:
        assert (reply.status, reply.headers["Location"]) == (307, "http://127.0.0.1:1/")


async def test_the_client_sees_a_clean_end_as_clean(build: Build) -> None:
    s = await build()
    s.decode[0].behaviour = streams(chat_stream(["a"]))
    async with s.client.post(s.url + "/v1/chat/completions", json={"messages": [], "stream": True}) as reply:
        await reply.read()
        assert isinstance(reply, aiohttp.ClientResponse) and reply.content.at_eof()
