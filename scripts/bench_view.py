#!/usr/bin/env python3
"""What the view of who holds which page costs: memory, lookups and events, with ten million pages, and over ZeroMQ.

    table      one view of `--pages` pages at 8 nodes, some at several: bytes a page (also right after it has doubled),
               lookups of 128 keys, events in batches, the longest pause of a batch while it grows, and going through
               everything to take a node out
    own_sets   the bad case for memory: runs of 1, 4 and 16 pages, each at three nodes of 1,000 that no other run shares
    zmq        the same lookups asked of a controller process that follows one node with real sockets
    simulated  1,000 nodes as data, sharded over controllers by the first bytes of the chain root: each shard in a
    process
               of its own, one after the other, alone on its core as it would be on a host

Each figure is of one process on one core. On a shared machine figures hold within a run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench import stats
from bench.view_data import (
    NAMESPACE,
    Chunks,
    Fed,
    Node,
    card,
    chunk_keys,
    page_keys,
    quantiles,
    records,
    resident_bytes,
    times_us,
)

from lmkv.control.admin import Admin
from lmkv.control.follow import EXACT
from lmkv.poolwire import EVENT_BYTES, Events

ROOT = Path(__file__).resolve().parents[1]
GOALS = {
    "bytes_per_page": ("≤", 100.0),
    "lookup128_us": ("≤", 50.0),
    "lookup128_zmq_us": ("≤", 300.0),
    "events_per_s": ("≥", 300_000.0),
}
KEYS = 128
BATCH = 2048


# --- one table --------------------------------------------------------------------------------------------------------


def bench_table(pages: int, lookups: int) -> dict[str, Any]:
    """Chains of 128 pages; one in four lies at a second node, one in sixteen at four."""
    rng = np.random.default_rng(7)
    nodes = 8
    fed = Fed(nodes)
    chains = pages // KEYS
    roots = rng.bytes(8 * chains)
    before_bytes = resident_bytes()

    def chain(number: int) -> Chunks:
        return chunk_keys(np.random.default_rng([number, roots[number * 8]]), KEYS)

    spent_s, worst_s, fed_pages, at_growth = 0.0, 0.0, 0, 0.0
    group = BATCH // KEYS
    for start in range(0, chains, group):
        chunks = np.concatenate([chain(number) for number in range(start, min(start + group, chains))])
        owners = {start // group % nodes}
        if start // group % 4 == 0:
            owners |= {
                n % nodes for n in range(start // group, start // group + (4 if start // group % 16 == 0 else 2))
            }
        doublings = fed.view.table.doublings
        for owner in owners:
            began_s = time.perf_counter()
            fed.feed(owner, chunks)
            fed.view.tick(0.0)
            took_s = time.perf_counter() - began_s
            spent_s, worst_s, fed_pages = spent_s + took_s, max(worst_s, took_s), fed_pages + len(chunks)
        if fed.view.table.doublings != doublings and fed.view.table.pages > pages // 4:
            at_growth = max(at_growth, (resident_bytes() - before_bytes) / fed.view.table.pages)
    found_pages = fed.view.table.pages
    after_bytes, table_bytes = resident_bytes(), fed.view.table.memory_bytes
    some = [page_keys(chain(int(n))) for n in rng.integers(0, chains, lookups)]
    hits = times_us(lambda i: fed.view.lookup(NAMESPACE, some[i]), lookups)
    assert all(len(fed.view.lookup(NAMESPACE, keys)[0].tiers) == KEYS for keys in some[:50])
    misses = [page_keys(chunk_keys(rng, KEYS)) for _ in range(lookups)]
    missed = times_us(lambda i: fed.view.lookup(NAMESPACE, misses[i]), lookups)
    picked = rng.integers(0, chains, lookups).tolist()
    half = [page_keys(np.concatenate((chain(number)[:64], chunk_keys(rng, 64)))) for number in picked]
    halved = times_us(lambda i: fed.view.lookup(NAMESPACE, half[i]), lookups)
    events = bench_events(fed, rng, chain, chains)
    return {
        "pages": found_pages,
        "holder_sets": fed.view.table.sets,
        "bytes_per_page": round((after_bytes - before_bytes) / found_pages, 2),
        "bytes_per_page_after_growth": round(at_growth, 2),
        "table_bytes_per_page": round(table_bytes / found_pages, 2),
        "fill_events_per_s": round(fed_pages / spent_s),
        "worst_batch_ms": round(worst_s * 1e3, 2),
        "lookup128_us": quantiles(hits),
        "lookup128_absent_us": quantiles(missed),
        "lookup128_half_us": quantiles(halved),
        **events,
        **bench_removal(fed),
        "lost": fed.view.table.lost,
    }


def bench_own_sets(run: int, pages: int) -> dict[str, Any]:
    """The bad case: each run of so many pages lies at three nodes out of 1,000 that no other run shares."""
    rng = np.random.default_rng(17)
    fed = Fed(1000)
    before_bytes = resident_bytes()
    spent_s = 0.0
    for _ in range(pages // BATCH):
        chunks, owners = chunk_keys(rng, BATCH), rng.integers(0, 1000, (BATCH // run, 3))
        began_s = time.perf_counter()
        for at in range(0, BATCH, run):
            for owner in owners[at // run].tolist():
                fed.feed(owner, chunks[at : at + run])
        fed.view.tick(0.0)
        spent_s += time.perf_counter() - began_s
    found = fed.view.table
    return {
        "run": run,
        "pages": found.pages,
        "holder_sets": found.sets,
        "bytes_per_page": round((resident_bytes() - before_bytes) / found.pages, 2),
        "events_per_s": round(3 * found.pages / spent_s),
    }


def bench_events(fed: Fed, rng: np.random.Generator, chain: Callable[[int], Chunks], chains: int) -> dict[str, Any]:
    """In a full table: a third are new pages, a third go, a third change their tiers; batches of three sizes."""
    rates = {}
    for size in (BATCH, 256, 32):
        count = max(20, 200_000 // size)
        prepared = []
        for _ in range(count):
            old = np.concatenate([chain(int(n)) for n in rng.integers(0, chains, max(1, size // KEYS))])[:size]
            fresh = chunk_keys(rng, size // 3)
            changed = old[: size - len(fresh)]
            body = records(fresh, 1) + records(changed[::2], 0) + records(changed[1::2], 3)
            prepared.append(body)
        made = sum(len(body) // EVENT_BYTES for body in prepared)
        began_s = time.perf_counter()
        for number, body in enumerate(prepared):
            node = number % len(fed.seqs)
            first = fed.seqs[node] + 1
            fed.seqs[node] += len(body) // EVENT_BYTES
            fed.view.events(Events(card(node).incarnation, first, body), 0.0)
        fed.view.tick(0.0)
        rates[f"events_per_s_{size}"] = round(made / (time.perf_counter() - began_s))
    return rates


def bench_removal(fed: Fed) -> dict[str, Any]:
    """A node leaves: the longest step, and all of them."""
    held = next(m.pages for m in fed.view.members(0.0) if m.card.incarnation == card(3).incarnation)
    fed.view.leave(card(3).incarnation)
    steps = []
    more = True
    while more:
        began_s = time.perf_counter()
        more = fed.view.sweep()
        steps.append((time.perf_counter() - began_s) * 1e3)
    removed = {"removed_pages": held, "removal_s": round(sum(steps) / 1e3, 3)}
    return removed | {"removal_worst_step_ms": round(max(steps), 2)}


# --- over ZeroMQ ------------------------------------------------------------------------------------------------------


def bench_zmq(pages: int, lookups: int) -> dict[str, Any]:
    """`pages` fewer than in the table: it is the way there and back that is measured."""
    rng = np.random.default_rng(9)
    chunks = chunk_keys(rng, pages)
    command = [sys.executable, "-c", "from lmkv.cli import main; main()", "controller"]
    command += ["--listen", "tcp://127.0.0.1:0", "--json", "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["ready"]
        began_s = time.monotonic()
        node = Node(address, chunks)
        try:
            with Admin(address, deadline_s=30.0) as admin:
                while [member.state for member in admin.members().nodes] != [EXACT]:
                    if time.monotonic() > began_s + 120:
                        raise SystemExit("the controller was not exact within 120 s")
                    time.sleep(0.01)
                exact_s = time.monotonic() - began_s
                starts = rng.integers(0, pages - KEYS, lookups).tolist()
                some = [page_keys(chunks[at : at + KEYS]) for at in starts]
                times = times_us(lambda i: admin.lookup(NAMESPACE, some[i]), lookups)
                floor = times_us(lambda _: admin.stats(), lookups)
        finally:
            node.close()
    finally:
        process.terminate()
        process.wait(30)
    return {
        "pages": pages,
        "exact_after_s": round(exact_s, 3),
        "lookup128_zmq_us": quantiles(times),
        "stats_zmq_us": quantiles(floor),
    }


# --- many nodes -------------------------------------------------------------------------------------------------------


def simulate_shard(shard: int, shards: int, nodes: int, pages: int, lookups: int) -> dict[str, Any]:
    """One controller's part of a pool of `pages` pages at `nodes` nodes, chains of 128 pages with roots of this shard.
    A fifth of all chains begin with one of 50 system prompts of 16 pages that every fourth node holds."""
    rng = np.random.default_rng([11, shard])
    fed = Fed(nodes)
    before_bytes = resident_bytes()
    prompts = [chunk_keys(np.random.default_rng([13, number]), 16) for number in range(50)]
    mine = [prompt for prompt in prompts if int(prompt[0, 0]) * shards // 256 == shard]
    for number, prompt in enumerate(mine):
        for node in range(number % 4, nodes, 4):
            fed.feed(node, prompt)
    fed.view.tick(0.0)
    chains = pages // KEYS // shards
    sample: list[tuple[Chunks, int]] = []
    began_s = time.perf_counter()
    made_s = 0.0
    for number in range(chains):
        making_s = time.perf_counter()
        chunks = chunk_keys(rng, KEYS)
        node = int(rng.integers(nodes))
        if mine and number % 5 == 0:
            chunks = np.concatenate((mine[number // 5 % len(mine)], chunks[16:]))
        if number % max(1, chains // lookups) == 0:
            sample.append((chunks, node))
        made_s += time.perf_counter() - making_s
        fed.feed(node, chunks)
    fed.view.tick(0.0)
    fill_s = time.perf_counter() - began_s - made_s
    after_bytes = resident_bytes()
    asked = [page_keys(chunks) for chunks, _ in sample][:lookups]
    cpu_s = time.process_time()
    times = times_us(lambda i: fed.view.lookup(NAMESPACE, asked[i], 1, 8), len(asked))
    spent_s = time.process_time() - cpu_s
    for (chunks, node), keys in list(zip(sample, asked, strict=False))[:200]:
        found = {holder.incarnation for holder in fed.view.lookup(NAMESPACE, keys, len(chunks))}
        assert card(node).incarnation in found
    shared = [fed.view.lookup(NAMESPACE, page_keys(prompt)) for prompt in mine]
    assert all(len(holders) >= nodes // 4 for holders in shared)
    return {
        "shard": shard,
        "nodes": nodes,
        "pages": fed.view.table.pages,
        "holder_sets": fed.view.table.sets,
        "events_per_s": round(chains * KEYS / fill_s),
        "lookups_per_s": round(len(asked) / spent_s),
        "lookup_us": quantiles(times),
        "memory_mib": round((after_bytes - before_bytes) / 2**20, 1),
        "bytes_per_page": round((after_bytes - before_bytes) / fed.view.table.pages, 1),
    }


def in_own_process(section: str, *arguments: int) -> Any:
    command = [sys.executable, __file__, "--section", section, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


# --- the report -------------------------------------------------------------------------------------------------------


def summary(
    table: dict[str, Any], own_sets: list[dict[str, Any]], zmq: dict[str, Any], shards: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "pages": table["pages"],
        "bytes_per_page": table["bytes_per_page"],
        "bytes_per_page_after_growth": table["bytes_per_page_after_growth"],
        **{f"bytes_per_page_own_sets_{found['run']}": found["bytes_per_page"] for found in own_sets},
        "lookup128_us": table["lookup128_us"]["p50"],
        "lookup128_p99_us": table["lookup128_us"]["p99"],
        "lookup128_zmq_us": zmq["lookup128_zmq_us"]["p50"],
        "events_per_s": table[f"events_per_s_{BATCH}"],
        "fill_events_per_s": table["fill_events_per_s"],
        "worst_batch_ms": table["worst_batch_ms"],
        "removal_worst_step_ms": table["removal_worst_step_ms"],
        "exact_after_s": zmq["exact_after_s"],
        "simulated_nodes": shards[0]["nodes"],
        "simulated_controllers": len(shards),
        "simulated_pages": sum(shard["pages"] for shard in shards),
        "simulated_lookups_per_s_each": round(statistics.median(shard["lookups_per_s"] for shard in shards)),
        "simulated_events_per_s_each": round(statistics.median(shard["events_per_s"] for shard in shards)),
        "simulated_memory_mib_each": round(max(shard["memory_mib"] for shard in shards), 1),
    }


def verdict(name: str, value: float) -> str:
    if name not in GOALS:
        return ""
    sign, goal = GOALS[name]
    met = value <= goal if sign == "≤" else value >= goal
    return f"   (goal {sign} {goal:g}: {'met' if met else 'missed'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write JSON here")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pages, under a minute")
    parser.add_argument("--section", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        section, *numbers = arguments.section
        sections: dict[str, Any] = {"table": bench_table, "own_sets": bench_own_sets, "simulated": simulate_shard}
        print(json.dumps(sections[section](*map(int, numbers))))
        return
    quick = arguments.quick
    pages, lookups, shards, simulated = (10**6, 2000, 2, 10**6) if quick else (10**7, 5000, 4, 2 * 10**7)
    table = in_own_process("table", pages, lookups)
    print(f"table: {json.dumps(table)}", file=sys.stderr)
    own_sets = [in_own_process("own_sets", run, pages // 20) for run in (1, 4, 16)]
    print(f"own_sets: {json.dumps(own_sets)}", file=sys.stderr)
    zmq = bench_zmq(100_000 if arguments.quick else 1_000_000, lookups)
    print(f"zmq: {json.dumps(zmq)}", file=sys.stderr)
    found = []
    for shard in range(shards):
        found.append(in_own_process("simulated", shard, shards, 1000, simulated, lookups))
        print(f"simulated: {json.dumps(found[-1])}", file=sys.stderr)
    report: dict[str, Any] = {
        "machine": stats.machine() | {"load_average_5_min": round(os.getloadavg()[1], 2)},
        "commit": stats.commit(ROOT),
        "settings": {"pages": pages, "lookups": lookups, "keys": KEYS, "batch": BATCH, "quick": arguments.quick},
        "results": {"table": table, "own_sets": own_sets, "zmq": zmq, "simulated": found},
        "summary": summary(table, own_sets, zmq, found),
    }
    for name, value in report["summary"].items():
        print(f"{name} = {value}{verdict(name, value)}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
