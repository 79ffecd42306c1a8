"""What stands for Docker when docker/run_lines.py executes a Dockerfile: copying, running, saying what went wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"
MODULES = ("dockerfile", "rootfs", "run_lines")


@pytest.fixture
def rootfs(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DOCKER))
    import rootfs

    yield rootfs
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run_lines(rootfs: ModuleType) -> ModuleType:
    import run_lines

    return run_lines


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "src" / "deep").mkdir(parents=True)
    for name in ("one", "src/a.py", "src/a.pyc", "src/deep/b"):
        (folder / name).write_text(name)
    (folder / "src" / "link").symlink_to("../elsewhere")
    return folder


def copied(rootfs: ModuleType, context: Path, source: str, into: Path, several: bool = False) -> set[str]:
    import dockerfile

    files = rootfs.files_of(context, source, dockerfile.Ignore("**/*.pyc\n"))
    rootfs.copy_in(context, source, files, into, several)
    return {str(path.relative_to(into)) for path in into.rglob("*") if path.is_symlink() or path.is_file()}


def test_a_folder_gives_its_content_and_links_stay_links(rootfs: ModuleType, context: Path, tmp_path: Path) -> None:
    into = tmp_path / "root" / "dst"
    assert copied(rootfs, context, "src", into) == {"a.py", "deep/b", "link"}
    assert os.readlink(into / "link") == "../elsewhere"
    assert copied(rootfs, context, "src/", into) == {"a.py", "deep/b", "link"}, "a second time changes nothing"


def test_a_file_becomes_the_target_or_goes_into_it(rootfs: ModuleType, context: Path, tmp_path: Path) -> None:
    copied(rootfs, context, "one", tmp_path / "root" / "other")
    assert (tmp_path / "root" / "other").read_text() == "one"
    assert copied(rootfs, context, "one", tmp_path / "root" / "dst", several=True) == {"one"}


def test_what_is_not_there_gives_no_file(rootfs: ModuleType, context: Path) -> None:
    assert rootfs.files_of(context, "none", None) == []


def test_a_command_that_fails_says_what_it_said(rootfs: ModuleType) -> None:
    import dockerfile

    said: list[str] = []
    rootfs.run(["sh", "-c", "echo one; echo two"], 20, said.append)
    assert [line.split("| ")[1] for line in said] == ["two"]
    with pytest.raises(dockerfile.DockerfileError, match="sh ended with status 3"):
        rootfs.run(["sh", "-c", "echo three; exit 3"], 20, said.append)
    assert "three" in said[-1]


def test_a_command_has_a_deadline_and_leaves_nothing(rootfs: ModuleType) -> None:
    import dockerfile

    started = time.monotonic()
    with pytest.raises(dockerfile.DockerfileError, match=r"not done after 0\.3 s"):
        rootfs.run(["sh", "-c", "sleep 60 & wait"], 0.3, print)
    assert time.monotonic() - started < 20, "the sleeping child held the pipe, so it was ended, too"


def test_a_stage_is_anew_when_a_line_an_argument_or_a_file_changes(
    run_lines: ModuleType, context: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lines, "CONTEXT", context)
    (context / ".dockerignore").write_text("**/*.pyc\n")

    def digests(text: str, **given: str) -> tuple[str, ...]:
        options = run_lines.Options(tmp_path, given, {}, (), "", None, 1.0, False)
        builder = run_lines.Builder(text, options, run_lines.Log(None))
        return tuple(builder._digest(stage) for stage in builder.stages)

    text = "FROM x AS a\nRUN one\nFROM y AS b\nCOPY src dst\n"
    before = digests(text)
    (context / "one").write_text("changed")
    (context / "src" / "a.pyc").write_text("changed")
    assert digests(text) == before, "neither is copied"
    assert digests(text.replace("one", "two"))[0] != before[0]
    assert digests(text, V="1")[0] != before[0]
    (context / "src" / "a.py").write_text("changed")
    assert (digests(text)[0], digests(text)[1] != before[1]) == (before[0], True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "none"], "there is no target 'none'"),
        (["--build-arg", "X"], "--build-arg 'X' · write NAME=VALUE"),
        (["--file", "/nowhere/Dockerfile"], "No such file"),
    ],
)
def test_bad_options_are_one_line(
    run_lines: ModuleType,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(run_lines.shutil, "which", lambda _: "/bin/true")
    assert run_lines.main(["--work", str(tmp_path), *arguments]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert out.count("\n") == 1
