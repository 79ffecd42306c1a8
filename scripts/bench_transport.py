#!/usr/bin/env python3
"""Data planes between two processes of this machine, each beside what it is built on, in one run.

nixl:// beside NIXL's Python API in the same configuration, tcp:// beside a plain socket that receives into place, and
process_vm_writev and memcpy as what the kernel and the memory allow. Destinations lie in random order. All pairs live
side by side and sleep while another is measured; every round measures every method, in alternating order, and ratios
are taken within a round. Times are those of the initiator, from the call to the proof that all bytes are in place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import stats
from bench.errors import BenchError, progress

ROOT = Path(__file__).resolve().parent.parent
MOVERS = ROOT / "scripts" / "bench" / "movers.py"
ARENA_BYTES = 256 << 20
REPLY_TIMEOUT_S = 120.0
NICE = -15
UCX_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}


@dataclass(frozen=True)
class Shape:
    name: str
    count: int
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.count * self.block_bytes


SHAPES = (
    Shape("1x256MiB", 1, 256 << 20),
    Shape("4096x16KiB", 4096, 16 << 10),
    Shape("4096x64KiB", 4096, 64 << 10),
    Shape("512x256KiB", 512, 256 << 10),
)
SMALL = Shape("1x4KiB", 1, 4 << 10)


@dataclass(frozen=True)
class Method:
    name: str
    kind: str
    env: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    idle_only: bool = False


def ucx_python() -> str:
    """ucxx and NIXL exclude each other, so it may have an environment of its own."""
    own = os.environ.get("LMKV_UCX_PYTHON") or str(ROOT / ".venv-ucx" / "bin" / "python")
    return own if os.access(own, os.X_OK) else sys.executable


# Each method of ours is followed by what it is compared with.
METHODS = (
    Method("nixl", "lmkv=nixl://"),
    Method("raw_nixl", "nixl=poll"),
    Method("nixl_threads", "lmkv=nixl://?progress=event&threads=2"),
    Method("raw_nixl_threads", "nixl=event"),
    Method("nixl_tcp", "lmkv=nixl://", env=UCX_TCP),
    Method("raw_nixl_tcp", "nixl=poll", env=UCX_TCP),
    Method("tcp", "lmkv=tcp://127.0.0.1"),
    Method("raw_socket", "socket"),
    Method("ucx", "lmkv=ucx://127.0.0.1", python=ucx_python()),
    Method("process_vm_writev", "process_vm"),
    Method("memcpy", "memcpy"),
    Method("raw_nixl_as_shipped", "nixl=shipped", idle_only=True),
)
PAIRS = (
    ("nixl", "raw_nixl"),
    ("nixl_threads", "raw_nixl_threads"),
    ("nixl_tcp", "raw_nixl_tcp"),
    ("tcp", "raw_socket"),
    ("tcp", "raw_nixl_tcp"),
    ("nixl", "process_vm_writev"),
)


class Child:
    """A process of movers.py."""

    def __init__(self, method: Method, role: str) -> None:
        self.what = f"{method.name} {role}"
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [method.python, str(MOVERS), str(theirs.fileno()), method.kind, role, str(ARENA_BYTES)],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, **method.env},
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()

    def send(self, command: str, **arguments: Any) -> None:
        self.pipe.send((command, arguments))

    def reply(self) -> Any:
        try:
            if not self.pipe.poll(REPLY_TIMEOUT_S):
                raise BenchError(f"{self.what} gave no answer within {REPLY_TIMEOUT_S:.0f} s")
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionError) as error:
            last = (self.process.communicate(timeout=10)[1].strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"{self.what} ended: {last}") from error
        if kind != "ok":
            raise BenchError(f"{self.what} failed:\n{value}")
        return value

    def call(self, command: str, **arguments: Any) -> Any:
        self.send(command, **arguments)
        return self.reply()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)
        self.pipe.close()


class Pair:
    """Initiator and target of one method, connected; raises BenchError where the method cannot run here."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.initiator, self.target = Child(method, "initiator"), Child(method, "target")
        try:
            self.here, self.there = (c.call("describe") for c in (self.initiator, self.target))
            self.initiator.call("meet", hello=self.there["hello"])
            self.target.call("meet", hello=self.here["hello"])
        except BenchError:
            self.end()
            raise

    def move(self, shape: Shape, times: int) -> list[float]:
        local, remote = tables(shape, self.here["address"], self.there["address"])
        self.target.call("expect", remote=remote)
        self.target.call("serve")
        samples: list[float] = self.initiator.call("move", local=local, remote=remote, times=times)
        return samples

    def pause(self) -> None:
        """The target's next command ends its serving."""
        self.target.call("describe")

    def check(self, shape: Shape) -> None:
        _, remote = tables(shape, self.here["address"], self.there["address"])
        side = self.initiator if self.method.kind == "memcpy" else self.target
        shifted = remote.copy()
        if side is self.initiator:
            shifted[:, 0] = remote[:, 0] - np.uint64(self.there["address"]) + np.uint64(self.here["address"])
        if not side.call("check", rows=shifted):
            raise BenchError(f"{self.method.name} {shape.name}: bytes are missing at the target")

    def end(self) -> None:
        for child in (self.initiator, self.target):
            child.end()


