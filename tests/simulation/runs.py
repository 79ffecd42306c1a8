"""Runs of many worlds over several processes, and what they add up to."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

RARE: dict[str, tuple[str, ...]] = {
    "same_step_hit": ("same_step_hit",),
    "preempted:before_prompt_end": ("preempted:before_prompt_end",),
    "preempted:after_prompt": ("preempted:after_prompt",),
    "grant:early": ("grant:early",),
    "grant:late": ("grant:late",),
    "send:parked": ("send:parked",),
    "landing_conversion": ("landing_conversion",),
    "pool:load:cut": ("pool:load:cut",),
    "abort:waiting": ("abort:waiting", "abort:preempted"),
    "abort:loading": ("abort:loading",),
    "abort:prompt": ("abort:prompt", "abort:prompt_in_flight"),
    "abort:decoding": ("abort:decoding", "abort:decoding_in_flight"),
    "two_in_flight": ("two_in_flight",),
}
"""A large run that has met one of these fewer than `RARE_TIMES` times, by any of its events, has shown little."""
RARE_TIMES = 200
LOADED_SHARE = 0.99


@dataclass(slots=True)
class Outcome:
    """One world as the report needs it; sent between processes."""

    seed: int
    text: str
    kinds: dict[str, bool]
    requests: int
    unended: int
    failures: list[str]
    leaks: list[str]
    events: dict[str, int]
    seconds: float

    @property
    def ok(self) -> bool:
        return not (self.failures or self.leaks or self.unended)


def run_world(seed: int, requests: int | None = None) -> Outcome:
    """Draws and runs the world of a seed. An exception of a part counts as a failure of the world."""
    from .plan import REQUESTS, draw
    from .stepped import SteppedWorld
    from .threaded import ThreadedWorld

    logging.getLogger("vllm").setLevel(logging.ERROR)
    plan = draw(seed, requests or REQUESTS)
    kinds = {
        "threaded": plan.threaded,
        "faults": plan.faults,
        "patient": plan.is_patient,
        "pool": bool(plan.nodes),
        "unlike": plan.is_unlike,
        "async": any(kind.is_async for kind in (*plan.prefills, *plan.decodes)),
        "v2": any(kind.is_v2 for kind in (*plan.prefills, *plan.decodes)),
    }
    started_s = time.perf_counter()
    world: Any = None
    try:
        world = (ThreadedWorld if plan.threaded else SteppedWorld)(plan)
        result = world.run()
    except Exception:  # noqa: BLE001  (reported with its seed)
        failures = [traceback.format_exc()]
        events = dict(world.result.events) if world is not None else {}
        seconds = time.perf_counter() - started_s
        return Outcome(seed, plan.describe(), kinds, 0, 0, failures, [], events, seconds)
    return Outcome(
        seed,
        plan.describe(),
        kinds,
        result.requests,
        result.unended,
        result.failures,
        result.leaks,
        dict(result.events),
        result.seconds,
    )


def _quiet() -> None:
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("PYTHONHASHSEED", "0")


def outcomes(seeds: Iterable[int], processes: int, requests: int | None = None) -> Iterator[Outcome]:
    """As they end. A process runs 60 worlds and is replaced, so that nothing piles up."""
    jobs = [(seed, requests) for seed in seeds]
    if processes == 1:
        yield from (run_world(*job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with contextlib.closing(context.Pool(processes, _quiet, maxtasksperchild=60)) as pool:
        yield from pool.imap_unordered(_one, jobs)


def _one(job: tuple[int, int | None]) -> Outcome:
    return run_world(*job)


@dataclass(slots=True)
class Report:
    """Sums over outcomes; `problems` says why the run has failed."""

    worlds: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    bad: list[Outcome] = field(default_factory=list)
    loadable: int = 0
    loaded: int = 0

    def add(self, outcome: Outcome) -> None:
        self.worlds += 1
        self.kinds.update(name for name, is_one in outcome.kinds.items() if is_one)
        self.requests["all"] += outcome.requests
        self.requests["threaded"] += outcome.requests if outcome.kinds["threaded"] else 0
        self.events.update(outcome.events)
        if outcome.kinds["patient"]:
            self.loadable += outcome.events.get("tokens:loadable", 0)
            self.loaded += outcome.events.get("tokens:loaded", 0)
        if not outcome.ok:
            self.bad.append(outcome)

    def rarest(self) -> tuple[str, int]:
        """The rare event that was met least, with how often."""
        return min(self.rare().items(), key=lambda pair: pair[1])

    def rare(self) -> dict[str, int]:
        """How often each of `RARE` was met."""
        return {name: sum(self.events[event] for event in events) for name, events in RARE.items()}

    def summary(self, seconds: float) -> dict[str, float]:
        return {
            "requests": self.requests["all"],
            "worlds": self.worlds,
            "wrong_blocks": sum(len(one.failures) for one in self.bad),
            "unended": sum(one.unended for one in self.bad),
            "leaks": sum(len(one.leaks) for one in self.bad),
            "blocks_checked": self.events["blocks_checked"],
            "loaded_of_loadable": round(self.loaded / self.loadable, 5) if self.loadable else 1.0,
            "rarest_event": self.rarest()[1],
            "requests_per_s": round(self.requests["all"] / max(seconds, 1e-9), 1),
        }

    def problems(self, complete: bool) -> list[str]:
        """`complete`: the run is large enough to have met everything."""
        found = [f"seed {one.seed}: {text}" for one in self.bad for text in (*one.failures[:2], *one.leaks[:2])]
        found += [f"seed {one.seed}: {one.unended} requests have not ended" for one in self.bad if one.unended]
        if self.loadable and self.loaded < LOADED_SHARE * self.loadable:
            found.append(f"{self.loaded} of {self.loadable} loadable tokens were loaded, below {LOADED_SHARE:.0%}")
        if complete:
            few = {name: n for name, n in self.rare().items() if n < RARE_TIMES}
            found += [f"{name} was met {n} times, below {RARE_TIMES}" for name, n in few.items()]
        return found


Progress = Callable[[Report, Outcome], None]


def simulate(seeds: Iterable[int], processes: int, progress: Progress, requests: int | None = None) -> Report:
    report = Report()
    for outcome in outcomes(seeds, processes, requests):
        report.add(outcome)
        progress(report, outcome)
    return report
