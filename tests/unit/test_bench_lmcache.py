"""LMCache as a baseline: command lines, where it lives, when a prompt counts as stored. Nothing here needs LMCache."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import lmcache, lmcache_place
from bench.engines import EngineSpec
from bench.errors import BenchError

PYTHON = Path("/somewhere/bin/python")
SERVER = lmcache.server_spec(1, 21200, PYTHON, 256)
TELEMETRY_OFF = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_server_starts_in_its_namespace_on_its_core() -> None:
    command = SERVER.command()
    assert command[:9] == ["ip", "netns", "exec", "lmkv-lmcache", "taskset", "--cpu-list", "1", str(PYTHON), "-m"]
    assert command[9:11] == ["lmcache.cli.main", "server"]
    assert (option(command, "--host"), option(command, "--port")) == ("127.0.0.1", "21201")
    assert (option(command, "--http-host"), option(command, "--http-port")) == ("198.18.3.2", "21200")
    assert option(command, "--chunk-size") == "256"
    assert option(command, "--supported-transfer-mode") == "lmcache_driven"
    assert option(command, "--worker-reap-timeout-seconds") == "0"  # a stopped engine stays registered


def test_an_engine_finds_the_server_and_lives_beside_it(tmp_path: Path) -> None:
    spec = lmcache.engine_spec("two", 0, 21203, tmp_path, SERVER, ("--max-num-seqs", "1"))
    command = spec.command()
    transfer = json.loads(option(command, "--kv-transfer-config"))
    extra = transfer["kv_connector_extra_config"]
    assert command[:8] == ["ip", "netns", "exec", "lmkv-lmcache", "taskset", "--cpu-list", "0", str(PYTHON)]
    assert command[-2:] == ["--max-num-seqs", "1"]
    assert spec.url == "http://198.18.3.2:21203"
    assert transfer["kv_connector"] == "LMCacheMPConnector"
    assert transfer["kv_connector_module_path"] == "lmcache.integration.vllm.lmcache_mp_connector"
    assert (extra["lmcache.mp.host"], extra["lmcache.mp.port"]) == ("tcp://127.0.0.1", SERVER.request_port)
    assert extra["lmcache.mp.mp_transfer_mode"] == "lmcache_driven"
    assert extra["lmcache.mp.heartbeat_interval"] >= 3600


@pytest.mark.parametrize("spec", [SERVER, lmcache.engine_spec("one", 0, 21202, Path("m"), SERVER)])
def test_neither_reports_home_and_both_are_found_by_their_owner(spec: EngineSpec) -> None:
    variables = spec.variables()
    assert {name: variables[name] for name in TELEMETRY_OFF} == TELEMETRY_OFF
    assert variables["HANDOVER_BENCH_OWNER_PID"] == str(os.getpid())
    assert spec.namespace == "lmkv-lmcache"


def test_other_engines_use_the_running_interpreter() -> None:
    command = EngineSpec("plain", Path("m"), 0, "127.0.0.1", 1).command()
    assert command[:5] == ["taskset", "--cpu-list", "0", sys.executable, "-m"]


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Commands that would have made the environment; the first makes the folders that a real one does."""
    ran: list[tuple[str, ...]] = []

    def install(*command: str) -> None:
        ran.append(command)
        if command[1:3] == ("-m", "venv"):
            made = Path(command[3])
            version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
            (made / "lib" / version / "site-packages").mkdir(parents=True)
            (made / "bin").mkdir()
            (made / "bin" / "python").touch()

    monkeypatch.setattr(lmcache_place, "_install", install)
    return ran


def test_the_environment_is_made_once(tmp_path: Path, installs: list[tuple[str, ...]]) -> None:
    python = lmcache.environment(tmp_path)
    assert python == tmp_path / "venv" / "bin" / "python"
    assert [command[1:3] for command in installs] == [("-m", "venv"), ("-m", "pip"), ("-P", "-c")]
    assert "--no-deps" in installs[1]
    assert "lmcache==0.5.6" in installs[1]
    assert all("==" in pin for pin in installs[1][installs[1].index("--no-deps") + 1 :])
    (links,) = tmp_path.glob("venv/lib/*/site-packages/*.pth")
    assert str(Path(pytest.__file__).parents[1]) in links.read_text().splitlines()
    assert lmcache.environment(tmp_path) == python
    assert len(installs) == 3