def tables(shape: Shape, here: int, there: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Sources in order, destinations anywhere in the arena in random order."""
    out = []
    places = np.random.default_rng(shape.count).permutation(ARENA_BYTES // shape.block_bytes)[: shape.count]
    for base, blocks in ((here, np.arange(shape.count)), (there, places)):
        table = np.zeros((shape.count, 3), dtype=np.uint64)
        table[:, 0] = np.uint64(base) + blocks.astype(np.uint64) * np.uint64(shape.block_bytes)
        table[:, 1] = shape.block_bytes
        out.append(table)
    return out[0], out[1]


def open_pairs(wanted: Sequence[str]) -> tuple[list[Pair], dict[str, str]]:
    """The pairs that can run here, and why the others cannot."""
    pairs, absent = [], {}
    for method in (m for m in METHODS if m.name in wanted):
        try:
            pairs.append(Pair(method))
        except BenchError as error:
            absent[method.name] = str(error)
            progress(f"{method.name} is left out: {error}")
    return pairs, absent


def measure(pairs: list[Pair], rounds: int, small_times: int) -> dict[tuple[str, str], list[float]]:
    """Seconds, by method and shape; for the small shape `small_times` a round, of which percentiles are taken."""
    samples: dict[tuple[str, str], list[float]] = {}
    moving = [pair for pair in pairs if not pair.method.idle_only]
    for number in range(rounds + 1):
        progress("warming up" if not number else f"round {number} of {rounds}")
        for shape in (*SHAPES, SMALL):
            for pair in moving if number % 2 else moving[::-1]:
                times = small_times if shape is SMALL else 1
                seconds = pair.move(shape, times)
                pair.pause()
                if number:
                    samples.setdefault((pair.method.name, shape.name), []).extend(seconds)
                elif shape is not SMALL:
                    pair.check(shape)
    return samples


def idle_cores(pairs: list[Pair], seconds: float) -> dict[str, float]:
    """Cores an idle agent takes: the mean of initiator and target, by process CPU time, all at once."""
    progress(f"idle for {seconds:.0f} s")
    with_agent = [pair for pair in pairs if pair.method.kind.startswith(("lmkv", "nixl"))]
    children = [child for pair in with_agent for child in (pair.initiator, pair.target)]
    for child in children:
        child.send("idle", seconds=seconds)
    used = [child.reply() for child in children]
    return {pair.method.name: round((used[2 * i] + used[2 * i + 1]) / 2, 4) for i, pair in enumerate(with_agent)}


def results(samples: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    out = []
    for (method, shape_name), seconds in samples.items():
        shape = next(s for s in (*SHAPES, SMALL) if s.name == shape_name)
        cell: dict[str, Any] = {"method": method, "shape": shape_name, "n": len(seconds)}
        if shape is SMALL:
            p50, p99 = np.percentile(seconds, [50, 99]) * 1e6
            cell |= {"p50_us": round(float(p50), 2), "p99_us": round(float(p99), 2)}
        else:
            cell["gb_per_s"] = stats.spread([shape.total_bytes / s / 1e9 for s in seconds], digits=3)
        out.append(cell)
    return out


def ratios(samples: dict[tuple[str, str], list[float]], ours: str, theirs: str) -> dict[str, float]:
    """Speed of ours over theirs by shape: the median of the rounds' ratios, of the p50 for the small shape."""
    out = {}
    for shape in (*SHAPES, SMALL):
        a, b = samples.get((ours, shape.name)), samples.get((theirs, shape.name))
        if not a or not b:
            continue
        if shape is SMALL:
            out[shape.name] = round(float(np.median(b) / np.median(a)), 4)
        else:
            out[shape.name] = round(stats.median([t / o for o, t in zip(a, b, strict=True)]), 4)
    return out


def summary(samples: dict[tuple[str, str], list[float]], idle: dict[str, float]) -> dict[str, float]:
    """Flat. `X_vs_Y` is the smallest ratio over the throughput shapes; the 4 KiB latency has a key of its own."""
    out: dict[str, float] = {}
    for ours, theirs in PAIRS:
        found = ratios(samples, ours, theirs)
        if not found:
            continue
        key = f"{ours}_vs_{theirs}"
        out[key] = min(value for shape, value in found.items() if shape != SMALL.name)
        out |= {f"{key}.{shape}": value for shape, value in found.items()}
    out |= {f"idle_cpu_cores.{name}": cores for name, cores in idle.items()}
    if "nixl" in idle:
        out["idle_cpu_cores"] = idle["nixl"]
    return out


def table(cells: list[dict[str, Any]], idle: dict[str, float], flat: dict[str, float]) -> str:
    names = list(dict.fromkeys(cell["method"] for cell in cells)) + [n for n in idle if n.startswith("raw_nixl_as")]
    by = {(cell["method"], cell["shape"]): cell for cell in cells}
    head = (
        f"{'GB/s':<20}" + "".join(f"{s.name:>12}" for s in SHAPES) + f"{'4 KiB p50':>11}{'p99 us':>9}{'idle cores':>12}"
    )
    lines = [head, "-" * len(head)]
    for name in names:
        line = f"{name:<20}"
        for shape in SHAPES:
            cell = by.get((name, shape.name))
            line += f"{cell['gb_per_s']['median']:>12.2f}" if cell else f"{'':>12}"
        small = by.get((name, SMALL.name))
        line += f"{small['p50_us']:>11.1f}{small['p99_us']:>9.1f}" if small else f"{'':>20}"
        lines.append(line + (f"{idle[name]:>12.3f}" if name in idle else ""))
    lines.append("")
    lines += [f"{key:<44}{value:>8.3f}" for key, value in flat.items() if "_vs_" in key]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="3 rounds and 1 s of idling, for a first look")
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions of each cell (default: 11; --quick: 3)")
    parser.add_argument(
        "--methods", default=",".join(m.name for m in METHODS), metavar="LIST", help="default: %(default)s"
    )
    given = parser.parse_args(arguments)
    given.methods = given.methods.split(",")
    if unknown := set(given.methods) - {m.name for m in METHODS}:
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown")
    given.rounds = given.rounds or (3 if given.quick else 11)
    if given.rounds < 1:
        parser.error("--rounds: at least 1")
    return given


