#!/usr/bin/env python3
"""Executes every RUN line of a target of docker/Dockerfile where no Docker is, in folders of debootstrap (as root).

COPY, WORKDIR, ENV, ARG, USER and SHELL act as in Docker. Stages are folders under --work; one that is unchanged since
an earlier run is not run again (--fresh does). Two base images are stood in for: python:3.11-slim-bookworm by a minimal
bookworm with Debian's Python 3.11, and vllm/vllm-openai by that with vLLM for the CPU in the system's Python. So what
needs CUDA is not proved; the log says so.

    docker/run_lines.py --target cpu --build-arg PIP_EXTRA_INDEX_URL= --secret pip=/etc/pip.conf --log run.log
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dockerfile
import rootfs
from dockerfile import DockerfileError, Instruction, Stage

HERE = Path(__file__).resolve().parent
CONTEXT = HERE.parent
PYTHON_IMAGE = "python:3.11-slim-bookworm"
VLLM_IMAGE = "vllm/vllm-openai:"
VLLM_STAGE = "engine"
"""Brings what stands in for VLLM_IMAGE."""
SITE_PACKAGES = "usr/local/lib/python3.11/dist-packages"
STOOD_IN = {
    PYTHON_IMAGE: "a minimal bookworm with Debian's Python 3.11 stands in for the image",
    VLLM_IMAGE: "vLLM for the CPU stands in for the image: nothing of CUDA is proved",
}
BASE_ENV = {
    "PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/tmp",
}


@dataclass(frozen=True, slots=True)
class Options:
    work: Path
    given: dict[str, str]
    secrets: dict[str, Path]
    binds: tuple[Path, ...]
    mirror: str
    apt_conf: Path | None
    timeout_s: float
    fresh: bool


@dataclass(slots=True)
class State:
    """A stage: where its files are, and what its next line sees. `digest` tells what it was made from."""

    root: str
    digest: str = ""
    env: dict[str, str] = field(default_factory=lambda: dict(BASE_ENV))
    arguments: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    runs: int = 0

    @property
    def known(self) -> dict[str, str]:
        return self.arguments | self.env

    def path(self, inside: str) -> Path:
        return Path(self.root) / os.path.normpath(os.path.join(self.workdir, inside)).lstrip("/")


class Log:
    """To the screen and a file."""

    def __init__(self, file: Path | None) -> None:
        self._sink = file.open("w") if file is not None else None

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self._sink is not None:
            print(text, file=self._sink, flush=True)


class Builder:
    def __init__(self, text: str, options: Options, log: Log) -> None:
        instructions = dockerfile.parse(text)
        self.options = options
        self.log = log
        self.outer = dockerfile.global_arguments(instructions, options.given)
        self.stages = dockerfile.stages(instructions, options.given)
        self.ignore = dockerfile.Ignore((CONTEXT / ".dockerignore").read_text())
        self.done: dict[str, State] = {}
        self.ran = 0

    def build(self, target: str) -> None:
        """Raises DockerfileError with the line that failed."""
        for stage in dockerfile.needed(self.stages, target):
            if stage.name not in self.done:
                if stage.base.startswith(VLLM_IMAGE):
                    self.build(VLLM_STAGE)
                self.done[stage.name] = self._stage(stage)

    def _stage(self, stage: Stage) -> State:
        self.log.say(f"FROM {stage.base} AS {stage.name}")
        digest = self._digest(stage)
        record = self.options.work / f"{stage.name}.json"
        if not self.options.fresh and record.exists():
            earlier = State(**json.loads(record.read_text()))
            if earlier.digest == digest:
                self.log.say(f"  = as in an earlier run ({earlier.runs} RUN lines)")
                return earlier
        record.unlink(missing_ok=True)
        state = self._base(stage)
        state.digest = digest
        for step in stage.steps:
            try:
                self._step(step, state)
            except DockerfileError as error:
                raise DockerfileError(f"line {step.line}: {step.name} failed: {error}") from error
        record.write_text(json.dumps(asdict(state)))
        return state

    def _digest(self, stage: Stage) -> str:
        """Of its lines, what they are given, its bases, and all that is copied."""
        found = hashlib.sha256(repr((stage.base, stage.steps, sorted(self.options.given.items()))).encode())
        for name in (stage.base, VLLM_STAGE if stage.base.startswith(VLLM_IMAGE) else ""):
            found.update(self.done[name].digest.encode() if name in self.done else b"")
        for step in (step for step in stage.steps if step.name == "COPY"):
            origin = step.flag("from")
            if origin:
                found.update(self.done[origin].digest.encode())
            for source in shlex.split(step.text)[:-1] if not origin else ():
                for file in rootfs.files_of(CONTEXT, source, self.ignore):
                    content = str(file.readlink()).encode() if file.is_symlink() else file.read_bytes()
                    found.update(str(file).encode() + hashlib.sha256(content).digest())
        return found.hexdigest()

    def _base(self, stage: Stage) -> State:
        state = State(str(self.options.work / stage.name))
        root = Path(state.root)
        if stage.base in self.done:
            parent = self.done[stage.base]
            rootfs.copy_root(Path(parent.root), root)
            return State(
                state.root, env=dict(parent.env), workdir=parent.workdir, user=parent.user, shell=list(parent.shell)
            )
        if stage.base != PYTHON_IMAGE and not stage.base.startswith(VLLM_IMAGE):
            raise DockerfileError(f"nothing stands in for {stage.base} · known: {', '.join(STOOD_IN)}")
        debian, options = self.options.work / "debian", self.options
        rootfs.debian(debian, options.mirror, options.apt_conf, options.timeout_s, self.log.say)
        rootfs.copy_root(debian, root)
        if stage.base.startswith(VLLM_IMAGE):
            engine = self.done[VLLM_STAGE]
            packages = engine.path(".venv/lib/python3.11/site-packages")
            shutil.copytree(packages, root / SITE_PACKAGES, symlinks=True, dirs_exist_ok=True)
            for library in Path(engine.root).glob("usr/lib/*/libnuma.so*"):
                shutil.copy2(library, root / library.relative_to(engine.root), follow_symlinks=False)
        self.log.say(f"  ~ {next(why for image, why in STOOD_IN.items() if stage.base.startswith(image))}")
        return state

    def _step(self, step: Instruction, state: State) -> None:
        match step.name:
            case "ARG":
                state.arguments |= dockerfile.arguments(step, self.options.given, self.outer, state.known)
            case "ENV":
                state.env |= dockerfile.assignments(step, state.known)
            case "WORKDIR":
                state.workdir = os.path.join(state.workdir, dockerfile.expand(step.text, state.known))
                state.path(".").mkdir(parents=True, exist_ok=True)
            case "USER":
                state.user = dockerfile.expand(step.text, state.known)
            case "SHELL":
                state.shell = dockerfile.shell(step)
            case "COPY":
                self._copy(step, state)
            case "RUN":
                self._run(step, state)

    def _copy(self, step: Instruction, state: State) -> None:
        *sources, target = shlex.split(dockerfile.expand(step.text, state.known))
        origin = step.flag("from")
        base, ignore = (Path(self.done[origin].root), None) if origin else (CONTEXT, self.ignore)
        for source in sources:
            files = rootfs.files_of(base, source, ignore)
            if not files:
                raise DockerfileError(f"there is no {source} in {origin or 'the context'} · see .dockerignore")
            rootfs.copy_in(base, source, files, state.path(target), len(sources) > 1 or target.endswith("/"))
        self.log.say(f"  line {step.line:3} COPY {step.text}" + (f" (from {origin})" if origin else ""))

    def _run(self, step: Instruction, state: State) -> None:
        self.log.say(f"  line {step.line:3} RUN  {step.text[:150]}")
        started = time.monotonic()
        words = [*state.shell, f"cd {shlex.quote(state.workdir)} && {dockerfile.command(step)}"]
        options = self.options
        rootfs.run_inside(
            Path(state.root),
            words,
            state.known,
            state.user,
            options.binds,
            {target: options.secrets[name] for name, target in dockerfile.secrets(step) if name in options.secrets},
            options.timeout_s,
            self.log.say,
        )
        state.runs += 1
        self.ran += 1
        self.log.say(f"           ✓ {time.monotonic() - started:.1f} s")


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    for each in given:
        if "=" not in each:
            raise DockerfileError(f"{option} {each!r} · write NAME=VALUE")
    return dict(each.partition("=")[::2] for each in given)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu", help="stage to make (default: %(default)s)")
    parser.add_argument("--file", type=Path, default=HERE / "Dockerfile")
    parser.add_argument("--work", type=Path, default=CONTEXT / ".cache" / "docker", help="for the stages' folders")
    parser.add_argument("--fresh", action="store_true", help="run every line, also of unchanged stages")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--secret", action="append", default=[], metavar="ID=FILE", help="for RUN --mount=type=secret")
    parser.add_argument(
        "--bind", action="append", default=[], type=Path, metavar="PATH", help="file or folder seen inside"
    )
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian")
    parser.add_argument("--apt-conf", type=Path, metavar="FILE", help="further settings of apt inside")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="of one line (default: %(default)s)")
    parser.add_argument("--log", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse_options(arguments)
    log = Log(given.log)
    try:
        if os.geteuid() != 0 or shutil.which("debootstrap") is None:
            raise DockerfileError("this needs root and debootstrap · apt-get install debootstrap")
        options = Options(
            given.work.resolve(),
            pairs(given.build_arg, "--build-arg"),
            {name: Path(file) for name, file in pairs(given.secret, "--secret").items()},
            tuple(given.bind),
            given.mirror,
            given.apt_conf,
            given.timeout,
            given.fresh,
        )
        options.work.mkdir(parents=True, exist_ok=True)
        builder = Builder(given.file.read_text(), options, log)
        builder.build(given.target)
    except (DockerfileError, OSError) as error:
        log.say(f"run_lines: {error}")
        return 1
    log.say(f"{given.target}: {builder.ran} RUN lines executed, all succeeded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
