"""One client of the load test, in a process of its own: stores, looks up, loads, and checks every byte.

Arguments: ADDRESS URL SEED SECONDS WORKING_SET. Prints what it did as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter

from lmkv.poolwire import Refusal
from tests.pool.bed import User, content

RUN = 8
SIZES = (4096, 12_288)


def size_of(number: int) -> int:
    """Of all pages of one run."""
    return SIZES[number // RUN % len(SIZES)]


def main() -> None:
    address, url, seed, seconds, working_set = sys.argv[1:]
    user, chance, did = User(address, url=url), random.Random(int(seed)), Counter[str]()
    end_s = time.monotonic() + float(seconds)
    while time.monotonic() < end_s:
        # Some prompts are asked for more often than others; a run is a prompt.
        first = int(int(working_set) * chance.random() ** 2) * RUN
        numbers = list(range(first, first + RUN))
        found = load(user, numbers, did)
        did["hits"] += found
        did["misses"] += RUN - found
        if found < RUN:
            store(user, numbers[found:], chance, did)
    user.close()
    print(json.dumps(did))


def load(user: User, numbers: list[int], did: Counter[str]) -> int:
    asked_s = time.monotonic()
    pinned = user.pin(numbers, lease_s=5.0)
    did["pins"] += 1
    for number, page in zip(numbers, pinned.pages, strict=False):
        wrong = user.read(page.offset, pinned.page_bytes) != content(number, pinned.page_bytes)
        if time.monotonic() > asked_s + pinned.lease_s:
            did["expired"] += 1  # its bytes are thrown away
        else:
            did["wrong"] += wrong or page.checksums != (number,)
            did["bytes"] += pinned.page_bytes
    user.unpin(pinned)
    return len(pinned.pages)


def store(user: User, numbers: list[int], chance: random.Random, did: Counter[str]) -> None:
    size = size_of(numbers[0])
    slots = user.reserve(numbers, size)
    did["reserves"] += 1
    mine = [(n, slot) for n, slot in zip(numbers, slots, strict=True) if slot.refusal is Refusal.NONE]
    did.update(slot.refusal.name for slot in slots)
    if not mine:
        return
    for number, slot in mine:
        user.write(slot.offset, content(number, size))
    wanted, granted = [n for n, _ in mine], [slot for _, slot in mine]
    if chance.random() < 0.05:
        user.abandon(wanted, granted, drained=True)
        did["abandoned"] += len(mine)
    else:
        done = user.commit(wanted, granted)
        did["commits"] += 1
        did["stored"] += sum(why is Refusal.NONE for why in done.refusals)


if __name__ == "__main__":
    main()