def test_other_pins_make_it_anew(
    tmp_path: Path, installs: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lmcache.environment(tmp_path)
    monkeypatch.setattr(lmcache_place, "PINS", ("lmcache==0.5.7",))
    lmcache.environment(tmp_path)
    assert len(installs) == 6


def test_a_failed_installation_is_told_and_tried_again(
    tmp_path: Path, installs: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = lmcache_place._install

    def fails(*command: str) -> None:
        works(*command)
        if "pip" in command:
            raise BenchError("no LMCache: no such package")

    monkeypatch.setattr(lmcache_place, "_install", fails)
    with pytest.raises(BenchError, match="no such package"):
        lmcache.environment(tmp_path)
    monkeypatch.setattr(lmcache_place, "_install", works)
    lmcache.environment(tmp_path)
    assert len(installs) == 5


def test_a_failed_command_says_its_last_words() -> None:
    with pytest.raises(BenchError, match=r"(?s)no LMCache: .* failed with code 3:.*not found"):
        lmcache_place._install(sys.executable, "-c", "import sys; print('not found'); sys.exit(3)")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match="cannot hold its environment"):
        lmcache.environment(tmp_path / "file" / "below")


class FakeServer(lmcache.LmcacheServer):
    """Speaks to an HTTP server that answers /status with one of the given counts after the other."""

    def __init__(self, port: int, chunk_tokens: int) -> None:
        self.server_spec = lmcache.ServerSpec("fake", Path(), 0, "127.0.0.1", port, chunk_tokens=chunk_tokens)
        self.spec = self.server_spec
        self.log_path = Path("fake.log")

    def check_alive(self) -> None:
        pass


@pytest.fixture
async def served() -> AsyncIterator[tuple[FakeServer, list[tuple[int, int]], aiohttp.ClientSession]]:
    """The last of the counts (all objects, those still being written) is repeated."""
    counts: list[tuple[int, int]] = []

    async def status(_: web.Request) -> web.Response:
        total, staging = counts.pop(0) if len(counts) > 1 else counts[0]
        l1: dict[str, Any] = {"total_object_count": total, "staging_object_count": staging}
        return web.json_response({"storage_manager": {"l1_manager": l1}})

    app = web.Application()
    app.router.add_get("/status", status)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session:
            yield FakeServer(port, 256), counts, session
    finally:
        await runner.cleanup()


Served = tuple[FakeServer, list[tuple[int, int]], aiohttp.ClientSession]


async def test_a_prompt_is_stored_when_its_complete_chunks_are_written(served: Served) -> None:
    server, counts, session = served
    counts[:] = [(3, 0), (7, 4), (7, 1), (7, 0)]
    await server.wait_stored(session, 3, 4 * 256 + 1)
    assert counts == [(7, 0)]


async def test_a_prompt_that_is_never_stored_is_told(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server, counts, session = served
    counts[:] = [(5, 0)]
    monkeypatch.setattr(lmcache, "STORE_DEADLINE_S", 0.1)
    with pytest.raises(BenchError, match="has 5 of 7 chunks"):
        await server.wait_stored(session, 3, 4 * 256 + 1)


def test_shared_memory_of_the_dead_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (f"lmcache_kv_{gone.pid}_0", f"lmcache_kv_{os.getpid()}_0", "psm_1"):
        (tmp_path / name).touch()
    lmcache._remove_segments_of_the_dead(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"lmcache_kv_{os.getpid()}_0", "psm_1"}


def test_the_table_shows_medians() -> None:
    def sample(loaded_ms: float, same: bool) -> dict[str, Any]:
        times = {"computed_ms": 900.0, "stored_after_answer_ms": 5.0, "loaded_ms": loaded_ms, "floor_ms": 40.0}
        return {"tokens": 1025, "cached_tokens": 1024, "same_answer": same, "same_as_own_cache": True, **times}

    row = lmcache.table([sample(141, True), sample(500, False), sample(139, True)]).splitlines()[1]
    assert row.split() == ["1025", "900", "5", "141", "40", "1024", "2", "of", "3", "3", "of", "3"]


@pytest.fixture
def island(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Beside that of a benchmark which may be running."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    names = {"NAMESPACE": "lmkv-lmc-test", "DEVICE": "lmkv-lmt1", "PEER_DEVICE": "lmkv-lmt0"}
    for name, value in {**names, "ADDRESS": "198.18.7.2", "PEER_ADDRESS": "198.18.7.1"}.items():
        monkeypatch.setattr(lmcache_place, name, value)
    place = lmcache_place.Island()
    try:
        yield lmcache_place.NAMESPACE
    finally:
        place.close()
        place.close()
        assert lmcache_place.NAMESPACE not in subprocess.check_output(["ip", "netns", "list"], text=True)


TRY = "import socket, sys; s = socket.socket(int(sys.argv[1])); s.settimeout(5); print(s.connect_ex((sys.argv[2], 9)))"


@pytest.mark.root
def test_nothing_leaves_the_namespace(island: str) -> None:
    def reach(family: int, address: str) -> int:
        inside = ["ip", "netns", "exec", island, sys.executable, "-c", TRY, str(family), address]
        return int(subprocess.check_output(inside, text=True))

    assert reach(2, "192.0.2.1") == errno.ENETUNREACH
    assert reach(10, "2001:db8::1") in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    assert reach(2, "198.18.7.1") == errno.ECONNREFUSED  # the benchmark itself is there


@pytest.mark.root
def test_a_namespace_that_is_lived_in_is_left_alone(island: str) -> None:
    tenant = subprocess.Popen(["ip", "netns", "exec", island, "sleep", "30"])
    try:
        while str(tenant.pid) not in subprocess.check_output(["ip", "netns", "pids", island], text=True).split():
            assert tenant.poll() is None
        with pytest.raises(BenchError, match=f"processes {tenant.pid} run in namespace"):
            lmcache_place.Island()
    finally:
        tenant.kill()
        tenant.wait()
