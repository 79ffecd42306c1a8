"""Folders that stand for images: making them, copying into them as COPY does, and running a command inside."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dockerfile import DockerfileError, Ignore

DEBIAN_PACKAGES = "python3 python3-venv python3-pip python3-distutils ca-certificates"
OUTPUT_LINES = 30

Say = Callable[[str], None]


def run(words: Sequence[str], timeout_s: float, say: Say) -> None:
    """Tells the end of what it said; more if it fails. Ended with all its children after the deadline."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise DockerfileError(f"not done after {timeout_s:g} s · raise --timeout") from error
        raise
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    for line in lines[-OUTPUT_LINES if process.returncode else -1 :]:
        say(f"           | {line[:160]}")
    if process.returncode:
        raise DockerfileError(f"{Path(words[0]).name} ended with status {process.returncode} · its last words: above")


def debian(root: Path, mirror: str, apt_conf: Path | None, timeout_s: float, say: Say) -> None:
    """A minimal bookworm with Python, where `python` is; nothing if it is there."""
    if (root / "complete").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    run(["debootstrap", "--variant=minbase", "bookworm", str(root), mirror], timeout_s, say)
    if apt_conf is not None:
        shutil.copy(apt_conf, root / "etc/apt/apt.conf.d/99local")
    install = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {DEBIAN_PACKAGES}"
    command = f"{install} && ln -s /usr/bin/python3 /usr/local/bin/python"
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    run_inside(root, ["/bin/sh", "-c", command], env, "0:0", (), {}, timeout_s, say)
    (root / "complete").touch()


def run_inside(
    root: Path,
    words: Sequence[str],
    env: Mapping[str, str],
    user: str,
    binds: Sequence[Path],
    files: Mapping[str, Path],
    timeout_s: float,
    say: Say,
) -> None:
    """With the network, and nothing of this machine's environment. What is mounted (`binds` read-only, `files` over
    theirs) is so in a namespace of its own, and gone with the command."""
    mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"mount --rbind /sys {root}/sys"]
    lent = {"/etc/resolv.conf": Path("/etc/resolv.conf"), **{str(path): path for path in binds}, **files}
    with contextlib.ExitStack() as placed:
        for target, source in lent.items():
            inside = placed.enter_context(_placeholder(root / target.lstrip("/"), source.is_dir()))
            mounts.append(f"mount --bind -o ro {shlex.quote(str(source))} {shlex.quote(str(inside))}")
        variables = [f"{name}={value}" for name, value in env.items()]
        inner = ["chroot", f"--userspec={user}", str(root), "/usr/bin/env", "-i", *variables, *words]
        script = " && ".join([*mounts, f"exec {shlex.join(inner)}"])
        run(["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script], timeout_s, say)


@contextlib.contextmanager
def _placeholder(path: Path, folder: bool) -> Iterator[Path]:
    """Something to mount over; gone afterwards if it was not there before."""
    there = path.exists()
    if not there:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.mkdir() if folder else path.touch()
    try:
        yield path
    finally:
        if not there:
            path.rmdir() if folder else path.unlink()


def copy_root(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(target)], check=True)


def files_of(base: Path, source: str, ignore: Ignore | None) -> list[Path]:
    """What COPY takes for `source`, links included."""
    start = base / source.strip("/")
    if start.is_file() or start.is_symlink():
        found = [start]
    else:
        found = sorted(path for path in start.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path for path in found if ignore is None or not ignore.leaves_out(str(path.relative_to(base)))]


def copy_in(base: Path, source: str, files: Sequence[Path], into: Path, several: bool) -> None:
    """A folder's content goes into the target; a file becomes it, or goes into it if there are `several`."""
    start = base / source.strip("/")
    for file in files:
        target = into / (file.relative_to(start) if file != start else Path(file.name if several else ""))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(file, target, follow_symlinks=False)
