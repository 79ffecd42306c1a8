"""Thousands of peers that come and vanish: does what they leave behind grow?

    python -m tests.scale.peers --peers 5000 --nixl 200 --out FILE

For each of an engine, a pool node, a controller and a router: memory, descriptors and threads after a fifth of the
peers and after all of them. The growth in between is to be at most 32 MiB, 0 and 0. Exit status 1 if it is more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from .readings import Reading, settled
from .targets import Child, ControllerTarget, EngineTarget, NodeTarget, RouterTarget

MOST_BYTES = 32 << 20
SETTLE_S = 30.0
"""The deaths of the last peers are noticed, closed connections end, within this time."""
LEAST_FIRST = 150
"""Peers before the first reading: more than an Outbox keeps connections with 1,024 descriptors (128)."""
TCP = "tcp://127.0.0.1"


class Target(Protocol):
    child: Child

    def run(self, count: int) -> None: ...

    def finish(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Growth:
    """What one target held after `first` peers and after `peers`."""

    target: str
    peers: int
    first: int
    early: Reading
    late: Reading
    seconds: float
    counted: dict[str, Any]

    @property
    def memory_bytes(self) -> int:
        return self.late.memory_bytes - self.early.memory_bytes

    @property
    def descriptors(self) -> int:
        return self.late.descriptors - self.early.descriptors

    @property
    def threads(self) -> int:
        return self.late.threads - self.early.threads

    def problems(self, most_bytes: int) -> list[str]:
        """What grew more than it may."""
        found = []
        if self.memory_bytes > most_bytes:
            found.append(f"{self.target}: memory grew by {self.memory_bytes / (1 << 20):.1f} MiB")
        counts = {"descriptors": self.descriptors, "threads": self.threads}
        return found + [f"{self.target}: {name} grew by {count}" for name, count in counts.items() if count > 0]

    def as_dict(self) -> dict[str, Any]:
        grown = {"memory_bytes": self.memory_bytes, "descriptors": self.descriptors, "threads": self.threads}
        return asdict(self) | {"grown": grown}


def measure(name: str, target: Target, peers: int, first: int) -> Growth:
    """Let `peers` come to a target that has been started. Raises AssertionError when it does not do its part."""
    start_s = time.monotonic()
    target.run(first)
    target.finish()
    early = settled(target.child.pid, SETTLE_S)
    target.run(peers - first)
    counted = target.finish()
    late = settled(target.child.pid, SETTLE_S, most=early)
    target.child.check()
    return Growth(name, peers, first, early, late, time.monotonic() - start_s, counted)


def makers(tmp: Path) -> dict[str, Callable[[], Target]]:
    return {
        "engine": lambda: EngineTarget(tmp, TCP),
        "engine-nixl": lambda: EngineTarget(tmp, "nixl://"),
        "node": lambda: NodeTarget(tmp, TCP),
        "controller": lambda: ControllerTarget(tmp),
        "router": lambda: RouterTarget(tmp),
    }


def measure_all(
    tmp: Path, counts: dict[str, int], tell: Callable[[Growth], None] = lambda growth: None
) -> list[Growth]:
    """By name of the target, how many peers it gets. All targets at once, each with its peers on a thread."""
    targets = {name: make() for name, make in makers(tmp).items() if counts.get(name)}

    def run(name: str) -> Growth:
        try:
            targets[name].child.wait_ready()
            return grown(name)
        except BaseException as error:
            print(f"{name}: {error!r}; its log: {targets[name].child.log.read_text()[-2000:]}", file=sys.stderr)
            raise

    def grown(name: str) -> Growth:
        growth = measure(name, targets[name], counts[name], min(counts[name], max(LEAST_FIRST, counts[name] // 5)))
        tell(growth)
        return growth

    try:
        with ThreadPoolExecutor(len(targets)) as pool:
            return list(pool.map(run, targets))
    finally:
        for target in targets.values():
            target.close()


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.scale.peers")
    options.add_argument("--peers", type=int, default=5000, help="of each target")
    options.add_argument("--nixl", type=int, default=200, help="to a further engine, over NIXL; 0: none")
    options.add_argument("--only", nargs="*", default=[], help="these targets only")
    options.add_argument("--out", type=Path, help="write the results there as JSON")
    given = options.parse_args()
    counts = {name: given.nixl if name == "engine-nixl" else given.peers for name in makers(Path())}
    counts = {name: count for name, count in counts.items() if not given.only or name in given.only}

    def tell(growth: Growth) -> None:
        grown = f"{growth.memory_bytes / (1 << 20):+.1f} MiB, {growth.descriptors:+d} descriptors"
        print(f"{growth.target}: {growth.peers} peers in {growth.seconds:.0f} s, from {growth.first} on {grown}, "
              f"{growth.threads:+d} threads", flush=True)  # fmt: skip

    with tempfile.TemporaryDirectory() as tmp:
        found = measure_all(Path(tmp), counts, tell)
    problems = [problem for growth in found for problem in growth.problems(MOST_BYTES)]
    if given.out:
        summary = {"peers": given.peers, "nixl": given.nixl, "problems": problems}
        given.out.write_text(json.dumps({"summary": summary, "targets": [g.as_dict() for g in found]}, indent=1) + "\n")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
