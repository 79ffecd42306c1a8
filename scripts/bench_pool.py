#!/usr/bin/env python3
"""Time to first token of a prompt that the pool has, beside computing it and beside LMCache; and what storing costs.

All engines run on core 0, pool nodes and LMCache's server on core 1; an engine that is not being measured is stopped.
In each round every method gets prompts that nobody has seen: the engine computes one (and stores it), its own prefix
cache is emptied, and the same prompt is asked again. It is asked a third time for the floor, the time for a prompt that
the engine still holds.

    plain      vLLM without a connector: computing
    local      the host's own node, its arena mapped
    disk       the same node, after it has given up its copies in memory
    remote     a node in another network namespace, over a link, read by NIXL over TCP
    object     a node with nothing but an S3-compatible server (moto) behind it
    lmcache    LMCache 0.5.6, MP mode, in a namespace of its own
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import pool_report, stats
from bench.errors import BenchError, progress
from bench.pool_run import LENGTHS, METHODS, Options, PoolBench

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench_pool.py"
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="2 rounds of plain, local, remote and lmcache, for a first look")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--methods", default=",".join(METHODS), metavar="LIST", help="what to measure (default: %(default)s)")
    add("--lengths", metavar="LIST", help=f"prompt lengths (default: {','.join(map(str, LENGTHS))})")
    add("--rounds", type=int, metavar="N", help="repetitions (default: 5; with --quick: 2)")
    add("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct", metavar="DIR", help="model folder")
    add("--port", type=int, default=22100, metavar="N", help="first of the 60 ports to use (default: %(default)s)")
    add("--logs", type=Path, metavar="DIR", help="keep logs there (default: a temporary folder)")
    given = parser.parse_args(arguments)
    methods = tuple(dict.fromkeys(["plain", *given.methods.split(",")]))
    if given.quick:
        methods = tuple(m for m in methods if m in ("plain", "local", "remote", "lmcache"))
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown; known are {', '.join(METHODS)}")
    lengths = tuple(int(n) for n in given.lengths.split(",")) if given.lengths else LENGTHS
    if {"remote", "lmcache"} & set(methods) and os.geteuid() != 0:
        parser.error("remote and lmcache make network namespaces, which only root may do; leave them out")
    logs = given.logs or Path(tempfile.mkdtemp(prefix="bench-pool-"))
    logs.mkdir(parents=True, exist_ok=True)
    return Options(
        methods, lengths, given.rounds or (2 if given.quick else 5), given.model.resolve(), given.port, logs, given.out
    )


async def run(options: Options) -> dict[str, Any]:
    bench = PoolBench(options)
    try:
        await bench.run()
    finally:
        await bench.close()
    cells = pool_report.cells(bench.samples)
    return {
        "benchmark": "pool",
        "machine": stats.machine(),
        "commit": stats.commit(ROOT),
        "versions": stats.versions(),
        "settings": {
            "model": options.model.name,
            "lengths_tokens": list(options.lengths),
            "rounds": options.rounds,
            **bench.notes,
        },
        "results": cells,
        "summary": pool_report.summary(cells, bench.notes),
    }


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        result = asyncio.run(run(options))
    except BenchError as error:
        print(f"bench_pool: {error}\nLogs: {options.logs}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress("stopped; nothing is left running")
        return 130
    print(pool_report.table(result["results"], result["summary"]))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(options.out)
        progress(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
