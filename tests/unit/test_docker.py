"""What docker/ holds: that the files can be read, and that what they name exists in lmkv."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml

import lmkv.cli
from lmkv.config import ConnectorSettings
from lmkv.router.settings import RouterSettings, router_settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
PROFILES = ("cpu", "cuda")
FOREIGN = {"CUDA_VISIBLE_DEVICES", "HF_TOKEN"}


@pytest.fixture
def dockerfile(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DOCKER))
    import dockerfile

    yield dockerfile
    sys.modules.pop("dockerfile")


def interpolated(value: Any, environ: dict[str, str]) -> Any:
    """As compose does it, of the forms ${NAME} and ${NAME:-default}."""
    if isinstance(value, dict):
        return {name: interpolated(each, environ) for name, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, environ) for each in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda m: environ.get(m[1]) or m[2] or "", value)


def services(profile: str) -> dict[str, dict[str, Any]]:
    """Those that a profile starts."""
    text = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    found: dict[str, dict[str, Any]] = interpolated(text, {"COMPOSE_PROFILES": profile})["services"]
    return {name: each for name, each in found.items() if profile in each.get("profiles", [profile])}


def command(service: dict[str, Any]) -> list[str]:
    given = service["command"]
    return shlex.split(given) if isinstance(given, str) else list(given)


# --- the parser ---


def test_an_instruction_goes_on_over_lines_and_comments(dockerfile: ModuleType) -> None:
    text = "# syntax=x\n\nFROM a AS b\nrun one \\\n  # not this\n\n  && two\nUSER 1:1\n"
    found = dockerfile.parse(text)
    assert [(each.line, each.name, each.text) for each in found] == [
        (3, "FROM", "a AS b"),
        (4, "RUN", "one && two"),
        (8, "USER", "1:1"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RUN <<EOF\none\n# two\nEOF\n", "one\n# two\n"),
        ("RUN <<-'END'\n\tone\n\tEND\n", "one\n"),
        ("RUN cat <<A <<B >x\n1\nA\n2\nB\n", "cat <<A <<B >x\n1\nA\n2\nB\n"),
        ("RUN echo plain\n", "echo plain"),
    ],
)
def test_here_documents(dockerfile: ModuleType, text: str, said: str) -> None:
    (run, user) = dockerfile.parse(text + "USER 1\n")
    assert user.name == "USER"
    assert dockerfile.command(run) == said


def test_flags_and_secrets(dockerfile: ModuleType) -> None:
    (run, copy) = dockerfile.parse("RUN --mount=type=secret,id=a,target=/b \\\n x\nCOPY --from=s --chown=1:1 a b c/\n")
    assert (run.text, dockerfile.secrets(run)) == ("x", [("a", "/b")])
    assert (copy.flag("from"), copy.flag("chown"), copy.flag("chmod"), copy.text) == ("s", "1:1", "", "a b c/")
    (cache,) = dockerfile.parse("RUN --mount=type=cache,target=/c x\n")
    with pytest.raises(dockerfile.DockerfileError, match=r"line 1.*type=cache"):
        dockerfile.secrets(cache)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FROM a\nONBUILD RUN x\n", "line 2: ONBUILD is not understood"),
        ("FROM a\nRUN\n", "line 2: RUN says nothing"),
        ("FROM a\nRUN x \\\n", "line 2: it goes on"),
        ("FROM a\nRUN <<EOF\nx\n", "here-document EOF has no end"),
    ],
)
def test_what_cannot_be_read_is_an_error(dockerfile: ModuleType, text: str, said: str) -> None:
    with pytest.raises(dockerfile.DockerfileError, match=said):
        dockerfile.parse(text)


@pytest.mark.parametrize("text", ["RUN x\nFROM a\n", "FROM a b\n", "FROM a as b c\n"])
def test_what_is_no_stage_is_an_error(dockerfile: ModuleType, text: str) -> None:
    with pytest.raises(dockerfile.DockerfileError, match="line 1"):
        dockerfile.stages(dockerfile.parse(text), {})


def test_variables(dockerfile: ModuleType) -> None:
    known = {"A": "1", "E": ""}
    for text, said in {
        "$A-${A}x": "1-1x",
        "${B:-2}${A:-2}${E:-3}": "213",
        "${A:+yes}${E:+no}${B:+no}": "yes",
        "$B|${B}": "|",
        r"\$A": "$",
    }.items():
        assert dockerfile.expand(text, known).startswith(said), text


def test_an_argument_comes_from_outside_or_from_before_the_first_stage(dockerfile: ModuleType) -> None:
    text = 'ARG V=1\nARG W=$V.0\nFROM i:$W AS a\nARG V\nARG U\nARG X=7\nENV P=$V:$X Q="two words"\n'
    found = dockerfile.parse(text)
    for given, base, expected in (({}, "i:1.0", ["1", "7"]), ({"V": "2", "U": "3"}, "i:2.0", ["2", "3", "7"])):
        (stage,) = dockerfile.stages(found, given)
        assert stage.base == base
        outer, known = dockerfile.global_arguments(found, given), {}
        for step in stage.steps[:3]:
            known |= dockerfile.arguments(step, given, outer, known)
        assert list(known.values()) == expected
        assert dockerfile.assignments(stage.steps[3], known) == {"P": f"{known['V']}:7", "Q": "two words"}


def test_a_target_needs_what_it_is_made_from(dockerfile: ModuleType) -> None:
    text = "FROM x AS a\nFROM y AS b\nFROM a AS c\nCOPY --from=b f f\nFROM z AS d\n"
    found = dockerfile.stages(dockerfile.parse(text), {})
    assert [stage.name for stage in dockerfile.needed(found, "c")] == ["a", "b", "c"]
    with pytest.raises(dockerfile.DockerfileError, match=r"no target 'e'.*a, b, c, d"):
        dockerfile.needed(found, "e")


def test_what_is_left_out_of_the_context(dockerfile: ModuleType) -> None:
    ignore = dockerfile.Ignore("# all\n*\n!src\n!docker/one.py\n**/*.pyc\nsrc/gen?/**\n")
    kept = ["src/a.py", "src/deep/b.c", "docker/one.py", "src/generic/x"]
    assert [path for path in kept if ignore.leaves_out(path)] == []
    gone = ["README", "docker/two.py", "src/a.pyc", "src/deep/a.pyc", "src/gen1/x"]
    assert [path for path in gone if not ignore.leaves_out(path)] == []


# --- the Dockerfile ---


def read(dockerfile: ModuleType) -> list[Any]:
    return list(dockerfile.stages(dockerfile.parse((DOCKER / "Dockerfile").read_text()), {}))


def test_both_targets_are_there_with_pinned_bases(dockerfile: ModuleType) -> None:
    bases = {stage.name: stage.base for stage in read(dockerfile)}
    assert bases["cuda"] == "vllm/vllm-openai:v0.32.0"
    assert bases["python"] == "python:3.11-slim-bookworm"
    wheel = next(stage for stage in read(dockerfile) if stage.name == "wheel")
    for target in PROFILES:
        assert wheel in dockerfile.needed(read(dockerfile), target), "the wheel is built once, for both"


def test_versions_are_those_of_the_setup_script(dockerfile: ModuleType) -> None:
    line = re.search(r"^TORCH=(\S+) VLLM=(\S+) NIXL=(\S+)$", (ROOT / "scripts" / "setup.sh").read_text(), re.M)
    assert line is not None
    given = dockerfile.global_arguments(dockerfile.parse((DOCKER / "Dockerfile").read_text()), {})
    assert [given[f"{name}_VERSION"] for name in ("TORCH", "VLLM", "NIXL")] == list(line.groups())


@pytest.mark.parametrize("target", PROFILES)
def test_an_image_runs_as_a_user_without_rights(dockerfile: ModuleType, target: str) -> None:
    stage = next(stage for stage in read(dockerfile) if stage.name == target)
    users = [step.text for step in stage.steps if step.name == "USER"]
    assert users[-1] == "10001:10001"


def test_all_that_is_copied_exists_and_is_in_the_context(dockerfile: ModuleType) -> None:
    ignore = dockerfile.Ignore((ROOT / ".dockerignore").read_text())
    copies = [step for stage in read(dockerfile) for step in stage.steps if step.name == "COPY"]
    for step in (step for step in copies if not step.flag("from")):
        for source in shlex.split(step.text)[:-1]:
            assert (ROOT / source).exists(), f"line {step.line}"
            assert not ignore.leaves_out(source), f"line {step.line}: {source} is left out by .dockerignore"
    assert ignore.leaves_out(".git/config")
    assert ignore.leaves_out("models/x/model.safetensors")
    assert ignore.leaves_out("lmkv/kernels/liblmkv_cpu.so"), "an image builds its own"


def test_only_steps_that_the_runner_executes(dockerfile: ModuleType) -> None:
    for stage in read(dockerfile):
        for step in stage.steps:
            assert step.name in dockerfile.STEPS | dockerfile.DESCRIPTIONS
            if step.name == "RUN":
                dockerfile.secrets(step)


# --- compose ---


@pytest.mark.parametrize("profile", PROFILES)
def test_every_process_is_there(profile: str) -> None:
    found = {name.removesuffix(f"-{profile}") for name in services(profile)}
    assert {"prefill", "decode", "pool", "controller", "router"} <= found


@pytest.mark.parametrize("profile", PROFILES)
def test_every_command_exists(profile: str) -> None:
    known = set(typer.main.get_command(lmkv.cli.main).commands)  # type: ignore[attr-defined]
    for name, service in services(profile).items():
        program, *rest = command(service)
        if program == "lmkv":
            assert rest[0] in known, name
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), name
        else:
            assert program == "sleep" or os.access(ROOT / "scripts" / program, os.X_OK), name


@pytest.mark.parametrize("profile", PROFILES)
def test_every_option_exists(profile: str) -> None:
    """Of lmkv's commands by their own parsers; of the launch scripts by their help."""
    commands = typer.main.get_command(lmkv.cli.main).commands  # type: ignore[attr-defined]
    for name, service in services(profile).items():
        program, *rest = command(service)
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        if program == "lmkv" and rest[0] in commands:
            known = {option for each in commands[rest[0]].params for option in each.opts}
        elif program.startswith("launch_"):
            script = [str(ROOT / "scripts" / program), "--help"]
            said = subprocess.run(script, capture_output=True, text=True, check=True, timeout=20).stdout
            known = set(re.findall(r"--[a-z-]+", said))
        else:
            continue
        assert options <= known, name


