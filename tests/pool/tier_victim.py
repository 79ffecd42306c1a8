"""A process that puts, reads and drops pages in a tier until it is killed at a point (LMKV_POOL_KILL_AT), and tells
before and after each step what it does. `python -m tests.pool.tier_victim PLACE SEED CAPACITY SEGMENT SEALED`"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from lmkv.pool import faults
from lmkv.pool.tiers.base import PageMeta, StoreTier
from lmkv.pool.tiers.disk import DiskTier
from lmkv.pool.tiers.objects import ObjectTier
from lmkv.pool.tiers.sealing import Sealer

KEYS = 24
"""Of each thread."""
THREADS = 2
STEPS = 70
SIZES = (20_000, 30_001, 61_440)
SEALER = Sealer(bytes(range(32)))


def key_at(thread: int, number: int) -> bytes:
    return bytes([thread]) * 16 + random.Random(number).randbytes(16) + b"\0"


def page_at(key: bytes, version: int) -> tuple[PageMeta, bytes]:
    """What `version` of a page is: every page tells its version, as its first checksum."""
    source = random.Random(key + version.to_bytes(8, "big"))
    data = source.randbytes(source.choice(SIZES))
    return PageMeta(len(data), (version, source.getrandbits(64))), data


def read(tier: StoreTier, key: bytes) -> int | None:
    """The version that is there. Raises AssertionError for bytes that are no version's."""
    into = bytearray(max(SIZES))
    found = tier.get(key, memoryview(into))
    if found is None:
        return None
    meta, data = page_at(key, found.checksums[0])
    assert found == meta, f"{key.hex()} has the meta of no version"
    assert into[: len(data)] == data, f"{key.hex()} has other bytes than version {found.checksums[0]}"
    return found.checksums[0]


def open_tier(where: str, capacity_bytes: int, segment_bytes: int, sealed: bool) -> StoreTier:
    sealer = SEALER if sealed else None
    if "://" in where:
        return ObjectTier(where, sealer=sealer)
    return DiskTier(Path(where), capacity_bytes, evicted=lambda keys: None, sealer=sealer, segment_bytes=segment_bytes)


def say(*words: object) -> None:
    """One whole line at once, or none."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def work(tier: StoreTier, thread: int, seed: int) -> None:
    choice = random.Random(f"{seed}/{thread}")
    for step in range(STEPS):
        number = choice.randrange(KEYS)
        key = key_at(thread, number)
        match choice.choices(("put", "get", "drop", "namespace", "compact"), (48, 14, 16, 2, 20))[0]:
            case "put":
                version = seed * 1000 + step
                say("?", thread, number, version)
                tier.put(key, *_packed(page_at(key, version)))
                say("!", thread, number, version)
            case "get":
                read(tier, key)
            case "drop":
                numbers = choice.sample(range(KEYS), choice.choice((1, 8, 16)))
                for each in numbers:
                    say("?", thread, each, "gone")
                tier.drop([key_at(thread, each) for each in numbers])
                for each in numbers:
                    say("!", thread, each, "gone")
            case "namespace":
                for each in range(KEYS):
                    say("?", thread, each, "gone")
                tier.drop_namespace(bytes([thread]) * 16)
                for each in range(KEYS):
                    say("!", thread, each, "gone")
            case _:
                if isinstance(tier, DiskTier):
                    tier.compact()


def _packed(page: tuple[PageMeta, bytes]) -> tuple[PageMeta, memoryview]:
    return page[0], memoryview(page[1])


def main() -> None:
    where = sys.argv[1]
    seed, capacity_bytes, segment_bytes, sealed = map(int, sys.argv[2:])
    tier = open_tier(where, capacity_bytes, segment_bytes, bool(sealed))
    faults.arm(os.environ.get(faults.VARIABLE, ""))
    threads = [threading.Thread(target=work, args=(tier, number, seed)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tier.close()
    say("end")


if __name__ == "__main__":
    main()
