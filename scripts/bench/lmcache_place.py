"""Where LMCache lives: an environment of its own beside vLLM, and a network namespace that nothing leaves.

LMCache reports its environment and configuration to its makers when it starts. Here it is told not to, and its
namespace has nothing but a loopback and one veth pair to the benchmark: no route leads further. The pair, and not a
helper inside of the namespace, because the engines are then asked by the same client over the same kind of TCP
connection as those of every other method.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.errors import BenchError, progress

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "lmcache"
VERSION = "0.5.6"
PINS = (f"lmcache=={VERSION}", "sortedcontainers==2.4.0", "cryptography==50.0.2", "cffi==2.1.1")
"""Everything else that LMCache imports in MP mode on a CPU comes with vLLM."""
NEEDED = ("lmcache.cli.main", "lmcache.v1.multiprocess.http_server", "lmcache.integration.vllm.lmcache_mp_connector")
INSTALL_DEADLINE_S = 300.0
QUIET = {
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "PYTHONSAFEPATH": "1",  # no module of the folder that the benchmark was started in
}

NAMESPACE = "lmkv-lmcache"
DEVICE, PEER_DEVICE = "lmkv-lmc1", "lmkv-lmc0"
ADDRESS, PEER_ADDRESS = "198.18.3.2", "198.18.3.1"  # of 198.18.0.0/15, which RFC 2544 keeps for benchmarks


def environment(folder: Path = CACHE) -> Path:
    """The python of an environment with LMCache beside the vLLM of the running one; made once, then found again.

    LMCache's own requirements contradict vLLM's in five places and ask for CUDA, hence no dependencies: the running
    environment's packages serve instead. Only the first of several processes makes it, the others wait.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            return _made(folder)
    except OSError as error:
        raise BenchError(f"no LMCache: {folder} cannot hold its environment ({error})") from None


def _made(folder: Path) -> Path:
    made = folder / "venv"
    python = made / "bin" / "python"
    stamp, wanted = folder / "made", "\n".join([*PINS, sys.version, *_package_folders()])
    if stamp.is_file() and stamp.read_text() == wanted and python.exists():
        return python
    progress(f"making an environment for LMCache {VERSION} in {folder}")
    stamp.unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    _install(sys.executable, "-m", "venv", str(made))
    links = made / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "benchmark.pth"
    links.write_text("\n".join(_package_folders()) + "\n")
    _install(str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", *PINS)
    _install(str(python), "-P", "-c", f"import vllm, {', '.join(NEEDED)}")
    stamp.write_text(wanted)
    return python


def _package_folders() -> list[str]:
    return [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        deadline_s = time.monotonic() + INSTALL_DEADLINE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BenchError(f"another process has held {path} for {INSTALL_DEADLINE_S:.0f} s") from None
                time.sleep(0.2)
        yield


def _install(*command: str) -> None:
    told = {**os.environ, **QUIET}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=told, timeout=INSTALL_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"no LMCache: `{' '.join(command)}` took over {INSTALL_DEADLINE_S:.0f} s") from None
    if done.returncode != 0:
        said = "\n".join(f"    {line}" for line in (done.stdout + done.stderr).splitlines()[-8:])
        raise BenchError(f"no LMCache: `{' '.join(command)}` failed with code {done.returncode}:\n{said}")


class Island:
    """The namespace that LMCache lives in; `close` removes it and may be called twice."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise BenchError("LMCache runs in a network namespace, which only root may make; run this as root")
        self._refuse_if_inhabited()
        self.close()
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _refuse_if_inhabited() -> None:
        known = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]
        if NAMESPACE in known and (pids := _ip("netns", "pids", NAMESPACE).split()):
            raise BenchError(f"processes {', '.join(pids)} run in namespace {NAMESPACE}: is another benchmark running?")

    @staticmethod
    def _create() -> None:
        _ip("netns", "add", NAMESPACE)
        _ip("-n", NAMESPACE, "link", "set", "lo", "up")
        _ip("link", "add", PEER_DEVICE, "type", "veth", "peer", "name", DEVICE)
        _ip("link", "set", DEVICE, "netns", NAMESPACE)
        for inside, device, address in (([], PEER_DEVICE, PEER_ADDRESS), (["-n", NAMESPACE], DEVICE, ADDRESS)):
            _ip(*inside, "link", "set", device, "addrgenmode", "none")  # no IPv6 address
            _ip(*inside, "addr", "add", f"{address}/30", "dev", device)
            _ip(*inside, "link", "set", device, "up")
        ways_out = [_ip(family, "-n", NAMESPACE, "route", "show", "default") for family in ("-4", "-6")]
        if any(ways_out):
            raise BenchError(f"namespace {NAMESPACE} has a way out: {' '.join(ways_out)}")

    @staticmethod
    def close() -> None:
        for command in (("netns", "delete", NAMESPACE), ("link", "delete", PEER_DEVICE)):
            with contextlib.suppress(BenchError):  # not there, or gone with the other end
                _ip(*command)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"`ip {' '.join(arguments)}` failed with code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
