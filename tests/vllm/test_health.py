"""`GET /health` of the API server fails once lmkv is dead in the engine, and nothing else of the server changes."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from lmkv import wire
from lmkv.config import ConnectorSettings, connector_settings
from lmkv.errors import ConfigError
from lmkv.ids import EngineName, Incarnation
from lmkv.obs.ledger import LedgerBook
from lmkv.vllm import health
from lmkv.vllm.endpoint import EngineEndpoint
from lmkv.vllm.health import Health, Message, addresses
from lmkv.vllm.pooled.lookup import Lookups
from tests.ports import free_port

DEAD = "the worker loop of rank 0 has failed; its log has more"
WELL = (200, b"")


class Server:
    """vLLM's app: /health is `status`, everything else streams two parts."""

    def __init__(self) -> None:
        self.status = 200
        self.seen: list[str] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.seen.append(scope["type"] if scope["type"] != "http" else scope["path"])
        if scope["type"] == "http":
            status = self.status if scope["path"] == "/health" else 200
            await send({"type": "http.response.start", "status": status, "headers": []})
            for part in (b"a", b"b") if scope["path"] != "/health" else ():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def sent(app: Health, path: str = "/health", method: str = "GET", **scope: Any) -> list[Message]:
    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody has asked for a body")

    await app({"type": "http", "method": method, "path": path, **scope}, receive, send)
    return said


async def probe(app: Health) -> tuple[int, bytes]:
    start, *rest = await sent(app)
    return start["status"], b"".join(message["body"] for message in rest)


