"""`python -m tests.simulation.mutants`: shows in which seed, and by what, each mutant is caught."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from .child import BOOTSTRAP
from .mutant import Mutant, MutantError
from .table import MUTANTS

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests" / "simulation" / "model"


@dataclass(slots=True)
class Found:
    """What became of a mutant. `seed` is the one that has caught it; `worlds` were run."""

    name: str
    half: str
    bug: str
    seed: int | None = None
    by: str = ""
    worlds: int = 0
    seconds: float = 0.0
    error: str = ""
    """The mutant could not be tried."""


def copy_tree(target: Path) -> None:
    """What a world needs of the working tree, and the compiled kernels beside their package."""
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("lmkv", "transport", "tests"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=unwanted)
    model = target / MODEL.relative_to(ROOT)
    shutil.rmtree(model)
    model.symlink_to(MODEL)  # weights that are newer than their engine are its own alone
    for folder in importlib.import_module("lmkv.kernels").__path__:
        for library in Path(folder).glob("*.so"):
            (target / "lmkv" / "kernels" / library.name).symlink_to(library)


def run_seeds(root: Path, needs: str, seeds: list[int], found: Found) -> None:
    """Worlds of these seeds in the tree at `root`, until one is not ok."""
    command = [sys.executable, "-c", BOOTSTRAP, str(root), needs, *map(str, seeds)]
    environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        with ThreadPoolExecutor(1) as reader:
            complaints = reader.submit(child.stderr.read)
            for line in child.stdout:
                if "\x1e" in line:
                    told = json.loads(line.split("\x1e", 1)[1])
                    found.worlds += 1
                    if told["caught"]:
                        found.seed, found.by = told["seed"], told["caught"]
            if child.wait() != 0:
                found.error = complaints.result().strip()[-600:] or f"its process has ended with {child.returncode}"


def try_mutant(mutant: Mutant, seeds: list[int]) -> Found:
    found = Found(mutant.name, mutant.half, mutant.bug)
    started_s = time.monotonic()
    try:
        text = mutant.apply(ROOT)
    except MutantError as error:
        found.error = str(error)
        return found
    with tempfile.TemporaryDirectory(prefix="lmkv-mutant-") as folder:
        root = Path(folder)
        copy_tree(root)
        (root / mutant.file).write_text(text)
        run_seeds(root, mutant.needs, seeds, found)
    found.seconds = round(time.monotonic() - started_s, 1)
    return found


def try_unmutated(seeds: list[int]) -> Found:
    """A catch says something only if the same seed is ok without the mutant."""
    found = Found("(unmutated)", "", "the same seeds, with nothing changed")
    with tempfile.TemporaryDirectory(prefix="lmkv-mutant-") as folder:
        copy_tree(Path(folder))
        run_seeds(Path(folder), "", seeds, found)
    return found


def _show(found: Found) -> None:
    if found.error:
        print(f"  ✗ {found.name}: {found.error}", flush=True)
    elif found.seed is None:
        print(f"  ✗ {found.name} SURVIVES {found.worlds} worlds ({found.seconds:.0f} s): {found.bug}", flush=True)
    else:
        print(f"  ✓ {found.name}: seed {found.seed} ({found.seconds:.0f} s): {found.by[:200]}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutants", description=__doc__)
    parser.add_argument("--out", default="", help="write the report as JSON")
    parser.add_argument("--seeds", type=int, default=60, help="a mutant has to be caught within so many (60)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this mutant; may be repeated")
    parser.add_argument("--processes", type=int, default=2, help="mutants tried side by side (2)")
    parser.add_argument("--list", action="store_true", help="show the mutants, and run nothing")
    return parser.parse_args()


def main() -> int:
    options = _options()
    unknown = set(options.only) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"unknown mutants: {', '.join(sorted(unknown))}; --list shows all", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.half:9}  {mutant.name:32}  {mutant.bug}")
        return 0
    started_s = time.monotonic()
    seeds = list(range(options.seeds))
    results: list[Found] = []
    with ThreadPoolExecutor(options.processes) as workers:
        tries = [workers.submit(try_mutant, mutant, seeds) for mutant in chosen]
        for future in as_completed(tries):
            results.append(future.result())
            _show(results[-1])
        caught = sorted({found.seed for found in results if found.seed is not None})
        shares = [caught[i :: options.processes] for i in range(options.processes)]
        unmutated = list(workers.map(try_unmutated, [share for share in shares if share]))
    broken = [control for control in unmutated if control.error or control.seed is not None]
    for control in broken:
        print(f"  ✗ without a mutant, seed {control.seed} is not ok either: {control.by or control.error}")
    survived = [found for found in results if found.seed is None]
    summary = {"mutants": len(results), "survived": len(survived), "broken_controls": len(broken)}
    seconds = round(time.monotonic() - started_s, 1)
    print(f"  mutants {len(results)} · survived {len(survived)} · {seconds:.0f} s")
    if options.out:
        _write(Path(options.out), results, summary, seconds)
    return 1 if survived or broken else 0


def _write(path: Path, results: list[Found], summary: dict[str, int], seconds: float) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "commit": commit.stdout.strip(),
        "machine": {"cpus": os.cpu_count()},
        "results": {"seconds": seconds, "mutants": [asdict(found) for found in results]},
        "summary": summary,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
