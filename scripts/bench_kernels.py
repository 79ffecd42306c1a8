#!/usr/bin/env python3
"""Conversions of KV between geometries, beside a plain copy of as many bytes between the same buffers.

Every cell works through 256 MiB and more, block by block in random order, so that caches are cold. Each round measures
the plain copy, the op, and where it sums, the same conversion without checksum; ratios are taken within a round. On the
CPU the copy is memcpy and everything runs in one thread (--threads); on CUDA it is a copy on the device. The reference
in torch gets a smaller share of the same work, and speeds are compared. The checksum of runs (of the blocks of a cache,
layer by layer) reads as many bytes as the copy and writes none.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import stats
from bench.errors import BenchError, progress

from lmkv import kernels, layout
from lmkv.kernels import Cache, checksum, reference
from lmkv.layout import Geometry, Segments, canonical_pages, vllm_cache

ROOT = Path(__file__).resolve().parent.parent
WORK_BYTES = 256 << 20
TORCH_BYTES = 8 << 20
PAGE_TOKENS = 256
NICE = -15
GOALS = {
    "pack_vs_memcpy": (">=", 0.8),
    "unpack_vs_memcpy": (">=", 0.8),
    "transpose_vs_memcpy": (">=", 0.5),
    "interior_vs_memcpy": (">=", 0.4),
    "checksum_vs_memcpy": (">=", 0.8),
    "checksum_cost": ("<=", 0.15),
    "vs_torch": (">=", 5.0),
}
"""By key of the summary, which is the worst of its cells."""


@dataclass(frozen=True)
class Side:
    """A cache of one model, or the canonical pages of it."""

    layout: str
    block_tokens: int
    interior: str = "plain"
    pages: bool = False

    def __str__(self) -> str:
        name = self.layout if self.interior == "plain" else self.interior
        return f"{name}/{self.block_tokens}"


@dataclass(frozen=True)
class Cell:
    group: str
    """Of the summary."""
    source: Side
    target: Side
    parts: tuple[int, ...] = (128, 128)
    heads: int = 8
    layers: int = 32
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        model = f"{self.heads}x{'+'.join(map(str, self.parts))} {self.dtype}"
        return f"{self.source} → {self.target}, {model}"

    @property
    def op(self) -> str:
        if self.group == "checksum":
            return "checksum"
        return "pack" if self.target.pages else "unpack" if self.source.pages else "convert"

    def geometry(self, side: Side, tokens: int) -> Geometry:
        blocks = tokens // side.block_tokens
        model = vllm_cache(
            "LBHNC" if side.pages else side.layout,
            layers=self.layers,
            blocks=blocks,
            heads=self.heads,
            block_tokens=side.block_tokens,
            parts=self.parts,
            interior=side.interior,
            dtype=self.dtype,
        )
        return canonical_pages(model, page_tokens=side.block_tokens, pages=blocks) if side.pages else model

    def tokens(self, work_bytes: int) -> int:
        """Whole pages that make up this many bytes."""
        token_bytes = sum(self.parts) * self.heads * self.layers * layout.WIDTHS[self.dtype]
        return -(-work_bytes // (token_bytes * PAGE_TOKENS)) * PAGE_TOKENS


def cells() -> list[Cell]:
    pages = Side("pages", PAGE_TOKENS, pages=True)
    nhd, hnd, hnd64 = Side("LBNHC", 16), Side("LBHNC", 16), Side("LBHNC", 64)
    mla: dict[str, Any] = {"parts": (576,), "heads": 1, "layers": 61}
    found = [
        Cell("pack", Side("LBHNC", 64), pages, **mla),
        Cell("unpack", pages, Side("LBHNC", 64), **mla),
        Cell("checksum", hnd, hnd),
        Cell("checksum", Side("LBHNC", 64), Side("LBHNC", 64), **mla),
        Cell("pack", hnd, hnd),
        Cell("pack", hnd, hnd64),
        Cell("unpack", hnd64, hnd),
    ]
    for d in (64, 128):
        found += [
            Cell("transpose", source, target, parts=(d, d))
            for source, target in ((nhd, pages), (pages, nhd), (hnd, pages), (pages, hnd), (nhd, hnd), (hnd, nhd))
        ]
    for interior, dtype in (("amx", "bfloat16"), ("vec", "bfloat16"), ("vec", "float32")):
        packed = Side("LBHNC", 128, interior)
        found += [Cell("interior", packed, pages, dtype=dtype), Cell("interior", pages, packed, dtype=dtype)]
        found += [Cell("interior", nhd, packed, dtype=dtype), Cell("interior", packed, nhd, dtype=dtype)]
    return found


class Bench:
    """The two caches of a cell, and what can be done with them."""

    def __init__(self, cell: Cell, device: str, work_bytes: int) -> None:
        tokens = cell.tokens(work_bytes)
        self.cell, self.device = cell, device
        self.source, self.target = (
            Cache.of(_memory(g.span_bytes(), device), g)
            for g in (cell.geometry(side, tokens) for side in (cell.source, cell.target))
        )
        self.bytes = min(self.source.data.numel(), self.target.data.numel())
        rng = np.random.default_rng(0)
        self.segments: Segments = layout.segments(
            self.source.geometry,
            self.target.geometry,
            _order(rng, self.source.geometry.blocks, cell.source.pages),
            _order(rng, self.target.geometry.blocks, cell.target.pages),
            (0, tokens),
        )
        g = self.source.geometry
        block_bytes, order = g.strides[1] * g.width, rng.permutation(g.blocks)
        starts = (self.source.layers.numpy()[:, None] + order[None, :] * block_bytes).reshape(-1)
        self.runs = np.stack([starts, np.full(len(starts), block_bytes)], axis=1)

    def convert(self) -> None:
        kernels.convert_blocks(self.source, self.target, self.segments)

    def op(self) -> None:
        if self.cell.op == "pack":
            kernels.pack_pages(self.source, self.target, self.segments)
        elif self.cell.op == "unpack":
            kernels.unpack_pages(self.source, self.target, self.segments)
        elif self.cell.op == "checksum":
            kernels.checksum_runs(self.source.data, self.runs)
        else:
            self.convert()

    def plain(self) -> None:
        if self.device == "cuda":
            self.target.data[: self.bytes].copy_(self.source.data[: self.bytes])
        else:
            ctypes.memmove(self.target.data.data_ptr(), self.source.data.data_ptr(), self.bytes)

    def seconds(self, work: Callable[[], None]) -> float:
        """Of one call, from the start to the end of its work on the device."""
        _finish(self.device)
        started = time.perf_counter()
        work()
        _finish(self.device)
        return time.perf_counter() - started


def _memory(size: int, device: str) -> torch.Tensor:
    """Touched once, so that no page is missing later."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)


