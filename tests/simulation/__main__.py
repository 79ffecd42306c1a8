"""`python -m tests.simulation`: many worlds, or one, with every byte checked.

Worlds are drawn from seeds, so a seed that fails fails again (`--seed S --worlds 1 --trace`); worlds of the threaded
gear depend on the machine's timing, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from .runs import Outcome, Report, simulate

COMPLETE = 200
"""A run of so many worlds has to have met every rare event."""


def main() -> int:
    options = _options()
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of text keep their order, so that a seed replays exactly
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], _environment())
    if not options.trace:
        logging.disable(logging.CRITICAL)
    started_s = time.monotonic()

    def progress(report: Report, outcome: Outcome) -> None:
        if not outcome.ok:
            print(f"FAILED {outcome.text}", *outcome.failures[:2], *outcome.leaks[:3], sep="\n    ", flush=True)
            print(f"    {outcome.unended} unended · again: --seed {outcome.seed} --worlds 1 --trace", flush=True)
        elif report.worlds % 20 == 0 or report.worlds == options.worlds:
            seconds = time.monotonic() - started_s
            total = report.requests["all"]
            print(f"{report.worlds} worlds · {total} requests · {seconds:.0f} s · {len(report.bad)} bad", flush=True)

    seeds = range(options.seed, options.seed + options.worlds)
    processes = 1 if options.trace or options.worlds == 1 else options.processes
    report = simulate(seeds, processes, progress, options.requests)
    seconds = time.monotonic() - started_s
    summary = report.summary(seconds)
    _show(report, summary)
    problems = report.problems(complete=options.worlds >= COMPLETE)
    if options.out:
        _write(Path(options.out), report, summary, seconds)
    for problem in problems:
        print(f"✗ {problem[:600]}")
    return 1 if problems else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--worlds", type=int, default=300, help="how many (300)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's (0)")
    parser.add_argument("--requests", type=int, default=None, help="requests a world (380)")
    parser.add_argument("--processes", type=int, default=2, help="side by side (2)")
    parser.add_argument("--trace", action="store_true", help="show what lmkv logs; one process")
    parser.add_argument("--out", default="", help="write the report as JSON")
    return parser.parse_args()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONHASHSEED": "0"}


def _show(report: Report, summary: dict[str, float]) -> None:
    width = max(len(name) for name in summary)
    for name, value in summary.items():
        print(f"  {name:{width}}  {value}")
    print("  kinds of worlds:", ", ".join(f"{name} {n}" for name, n in sorted(report.kinds.items())))
    print("  rarest event:", *report.rarest())


def _write(path: Path, report: Report, summary: dict[str, float], seconds: float) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    path.write_text(
        json.dumps(
            {
                "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
                "commit": commit.stdout.strip(),
                "results": {
                    "seconds": round(seconds, 1),
                    "kinds": dict(report.kinds),
                    "rare": report.rare(),
                    "events": dict(sorted(report.events.items())),
                    "requests": dict(report.requests),
                    "bad_seeds": [one.seed for one in report.bad],
                },
                "summary": summary,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
