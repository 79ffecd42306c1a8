#!/usr/bin/env python3
"""Asks real engines in bursts that share a fresh prefix, and compares every greedy answer with plain vLLM's.

Clients go away in the middle of each burst, and every eighth burst is larger than the caches, so that requests are
preempted. All engines run in float32. The modes:

    direct     a prefill engine pushes into a decode engine of the same layout; no pool
    landing    the same with unlike block sizes: KV is converted on arrival
    pool       two engines that share nothing but a pool node
    pool-pd    a prefill and a decode engine on a pool node

Exit status 1 if an answer was wrong; it is then printed with its prompt, both texts and the router's ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.e2e.bed import Engine
from tests.e2e.bursts import (
    PLAIN_SHAPE,
    TIGHT_SHAPE,
    Judged,
    Mode,
    Tally,
    burst,
    client_of,
    idle,
    plain_engine,
    pooling_engines,
    pushing_engines,
)

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"tiny": "tiny-llama", "smollm2": "SmolLM2-135M-Instruct"}
MODES = ("direct", "landing", "pool", "pool-pd")
TIGHT_EVERY = 8


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="soak.py"
    )
    add = parser.add_argument
    add("--requests", type=int, default=100, metavar="N", help="answers to compare, a mode (default: %(default)s)")
    add("--modes", default=",".join(MODES), metavar="LIST", help="default: %(default)s")
    add("--model", choices=sorted(MODELS), default="tiny", help="tiny: random weights; smollm2: real ones")
    add("--seed", type=int, default=1, metavar="S", help="other seeds make other prompts (default: %(default)s)")
    add("--json", action="store_true", help="print the result as JSON")
    add("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    add("--logs", type=Path, metavar="DIR", help="keep the engines' logs there (default: a temporary folder)")
    options = parser.parse_args(arguments)
    options.modes = tuple(dict.fromkeys(options.modes.split(",")))
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"--modes: {', '.join(sorted(unknown))} unknown; known are {', '.join(MODES)}")
    if options.requests < 1:
        parser.error(f"--requests is {options.requests}; give 1 or more")
    folder = Path(os.environ.get("LMKV_MODELS") or ROOT / "models") / MODELS[options.model]
    if not folder.is_dir():
        parser.error(f"no model at {folder}; run scripts/fetch_model.py")
    return options


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def soak(mode: Mode, plain: Engine, model: str, options: argparse.Namespace) -> Tally:
    """Bursts until `options.requests` answers have been compared; progress after each."""
    tally = Tally()
    async with client_of(model) as client:
        number = 0
        while len(tally.judged) < options.requests:
            number += 1
            shape = TIGHT_SHAPE if number % TIGHT_EVERY == 0 else PLAIN_SHAPE
            title = f"Seed {options.seed}, {mode.name}, letter {number}"
            one = await burst(client, mode, plain, title, shape)
            tally.add(one)
            for judged in one.wrong:
                show(mode, judged)
            say(
                f"  {mode.name:8} {len(tally.judged):5} of {options.requests} answers · {len(tally.wrong)} wrong · "
                f"{tally.count('tie')} ties · {tally.preemptions} preemptions · {tally.seconds:.0f} s"
            )
        await idle(client, mode)
    return tally


def show(mode: Mode, judged: Judged) -> None:
    """A wrong answer, with all that is needed to look into it."""
    say(f"WRONG ANSWER in mode {mode.name}, from {judged.url}, request {judged.request_id}")
    say(f"  prompt  {judged.prompt!r}")
    say(f"  ours    {judged.ours!r}")
    say(f"  plain   {judged.plain!r}")
    say(f"  ledger  {json.dumps(judged.ledger)}")


@contextlib.contextmanager
def running(run: Path, model: str, wanted: tuple[str, ...]) -> Iterator[Iterator[Mode]]:
    """The wanted modes one after the other, with their engines, each set of which is started once."""

    def each() -> Generator[Mode]:
        if {"direct", "landing"} & set(wanted):
            say("starting a prefill and two decode engines")
            with pushing_engines(run, model) as modes:
                yield from (mode for name, mode in modes.items() if name in wanted)
        if {"pool", "pool-pd"} & set(wanted):
            say("starting two engines on a pool node")
            with pooling_engines(run, model) as (modes, _):
                yield from (mode for name, mode in modes.items() if name in wanted)

    modes = each()
    with contextlib.closing(modes):
        yield modes


def result_of(options: argparse.Namespace, tallies: dict[str, Tally]) -> dict[str, Any]:
    each = {
        name: {
            "requests": len(tally.judged),
            "wrong": len(tally.wrong),
            "ties": tally.count("tie"),
            "aborted": tally.aborted,
            "preemptions": tally.preemptions,
            "seconds": round(tally.seconds, 1),
        }
        for name, tally in tallies.items()
    }
    return {
        "summary": {
            "model": MODELS[options.model],
            "requests": sum(mode["requests"] for mode in each.values()),
            "wrong": sum(mode["wrong"] for mode in each.values()),
        },
        "modes": each,
        "wrong_answers": [
            {"mode": name, "prompt": one.prompt, "ours": one.ours, "plain": one.plain, "ledger": one.ledger}
            for name, tally in tallies.items()
            for one in tally.wrong
        ],
    }


def table(result: dict[str, Any]) -> str:
    columns = ("requests", "wrong", "ties", "aborted", "preemptions", "seconds")
    lines = ["mode      " + "".join(f"{column:>13}" for column in columns)]
    lines += [f"{name:10}" + "".join(f"{mode[c]:>13}" for c in columns) for name, mode in result["modes"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    run = options.logs or Path(tempfile.mkdtemp(prefix="soak-"))
    run.mkdir(parents=True, exist_ok=True)
    model = MODELS[options.model]
    started_s = time.monotonic()
    say(f"logs of the engines are in {run}")
    tallies = {}
    try:
        with plain_engine(run, model) as plain, running(run, model, options.modes) as modes:
            for mode in modes:
                tallies[mode.name] = asyncio.run(soak(mode, plain, model, options))
    except (AssertionError, aiohttp.ClientError, TimeoutError) as error:  # an engine does not start, or does not answer
        say(f"soak: {error or type(error).__name__} · read the logs in {run}")
        return 3
    result = result_of(options, tallies)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result) if options.json else table(result))
    say(
        f"{result['summary']['wrong']} wrong of {result['summary']['requests']} in {time.monotonic() - started_s:.0f} s"
    )
    return 1 if result["summary"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