async def trouble(app: Health) -> str:
    status, body = await probe(app)
    assert status == 503
    return str(json.loads(body)["trouble"])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each probe asks anew, and does not wait for long."""
    monkeypatch.setattr(health, "FRESH_S", 0.0)
    monkeypatch.setattr(health, "ASK_S", 0.3)


@pytest.fixture
def endpoint() -> Iterator[EngineEndpoint]:
    made = EngineEndpoint("tcp://127.0.0.1:0", "", LedgerBook())
    yield made
    made.close()


def start(endpoint: EngineEndpoint) -> None:
    card = wire.EngineCard(EngineName("e"), Incarnation("a" * 16), endpoint.address, "both", {}, {}, (16,), ())
    endpoint.start(card, ())


Make = Callable[..., Health]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Health] = []

    def build(*addresses: str, server: Server | None = None) -> Health:
        made.append(Health(server or Server(), {"LMKV_HEALTH": ",".join(addresses)}))
        return made[-1]

    yield build
    for app in made:
        await app.close()


class Stub:
    """A control endpoint that the test has in hand."""

    def __init__(self) -> None:
        self.trouble = ""
        self.asked = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            identity, payload = await self._socket.recv_multipart()
            question = wire.decode_control(payload)
            assert isinstance(question, wire.Describe)
            self.asked += 1
            await self.hold.wait()
            told = wire.Description(
                question.token, EngineName("e"), Incarnation("a" * 16), "both", (), {}, "", self.trouble
            )
            await self._socket.send_multipart([identity, wire.encode(told)])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._socket.close(linger=0)
        self._context.term()


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    stub = Stub()
    yield stub
    await stub.close()


# --- what a probe is told ---


async def test_a_healthy_engine_answers_as_vllm_does(make: Make, endpoint: EngineEndpoint) -> None:
    start(endpoint)
    server = Server()
    app = make(endpoint.address, server=server)
    assert await probe(app) == WELL
    server.status = 503
    assert await probe(app) == (503, b"")


async def test_a_dead_loop_turns_it_red(make: Make, endpoint: EngineEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    start(endpoint)
    app = make(endpoint.address)
    assert await probe(app) == WELL
    endpoint.refuse_all(DEAD)
    (first, last) = await sent(app)
    assert (first["status"], json.loads(last["body"])) == (503, {"trouble": DEAD})
    assert (b"content-length", str(len(last["body"])).encode()) in first["headers"]
    assert await trouble(app) == DEAD
    assert [r.levelname for r in caplog.records if DEAD in r.getMessage() and r.name == health.__name__] == ["ERROR"]


async def test_a_dead_lookup_thread_turns_it_red(
    make: Make, endpoint: EngineEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups = Lookups(ConnectorSettings(), 1, "e")
    endpoint.on_describe(lambda: lookups.trouble)
    start(endpoint)
    app = make(endpoint.address)
    assert await probe(app) == WELL
    lookups.end()
    assert "asks the pool" in await trouble(app)
    lookups.close()
    assert await probe(app) == WELL, "an engine that ends is not dead"


async def test_a_dead_endpoint_thread_turns_it_red_at_once(make: Make, endpoint: EngineEndpoint) -> None:
    start(endpoint)
    app = make(endpoint.address)
    assert await probe(app) == WELL
    endpoint.close()
    assert endpoint.address in await trouble(app)


async def test_where_nobody_has_ever_listened_it_is_red(make: Make) -> None:
    assert "nobody listens" in await trouble(make(f"tcp://127.0.0.1:{free_port()}"))


async def test_an_engine_that_still_reads_its_weights_is_well(make: Make, endpoint: EngineEndpoint) -> None:
    app = make(endpoint.address)
    for _ in range(health.MISSES + 1):
        assert await probe(app) == WELL
    start(endpoint)
    assert await probe(app) == WELL


async def test_silence_turns_it_red_unless_it_is_short(make: Make, stub: Stub) -> None:
    app = make(stub.address)
    assert await probe(app) == WELL
    stub.hold.clear()
    for _ in range(health.MISSES - 1):
        assert await probe(app) == WELL
    assert "did not answer Describe" in await trouble(app)
    stub.hold.set()
    assert await probe(app) == WELL
    stub.trouble = DEAD
    assert await trouble(app) == DEAD
    stub.hold.clear()
    assert await trouble(app) == DEAD, "a late answer makes nothing well"


async def test_each_rank_is_asked(make: Make, stub: Stub, endpoint: EngineEndpoint) -> None:
    start(endpoint)
    app = make(endpoint.address, stub.address)
    assert await probe(app) == WELL
    stub.trouble = DEAD
    assert await trouble(app) == DEAD
    endpoint.refuse_all("another")
    assert await trouble(app) == f"another; {DEAD}"
    endpoint.refuse_all(DEAD)
    assert await trouble(app) == DEAD


async def test_a_dead_engine_speaks_for_itself(make: Make, stub: Stub) -> None:
    """The router takes our words to mean that requests are served."""
    server = Server()
    server.status, stub.trouble = 503, DEAD
    assert await probe(make(stub.address, server=server)) == (503, b"")


# --- what it costs ---


async def test_probes_that_come_together_share_a_question(make: Make, stub: Stub) -> None:
    app = make(stub.address)
    stub.hold.clear()
    probes = [asyncio.create_task(probe(app)) for _ in range(50)]
    while not stub.asked:
        await asyncio.sleep(0.001)
    probes[0].cancel()
    stub.hold.set()
    told = await asyncio.gather(*probes, return_exceptions=True)
    assert isinstance(told[0], asyncio.CancelledError) and told[1:] == [WELL] * 49
    assert stub.asked == 1


async def test_an_answer_is_good_for_a_while(make: Make, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "FRESH_S", 0.3)
    app = make(stub.address)
    for _ in range(5):
        assert await probe(app) == WELL
    assert stub.asked == 1
    await asyncio.sleep(0.35)
    stub.trouble = DEAD
    assert await trouble(app) == DEAD
    assert stub.asked == 2


@pytest.mark.parametrize(
    ("path", "method"), [("/v1/completions", "POST"), ("/metrics", "GET"), ("/health", "POST"), ("/health/x", "GET")]
)
async def test_everything_else_goes_straight_on(make: Make, stub: Stub, path: str, method: str) -> None:
    server = Server()
    app, stub.trouble = make(stub.address, server=server), DEAD
    start, *_ = said = await sent(app, path, method)
    assert start["status"] == 200 and server.seen == [path] and stub.asked == 0
    if path != "/health":
        assert [m["body"] for m in said[1:]] == [b"a", b"b", b""]


async def test_behind_a_root_path(make: Make, stub: Stub) -> None:
    app, stub.trouble = make(stub.address), DEAD
    assert (await sent(app, "/up/health", root_path="/up"))[0]["status"] == 503


async def test_the_end_of_the_server_closes_the_connection(make: Make, stub: Stub) -> None:
    server = Server()
    app = make(stub.address, server=server)
    assert await probe(app) == WELL
    await app({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert server.seen == ["/health", "lifespan"] and app._client is None


# --- whom it asks ---


async def test_without_the_variable_it_warns_once_and_passes_on(caplog: pytest.LogCaptureFixture) -> None:
    app = Health(Server(), {})
    assert [await probe(app) for _ in range(3)] == [WELL] * 3
    assert len([r for r in caplog.records if "LMKV_HEALTH is not set" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("tcp://10.0.0.5:7", ("tcp://10.0.0.5:7",)),
        ("tcp://0.0.0.0:7, tcp://*:8", ("tcp://127.0.0.1:7", "tcp://127.0.0.1:8")),
        ("tcp://[::]:7", ("tcp://[::1]:7",)),
        ("", ()),
        (f"tcp://{socket.if_nameindex()[0][1]}:7", ()),
    ],
)
def test_addresses_as_this_host_connects_to_them(given: str, asked: tuple[str, ...]) -> None:
    assert addresses({"LMKV_HEALTH": given}) == asked


@pytest.mark.parametrize("given", ["127.0.0.1:7", "tcp://127.0.0.1:0", "tcp://127.0.0.1:7;tcp://127.0.0.1:8"])
def test_an_address_that_is_none_ends_the_server(given: str) -> None:
    with pytest.raises(ConfigError, match="LMKV_HEALTH"):
        Health(Server(), {"LMKV_HEALTH": given})


def test_the_engine_leaves_the_variable_alone() -> None:
    assert connector_settings({}, {"LMKV_HEALTH": "tcp://127.0.0.1:7"}) == ConnectorSettings()


async def test_whether_somebody_listens(stub: Stub) -> None:
    assert await health._listens(stub.address)
    for host in ("127.0.0.1", "[::1]", "no-such-host.invalid"):
        assert not await health._listens(f"tcp://{host}:{free_port()}")


def test_importing_it_is_light() -> None:
    code = (
        "import sys, lmkv.vllm.health\n"
        "print([n for n in ('torch', 'vllm', 'nixl', 'starlette', 'aiohttp') if n in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "[]"
