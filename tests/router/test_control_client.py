"""Questions to a real ROUTER: tokens, deadlines, late and unreadable answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from lmkv import wire
from lmkv.control.client import ControlClient, ControlError
from lmkv.errors import ConfigError
from lmkv.ids import EngineName, Incarnation, TransferId

from .fakes import FakeControl, until, within


@pytest.fixture
async def client() -> AsyncIterator[ControlClient]:
    client = ControlClient()
    yield client
    await client.close()


@pytest.fixture
async def engine() -> AsyncIterator[FakeControl]:
    engine = FakeControl("d0", "0" * 16)
    engine.resolve[engine.address] = engine
    yield engine
    await engine.close()


class Raw:
    """A ROUTER the test answers by hand."""

    def __init__(self, address: str = "tcp://127.0.0.1") -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        port = self.socket.bind_to_random_port(address)
        self.address = f"tcp://127.0.0.1:{port}"

    async def question(self) -> tuple[bytes, wire.Describe]:
        identity, payload = await within(self.socket.recv_multipart())
        message = wire.decode_control(payload)
        assert isinstance(message, wire.Describe)
        return identity, message

    async def answer(self, identity: bytes, message: wire.Control) -> None:
        await self.socket.send_multipart([identity, wire.encode(message)])

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
async def raw() -> AsyncIterator[Raw]:
    raw = Raw()
    yield raw
    raw.close()


def description(token: str, name: str) -> wire.Description:
    return wire.Description(token, EngineName(name), Incarnation("0" * 16), "both", (), {})


async def test_the_three_questions(client: ControlClient, engine: FakeControl) -> None:
    engine.ledgers["t"] = b"{}"
    assert (await client.describe(engine.address)).name == "d0"
    assert await client.explain(engine.address, TransferId("t")) == b"{}"
    assert await client.explain(engine.address, TransferId("u")) == b""
    met = await client.meet(engine.address, engine.address)
    assert (met.name, met.incarnation, met.refused) == ("d0", "0" * 16, "")


async def test_answers_in_any_order_find_their_questions(client: ControlClient, raw: Raw) -> None:
    asked = [asyncio.create_task(client.describe(raw.address)) for _ in range(5)]
    questions = [await raw.question() for _ in asked]
    for identity, question in reversed(questions):
        await raw.answer(identity, description(question.token, question.token))
    answers = await within(asyncio.gather(*asked))
    assert [a.name for a in answers] == [a.token for a in answers]
    assert len({a.token for a in answers}) == 5


async def test_a_deadline_is_kept_and_a_late_answer_harms_nothing(client: ControlClient, raw: Raw) -> None:
    with pytest.raises(ControlError) as caught:
        await client.describe(raw.address, deadline_s=0.1)
    assert caught.value.code == "LMKV-N701"
    assert raw.address in str(caught.value)
    identity, late = await raw.question()
    await raw.answer(identity, description(late.token, "late"))
    asked = asyncio.create_task(client.describe(raw.address))
    identity, question = await raw.question()
    await raw.answer(identity, description("0" * 16, "of somebody else"))
    await raw.answer(identity, description(question.token, "right"))
    assert (await within(asked)).name == "right"


async def test_unreadable_answers_are_counted(client: ControlClient, raw: Raw) -> None:
    asked = asyncio.create_task(client.describe(raw.address))
    identity, question = await raw.question()
    await raw.socket.send_multipart([identity, b"\xc1 nonsense"])
    await raw.answer(identity, wire.Describe("not an answer"))
    await raw.answer(identity, description(question.token, "right"))
    assert (await within(asked)).name == "right"
    assert client.unreadable == 2


async def test_an_answer_of_another_kind_is_an_error(client: ControlClient, raw: Raw) -> None:
    asked = asyncio.create_task(client.describe(raw.address))
    identity, question = await raw.question()
    await raw.answer(identity, wire.Explained(question.token, b""))
    with pytest.raises(ControlError, match="answered Describe with Explained"):
        await within(asked)


async def test_nobody_listens_then_somebody_does(client: ControlClient) -> None:
    """Questions asked in vain do not reach the engine when it comes: it answers the new one only."""
    placeholder = Raw()
    address = placeholder.address
    placeholder.close()
    for _ in range(3):
        with pytest.raises(ControlError):
            await client.describe(address, deadline_s=0.05)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(address)
    asked = asyncio.create_task(client.describe(address, deadline_s=5.0))
    identity, payload = await within(socket.recv_multipart())
    question = wire.decode_control(payload)
    assert isinstance(question, wire.Describe)
    await socket.send_multipart([identity, wire.encode(description(question.token, "right"))])
    assert (await within(asked)).token == question.token
    socket.close(linger=0)
    context.term()


async def test_cancelled_questions_leave_nothing(client: ControlClient, raw: Raw) -> None:
    asked = asyncio.create_task(client.describe(raw.address))
    await raw.question()
    asked.cancel()
    await until(asked.done, "cancelled")
    assert not client._lines[raw.address].waiting


async def test_an_address_that_is_none(client: ControlClient) -> None:
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"):
        await client.describe("ipc:///tmp/x")
