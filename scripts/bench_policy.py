#!/usr/bin/env python3
"""Which tokens of a request trace a pool would find, by eviction policy and by its size.

Traces are replayed as chains of pages of 128 tokens through the pool's own policies. A page counts as found only if all
before it in its prompt were found too. Beside them: the most that any policy can find at that size (Belady's
clairvoyant one), and what a pool without limit finds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import replay, stats, traces
from bench.errors import BenchError, progress

from lmkv.pool.policy import LRU, Policy, S3Fifo

ROOT = Path(__file__).resolve().parent.parent
SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of a trace's distinct pages."""
QUICK_SIZES = (0.02, 0.1, 0.3)
QUICK_REQUESTS = 2_000
MADE_UP_REQUESTS = 8_000

POLICIES: dict[str, tuple[Callable[[], Policy], bool]] = {
    "lru": (LRU, True),
    "lru-beginnings-first": (LRU, False),
    "s3fifo": (S3Fifo, True),
    "s3fifo-one-hit": (lambda: S3Fifo(promote_above=0), True),
    "s3fifo-small-30": (lambda: S3Fifo(small_share=0.3, promote_above=0), True),
}
"""With whether a policy is told of a chain's end first. The last two are S3-FIFO with one hit enough for the main
queue, and that with a small queue of 30 %."""


def cell(trace: traces.Trace, policy: str, share: float, found: replay.Found, took_s: float) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "policy": policy,
        "size": share,
        "hit_rate": round(found.hits * traces.CHUNK_TOKENS / trace.tokens, 4),
        "stranded": found.stranded,
        "refused": found.refused,
        "us_per_page": round(took_s / found.asked * 1e6, 2),
    }


def timed(work: Callable[[], replay.Found]) -> tuple[replay.Found, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def run(trace: traces.Trace, sizes: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    pages = len({key for chain in trace.chains for key in chain})
    progress(f"{trace.name}: {len(trace.chains)} requests, {trace.tokens} tokens, {pages} distinct pages")
    unlimited = replay.replay(trace.chains, replay.Pool(LRU(), pages), True)
    for share in sizes:
        room = max(1, int(pages * share))
        found, took_s = timed(lambda room=room: replay.clairvoyant(trace.chains, room))  # type: ignore[misc]
        yield cell(trace, "unlimited", share, unlimited, 0.0)
        yield cell(trace, "clairvoyant", share, found, took_s)
        for name, (make, ends_first) in POLICIES.items():
            pool = replay.Pool(make(), room)
            found, took_s = timed(lambda p=pool, e=ends_first: replay.replay(trace.chains, p, e))  # type: ignore[misc]
            yield cell(trace, name, share, found, took_s)
        progress(f"{trace.name}: a pool of {share:.0%}, {room} pages")


def table(cells: list[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(c["policy"] for c in cells))
    yield f"{'trace':14} {'size':>5}  " + "  ".join(f"{name:>{max(len(name), 6)}}" for name in names)
    for trace, size in dict.fromkeys((c["trace"], c["size"]) for c in cells):
        row = {c["policy"]: c["hit_rate"] for c in cells if (c["trace"], c["size"]) == (trace, size)}
        yield f"{trace:14} {size:5.0%}  " + "  ".join(f"{row[name]:{max(len(name), 6)}.4f}" for name in names)


def summary(cells: list[dict[str, Any]]) -> dict[str, float]:
    """hit_rate_POLICY_TRACE_PERCENT, and the mean over all traces and sizes."""
    flat = {f"hit_rate_{c['policy']}_{c['trace']}_{c['size'] * 100:g}": c["hit_rate"] for c in cells}
    for name in POLICIES:
        flat[f"mean_hit_rate_{name}"] = round(mean([c["hit_rate"] for c in cells if c["policy"] == name]), 4)
        flat[f"mean_us_per_page_{name}"] = round(mean([c["us_per_page"] for c in cells if c["policy"] == name]), 2)
    return flat


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests, {len(QUICK_SIZES)} sizes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--traces", type=Path, metavar="DIR", help="*.jsonl with input_length and hash_ids (default: one is made up)"
    )
    options = parser.parse_args(arguments)
    limit = QUICK_REQUESTS if options.quick else None
    sizes = QUICK_SIZES if options.quick else SIZES
    try:
        given = traces.read(options.traces, limit) if options.traces else [traces.made_up(limit or MADE_UP_REQUESTS)]
        cells = [each for trace in given for each in run(trace, sizes)]
    except (BenchError, OSError) as error:
        print(f"bench_policy: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(cells)))
    if options.out is not None:
        result = {
            "benchmark": "policy",
            "machine": stats.machine(),
            "commit": stats.commit(ROOT),
            "versions": stats.versions(),
            "settings": {
                "page_tokens": traces.CHUNK_TOKENS,
                "traces": {trace.name: {"requests": len(trace.chains), "tokens": trace.tokens} for trace in given},
            },
            "results": cells,
            "summary": summary(cells),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        progress(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
