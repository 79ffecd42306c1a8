"""What `lmkv up` would start, from its options: ports, command lines, cores; and the mistakes that it names."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmkv.errors import ConfigError
from lmkv.up import commands, places, plan
from lmkv.up.plan import Options, Plan, Process, make_plan
from tests.ports import free_port


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def planned(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    monkeypatch.setattr(plan, "is_installed", lambda _: True)
    monkeypatch.setattr(plan, "spread", lambda engines: [places.Place() for _ in range(engines)])
    port = free_port(*(above + n for above in (100, 200, 300, 10100, 10200, 10300, 10400) for n in range(3)))

    def make(**options: Any) -> Plan:
        return make_plan(Options(**({"model": str(model), "run": tmp_path / "run", "port": port} | options)))

    return make


def after(process: Process, option: str) -> list[str]:
    words = process.command
    return [words[i + 1] for i, word in enumerate(words) if word == option]


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_ports_follow_from_the_routers(planned: Callable[..., Plan]) -> None:
    made = planned(prefill=2)
    port = port_of(made.url)
    assert [port_of(engine.address) - port for engine in made.engines] == [100, 101, 200]
    assert [port_of(engine.control) - port for engine in made.engines] == [10100, 10101, 10200]
    assert [port_of(process.address) - port for process in (*made.pool, *made.controller)] == [10300, 10400]


def test_everybody_is_told_of_the_others(planned: Callable[..., Plan]) -> None:
    made = planned(prefill=2, decode=1, vllm=("--dtype", "float32"))
    (node,), (controller,), (router,) = made.pool, made.controller, made.router
    assert after(node, "--controller") == [controller.address]
    for engine in made.engines:
        assert after(engine, "--pool") == [node.address]
        assert after(engine, "--controller") == [controller.address]
        assert engine.command[-2:] == ("--dtype", "float32")
    sides = [f"{engine.address}={engine.control}" for engine in made.engines]
    assert after(router, "--prefill") == sides[:2]
    assert after(router, "--decode") == sides[2:]
    assert made.model == "a-model"
    assert [stage[0].name for stage in made.stages] == ["controller", "pool", "prefill-0", "router"]


def test_without_a_pool_there_is_no_controller_either(planned: Callable[..., Plan]) -> None:
    made = planned(pool=False)
    assert [stage[0].name for stage in made.stages] == ["prefill-0", "router"]
    assert not any(after(engine, "--pool") or after(engine, "--controller") for engine in made.engines)


def test_engines_of_both_roles_stand_as_decode_engines(planned: Callable[..., Plan]) -> None:
    made = planned(engines=2)
    assert [engine.name for engine in made.engines] == ["engine-0", "engine-1"]
    assert all("launch_engine.sh" in " ".join(engine.command) for engine in made.engines)
    assert len(after(made.router[0], "--decode")) == 2
    assert not after(made.router[0], "--prefill")


def test_the_pools_options_reach_it(planned: Callable[..., Plan], tmp_path: Path) -> None:
    (node,) = planned(pool_capacity="300MiB", disk=str(tmp_path / "disk")).pool
    assert after(node, "--capacity") == ["300MiB"]
    assert after(node, "--disk") == [str(tmp_path / "disk")]


def test_a_taken_port_of_ours_is_replaced(planned: Callable[..., Plan]) -> None:
    usual = port_of(planned().engines[0].control)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", usual))
        taken.listen()
        engine = planned().engines[0]
    assert port_of(engine.control) == port_of(engine.address) + 10000 != usual


def test_port_zero_is_a_free_one(planned: Callable[..., Plan]) -> None:
    assert port_of(planned(port=0).url) > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "/nowhere/model"}, "there is no model at /nowhere/model"),
        ({"model": "."}, r"\. has no config.json"),
        ({"pool": False, "disk": "d"}, "--no-pool stands beside"),
        ({"pool_capacity": "many"}, "--pool-capacity 'many' is no size"),
        ({"cores": ("0",)}, "--cores is given 1 times for 2 engines"),
        ({"cores": ("0", "x")}, "--cores 'x' is no set of cores"),
        ({"cores": ("0", "4-2")}, "--cores '4-2' is no set of cores"),
        ({"cores": ("0", "9999")}, r"names cores \[9999\]"),
        ({"vllm": ("--port=1",)}, "--port is set by lmkv up itself"),
        ({"vllm": ("stray",)}, "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_named_before_anything_starts(
    planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(ConfigError, match=said):
        planned(**options)


def test_a_name_on_the_hub_is_passed_on(planned: Callable[..., Plan]) -> None:
    made = planned(model="somebody/some-model")
    assert made.model == "somebody/some-model"
    assert after(made.engines[0], "--model") == ["somebody/some-model"]


def test_missing_vllm_is_named(planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMKV_PYTHON", raising=False)
    monkeypatch.setattr(plan, "is_installed", lambda _: False)
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        planned()


def test_scripts_are_found_on_the_path_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "site" / "lmkv" / "up" / "commands.py"))
    with pytest.raises(ConfigError, match=r"there is no launch_decode\.sh"):
        commands.launch("decode")
    script = tmp_path / "launch_decode.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert commands.launch("decode", "--x")[1:] == [str(script), "--x"]


@pytest.mark.parametrize(
    ("cores", "engines", "shares"),
    [
        ([0, 1], 2, ["0", "1"]),
        ([0, 1, 2, 3, 4], 2, ["0,1", "2,3"]),
        ([3, 5], 3, ["3", "5", "3"]),
        ([0, 1, 2], 1, ["0,1,2"]),
    ],
)
def test_cores_are_spread(cores: list[int], engines: int, shares: list[str]) -> None:
    assert places.share_cores(cores, engines) == shares


def test_gpus_are_spread_and_their_memory_divided() -> None:
    two = places.share_gpus(["0", "3"], 2)
    assert [place.environ["CUDA_VISIBLE_DEVICES"] for place in two] == ["0", "3"]
    assert two[0].flags == ()
    assert [place.flags[1] for place in places.share_gpus(["0"], 2)] == ["0.42", "0.42"]
    assert places.share_gpus([], 2) == [places.Place(), places.Place()]