def _order(rng: np.random.Generator, blocks: int, pages: bool) -> layout.Array:
    return np.arange(blocks) if pages else rng.permutation(blocks)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def torch_reference() -> Iterator[None]:
    with mock.patch.multiple(
        torch.ops.lmkv,
        convert_blocks=reference.convert_blocks,
        pack_pages=reference.pack_pages,
        unpack_pages=reference.unpack_pages,
        checksum_runs=checksum.reference,
    ):
        yield


def measure(cell: Cell, device: str, rounds: int) -> dict[str, Any]:
    bench = Bench(cell, device, WORK_BYTES)
    works = {"plain": bench.plain, "op": bench.op}
    if cell.op in ("pack", "unpack"):
        works["no_sum"] = bench.convert
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works) if number % 2 else list(works)[::-1]:
            seconds = bench.seconds(works[name])
            if number:
                times[name].append(seconds)
    small = Bench(cell, device, TORCH_BYTES)
    with torch_reference():
        by_torch = stats.median([small.seconds(small.op) for _ in range(2)])
    op = stats.median(times["op"])
    found: dict[str, Any] = {
        "cell": str(cell),
        "group": cell.group,
        "op": cell.op,
        "bytes": bench.bytes,
        "plain_gb_per_s": stats.spread([bench.bytes / s / 1e9 for s in times["plain"]]),
        "op_gb_per_s": stats.spread([bench.bytes / s / 1e9 for s in times["op"]]),
        "vs_memcpy": round(stats.median([p / o for p, o in zip(times["plain"], times["op"], strict=True)]), 3),
        "vs_torch": round((by_torch / small.bytes) / (op / bench.bytes), 1),
    }
    if "no_sum" in works:
        costs = [o / n - 1 for o, n in zip(times["op"], times["no_sum"], strict=True)]
        found["checksum_cost"] = round(stats.median(costs), 3)
    return found