def run(given: argparse.Namespace) -> dict[str, Any]:
    pairs, absent = open_pairs(given.methods)
    children = [child for pair in pairs for child in (pair.initiator, pair.target)]
    try:
        usage = stats.CpuUsage(lambda: sum(child.cpu_s() for child in children))
        samples = measure(pairs, given.rounds, 200 if given.quick else 500)
        foreign = usage.foreign_share()
        idle = idle_cores(pairs, 1.0 if given.quick else 5.0)
    finally:
        for pair in pairs:
            pair.end()
    return {
        "benchmark": "transport",
        "machine": stats.machine(),
        "commit": stats.commit(ROOT),
        "versions": stats.versions(),
        "settings": {
            "rounds": given.rounds,
            "nice": os.nice(0),
            "arena_bytes": ARENA_BYTES,
            "methods": [{"name": p.method.name, "kind": p.method.kind, "env": p.method.env} for p in pairs],
            "absent": absent,
            "foreign_cpu_share": round(foreign, 4),
        },
        "results": results(samples),
        "idle_cpu_cores": idle,
        "summary": summary(samples, idle),
    }


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    # So that what else runs here disturbs less. Without the right to do so it stays as it is.
    with contextlib.suppress(PermissionError):
        os.nice(NICE)
    try:
        result = run(given)
    except BenchError as error:
        print(f"bench_transport: {error}", file=sys.stderr)
        return 1
    print(table(result["results"], result["idle_cpu_cores"], result["summary"]))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        partial = given.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(given.out)
        progress(f"written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
