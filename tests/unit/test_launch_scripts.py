"""The launch scripts: what they pass on, what they say, and that nothing of an engine is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from script_bed import SCRIPTS, Bed, ended, until

from tests.ports import free_port

ROLES = ("prefill", "decode", "plain")


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    bed = Bed(tmp_path)
    yield bed
    bed.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("role", ROLES)
def test_help_names_every_option(role: str, bed: Bed) -> None:
    said = subprocess.run(
        ["bash", str(SCRIPTS / f"launch_{role}.sh"), "--help"],
        env=bed.environ,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for option in ("--model", "--host", "--port", "--help", f"READY {role}"):
        assert option in said
    assert ("--lmkv-listen" in said) == (role != "plain")


@pytest.mark.parametrize("role", ROLES)
def test_engine_gets_its_settings_and_whatever_else_is_given(role: str, bed: Bed) -> None:
    port = free_port(10000)
    launched = bed.launch(role, "--port", str(port), "--name", "n1", "--max-model-len=77", "--seed", "5", "--x y")
    with ended(launched) as process:
        control = "" if role == "plain" else f" control tcp://127.0.0.1:{port + 10000}"
        assert first_line(process) == f"READY {role} http://127.0.0.1:{port}{control}"
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
    argv = bed.recorded()["argv"]
    assert argv[-4:] == ["--max-model-len=77", "--seed", "5", "--x y"]  # last, so that they win in vLLM's parser
    assert argv[argv.index("--served-model-name") + 1] == "model"
    assert argv[argv.index("--dtype") + 1] == "bfloat16"
    if role == "plain":
        assert not {"--kv-transfer-config", "--middleware"} & set(argv)
        assert "LMKV_HEALTH" not in bed.recorded()["environ"]
        return
    assert argv[argv.index("--middleware") + 1] == "lmkv.vllm.health.Health"
    assert bed.recorded()["environ"]["LMKV_HEALTH"] == f"tcp://127.0.0.1:{port + 10000}"
    config = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    assert config == {
        "kv_connector": "LmkvConnector",
        "kv_connector_module_path": "lmkv.vllm.connector",
        "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "listen": f"tcp://127.0.0.1:{port + 10000}",
            "name": "n1",
            "transport": "nixl://",
        },
    }


def test_options_win_over_variables_and_ours_stay_out_of_the_engine(bed: Bed) -> None:
    port, core = free_port(), min(os.sched_getaffinity(0))
    launched = bed.launch(
        *("decode", "--port", str(port), "--lmkv-listen", "tcp://127.0.0.1:0"),
        LMKV_LISTEN="tcp://127.0.0.1:1",
        LMKV_NAME="from-env",
        LMKV_TRANSPORT="tcp://",
        LMKV_CHECKSUM="0",
        LMKV_CORES=str(core),
        VLLM_CPU_KVCACHE_SPACE="3",
    )
    with ended(launched) as process:
        assert first_line(process).endswith("control tcp://127.0.0.1:0")
        process.terminate()
        process.wait(10)
    told = bed.recorded()
    config = json.loads(told["argv"][told["argv"].index("--kv-transfer-config") + 1])
    assert config["kv_connector_extra_config"] == {
        "listen": "tcp://127.0.0.1:0",
        "name": "from-env",
        "transport": "tcp://",
    }
    # The connector takes any other LMKV_ variable for a setting of its own and refuses those it does not know.
    assert {name for name in told["environ"] if name.startswith("LMKV_")} == {"LMKV_CHECKSUM"}
    assert told["environ"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert told["environ"]["VLLM_CPU_OMP_THREADS_BIND"] == str(core)
    assert told["environ"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        (["--data-parallel-size", "2"], (0, 1)),
        (["--data_parallel_size=3", "--data-parallel-start-rank=1"], (1, 2)),
        (["-dp", "4", "-dpl", "2", "-dpr", "2"], (2, 3)),
        (["-dp", "4", "--data-parallel-rank", "3"], (3,)),
        (["-dp", "4", "--data-parallel-multi-port-external-lb"], ()),
        (["--kv-transfer-config", "{}"], ()),
        (["--seed", "08", "-dp", "x"], (0,)),
    ],
)
def test_the_api_server_is_told_where_the_ranks_of_this_host_answer(
    bed: Bed, arguments: list[str], ranks: tuple[int, ...]
) -> None:
    port = free_port(10000)
    with ended(bed.launch("decode", "--port", str(port), *arguments, LMKV_HEALTH="tcp://of.another:1")) as process:
        first_line(process)
        process.terminate()
        process.wait(10)
    told = ",".join(f"tcp://127.0.0.1:{port + 10000 + rank}" for rank in ranks)
    assert bed.recorded()["environ"].get("LMKV_HEALTH", "") == told


def test_a_gpu_build_gets_no_cpu_settings(bed: Bed) -> None:
    launched = bed.launch("plain", "--port", str(free_port()), FAKE_ENGINE_DEVICE="gpu")
    with ended(launched) as process:
        first_line(process)
        process.terminate()
        process.wait(10)
    told = bed.recorded()
    assert not {"--dtype", "--enforce-eager", "--max-model-len"} & set(told["argv"])
    assert "VLLM_CPU_KVCACHE_SPACE" not in told["environ"]


def test_ready_comes_after_one_long_prompt(bed: Bed) -> None:
    ready = bed.folder / "ready"
    ready.write_text("of an earlier engine")
    launched = bed.launch("plain", "--port", str(free_port()), LMKV_READY_FILE=str(ready), FAKE_ENGINE_LOADS_S="0.5")
    with ended(launched) as process:
        line = first_line(process)
        (prompt,) = bed.recorded()["bodies"]
        assert len(prompt["prompt"]) == 300
        until(lambda: ready.exists() and ready.read_text().strip() == line, "no ready file")
        process.terminate()
        process.wait(10)
    assert not ready.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(bed: Bed, number: signal.Signals) -> None:
    with ended(bed.launch("plain", "--port", str(free_port()), FAKE_ENGINE_IGNORES_TERM="1")) as process:
        first_line(process)
        assert len(bed.alive()) >= 3  # the script, the engine, the child of the engine that ignores SIGTERM
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        bed.until_none_left()


def test_nothing_is_left_when_stopped_while_loading(bed: Bed) -> None:
    with ended(bed.launch("plain", "--port", str(free_port()), FAKE_ENGINE_LOADS_S="60")) as process:
        until(bed.record.exists, "the engine did not start")
        process.terminate()
        process.wait(10)
        bed.until_none_left()


def test_the_engine_ends_with_a_script_that_was_killed(bed: Bed) -> None:
    with ended(bed.launch("plain", "--port", str(free_port()), FAKE_ENGINE_ALONE="1")) as process:
        first_line(process)
        assert bed.recorded()["pid"] in bed.alive()
        process.kill()
        process.wait(10)
        bed.until_none_left()


def test_an_engine_that_dies_gives_the_status(bed: Bed) -> None:
    launched = bed.launch("prefill", "--port", str(free_port(10000)), FAKE_ENGINE_DIES="--model")
    with ended(launched) as process:
        out, err = process.communicate(timeout=15)
    assert process.returncode == 7
    assert "READY" not in out
    assert "no memory left for the model" in err
    assert "ended with status 7" in err


def test_an_engine_that_never_answers_is_given_up(bed: Bed) -> None:
    launched = bed.launch("plain", "--port", str(free_port()), FAKE_ENGINE_LOADS_S="60", LMKV_START_TIMEOUT_S="1")
    with ended(launched) as process:
        _, err = process.communicate(timeout=15)
    assert process.returncode == 4
    assert "LMKV_START_TIMEOUT_S" in err
    bed.until_none_left()


@pytest.mark.parametrize(("distance", "option"), [(0, "--port"), (10000, "--lmkv-listen")])
def test_a_taken_port_is_named_before_anything_starts(bed: Bed, distance: int, option: str) -> None:
    port = free_port(10000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + distance))
        taken.listen()
        with ended(bed.launch("decode", "--port", str(port))) as process:
            _, err = process.communicate(timeout=15)
    assert process.returncode == 3
    assert f"port {port + distance} on 127.0.0.1 is taken" in err
    assert option in err
    assert not bed.record.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--port", "0"], 2, "--port is '0'"),
        (["--port", "70000"], 2, "--port is '70000'"),
        (["--port", "60000"], 2, "control port 70000"),
        (["--port"], 2, "--port needs a value"),
        (["--name", "a b"], 2, "--name is 'a b'"),
        (["--lmkv-listen", "127.0.0.1:5"], 2, "write tcp://HOST:PORT"),
        (["--lmkv-transport", 'x"'], 2, "write SCHEME://"),
        (["--model", "/nowhere/model"], 1, "no model at /nowhere/model"),
    ],
)
def test_mistakes_are_named(bed: Bed, arguments: list[str], status: int, said: str) -> None:
    with ended(bed.launch("prefill", *arguments)) as process:
        _, err = process.communicate(timeout=15)
    assert process.returncode == status
    assert said in err