def summary(results: list[dict[str, Any]]) -> dict[str, float]:
    """The worst of all cells, by key."""
    out = {
        f"{group}_vs_memcpy": min(cell["vs_memcpy"] for cell in results if cell["group"] == group)
        for group in ("pack", "unpack", "transpose", "interior", "checksum")
        if any(cell["group"] == group for cell in results)
    }
    if costs := [cell["checksum_cost"] for cell in results if "checksum_cost" in cell]:
        out["checksum_cost"] = max(costs)
    out["vs_torch"] = min(cell["vs_torch"] for cell in results)
    return out


def table(results: list[dict[str, Any]], flat: dict[str, float]) -> str:
    head = f"{'':<46}{'op':<9}{'GB/s':>7}{'copy':>7}{'share':>7}{'sum':>8}{'x torch':>9}"
    lines = [head, "-" * len(head)]
    for cell in results:
        cost = f"{cell['checksum_cost']:>8.0%}" if "checksum_cost" in cell else f"{'':>8}"
        lines.append(
            f"{cell['cell']:<46}{cell['op']:<9}{cell['op_gb_per_s']['median']:>7.2f}"
            f"{cell['plain_gb_per_s']['median']:>7.2f}{cell['vs_memcpy']:>7.2f}{cost}{cell['vs_torch']:>9.1f}"
        )
    lines.append("")
    for key, value in flat.items():
        sign, goal = GOALS[key]
        met = value >= goal if sign == ">=" else value <= goal
        lines.append(f"{key:<24}{value:>8.3f}   goal {sign} {goal:<5} {'met' if met else 'missed'}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="3 rounds, for a first look")
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions of each cell (default: 11; --quick: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1, as memcpy has)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name or group has this in it")
    given = parser.parse_args(arguments)
    given.rounds = given.rounds or (3 if given.quick else 11)
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads: at least 1")
    return given


def run(given: argparse.Namespace) -> dict[str, Any]:
    if given.device not in kernels.loaded:
        raise BenchError(f"nothing compiled is loaded for {given.device}; `python -m lmkv.kernels` says what is there")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("torch sees no CUDA device; use --device cpu, or a torch that is built for CUDA")
    torch.set_num_threads(given.threads)
    chosen = [cell for cell in cells() if given.only in f"{cell.group} {cell}"]
    if not chosen:
        raise BenchError(f"--only {given.only!r} leaves no cell")
    usage = stats.CpuUsage(time.process_time)
    results = []
    for cell in chosen:
        progress(f"{cell.op}: {cell}")
        results.append(measure(cell, given.device, given.rounds))
    return {
        "benchmark": "kernels",
        "machine": stats.machine(),
        "commit": stats.commit(ROOT),
        "versions": stats.versions(),
        "settings": {
            "device": given.device,
            "threads": given.threads,
            "rounds": given.rounds,
            "nice": os.nice(0),
            "work_bytes": WORK_BYTES,
            "foreign_cpu_share": round(usage.foreign_share(), 4),
        },
        "results": results,
        "summary": summary(results),
        "goals": {key: f"{sign} {goal}" for key, (sign, goal) in GOALS.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    # So that what else runs here disturbs less. Without the right to do so it stays as it is.
    with contextlib.suppress(PermissionError):
        os.nice(NICE)
    try:
        result = run(given)
    except BenchError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 1
    print(table(result["results"], result["summary"]))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        partial = given.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(given.out)
        progress(f"written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
