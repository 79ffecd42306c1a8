#!/usr/bin/env python3
"""The pool's lower tiers beside what they are built on, in one run.

The disk tier beside plain O_DIRECT writes and reads of the same pages by as many threads: each write synced by itself,
and not synced at all. The object tier beside plain obstore, in a directory (where the tier syncs and obstore does not),
in memory, and against an S3 server on loopback if moto is installed (one Python process, then it is what is measured).
Every round measures every method, in alternating order; ratios are taken within a round. Pages lie at block boundaries.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sys
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench import stats
from bench.errors import BenchError, progress

from lmkv.errors import LmkvError
from lmkv.pool.tiers.base import PageMeta, StoreTier
from lmkv.pool.tiers.disk import DiskTier
from lmkv.pool.tiers.objects import ObjectTier, object_name
from lmkv.pool.tiers.sealing import Sealer

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
WARM_ROUNDS = 2
NICE = -15
LOG_COMMITS = 1100
GOAL = 0.8


@dataclass(frozen=True)
class Shape:
    page_bytes: int
    pages: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.page_bytes // MIB}MiB_x{self.threads}"


class Method(ABC):
    """Puts and gets page `number` from and to memory; several threads at once."""

    name: str
    peer: str = ""
    """What its figures are divided by."""

    @abstractmethod
    def put(self, number: int, page: memoryview) -> None: ...

    @abstractmethod
    def get(self, number: int, page: memoryview) -> None: ...

    def close(self) -> None:  # noqa: B027
        pass


class RawFile(Method):
    """One preallocated file."""

    def __init__(self, directory: Path, shape: Shape, synced: bool) -> None:
        self.name = "raw synced" if synced else "raw"
        self._synced = synced
        self._path = directory / self.name
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        try:
            self._fd = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise BenchError(f"{directory} takes no O_DIRECT ({error.strerror}); choose another with --dir") from error
        os.posix_fallocate(self._fd, 0, shape.page_bytes * shape.pages)

    def put(self, number: int, page: memoryview) -> None:
        os.pwrite(self._fd, page, number * len(page))
        if self._synced:
            os.fdatasync(self._fd)

    def get(self, number: int, page: memoryview) -> None:
        os.preadv(self._fd, [page], number * len(page))

    def close(self) -> None:
        os.close(self._fd)
        self._path.unlink()


class OfTier(Method):
    def __init__(self, name: str, peer: str, tier: StoreTier) -> None:
        self.name, self.peer, self._tier = name, peer, tier

    def put(self, number: int, page: memoryview) -> None:
        self._tier.put(key_of(number), PageMeta(len(page), (1, 2, 3, 4)), page)

    def get(self, number: int, page: memoryview) -> None:
        if self._tier.get(key_of(number), page) is None:
            raise BenchError(f"{self.name}: page {number} is not there")

    def close(self) -> None:
        self._tier.drop_namespace(b"")
        self._tier.close()


class PlainStore(Method):
    """obstore itself, on the store of a tier of its own; the bytes end in the page, as with a tier."""

    def __init__(self, name: str, tier: ObjectTier) -> None:
        import obstore

        self.name, self._obstore, self._tier = name, obstore, tier
        self._store = tier._store  # noqa: SLF001

    def put(self, number: int, page: memoryview) -> None:
        self._obstore.put(self._store, object_name(key_of(number)), bytes(page), use_multipart=False)

    def get(self, number: int, page: memoryview) -> None:
        page[:] = memoryview(self._obstore.get(self._store, object_name(key_of(number))).bytes())

    def close(self) -> None:
        self._tier.drop_namespace(b"")
        self._tier.close()


def key_of(number: int) -> bytes:
    return bytes(16) + random.Random(number).randbytes(16) + b"\0"


@contextmanager
def s3_server() -> Iterator[str]:
    """Its URL; empty: moto is not installed."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield ""
        return
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "id")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        request = urllib.request.Request(f"http://{host}:{port}/bench", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def disk_methods(directory: Path, shape: Shape) -> list[Method]:
    def tier(name: str, sealer: Sealer | None) -> DiskTier:
        made = DiskTier(directory / name, 0, evicted=lambda keys: None, sealer=sealer)
        # A tier that has run for a while: sqlite's log has its length, and is written again from its start.
        for number in range(LOG_COMMITS):
            made.describe(bytes(16), str(number))
        return made

    return [
        RawFile(directory, shape, synced=False),
        RawFile(directory, shape, synced=True),
        OfTier("disk tier", "raw", tier("plain", None)),
        OfTier("disk tier sealed", "raw", tier("sealed", Sealer(bytes(32)))),
    ]


def object_methods(directory: Path, endpoint: str) -> list[Method]:
    urls = {"directory": f"file://{directory}/objects", "memory": "memory://", "s3": "s3://bench/pages"}
    methods: list[Method] = []
    for kind, url in urls.items():
        if kind != "s3":
            plain, ours = ObjectTier(url + "-plain" * (kind == "directory")), ObjectTier(url)
        elif endpoint:
            settings: dict[str, Any] = {
                "endpoint": endpoint,
                "region": "us-east-1",
                "allow_http": True,
                "timeout_s": 60,
            }
            plain, ours = ObjectTier(url + "-plain", **settings), ObjectTier(url, **settings)
        else:
            continue
        methods += [PlainStore(f"obstore {kind}", plain), OfTier(f"object tier {kind}", f"obstore {kind}", ours)]
    return methods


def timed(shape: Shape, arenas: Sequence[memoryview], step: Any) -> float:
    """GB/s of all threads together, each with an arena of its own and every so-manieth page."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(shape.threads + 1)

    def work(thread: int) -> None:
        try:
            barrier.wait(60)
            for number in range(thread, shape.pages, shape.threads):
                step(number, arenas[thread])
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(shape.threads)]
    for thread in threads:
        thread.start()
    barrier.wait(60)
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - started
    if errors:
        raise errors[0]
    return shape.page_bytes * shape.pages / took_s / 1e9


def measure(methods: Sequence[Method], shape: Shape, rounds: int) -> dict[str, dict[str, list[float]]]:
    mapping = mmap.mmap(-1, shape.page_bytes * shape.threads)
    mapping.write(random.Random(1).randbytes(len(mapping)))
    whole = memoryview(mapping)
    arenas = [whole[at : at + shape.page_bytes] for at in range(0, len(whole), shape.page_bytes)]
    samples: dict[str, dict[str, list[float]]] = {method.name: {"put": [], "get": []} for method in methods}
    for number in range(-WARM_ROUNDS, rounds):
        for method in methods if number % 2 else reversed(methods):
            put, get = timed(shape, arenas, method.put), timed(shape, arenas, method.get)
            if number >= 0:
                samples[method.name]["put"].append(put)
                samples[method.name]["get"].append(get)
    return samples


def cells(methods: Sequence[Method], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    samples = measure(methods, shape, rounds)
    found: list[dict[str, Any]] = []
    for method in methods:
        cell: dict[str, Any] = {"method": method.name, "shape": shape.name, "page_bytes": shape.page_bytes}
        cell |= {"threads": shape.threads, "pages": shape.pages, "peer": method.peer}
        for what, own in samples[method.name].items():
            cell[f"{what}_gbytes_per_s"] = stats.spread(own, digits=3)
            if method.peer:
                ratios = [one / other for one, other in zip(own, samples[method.peer][what], strict=True)]
                cell[f"{what}_vs_peer"] = stats.spread(ratios, digits=3)
        if method.name == "disk tier":
            ratios = [a / b for a, b in zip(samples[method.name]["put"], samples["raw synced"]["put"], strict=True)]
            cell["put_vs_raw_synced"] = stats.spread(ratios, digits=3)
        found.append(cell)
    return found


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for cell in found:
        for name in ("put_vs_peer", "get_vs_peer", "put_vs_raw_synced"):
            if name in cell:
                flat[f"{cell['method'].replace(' ', '_')}_{name}_{cell['shape']}"] = cell[name]["median"]
    return flat


def table(found: Sequence[dict[str, Any]]) -> str:
    rows = [["shape", "method", "put GB/s", "get GB/s", "beside", "put", "get"]]
    for cell in found:
        row = [cell["shape"], cell["method"]]
        row += [f"{cell[f'{what}_gbytes_per_s']['median']:.2f}" for what in ("put", "get")]
        row += [cell["peer"], *(f"{cell[f'{what}_vs_peer']['median']:.2f}" for what in ("put", "get") if cell["peer"])]
        rows.append(row + [""] * (7 - len(row)))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", f"Medians; ratios within a round. Goal of the disk tier: {GOAL} of raw."]
    return "\n".join(lines)


def run(given: argparse.Namespace) -> dict[str, Any]:
    rounds = given.rounds or (3 if given.quick else 11)
    total = (128 if given.quick else 256) * MIB
    shapes = [
        Shape(size * MIB, total // (size * MIB), given.threads) for size in ((1, 4) if given.quick else (1, 2, 4))
    ]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-tiers-", dir=given.dir) as folder, s3_server() as endpoint:
        usage = stats.CpuUsage(lambda: time.process_time())
        for shape in shapes:
            progress(f"disk, {shape.name}")
            found += measured(disk_methods(Path(folder), shape), shape, rounds)
        for shape in (Shape(MIB, 64, given.threads), Shape(4 * MIB, 16, given.threads)):
            progress(f"objects, {shape.name}")
            found += measured(object_methods(Path(folder), endpoint), shape, max(3, rounds // 2))
        foreign = usage.foreign_share()
    return {
        "benchmark": "tiers",
        "machine": stats.machine(),
        "commit": stats.commit(ROOT),
        "versions": stats.versions(),
        "settings": {
            "rounds": rounds,
            "threads": given.threads,
            "nice": os.nice(0),
            "foreign_cpu_share": round(foreign, 4),
        },
        "results": found,
        "summary": summary(found),
    }


def measured(methods: list[Method], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    try:
        return cells(methods, shape, rounds)
    finally:
        for method in methods:
            method.close()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--quick", action="store_true", help="3 rounds of half the bytes")
    parser.add_argument("--rounds", type=int, metavar="N", help="repetitions of each cell (default: 11; --quick: 3)")
    parser.add_argument("--threads", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="on the disk to measure (default: for temporary files)")
    given = parser.parse_args(arguments)
    # So that what else runs here disturbs less. Without the right to do so it stays as it is.
    with suppress(PermissionError):
        os.nice(NICE)
    try:
        result = run(given)
    except (BenchError, LmkvError) as error:
        print(f"bench_tiers: {error}", file=sys.stderr)
        return 1
    print(table(result["results"]))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        progress(f"written to {given.out}")
    return 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