@pytest.mark.parametrize("profile", PROFILES)
def test_every_variable_is_a_setting(profile: str) -> None:
    text = (ROOT / "scripts" / "_launch.sh").read_text()
    scripts = re.search(r"LMKV_SCRIPT_VARIABLES=\((.*?)\)", text, re.S)
    assert scripts is not None
    connector = {f"LMKV_{name.upper()}" for name in ConnectorSettings.model_fields}
    router = {f"LMKV_ROUTER_{name.upper()}" for name in RouterSettings.model_fields}
    for name, service in services(profile).items():
        given = set(service.get("environment", {})) - FOREIGN
        role = name.removesuffix(f"-{profile}")
        assert given <= (connector | set(scripts[1].split()) if role in ("prefill", "decode") else router), name


@pytest.mark.parametrize("profile", PROFILES)
def test_processes_are_addressed_where_they_listen(profile: str) -> None:
    found = services(profile)
    listens = set()
    for service in found.values():
        names = [*service.get("networks", {}).get("default", {}).get("aliases", [])]
        words = " ".join(command(service))
        for port in re.findall(r"tcp://0\.0\.0\.0:(\d+)|--port (\d+)", words):
            listens |= {f"{host}:{port[0] or port[1]}" for host in names}
    for name in ("pool", "controller"):
        (port,) = re.findall(r"--listen[= ]tcp://0\.0\.0\.0:(\d+)", " ".join(command(found[name])))
        listens.add(f"{name}:{port}")
    spoken = yaml.safe_dump([[each["command"], each.get("environment")] for each in found.values()], width=1000)
    addresses = set(re.findall(r"(?:tcp|http)://([a-z]+:\d+)", spoken))
    assert addresses == listens


