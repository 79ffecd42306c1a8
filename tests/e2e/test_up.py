"""`lmkv up` with real engines: serves, shares KV through its pool, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lmkv.control.admin import Admin
from lmkv.control.client import ControlClient
from lmkv.up import commands
from tests.ports import free_port

from .bed import MODELS, PROSE, Client, Proc, eventually, spawn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "tiny-llama"
CHUNK = 128
START_S = 600.0


@pytest.fixture
def up(tmp_path: Path) -> Iterator[tuple[Proc, str]]:
    """The process and a mark that everything it starts inherits. What a failed test leaves is killed."""
    mark = uuid.uuid4().hex
    words = ["up", "--model", str(MODELS / MODEL), "--port", str(free_port()), "--json", "--pool-capacity", "128MiB"]
    command = commands.lmkv(*words, "--run", str(tmp_path / "run"), "--", "--dtype", "float32")
    proc = spawn("up", command, tmp_path, {"TEST_MARK": mark})
    yield proc, mark
    for pid in marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    proc.process.wait(10)


def marked(mark: str) -> list[int]:
    """Processes that carry the mark and run (zombies do not)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and f"TEST_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


async def ready(proc: Proc) -> dict[str, Any]:
    """What stood on its stdout; the log has stderr, too."""

    async def told() -> dict[str, Any] | None:
        proc.check()
        lines = [line for line in proc.log.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[0]) if lines else None

    answer: dict[str, Any] = await eventually(told, "lmkv up to be ready", START_S)
    return answer


async def counters(control: str) -> dict[str, int]:
    client = ControlClient()
    try:
        return (await client.describe(control, deadline_s=10)).counters
    finally:
        await client.close()


def pages(address: str) -> int:
    with Admin(address) as admin:
        return int(json.loads(admin.stats().stats)["pages"])


async def test_it_serves_shares_and_leaves_nothing(up: tuple[Proc, str]) -> None:
    proc, mark = up
    told = await ready(proc)
    prefill, _ = told["engines"]
    (node,) = told["pool"]
    before = pages(node)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        client = Client(session, told["model"])
        first = await client.complete(told["ready"], PROSE[:3000])
        second = await client.complete(told["ready"], PROSE[:3000])
    assert first.status == second.status == 200
    assert first.text == second.text
    wanted = before + first.body["usage"]["prompt_tokens"] // CHUNK
    assert wanted > before

    async def stored() -> bool:
        return pages(node) >= wanted

    await eventually(stored, f"{wanted} pages in the pool")
    assert (await counters(prefill["control"])).get("pool:lookup:hit", 0) == 0  # its own cache had the second
    with Admin(told["controller"][0]) as admin:
        assert [member.card.address for member in admin.members().nodes] == [node]

    assert len(marked(mark)) >= 6  # this command, controller, pool node, two engines, router
    proc.process.send_signal(signal.SIGINT)
    assert proc.process.wait(60) == 0, proc.tail()
    assert marked(mark) == []
    assert "Traceback" not in proc.log.read_text()
