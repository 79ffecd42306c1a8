"""The router as a process: ready line, drain, errors without a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from .fakes import FakeEngine, Seen, chat_chunk, chat_stream, hang, role_chunk, streams_then_hangs, until, within

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "script": [str(ROOT / "scripts" / "router.py")],
    "cli": ["-c", "from lmkv.cli import main; main()", "router"],
}


@pytest.fixture
async def engines() -> AsyncIterator[list[FakeEngine]]:
    engines = [FakeEngine("p0"), FakeEngine("d0")]
    for engine in engines:
        await engine.start()
        for other in engines:
            engine.control.resolve[other.control.address] = other.control
    yield engines
    for engine in engines:
        await engine.close()


async def start(*arguments: str, command: str = "script", **environ: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, *COMMANDS[command], *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT, env={**os.environ, **environ},
    )  # fmt: skip


class Running:
    """A started router; killed at the end if it is still there."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def end(self) -> tuple[int, str]:
        _, err = await within(self.process.communicate())
        assert self.process.returncode is not None
        return self.process.returncode, err.decode()


@pytest.fixture
async def router(engines: list[FakeEngine], request: pytest.FixtureRequest) -> AsyncIterator[Running]:
    extra = getattr(request, "param", [])
    prefill, decode = engines
    process = await start("--prefill", prefill.spec, "--decode", decode.spec, "--port", "0", "--json", *extra)
    assert process.stdout is not None
    url = json.loads(await within(process.stdout.readline()))["ready"]
    yield Running(process, url)
    if process.returncode is None:
        process.kill()
        await process.communicate()


def refuses(host: str, port: int) -> bool:
    with socket.socket() as knocking:
        return knocking.connect_ex((host, port)) != 0


async def stream_into(url: str, into: bytearray) -> None:
    async with (
        aiohttp.ClientSession() as client,
        client.post(url + "/v1/chat/completions", json={"messages": [], "stream": True}) as reply,
    ):
        async for chunk in reply.content.iter_any():
            into += chunk


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_requests_in_flight_finish_and_new_ones_are_refused(
    engines: list[FakeEngine], router: Running, number: signal.Signals
) -> None:
    go_on = asyncio.Event()
    chunks = chat_stream(["a", "b"])

    async def in_two_parts(request: web.Request, seen: Seen) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        await reply.write(b"".join(chunks[:2]))
        await go_on.wait()
        await reply.write(b"".join(chunks[2:]))
        return reply

    engines[1].behaviour = in_two_parts
    got = bytearray()
    reading = asyncio.create_task(stream_into(router.url, got))
    await until(lambda: got, "the first token")
    router.process.send_signal(number)
    host, port = router.url.removeprefix("http://").split(":")
    await until(lambda: refuses(host, int(port)), "no new connections")
    assert router.process.returncode is None
    go_on.set()
    await within(reading)
    assert bytes(got) == b"".join(chunks)
    code, err = await router.end()
    assert (code, "Traceback" in err) == (0, False)


@pytest.mark.parametrize("router", [["--drain-s", "0.3"]], indirect=True)
async def test_what_does_not_finish_in_time_is_cut_off(engines: list[FakeEngine], router: Running) -> None:
    engines[0].behaviour = hang
    engines[1].behaviour = streams_then_hangs([role_chunk(), chat_chunk("a")])
    got = bytearray()
    reading = asyncio.create_task(stream_into(router.url, got))
    await until(lambda: got, "the first token")
    router.process.terminate()
    code, err = await router.end()
    assert code == 0
    assert "1 requests are cut off" in err and "Traceback" not in err
    with pytest.raises(aiohttp.ClientError):
        await within(reading)
    for engine in engines:
        await within(engine.seen[0].done.wait())
        assert engine.seen[0].aborted


async def test_an_idle_router_stops_at_once(router: Running) -> None:
    async with aiohttp.ClientSession() as client, client.get(router.url + "/healthz") as reply:
        assert reply.status == 200
        router.process.terminate()
        code, err = await router.end()
    assert (code, "Traceback" in err) == (0, False)


@pytest.mark.parametrize("command", COMMANDS)
async def test_ready_line(engines: list[FakeEngine], command: str) -> None:
    process = await start("--decode", engines[1].spec, "--port", "0", command=command)
    assert process.stdout is not None
    line = (await within(process.stdout.readline())).decode()
    assert line.startswith("lmkv router ready at http://127.0.0.1:")
    process.terminate()
    await within(process.communicate())
    assert process.returncode == 0


async def test_engines_from_the_environment(engines: list[FakeEngine]) -> None:
    process = await start("--port", "0", LMKV_ROUTER_DECODE=engines[1].spec, LMKV_ROUTER_PREFILL=engines[0].spec)
    assert process.stdout is not None
    url = (await within(process.stdout.readline())).decode().rpartition(" ")[2].strip()
    async with aiohttp.ClientSession() as client, client.get(url + "/readyz") as reply:
        assert [e["side"] for e in (await reply.json())["engines"]] == ["prefill", "decode"]
    process.terminate()
    await within(process.communicate())


async def test_port_taken(engines: list[FakeEngine]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await start("--decode", engines[1].spec, "--port", str(port))
        out, err = await within(process.communicate())
    text = err.decode()
    assert (process.returncode, out) == (2, b"")
    assert "LMKV-C106" in text and str(port) in text and "--port" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no decode engine is given"),
        (["--decode", "nonsense"], "'nonsense' is not the address"),
        (["--decode", "http://a:1", "--decode", "http://a:1"], "a:1 is given twice"),
        (["--decode", "http://a:1", "--policy", "best"], "--policy"),
        (["--decode", "http://a:1", "--log-level", "loud"], "--log-level"),
        (["--decode", "http://a:1", "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    ],
)
async def test_mistakes_are_explained_without_a_traceback(arguments: list[str], message: str) -> None:
    process = await start(*arguments, "--port", "0", command="cli")
    out, err = await within(process.communicate())
    assert (process.returncode, out) == (2, b"")
    assert message in err.decode() and "Traceback" not in err.decode()
