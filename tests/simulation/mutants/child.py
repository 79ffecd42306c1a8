"""Worlds in a copy of the tree. Runs as a process of its own; tells the outcome of each seed as a line of JSON.

`bootstrap` is what the process begins with: modules of lmkv and of the tests come from the copy, whatever an editable
installation says.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

CPU_S = 120.0
"""A world takes some seconds; one that takes so many goes round in circles."""

BOOTSTRAP = """
import importlib.machinery, sys

class FromCopy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("lmkv", "tests"):
            return importlib.machinery.PathFinder.find_spec(name, path or [sys.argv[1]])

sys.meta_path.insert(0, FromCopy)
from tests.simulation.mutants.child import main
main()
"""


class _StuckError(BaseException):
    """The world does not come to an end."""


def _check_origin(root: Path) -> None:
    import lmkv
    import lmkv.kernels
    import tests.simulation

    for module in (lmkv, lmkv.kernels, tests.simulation):
        origin = Path(str(module.__file__)).resolve()
        assert root in origin.parents, f"{module.__name__} was imported from {origin}, not from {root}"


def _has(plan: Any, needs: str) -> bool:
    engines = (*plan.prefills, *plan.decodes)
    found = {
        "pool": bool(plan.nodes),
        "unlike": plan.is_unlike,
        "faults": plan.faults,
        "async": any(kind.is_async for kind in engines),
        "async prefill": any(kind.is_async for kind in plan.prefills),
    }
    return all(found[need] for need in needs.split(", ") if need)


def _caught(seed: int) -> str:
    """What is not ok in the world of this seed, in one line; "" if nothing."""
    from tests.simulation.runs import run_world

    def stuck(*_: object) -> None:
        raise _StuckError

    signal.signal(signal.SIGVTALRM, stuck)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        outcome = run_world(seed)
    except _StuckError:
        return f"it does not end within {CPU_S:g} s of CPU"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    found = [*outcome.failures, *outcome.leaks]
    found += [f"{outcome.unended} requests have not ended"] if outcome.unended else []
    return " | ".join(line.strip() for line in found[0].strip().splitlines()[-3:]) if found else ""


def main() -> None:
    """argv: root of the copy, what a world must have, and the seeds."""
    root, needs = Path(sys.argv[1]).resolve(), sys.argv[2]
    assert os.environ.get("PYTHONHASHSEED") == "0", "a seed replays only if sets of text keep their order"
    logging.disable(logging.CRITICAL)
    _check_origin(root)
    from tests.simulation.plan import draw

    seeds = sorted(map(int, sys.argv[3:]), key=lambda seed: draw(seed).longest)  # most is met where caches are small
    for seed in seeds:
        plan = draw(seed)
        if plan.threaded or not _has(plan, needs):
            continue
        started_s = time.perf_counter()
        caught = _caught(seed)
        line = {"seed": seed, "caught": caught, "seconds": round(time.perf_counter() - started_s, 1)}
        print(f"\x1e{json.dumps(line)}", flush=True)
        if caught:
            return