@pytest.mark.parametrize("profile", PROFILES)
def test_the_router_takes_its_settings(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = services(profile)["router"]["environment"]
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    settings = router_settings({}, given)
    assert settings.prefill == ("http://prefill:8100=tcp://prefill:18100",)
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)


@pytest.mark.parametrize("profile", PROFILES)
def test_engines_and_pool_share_what_makes_them_one_host(profile: str) -> None:
    found = services(profile)
    for name in ("pool", f"prefill-{profile}", f"decode-{profile}"):
        service = found[name]
        assert (service["pid"], service["ipc"]) == ("service:pause", "service:pause"), name
        assert "run:/run/lmkv" in service["volumes"], name
        assert "pause" in service["depends_on"], name
    assert found["pause"]["ipc"] == "shareable"
    (share,) = re.findall(r"--share=(\S+)", " ".join(command(found["pool"])))
    assert share.startswith("/run/lmkv/")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_process_that_serves_has_a_health_check_that_exists(profile: str) -> None:
    for name, service in services(profile).items():
        if name in ("pause", "model"):
            continue
        kind, python, script, *checks = service["healthcheck"]["test"]
        assert (kind, python) == ("CMD", "python")
        assert (ROOT / script).is_file()
        assert checks, name


@pytest.mark.parametrize("profile", PROFILES)
def test_images_are_targets_and_no_container_has_rights(dockerfile: ModuleType, profile: str) -> None:
    names = {stage.name for stage in read(dockerfile)}
    for name, service in services(profile).items():
        assert service["build"]["target"] in names, name
        assert service["image"] == f"lmkv:{service['build']['target']}", name
        assert service["cap_drop"] == ["ALL"], name
        assert not {"privileged", "cap_add", "user"} & set(service), name
        assert set(service.get("depends_on", {})) <= set(services(profile)), name


def test_volumes_are_declared_and_no_secret_is_written_down() -> None:
    text = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    used = {str(volume).split(":")[0] for each in services("cuda").values() for volume in each.get("volumes", [])}
    assert used <= set(text["volumes"])
    assert all(each.get("environment", {}).get("HF_TOKEN") is None for each in services("cuda").values())


# --- the health check ---


def health(*arguments: str) -> int:
    script = [sys.executable, str(DOCKER / "health.py"), *arguments]
    return subprocess.run(script, check=False, capture_output=True, timeout=20).returncode


def test_health_of_files_and_ports(tmp_path: Path) -> None:
    import socket

    ready = tmp_path / "ready"
    assert health() == 1
    assert health(str(ready)) == 1
    ready.touch()
    assert health(str(ready)) == 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert health(address, str(ready)) == 0
        assert health(address, str(tmp_path / "none")) == 1
    assert health(address) == 1
    assert health("tcp://nonsense") == 1


def test_health_over_http() -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert (health(f"{url}/health"), health(f"{url}/other")) == (0, 1)
        finally:
            server.shutdown()
            thread.join()
