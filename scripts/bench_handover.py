#!/usr/bin/env python3
"""Time to first token of plain vLLM and of three ways to hand a prompt from a prefill to a decode engine.

Compared in one run: vLLM without a connector, lmkv, and vLLM's own NixlConnector (pull) and NixlPushConnector (push).
Prefill and decode are two "hosts": all threads of the one on core 0, of the other on core 1; plain vLLM runs on core 0
too, so the computation compared is the same. An engine that is not being measured is stopped (SIGSTOP) and takes no
CPU time. Each round measures every method with the same prompts, in rotating order; overheads are taken within a round.
With --link-mbit, the pairs live in two network namespaces joined by a link of that rate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import client, report, stats
from bench.engines import ENGINE_BYTES, Engine, reap_leftovers, stop_all
from bench.errors import BenchError, progress
from bench.methods import METHODS, Settings, linked_places, plain_spec
from bench.netns import Link
from bench.prompts import PROSE, Prompts, model_shape
from bench.rounds import Bench, Options

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (513, 1025, 2049, 3457)
QUICK_LENGTHS = (1025, 2049)
CLIENT_NICE = -10


def split_groups(options: Options) -> list[list[str]]:
    """Which pairs are alive at once. All of them where memory allows: the finest interleaving. Otherwise one pair after
    the other, each still interleaved with plain vLLM."""
    pairs = options.pairs
    needed_bytes = ENGINE_BYTES * (1 + 2 * len(pairs))
    together = options.alive == "all" or (options.alive == "auto" and stats.available_bytes() >= needed_bytes)
    if not together and options.alive == "auto" and len(pairs) > 1:
        progress(f"{needed_bytes / 2**30:.0f} GiB for all engines are not free: one pair after the other")
    return [pairs] if together else [[pair] for pair in pairs]


async def run(options: Options) -> dict[str, Any]:
    """The whole benchmark; leaves no engine, namespace or device behind, whatever happens."""
    reap_leftovers()
    async with client.connect() as session:
        bench = Bench(options, Prompts(options.settings.model, options.text), session)
        try:
            return await _run(bench)
        finally:
            bench.close()


async def _run(bench: Bench) -> dict[str, Any]:
    options = bench.options
    plain = (await bench.start(plain_spec(options.settings)))[0]
    facts = await _make_link(bench, plain)
    plain.pause()
    groups = split_groups(options)
    for group in groups:
        pairs = [await bench.start_pair(method) for method in group]
        await bench.measure(plain, pairs)
        ended = [engine for pair in pairs for engine in pair.engines]
        stop_all(ended)
        bench.engines = [engine for engine in bench.engines if engine not in ended]
    cells = report.cells(bench.samples, facts)
    return {
        "benchmark": "handover" if facts is None else "handover-link",
        "machine": stats.machine(),
        "commit": stats.commit(ROOT),
        "versions": stats.versions(),
        "settings": {
            "model": options.settings.model.name,
            "lengths_tokens": list(options.lengths),
            "repetitions": options.repetitions,
            "alive_together": [["plain", *group] for group in groups],
            "client_nice": os.nice(0),
            "link_mbit": None if facts is None else round(facts.rate_mbit, 3),
            "spinners": "idle" if options.idle_spinners else "shipped",
            "lmkv_transport": options.settings.lmkv_transport,
            "engine_arguments": list(options.settings.engine_arguments),
            **bench.notes,
        },
        "results": cells,
        "summary": report.summary(cells, facts),
    }


async def _make_link(bench: Bench, plain: Engine) -> report.LinkFacts | None:
    """`auto`: moving the KV of a prompt takes as long as plain vLLM takes to compute it (mean over the lengths)."""
    wanted = bench.options.link
    if wanted is None:
        return None
    bytes_per_token = model_shape(bench.options.settings.model).kv_bytes_per_token
    rate_mbit = wanted if isinstance(wanted, float) else 0.0
    if wanted == "auto":
        rates = []
        for tokens in QUICK_LENGTHS:
            times_ms = [(await bench.ask(plain, bench.fresh(tokens)))[0] for _ in range(3)]
            rates.append(tokens * bytes_per_token * 8 / (stats.median(times_ms) * 1e-3) / 1e6)
        rate_mbit = round(sum(rates) / len(rates), 1)
    progress(f"link of {rate_mbit:.1f} Mbit/s between prefill and decode")
    bench.link = Link(rate_mbit)
    bench.places = linked_places()
    return report.LinkFacts(rate_mbit, bytes_per_token)


def parse(arguments: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="bench_handover.py"
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 rounds of 1025 and 2049 tokens, for a first look")
    add("--out", type=Path, metavar="FILE", help="write the result as JSON")
    add("--methods", default=",".join(METHODS), metavar="LIST", help="what to compare (default: %(default)s)")
    add("--lengths", metavar="LIST", help=f"prompt lengths in tokens (default: {','.join(map(str, LENGTHS))})")
    add("--rounds", type=int, metavar="N", help="repetitions of each cell (default: 5; with --quick: 3)")
    add(
        "--link-mbit",
        metavar="N|auto",
        help="join prefill and decode by a link of this rate (needs root); auto: the "
        "rate at which moving the KV takes as long as computing it; lengths are then 1025 and 2049",
    )
    add(
        "--push-dispatch",
        choices=("auto", "serial", "concurrent"),
        default="auto",
        help="how a push pair is asked; auto: the faster way, as measured before the rounds",
    )
    add(
        "--spinners",
        choices=("shipped", "idle"),
        default="shipped",
        help="threads that spin while their engine is idle (the in-tree connectors' progress threads): as shipped they "
        "share the engine's core; idle: they run only when it has nothing else to do, as if they had one of their own",
    )
    add(
        "--alive",
        choices=("auto", "all", "one"),
        default="auto",
        help="pairs that are alive at once (19 GiB for all three); auto: all where memory allows",
    )
    _add_engine_arguments(parser)
    return _checked(parser, parser.parse_args(arguments))


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=ROOT / "models" / "SmolLM2-135M-Instruct",
        metavar="DIR",
        help="model folder (default: models/SmolLM2-135M-Instruct)",
    )
    add("--text", type=Path, default=PROSE, metavar="FILE", help="sentences to make prompts of, one a line")
    add("--port", type=int, default=21100, metavar="N", help="first of the 40 ports to use (default: %(default)s)")
    add("--lmkv-transport", default="nixl://", metavar="URL", help="lmkv's data plane (default: %(default)s)")
    add(
        "--engine-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="passed to every engine as it is, e.g. --engine-arg=--max-num-batched-tokens=512; may be repeated",
    )
    add("--logs", type=Path, metavar="DIR", help="keep the engines' logs there (default: a temporary folder)")


def _checked(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Options:
    methods = tuple(dict.fromkeys(["plain", *given.methods.split(",")]))
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--methods: {', '.join(sorted(unknown))} unknown; known are {', '.join(METHODS)}")
    if methods == ("plain",):
        parser.error("--methods: name at least one of lmkv, pull and push to compare with plain vLLM")
    if "lmkv" in methods and not (ROOT / "lmkv" / "vllm" / "connector.py").is_file():
        parser.error("this checkout has no lmkv/vllm/connector.py yet; leave lmkv out: --methods pull,push")
    lengths: tuple[int, ...] = QUICK_LENGTHS if given.quick or given.link_mbit else LENGTHS
    link: float | str | None = given.link_mbit
    try:
        if given.lengths:
            lengths = tuple(sorted({int(text) for text in given.lengths.split(",")}))
        if link not in (None, "auto"):
            link = float(given.link_mbit)
    except ValueError as error:
        parser.error(f"--lengths and --link-mbit take numbers: {error}")
    if min(lengths) < 200 or max(lengths) > 4000:
        parser.error("--lengths: from 200 to 4000 tokens (the engines' context is 4096)")
    if isinstance(link, float) and link <= 0:
        parser.error("--link-mbit: a rate above 0")
    if link is not None and os.geteuid() != 0:
        parser.error("--link-mbit makes network namespaces, which only root may do")
    rounds = given.rounds or (3 if given.quick else 5)
    if rounds < 1:
        parser.error("--rounds: at least 1")
    logs = given.logs or Path(tempfile.mkdtemp(prefix="bench-handover-"))
    logs.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.model.resolve(), given.port, given.lmkv_transport, tuple(given.engine_arg))
    return Options(
        methods,
        lengths,
        rounds,
        link,
        given.push_dispatch,
        given.alive,
        given.spinners == "idle",
        settings,
        given.text,
        given.out,
        logs,
        given.logs is not None,
    )


def _client_like_a_host() -> None:
    """The client stands for another machine: on the core that is idle while prompts are computed, and not made to wait
    for a time slice by engines whose threads spin there. Without the right to do so it stays as it is."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with contextlib.suppress(PermissionError):
        os.nice(CLIENT_NICE)


async def _until_signal(options: Options, received: list[signal.Signals]) -> dict[str, Any]:
    """A signal cancels the run, whose clean-up then ends the engines; further signals do not disturb it."""
    work = asyncio.ensure_future(run(options))
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        received.append(number)
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    return await work


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    _client_like_a_host()
    received: list[signal.Signals] = []
    try:
        result = asyncio.run(_until_signal(options, received))
    except asyncio.CancelledError:
        if not received:
            raise
        progress(f"stopped by {received[0].name}; engines and namespaces are gone")
        return 128 + received[0]
    except BenchError as error:
        print(f"bench_handover: {error}\nEngine logs: {options.log_folder}", file=sys.stderr)
        return 1
    print(report.table(result["results"], result["summary"]))
    if not options.keep_logs:
        shutil.rmtree(options.log_folder)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        partial = options.out.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(options.out)
        progress(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
